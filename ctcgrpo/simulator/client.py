"""Asking the simulator: one method, retries for what a retry can mend, one error type for each thing that stays wrong."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Any

import aiohttp
from pydantic import ValidationError

from ctcgrpo.errors import SimulatorReplyError, SimulatorTransportError
from ctcgrpo.simulator.protocol import HEALTH_PATH, TURN_PATH, TurnReply, TurnRequest

_jitter = random.Random()  # of its own: training's random state must not depend on retries
_TRANSPORT_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class SimulatorClient:
    """An async context manager around one HTTP session.

    `timeout` is the seconds that one attempt may take, `attempts` how many there are; between them it waits
    `backoff` x 2^k seconds with jitter.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, attempts: int = 4, backoff: float = 0.5) -> None:
        self._url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._attempts = attempts
        self._backoff = backoff
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SimulatorClient:
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def health(self) -> dict[str, Any]:
        """What the server says of itself. Raises SimulatorTransportError at once where none answers."""
        try:
            async with self._open.get(self._url + HEALTH_PATH) as response:
                response.raise_for_status()
                answer: dict[str, Any] = await response.json()
            if not isinstance(answer, dict) or answer.get("status") != "ok" or "backend" not in answer:
                raise ValueError("what answers is no simulator server")
            return answer
        except (*_TRANSPORT_ERRORS, ValueError) as error:
            raise SimulatorTransportError(
                f"simulator.url {self._url!r}: no simulator server answers there ({_describe(error)}); "
                "start one with `ctcgrpo serve`, or set simulator.url=embedded"
            ) from None

    async def turn(self, request: TurnRequest) -> TurnReply:
        """The user's reaction. Raises SimulatorTransportError when every attempt failed, SimulatorReplyError when the
        server refused the request or answered what is not a TurnReply."""
        body = request.model_dump_json().encode()
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5))
            try:
                async with self._open.post(
                    self._url + TURN_PATH, data=body, headers={"Content-Type": "application/json"}
                ) as response:
                    status, payload = response.status, await response.read()
            except _TRANSPORT_ERRORS as error:
                problem = _describe(error)
                continue
            if status == 429 or status >= 500:
                problem = f"HTTP {status}"
                continue
            if status != 200:
                raise SimulatorReplyError(f"{self._url} refused the request (HTTP {status}): {_excerpt(payload)}")
            try:
                return TurnReply.model_validate_json(payload)
            except ValidationError as error:
                raise SimulatorReplyError(
                    f"{self._url} answered what is no turn reply: {error.errors()[0]['msg']}"
                ) from None
        raise SimulatorTransportError(f"{self._url} failed {self._attempts} times, last with: {problem}")

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("SimulatorClient is used outside its `async with` block")
        return self._session


def _describe(error: BaseException) -> str:
    return "timed out" if isinstance(error, asyncio.TimeoutError) else (str(error) or type(error).__name__)


def _excerpt(payload: bytes) -> str:
    return payload[:300].decode(errors="replace")
