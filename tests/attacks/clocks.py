"""A wall clock that jumps by an hour, back and forth: what waits goes by the monotonic clock."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ctcgrpo.errors import OutputError, SimulatorTransportError
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.util.workers import lock_folder
from tests.attacks.suite import Tries, attack
from tests.unit.test_endpoints import config, done, error, says, serving, turns
from tests.unit.test_simulator_prompts import request

_HOUR = 3600.0


@contextlib.contextmanager
def _jumping(by: float) -> Iterator[None]:
    """Each time it is asked, time.time() has jumped by so many seconds, and back."""
    real, calls = time.time, itertools.count()
    with mock.patch("time.time", lambda: real() + by * (next(calls) % 2)):
        yield


@contextlib.contextmanager
def _jumps_once(by: float) -> Iterator[None]:
    """After the first second that is asked for."""
    real = time.time
    with mock.patch("time.time", lambda: real() + by):
        yield


_JUMPS = {
    "forth and back": lambda: _jumping(_HOUR),
    "back and forth": lambda: _jumping(-_HOUR),
    "an hour ahead": lambda: _jumps_once(_HOUR),
    "an hour behind": lambda: _jumps_once(-_HOUR),
}


@attack("clocks", seconds=60)
def clock_jumps(tries: Tries) -> None:
    """Retry-after, rate limits, breakers, patience and locks while time.time() jumps: each waits for as long as it says."""

    def timed(call: Any) -> tuple[Any, float]:
        started = time.monotonic()
        found = asyncio.run(call)
        return found, time.monotonic() - started

    async def retry_after() -> Any:
        def answer(n: int, body: Any) -> Any:
            return error("slow down", 429, headers={"Retry_After": "0.5"}) if n == 1 else _ok()

        async with serving(answer) as provider:
            return await turns(config(provider.url, deadline=5.0))

    async def breaker() -> Any:
        def answer(n: int, body: Any) -> Any:
            return error("oops", 500) if n <= 2 else _ok()

        async with serving(answer) as provider:
            return await turns(config(provider.url, deadline=8.0, endpoint__breaker_failures=2, endpoint__breaker_seconds=0.5))

    async def rate_limit() -> Any:
        async with serving(_ok()) as provider:
            scenes = ("support", "defense", "repair")
            return await turns(config(provider.url, deadline=5.0, endpoint__requests_per_minute=120), *scenes)

    async def patience() -> Any:
        async with SimulatorClient("http://127.0.0.1:9", patience=0.6, backoff=0.1) as client:
            try:
                return await client.turn(request("Hello."))
            except SimulatorTransportError as problem:
                return problem

    for name, jump in _JUMPS.items():
        with tries.one(f"{name}: retry-after 0.5 s"), jump():
            asked, seconds = timed(retry_after())
            assert asked.results == ["Thanks."] and 0.4 < seconds < 3, (asked.results, seconds)
        with tries.one(f"{name}: a breaker that is open for 0.5 s"), jump():
            asked, seconds = timed(breaker())
            assert asked.results == ["Thanks."] and 0.4 < seconds < 6, (asked.results, seconds)
        with tries.one(f"{name}: a limit of requests"), jump():
            asked, seconds = timed(rate_limit())
            assert asked.results == ["Thanks."] * 3 and seconds < 4, (asked.results, seconds)
        with tries.one(f"{name}: a client's patience of 0.6 s"), jump():
            found, seconds = timed(patience())
            assert isinstance(found, SimulatorTransportError) and 0.1 < seconds < 3, (found, seconds)
        with tries.one(f"{name}: the lock of a folder"), jump():
            folder = tries.folder / name.replace(" ", "-")
            folder.mkdir()
            with (folder / "LOCK").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                started = time.monotonic()
                try:
                    with lock_folder(folder, patience=0.5):
                        raise AssertionError("two processes have the folder")
                except OutputError:
                    seconds = time.monotonic() - started
            assert 0.4 < seconds < 2, seconds


def _ok() -> Any:
    return says(done())
