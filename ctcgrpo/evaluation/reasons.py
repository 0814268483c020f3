"""Why a call of Inspect to a provider failed, by the provider's own message, and which failures are retried."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.event import ModelEvent
from inspect_ai.log import transcript
from inspect_ai.model import Model
from pydantic import ValidationError
from rich.errors import MarkupError
from rich.text import Text

from ctcgrpo.llm_client.reasons import CallFailed, error_body, error_object, failure_of

PATIENCE = 600  # seconds of retries of a call; Inspect itself has no limit
_MAX_CHARACTERS = 600
_LOG_INTERVAL = 60.0  # seconds between two lines about the same provider
_LEFT_OUT = ("temperature", "top_p", "max_tokens", "seed", "response_format")
_PARSE_ERRORS = (TypeError, IndexError, AttributeError, KeyError, ValidationError)
"""What Inspect's providers raise for a body that is no completion."""
_log = logging.getLogger(__name__)


def reason_of(error: BaseException) -> str:
    """The provider's message, or else its client's; of a long one the end, since the beginning is the request."""
    chain = list(_chain(error))
    if failed := next(filter(None, map(_http_failure, chain)), None):
        return f"{failed}{_hint(str(failed))}"
    if isinstance(error, _PARSE_ERRORS) and (message := unparsed_response()):
        return message
    chain = [part for part in chain if type(part).__name__ != "RetryError"]  # has no message of its own
    parts = dict.fromkeys(f"{type(part).__name__}: {' '.join(_words(part).split())}".removesuffix(": ") for part in chain)
    text = "; ".join(reversed(parts))
    return text if len(text) <= _MAX_CHARACTERS else f"... {text[-_MAX_CHARACTERS:]}"


def _words(error: BaseException) -> str:
    return plain(str(error)).removeprefix("ERROR: ") if isinstance(error, PrerequisiteError) else str(error)


def plain(text: str) -> str:
    """Without rich's markup, where it is markup."""
    try:
        return Text.from_markup(text).plain
    except MarkupError:
        return text


def prepared(model: Model) -> Model:
    """The model with changed retries: none for permanent failures (no quota left), a log line for each retry, and an error where
    the provider sends one with HTTP 200."""
    if not isinstance(model.api.should_retry, _Retries):
        model.api.should_retry = _Retries(str(model), model.api.should_retry)  # type: ignore[assignment, method-assign]
    client: Any = getattr(model.api, "http_client", None)  # httpx's; another one for each evaluation
    if hasattr(client, "event_hooks") and _give_status not in client.event_hooks["response"]:
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks["response"], _give_status]}
    return model


async def _give_status(response: Any) -> None:
    """Give an error within HTTP 200 the status that it stands for: the provider's client then raises it, or tries again."""
    if response.status_code != 200 or "json" not in response.headers.get("content-type", ""):
        return
    try:
        data = json.loads(await response.aread())
    except (ValueError, RecursionError):
        return
    if isinstance(data, Mapping) and data.get("error") and not data.get("choices"):
        response.status_code = error_object(data).status or 502


class _Retries:
    def __init__(self, name: str, rule: Callable[[Exception], Any]) -> None:
        self._name, self._rule = name, rule
        self._quiet_until = 0.0

    def __call__(self, error: Exception) -> Any:
        failed = next(filter(None, map(_http_failure, _chain(error))), None)
        if failed is not None and failed.result == "quota":
            return False
        decision = self._rule(error)
        if decision and time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _LOG_INTERVAL
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + PATIENCE))
            _log.warning("retrying %s until %s at most: %s", self._name, until, reason_of(error))
        return decision


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = part.__cause__ or part.__context__


def _http_failure(error: BaseException) -> CallFailed | None:
    """The failure of a client's error that has an HTTP status and a body; None for another error."""
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    if not isinstance(status, int):
        return None
    try:
        text = getattr(response, "text", None)
    except RuntimeError:  # httpx: a body that was never read
        return None
    if not isinstance(text, str):
        return None
    headers = {str(name).lower(): str(value) for name, value in dict(getattr(response, "headers", {})).items()}
    return failure_of(status, headers, error_body(text), sent={}, key="")


def unparsed_response() -> str:
    """A message on the last response of this sample, which Inspect's provider could not parse; empty where it is unknown."""
    call = next((event.call for event in reversed(transcript().events) if isinstance(event, ModelEvent)), None)
    if call is None or not call.response:
        return ""
    given = {name: value for name, value in call.response.items() if value is not None}
    return f"expected a chat completion, got {error_object(given).message}"


def _hint(message: str) -> str:
    if "max_completion_tokens" in message:
        return " (set it with -G max_completion_tokens=N)"
    named = [name for name in _LEFT_OUT if re.search(rf"\b{name}\b", message)]
    return f" (to leave it out: {' '.join(f'-G {name}=null' for name in named)})" if named else ""
