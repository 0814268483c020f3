"""The simulator's client: it retries temporary failures, and raises one error type for each kind of permanent failure."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from pydantic import ValidationError

from ctcgrpo.errors import BudgetSpent, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.llm_client.reasons import retry_after
from ctcgrpo.simulator.protocol import ACCOUNT_PATH, HEALTH_PATH, TURN_PATH, UNAVAILABLE, TurnProblem, TurnReply, TurnRequest
from ctcgrpo.util.naming import cut
from ctcgrpo.util.proxies import proxy_of, through_proxy

_TRANSPORT_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
_LONGEST_PAUSE = 15.0
_log = logging.getLogger(__name__)
_LARGEST = 4_000_000  # bytes of a response at most


class _NoAnswer(Exception):
    """An attempt that failed for a reason that a retry may solve."""


class SimulatorClient:
    """An async context manager around one HTTP session.

    `urls` are replicas of one simulator. A scenario stays with one replica while that answers, which may have cached its prefix.
    `timeout`: seconds of one attempt at most. `patience`: seconds of retries at most, where no server answers (it may be
    restarting) or no LLM is available (`log_line` is then called with the reason and the end of the outage). Between rounds over
    the replicas it waits `backoff` x 2^k seconds with jitter, at most 15. `name`: what errors name in place of the URL of a server
    in this process.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        timeout: float = 240.0,
        patience: float = 600.0,
        backoff: float = 0.5,
        log_line: Callable[[str], None] = _log.warning,
        name: str | None = None,
    ) -> None:
        self._urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        self._in_process, self.name = name is not None, name or ", ".join(self._urls)
        self._proxies = {url: proxy_of(url) for url in self._urls}
        self._log_line, self._silent_until = log_line, 0.0
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._patience = patience
        self._backoff = backoff
        self._jitter = random.Random()  # its own generator: training's random state must not depend on retries
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SimulatorClient:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def health(self) -> dict[str, Any]:
        """The health answer of the replicas. Raises SimulatorTransportError at once where none answers, and where replicas that
        answer play different users."""
        answers: dict[str, dict[str, Any]] = {}
        problems: dict[str, _NoAnswer] = {}
        for url in self._urls:
            try:
                answers[url] = await self._get(url, HEALTH_PATH)
            except _NoAnswer as error:
                problems[url] = error
        if not answers:
            url, problem = next(iter(problems.items()))
            if self._in_process:
                raise SimulatorTransportError(f"{self.name}: its server in this process does not answer ({problem})")
            raise SimulatorTransportError(
                f"simulator.url = {url!r}: no simulator server answers ({problem}){through_proxy(url)}; start one with "
                "`ctcgrpo serve`, or set simulator.url=embedded"
            )
        (first, health), *others = answers.items()
        for url, other in others:
            if other != health:
                raise SimulatorTransportError(f"simulator.url: {first} and {url} play different users ({health}, {other})")
        return health

    async def account(self) -> dict[str, Any]:
        """What the simulator has spent; empty where it spent nothing, or no server answers any more."""
        for url in self._urls:
            with suppress(_NoAnswer):
                return await self._get(url, ACCOUNT_PATH)
        return {}

    async def turn(self, request: TurnRequest) -> TurnReply:
        """The user's reaction. Raises SimulatorTransportError where no answer came, SimulatorReplyError where a server refused
        the request or sent no valid TurnReply, BudgetSpent where the budget is spent."""
        body = request.model_dump_json().encode()
        urls = self._order(request.scenario.id)
        started, attempts, problem = time.monotonic(), 0, ""
        final: dict[str, SimulatorTransportError] = {}
        while True:
            for url in (url for url in urls if url not in final):
                attempts += 1
                try:
                    return _checked(self._called(url), request, await self._attempt(url, body))
                except _NoAnswer as error:
                    problem = str(error)
                except SimulatorTransportError as error:  # this replica tried, or rejected our token; another may answer
                    final[url] = error
            if len(final) == len(urls):
                raise final[urls[0]]
            rounds = max(1, attempts // len(urls))
            pause = min(_LONGEST_PAUSE, self._backoff * 2 ** min(rounds - 1, 10)) * self._jitter.uniform(0.5, 1.5)
            if time.monotonic() - started + pause > self._patience:
                raise SimulatorTransportError(
                    f"{self.name}: no answer within the patience of {self._patience:g} s ({attempts} attempts); last "
                    f"problem: {problem}"
                )
            await asyncio.sleep(pause)

    def _called(self, url: str) -> str:
        return self.name if self._in_process else url

    async def _attempt(self, url: str, body: bytes) -> TurnReply:
        called = self._called(url)
        try:
            async with self._open.post(url + TURN_PATH, data=body, proxy=self._proxies[url]) as response:
                status, payload = response.status, await _body(called, response)
        except _TRANSPORT_ERRORS as error:
            raise _NoAnswer(f"{_describe(error)}{through_proxy(url)}") from None
        if status == 200:
            try:
                return TurnReply.model_validate_json(payload)
            except ValidationError as error:
                raise SimulatorReplyError(
                    f"{called}: invalid response; expected a TurnReply: {error.errors()[0]['msg']}"
                ) from None
        try:
            problem = TurnProblem.model_validate_json(payload)
        except ValidationError:
            if status in (408, 429) or status >= 500:
                raise _NoAnswer(f"HTTP {status}{through_proxy(url)}: {_excerpt(payload)}") from None
            raise SimulatorReplyError(f"{called} refused the request (HTTP {status}): {_excerpt(payload)}") from None
        if problem.kind == UNAVAILABLE:
            self._log_outage(problem.error, retry_after(response.headers) or 0.0)
            raise _NoAnswer(problem.error)
        types = {error.kind: error for error in (SimulatorTransportError, BudgetSpent)}
        status_of = "" if self._in_process else f" (HTTP {status})"
        raise types.get(problem.kind, SimulatorReplyError)(f"{called}{status_of}: {cut(problem.error, 2100)}")

    def _log_outage(self, outage: str, seconds: float) -> None:
        """Log an outage of so many seconds once, however many turns wait for its end."""
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + seconds
            limit = f"at most {self._patience:g} s (simulator.patience), or less by its llm.patience"
            self._log_line(f"waiting for the simulator, {limit}: {outage}")

    def _order(self, scenario: str) -> list[str]:
        start = int.from_bytes(hashlib.sha256(scenario.encode("utf-8", "replace")).digest()[:4], "big") % len(self._urls)
        return self._urls[start:] + self._urls[:start]

    async def _get(self, url: str, path: str) -> dict[str, Any]:
        try:
            async with self._open.get(url + path, proxy=self._proxies[url]) as response:
                response.raise_for_status()
                answer = json.loads(await _body(url, response))
        except (*_TRANSPORT_ERRORS, SimulatorReplyError) as error:
            raise _NoAnswer(_describe(error)) from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or (path == HEALTH_PATH and not _is_health(answer)):
            raise _NoAnswer("the answer is not that of a simulator server")
        return answer

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("SimulatorClient is used outside its `async with` block")
        return self._session


def _is_health(answer: dict[str, Any]) -> bool:
    deadline = answer.get("deadline")
    return answer.get("status") == "ok" and "backend" in answer and (deadline is None or type(deadline) in (int, float))


async def _body(url: str, response: aiohttp.ClientResponse) -> bytes:
    found = bytearray()
    async for part in response.content.iter_chunked(65536):
        found += part
        if len(found) > _LARGEST:
            raise SimulatorReplyError(f"{url}: the response is larger than {_LARGEST} bytes")
    return bytes(found)


def _checked(url: str, request: TurnRequest, reply: TurnReply) -> TurnReply:
    """The reply. Raises SimulatorReplyError unless its state is the request's plus the deltas: rewards are computed from it."""
    expected = request.state.plus(reply.anger_delta, reply.trust_delta)
    if reply.state != expected:
        raise SimulatorReplyError(
            f"{url}: the response's state is {reply.state}; expected {expected}: the request's {request.state} and the "
            f"deltas {reply.anger_delta:+d} and {reply.trust_delta:+d}"
        )
    return reply


def _describe(error: BaseException) -> str:
    return "timed out" if isinstance(error, asyncio.TimeoutError) else (str(error) or type(error).__name__)


def _excerpt(payload: bytes) -> str:
    return payload[:300].decode(errors="replace")
