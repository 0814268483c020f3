"""One call to an OpenAI-compatible endpoint: its request, and the completion in the answer, or CallFailed with the reason.

It uses aiohttp rather than openai's client: bodies have a limit, redirects stay at their origin (no other server gets the key), and
an invalid answer is searched for an error message.
"""

import json
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import certifi

from ctcgrpo.llm_client.reasons import CallFailed, error_body, error_object, failure_of, is_html, without_secrets
from ctcgrpo.simulator.config import Calls, Endpoint
from ctcgrpo.types import Message
from ctcgrpo.util.proxies import proxy_of, through_proxy

MOST_BYTES = 8_000_000  # of an answer's body, decompressed
_AT_ONCE = 1.0  # seconds; a connection that closes sooner, without a byte of an answer, caused no paid work
_REDIRECTS = 3
_TEXTS = ("text", "output_text")
_REASONING = ("reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """An endpoint's completion. `ended`: its finish reason (length: the limit on tokens; refusal). Token counts are 0 where
    they are missing or impossible. `note`: why the text is empty, if it is."""

    text: str
    ended: str
    prompt_tokens: int
    completion_tokens: int
    endpoint: str
    note: str = ""


class ChatClient:
    """Calls to one endpoint over one session, which the first call opens. Raises RecipeError for a key that is not set."""

    def __init__(self, settings: Endpoint, calls: Calls) -> None:
        self._settings, self._calls = settings, calls
        self._headers = settings.sent_headers(os.environ)
        self._secrets = sorted({os.environ[name] for name in settings.secrets}, key=len, reverse=True)
        self._proxy = proxy_of(settings.url)
        self._via = through_proxy(settings.url)
        self._session: aiohttp.ClientSession | None = None
        named = {"key_env": settings.key_env, "headers": ", ".join(settings.headers)}
        shown = [f"{field}: {value}" for field, value in named.items() if value]
        self._key = ", ".join(shown) or "no key_env is set for this endpoint"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def complete(self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any]) -> ChatCompletion:
        """One completion. Raises CallFailed. The caller limits the time."""
        body = self.request(messages, seed, schema)
        try:
            status, headers, text = await self._post(body)
            if not 200 <= status < 300:
                reported = error_body(text)
                reported = replace(reported, message=reported.message + self._via) if status >= 500 else reported
                raise failure_of(status, headers, reported, sent=body, key=self._key)
            return self._completion(text, headers, body)
        except CallFailed as error:
            shown = without_secrets(" ".join(str(error).split()), self._secrets)
            raise CallFailed(error.result, shown, wait=error.wait, paid=error.paid) from None

    def request(self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The request's body, without fields that are None."""
        calls, settings = self._calls, self._settings
        formats: dict[str, Any] = {
            "json_schema": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
            "json_object": {"type": "json_object"},
            "text": None,
        }
        renamed = calls.max_completion_tokens is not None or settings.extra_body.get("max_completion_tokens") is not None
        fields = {
            "model": settings.model,
            "messages": list(messages),
            "temperature": calls.temperature,
            "top_p": calls.top_p,
            "max_tokens": None if renamed else calls.max_tokens,
            "max_completion_tokens": calls.max_completion_tokens,
            "seed": seed % 2**31 if settings.seed else None,
            "response_format": formats[settings.output],
            **settings.extra_body,
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of the answer."""
        if self._session is None:
            # The system's certificates, or certifi's where it has none.
            context = ssl.create_default_context()
            context.load_verify_locations(certifi.where())
            connector = aiohttp.TCPConnector(limit=0, ssl=context)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        url, started, answered = self._settings.chat_url, time.monotonic(), False
        try:
            for _ in range(_REDIRECTS):
                async with self._session.post(
                    url, json=body, headers=self._headers, proxy=self._proxy, allow_redirects=False
                ) as response:
                    answered = True
                    onward = urljoin(url, response.headers.get("location", ""))
                    if response.status in (307, 308) and urlsplit(onward)[:2] == urlsplit(url)[:2]:
                        url = onward
                        continue
                    return response.status, response.headers, await _text(response)
            raise CallFailed("refused", f"it redirects more than {_REDIRECTS} times, last to {url}")
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise CallFailed("unreachable", f"cannot connect{self._via}: {error}") from None
        except aiohttp.ClientPayloadError as error:
            raise CallFailed("disconnected", f"its answer broke off or cannot be decoded: {error}", paid=True) from None
        except (aiohttp.ClientError, OSError) as error:
            late = answered or time.monotonic() - started > _AT_ONCE
            what = f"it closed the connection without an answer{self._via} ({str(error) or type(error).__name__})"
            raise CallFailed("disconnected", what, paid=late) from None

    def _completion(self, text: str, headers: Mapping[str, str], sent: Mapping[str, Any]) -> ChatCompletion:
        if is_html(text):
            raise CallFailed("malformed", f"it answered with {error_body(text).message}")
        if "event-stream" in headers.get("content-type", "") or text.lstrip().startswith("data:"):
            raise _malformed("expected a chat completion, got a stream, which was not requested")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise _malformed(f"its answer is not JSON: {error_body(text).message or 'empty'}") from None
        if not isinstance(data, Mapping):
            raise _malformed(f"expected a chat completion, got {error_object(data).message}")
        choices, usage = data.get("choices"), data.get("usage")
        choice = _first(choices)
        for error in (data.get("error"), choice.get("error")):
            if error:
                reported = error_object(error)
                failed = failure_of(reported.status or 502, headers, reported, sent=sent, key=self._key)
                raise CallFailed(failed.result, f"an error within HTTP 200: {failed}", wait=failed.wait, paid=bool(usage))
        if not choice:
            got = error_object(data).message if "choices" not in data else f"choices: {json.dumps(choices)[:100]}"
            raise _malformed(f"expected a chat completion, got {got}")
        message = choice.get("message")
        if not isinstance(message, Mapping):
            raise _malformed(f"expected choices[0].message, got {json.dumps(choice)[:200]}")
        ended, note = str(choice.get("finish_reason")), ""
        said_text, refusal = _content(message.get("content")), message.get("refusal")
        if not said_text.strip():
            if isinstance(refusal, str) and refusal.strip():
                ended, note = "refusal", error_body(refusal).message
            else:
                note = _why_empty(message, ended)
        counted = usage if isinstance(usage, Mapping) else {}
        prompt, completion = (_count(counted.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        tokens = (prompt, completion) if prompt and completion is not None else (0, 0)
        shown = self._without_key(said_text.encode("utf-8", "replace").decode())
        return ChatCompletion(shown, ended, *tokens, self._settings.label, self._without_key(note))

    def _without_key(self, text: str) -> str:
        """A model's text without the key, for traces and pages. A short key (EMPTY) is no secret, and may be an ordinary word."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]") if len(secret) >= 8 else text
        return text


def _malformed(message: str) -> CallFailed:
    return CallFailed("malformed", message, paid=True)


async def _text(response: aiohttp.ClientResponse) -> str:
    raw, charset = bytearray(), (response.charset or "utf-8").lower()
    async for part in response.content.iter_chunked(1 << 16):
        raw += part
        if len(raw) > MOST_BYTES:
            raise _malformed(f"HTTP {response.status}: its answer is larger than {MOST_BYTES // 1_000_000} MB")
    try:
        return raw.decode("utf-8-sig" if charset in ("utf-8", "utf8") else charset)
    except (UnicodeDecodeError, LookupError):
        return raw.decode("utf-8-sig", "replace")


def _first(choices: Any) -> Mapping[str, Any]:
    """The choice with the lowest index; empty without choices."""
    found = [choice for choice in choices if isinstance(choice, Mapping)] if isinstance(choices, list) else []
    return min(found, key=lambda choice: choice.get("index") != 0, default={})


def _content(content: Any) -> str:
    """The text of a message; some providers send it in parts, reasoning among them."""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if part.get("type", "text") in _TEXTS)


def _why_empty(message: Mapping[str, Any], ended: str) -> str:
    reasoned = next((name for name in _REASONING if message.get(name)), None)
    if reasoned is not None and ended == "length":
        return (
            f"content is empty: {reasoned} used up the limit on tokens; raise max_tokens, or turn reasoning off "
            "(extra_body: {chat_template_kwargs: {enable_thinking: false}})"
        )
    if reasoned is not None:
        return (
            f"content is empty: the text is in {reasoned}; start the server without a reasoning parser, or turn reasoning on "
            "where the server parses it and off where it does not (extra_body: {chat_template_kwargs: {enable_thinking: ...}})"
        )
    if message.get("tool_calls") or message.get("function_call"):
        return "content is empty: the model called a tool, and none was offered; try output: json_object or text"
    return f"content is empty (finish_reason {ended})"


def _count(value: Any) -> int | None:
    """A number of tokens; None for an invalid value."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e12 and value == value // 1 else None
