"""Gets one chat completion from several OpenAI-compatible endpoints, or raises with the reasons.

A dialogue stays with one endpoint, which may have cached its prefix (weighted rendezvous hashing over the scenario). It moves to
another one when the first is full, refuses the request, sent a Retry-After, or its circuit breaker is open after consecutive
failures. While all are unavailable, a request waits beyond its deadline, for up to `patience` seconds.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctcgrpo.errors import BudgetSpent, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.llm_client.account import Account, Spent
from ctcgrpo.llm_client.calls import ChatCompletion
from ctcgrpo.llm_client.endpoint_state import EndpointState
from ctcgrpo.llm_client.reasons import CallFailed
from ctcgrpo.simulator.config import Calls, Price
from ctcgrpo.types import Message

_LONGEST_PAUSE = 30.0
_SHORTEST_CALL = 0.05  # seconds; no call starts with less time left
_MOMENT = 1.0  # seconds; a shorter outage is not logged
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call, for logs and metrics. `result`: ok, or the kind of failure."""

    endpoint: str
    result: str
    seconds: float
    spent: Spent


class Deadline:
    """The deadline of a request, on time.monotonic()'s clock; it is extended while every endpoint is unavailable."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = time.monotonic() + seconds
        self.waited = 0.0  # seconds of all extensions
        self.obstacle = "no time was left"  # why an endpoint was not called

    def left(self) -> float:
        return self.at - time.monotonic()

    def wait(self, seconds: float, then: float) -> None:
        """Extend it by a wait of `seconds`, with at least `then` seconds for a call after it."""
        moved = max(self.at + seconds, time.monotonic() + seconds + then)
        self.waited += moved - self.at
        self.at = moved


@dataclass(frozen=True, slots=True)
class Outage:
    """Every endpoint is unavailable. `seconds` to the next attempt, and the `reason`."""

    seconds: float
    reason: str

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() + self.seconds))
        return f"every LLM endpoint is unavailable; next attempt at {clock} (in {self.seconds:.0f} s): {self.reason}"


class EndpointPool:
    """Interchangeable endpoints. `on_call` gets a record of every call; `log_line` gets a line for each outage of all endpoints."""

    def __init__(
        self,
        calls: Calls,
        account: Account,
        on_call: Callable[[CallRecord], None] = lambda record: None,
        log_line: Callable[[str], None] = _log.warning,
    ) -> None:
        self.lines = [EndpointState(settings, calls) for settings in calls.endpoints]
        self._calls = calls
        self._account = account
        self._on_call, self._log_line = on_call, log_line
        self._said_until = 0.0
        self._random = random.Random()  # its own generator: training's random state must not depend on retries

    async def close(self) -> None:
        for line in self.lines:
            await line.client.close()

    def is_ready(self) -> bool:
        """Whether any endpoint may be called now."""
        return any(line.ready for line in self.lines)

    def spent(self) -> Mapping[str, Any]:
        return self._account.summary()

    def outage(self) -> Outage | None:
        """The current outage; None while an endpoint may be called, or is being probed."""
        now = time.monotonic()
        seconds = min((line.unavailable_until for line in self.lines if not line.hopeless), default=now) - now
        return None if seconds <= 0 or self.is_ready() else Outage(seconds, self._reasons())

    async def complete(
        self, messages: Sequence[Message], *, dialogue: str, seed: int, schema: dict[str, Any], deadline: Deadline
    ) -> ChatCompletion:
        """A completion before `deadline`.

        Raises SimulatorTransportError where none came in time, SimulatorReplyError for a request that every endpoint refuses,
        BudgetSpent where the budget is spent or no provider has quota left.
        """
        problems: list[str] = []
        tries: Counter[str] = Counter()
        refused: dict[str, str] = {}
        while len(refused) < len(self.lines):
            lines = [line for line in self.lines if line.name not in refused]
            if problems and all(line.hopeless for line in lines):
                self._give_up(lines)
            self._check_time(0, deadline, problems)
            rounds = min(tries[line.name] for line in lines)
            if rounds and any(line.ready for line in lines):
                pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(rounds, 8)) * self._random.uniform(0.5, 1.5)
                self._check_time(pause, deadline, problems)
                await asyncio.sleep(pause)
            line = await self._choose(lines, dialogue, tries, deadline, problems)
            # No await between the choice and this: only one call may probe an open breaker.
            probe = line.probing = bool(line.opened)
            tries[line.name] += 1
            try:
                return await self._attempt(line, (messages, seed, schema), deadline, probe)
            except CallFailed as problem:
                line.failed(problem, dialogue=dialogue, probe=probe)
                if problem.result == "waiting":  # it was not called
                    tries[line.name] -= 1
                    deadline.obstacle = f"{line.name}: {problem}"
                    continue
                problems.append(f"{line.name}: {problem}")
                if problem.result in ("refused", "forbidden"):
                    refused[line.name] = str(problem)
            finally:
                if probe:
                    line.probing = False
        raise SimulatorReplyError("; ".join(f"{name} refused the request: {reason}" for name, reason in refused.items()))

    async def _choose(
        self, lines: Sequence[EndpointState], dialogue: str, tries: Counter[str], deadline: Deadline, problems: list[str]
    ) -> EndpointState:
        """The dialogue's endpoint, or the next in its order that is ready and has room; those with the fewest tries come first.
        Waits where none is ready."""
        order = sorted(lines, key=lambda line: (tries[line.name], -line.rank(dialogue)))
        while True:
            ready = [line for line in order if line.ready]
            if ready:
                return next((line for line in ready if not line.slots.locked()), ready[0])
            awaited = [line for line in order if not line.hopeless]
            if not awaited:
                self._give_up(order)
            soonest = min(line.unavailable_until for line in awaited) - time.monotonic()
            pause = max(0.05, soonest) + self._random.uniform(0, 0.05)
            if deadline.left() > pause + _SHORTEST_CALL:
                await self._wait(pause)
            elif soonest > _MOMENT and deadline.waited + pause <= self._calls.patience and any(e.may_return for e in awaited):
                deadline.wait(pause, then=min(deadline.seconds, max(line.settings.timeout for line in awaited)))
                await self._wait(pause)
            elif deadline.waited:
                raise SimulatorTransportError(
                    f"every endpoint is unavailable: waited {deadline.waited:.0f} s, and the next attempt, in {soonest:.0f} s, "
                    f"exceeds patience = {self._calls.patience:g} s: {self._reasons()}"
                )
            else:
                self._check_time(pause, deadline, problems)

    async def _wait(self, seconds: float) -> None:
        """Sleep; log each outage of all endpoints once, unless it is short."""
        outage = self.outage()
        if outage is not None and outage.seconds > _MOMENT and time.monotonic() >= self._said_until:
            self._said_until = time.monotonic() + outage.seconds
            self._log_line(str(outage))
        await asyncio.sleep(seconds)

    def _give_up(self, lines: Sequence[EndpointState]) -> None:
        """Raises the error for endpoints that no wait can bring back."""
        if any(line.out_of_quota for line in lines):
            raise BudgetSpent(f"no provider has quota left: {self._reasons()}; top up the provider's account")
        raise SimulatorTransportError(f"no endpoint is usable: {self._reasons()}")

    def _reasons(self) -> str:
        return "; ".join(f"{line.name}: {line.problem}" for line in self.lines if line.problem)

    def _check_time(self, seconds: float, deadline: Deadline, problems: Sequence[str]) -> None:
        """Raises SimulatorTransportError where a wait of `seconds` leaves no time for a call."""
        if seconds + _SHORTEST_CALL >= deadline.left():
            last = next(iter(problems[-1:]), self._reasons() or deadline.obstacle)
            attempts = f"{len(problems)} attempts" if len(problems) != 1 else "1 attempt"
            raise SimulatorTransportError(f"no endpoint answered within {deadline.seconds:g} s ({attempts}, last: {last})")

    async def _attempt(
        self, line: EndpointState, request: tuple[Sequence[Message], int, dict[str, Any]], deadline: Deadline, probe: bool
    ) -> ChatCompletion:
        """One call. `request`: messages, seed, schema."""
        # With a byte-level vocabulary a text has at most as many tokens as bytes.
        size = sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in request[0])
        most = _spent(size, self._calls.most_tokens, line.settings.price)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(deadline.left() - _SHORTEST_CALL):
                    await stack.enter_async_context(line.slots)
                    await line.within_limits()
            except TimeoutError:
                raise CallFailed("waiting", "its limits left no room before the deadline") from None
            if not line.ready and not probe:  # it became unavailable while this call waited
                raise CallFailed("waiting", line.problem)
            asked = time.monotonic()
            booking = await stack.enter_async_context(self._account.booking(most, deadline.left() - _SHORTEST_CALL))
            started = time.monotonic()
            timeout = min(deadline.left(), line.settings.timeout)
            # Little of the budget is left: calls run one by one, and the deadline passes while they wait.
            held_up = self._account.is_limited and started - asked > timeout
            if timeout < _SHORTEST_CALL:
                booking.cost = Spent()
                if held_up:
                    raise BudgetSpent(self._account.explain())
                raise CallFailed("waiting", "no time was left for a call")
            result = "cancelled"
            try:
                async with asyncio.timeout(timeout):
                    answer = await line.client.complete(*request)
                read, written = answer.prompt_tokens, answer.completion_tokens
                # Templates and reasoning may take more tokens than booked; a count beyond this is wrong.
                if read > 2 * most.prompt_tokens + 10_000 or written > 10 * most.completion_tokens + 100_000:
                    answer = replace(answer, prompt_tokens=0, completion_tokens=0)
                elif read:  # else its maximum cost stays booked
                    booking.cost = _spent(read, written, line.settings.price)
                line.succeeded(booking.cost.tokens)
                result = "ok"
                return answer
            except TimeoutError:
                result = "timeout"
                if held_up:
                    raise BudgetSpent(self._account.explain()) from None
                raise CallFailed("timeout", f"no answer within {timeout:.1f} s", paid=True) from None
            except CallFailed as problem:
                result = problem.result
                if not problem.paid:
                    booking.cost = Spent()
                raise
            finally:
                self._on_call(CallRecord(line.name, result, time.monotonic() - started, booking.cost))


def _spent(prompt_tokens: int, completion_tokens: int, price: Price) -> Spent:
    money = round(prompt_tokens * price.prompt + completion_tokens * price.completion)
    return Spent(1, prompt_tokens, completion_tokens, money)
