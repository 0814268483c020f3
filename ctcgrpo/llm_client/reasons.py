"""Why a call to an endpoint gave no completion, in the provider's own words. Pure.

Providers send errors in many forms: {"error": {"message", "code", "type"}}, {"error": "..."}, {"message"}, {"detail"}, a list of
problems, plain text, an HTML page; with an error status, or with 200.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any, Literal

_ByStatus = Literal["rate_limited", "quota", "http_5xx", "key_refused", "not_found", "refused", "forbidden"]
Result = Literal[_ByStatus, "unreachable", "disconnected", "timeout", "malformed", "waiting"]
"""The kind of failure, for metrics. refused: for this request; forbidden: for its content or for the account (403); waiting: no
call was made, since the endpoint's limits left no room."""
LONGEST_WAIT = 300.0  # seconds; a longer Retry-After is cut to this
_MOST_WORDS = 400
_RETRIED = frozenset({408, 409, 425, 429})
_QUOTA = re.compile(
    r"insufficient_(?:quota|balance|credits)|exceeded_current_quota_error|billing_(?:hard_limit_reached|not_active)|arrearage"
)
_QUOTA_WORDS = re.compile(
    r"insufficient (?:account )?(?:balance|credits?|funds|quota)|credit balance is too low|exceeded your current quota(?!.*retry)"
    r"|billing hard limit",
    re.IGNORECASE | re.DOTALL,
)
_STATUS_OF = (
    (re.compile(r"rate.?limit|too_many_requests|resource_exhausted|throttl", re.IGNORECASE), 429),
    (re.compile(r"moderation|content.?(?:filter|policy)|inspection", re.IGNORECASE), 403),
    (re.compile(r"auth|permission|api.?key", re.IGNORECASE), 401),
    (re.compile(r"insufficient|quota|credit|balance|billing", re.IGNORECASE), 402),
    (re.compile(r"not.?found", re.IGNORECASE), 404),
    (re.compile(r"invalid|bad.?request|context.?length|unsupported", re.IGNORECASE), 400),
)
"""The HTTP status of an error object without one, by its type or code."""
_LEFT_OUT = ("temperature", "top_p", "seed", "response_format")


class CallFailed(Exception):
    """A call without a completion. `wait`: seconds of its Retry-After; `paid`: whether the provider may charge for it."""

    def __init__(self, result: Result, message: str, *, wait: float | None = None, paid: bool = False) -> None:
        super().__init__(message)
        self.result, self.wait, self.paid = result, wait, paid


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The content of an error's body: its `message` in one line, `codes` (code and type, lower case), and the HTTP `status` that
    its code means."""

    message: str
    codes: tuple[str, ...] = ()
    status: int | None = None


def failure_of(status: int, headers: Mapping[str, str], body: ErrorBody, *, sent: Mapping[str, Any], key: str) -> CallFailed:
    """The failure of an error status, or of an error object with status 200. `sent`: the request's body; `key`: the source of the
    endpoint's key."""
    shown = f"HTTP {status}: {body.message or 'no reason given'}"
    named = f" ({key})" if key else ""
    if status == 402 or (
        status in (400, 403, 429) and (any(map(_QUOTA.fullmatch, body.codes)) or _QUOTA_WORDS.search(body.message))
    ):
        return CallFailed("quota", f"{shown} (no quota is left)")
    if status == 401:
        return CallFailed("key_refused", shown + named)
    if status == 403:
        return CallFailed("forbidden", shown + named)
    if status == 404:
        return CallFailed("not_found", f"{shown} (check the endpoint's url, which usually ends with /v1, and its model)")
    if status in _RETRIED or status >= 500:
        wait = retry_after(headers) if status in (429, 503) else None
        return CallFailed("rate_limited" if status == 429 else "http_5xx", shown, wait=wait)
    if 300 <= status < 400:
        onward = headers.get("location", "?")
        return CallFailed("refused", f"HTTP {status}: it redirects to {onward}; set url to that address")
    return CallFailed("refused", shown + _hint(body.message, sent))


def _hint(message: str, sent: Mapping[str, Any]) -> str:
    """Advice for a field that the provider rejects."""
    if "max_completion_tokens" in message and "max_tokens" in sent:
        return " (set max_completion_tokens in place of max_tokens)"
    named = [name for name in _LEFT_OUT if name in sent and re.search(rf"\b{name}\b", message)]
    removed = ", ".join(f"{name}: null" for name in named)
    return f" (to leave it out: extra_body: {{{removed}}})" if named else ""


def error_body(text: str) -> ErrorBody:
    """Parse a body of any form; never raises."""
    if is_html(text):
        return ErrorBody(f"an HTML page: {_page_text(text)}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return ErrorBody(_one_line(text))
    if isinstance(data, Sequence) and not isinstance(data, str) and data:  # Google wraps its errors in a list
        data = data[0]
    return error_object(data)


def error_object(data: Any) -> ErrorBody:
    """The error in a parsed body, or in an error object."""
    if not isinstance(data, Mapping):
        return ErrorBody(_one_line(data if isinstance(data, str) else json.dumps(data)))
    error = data.get("error") or data
    if not isinstance(error, Mapping):
        return ErrorBody(_one_line(str(error)), status=_status(data))
    codes = tuple(str(error[name]).lower() for name in ("code", "type", "status") if error.get(name) is not None)
    message = _words(error)
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None  # OpenRouter: the error of the provider behind it
    if raw:
        message = f"{message}: {raw if isinstance(raw, str) else json.dumps(raw)}"
    return ErrorBody(_one_line(message), codes, _status(error))


def _words(error: Mapping[str, Any]) -> str:
    for name in ("message", "detail", "msg", "error_description", "error", "errors"):
        found = error.get(name)
        if isinstance(found, str) and found.strip():
            return found
        if isinstance(found, Mapping):
            return _words(found)
        if isinstance(found, list) and found:  # FastAPI's {"detail": [{"loc": ["body", "seed"], "msg": "..."}]}
            return "; ".join(_problem(part) for part in found)
    return json.dumps(error) if error else ""


def _problem(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    where = part.get("loc")
    return f"{'.'.join(map(str, where))}: {_words(part)}" if where and isinstance(where, list) else _words(part)


def _status(error: Mapping[str, Any]) -> int | None:
    for value in (str(error[name]) for name in ("code", "status", "type") if error.get(name) is not None):
        if re.fullmatch(r"[45]\d\d", value):
            return int(value)
        for pattern, status in _STATUS_OF:
            if pattern.search(value):
                return status
    return None


def is_html(text: str) -> bool:
    return bool(re.match(r"\s*<(?:!doctype|html|head|body)", text[:200], re.IGNORECASE))


def _page_text(text: str) -> str:
    """The title and the text of a page."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", text[:20_000], flags=re.DOTALL | re.IGNORECASE)
    return _one_line(unescape(re.sub(r"<[^>]*>", " ", bare))) or "without a text"


def _one_line(text: str) -> str:
    """Without control characters, which would reach a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * _MOST_WORDS]).split())
    return line if len(line) <= _MOST_WORDS else f"{line[:_MOST_WORDS]}..."


def without_secrets(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced, and every word with the beginning or end of one, as providers quote rejected keys."""
    for secret in secrets:
        if len(secret) < 8:
            text = re.sub(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", "[key]", text)
            continue
        start, end = secret[:4], secret[-4:]

        def hidden(word: re.Match[str], start: str = start, end: str = end) -> str:
            return "[key]" if word[0].startswith(start) or word[0].rstrip(".").endswith(end) else word[0]

        text = re.sub(r"[^\s\"'`:,;()\[\]]{6,}", hidden, text.replace(secret, "[key]"))
    return text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header in either form, at most 300."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    return min(LONGEST_WAIT, max(0.0, seconds)) if math.isfinite(seconds) else None
