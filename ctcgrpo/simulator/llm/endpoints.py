"""Getting one chat completion out of several OpenAI-compatible endpoints, or the reason why there is none.

The openai client makes the calls; it would repeat a call at one endpoint, so repeating is done here, where another endpoint can
take over: a dialogue stays with the endpoint that knows its prefix (weighted rendezvous hashing over the scenario), moves on when
that one is full, told us to wait (Retry-After), or failed so often in a row that its circuit breaker is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import openai
from aiolimiter import AsyncLimiter

from ctcgrpo.errors import BudgetSpent, RecipeError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.simulator.config import Endpoint, Llm, Price
from ctcgrpo.simulator.llm.account import Account, Spent, cost
from ctcgrpo.simulator.llm.prompts import Message

_RETRIED = frozenset({408, 409, 425, 429})
_LONGEST_PAUSE = 30.0
_LONGEST_OPEN = 300.0
_SHORTEST_CALL = 0.05
"""Seconds: with less than this left, a call is not begun."""
_FREE = frozenset({"rate_limited", "http_5xx", "refused", "unreachable"})
"""Results of a call that nobody charges for."""
_NO_KEY = "not-needed"


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """What an endpoint answered; `ended` is its finish reason (length: it ran into the limit on tokens)."""

    text: str
    ended: str
    prompt_tokens: int
    completion_tokens: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call, for logs and metrics: `result` is ok, or what went wrong in a word."""

    endpoint: str
    result: str
    seconds: float
    spent: Spent


class _Refused(Exception):
    """An attempt that failed: `wait` seconds until this endpoint may be asked again; `counts` towards its breaker."""

    def __init__(self, result: str, message: str, *, wait: float | None = None, counts: bool = True) -> None:
        super().__init__(message)
        self.result, self.wait, self.counts = result, wait, counts


class _Line:
    """One endpoint with its limits and its breaker."""

    def __init__(self, settings: Endpoint, llm: Llm) -> None:
        self.settings = settings
        self.name = settings.label
        key = os.environ.get(settings.key_env, "") if settings.key_env else _NO_KEY
        if not key:
            raise RecipeError(
                f"llm.endpoints {settings.url!r}: the environment variable {settings.key_env} (key_env) is empty or not set"
            )
        self._key = key
        self._llm = llm
        self.client = openai.AsyncOpenAI(
            # On aiohttp, which takes 1.5 ms of CPU a call here where httpx takes 3.5 ms (1,000 calls at once, 10 kB prompts).
            base_url=settings.url,
            api_key=key,
            max_retries=0,
            timeout=settings.timeout,
            http_client=openai.DefaultAioHttpClient(),
        )
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._requests = _limiter(settings.requests_per_minute)
        self._tokens = _limiter(settings.tokens_per_minute)
        self._mean_tokens = 2000.0
        self.resting_until = 0.0
        self.problem = ""
        """What kept it from answering last."""
        self.probing = False
        self.opened = 0
        self._failures = 0

    def rank(self, key: str) -> float:
        """Weighted rendezvous hashing: the endpoint with the highest rank is a dialogue's own."""
        digest = hashlib.sha256(f"{self.settings.url}|{self.settings.model}|{key}".encode()).digest()
        return -self.settings.weight / math.log((int.from_bytes(digest[:8], "big") + 1) / (2**64 + 2))

    @property
    def ready(self) -> bool:
        """Whether it may be asked now; of an open breaker, once its time is over, by one call at a time."""
        return time.monotonic() >= self.resting_until and not (self.opened and self.probing)

    @property
    def full(self) -> bool:
        return self.slots.locked()

    async def within_limits(self) -> None:
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None:
            await self._tokens.acquire(min(self._mean_tokens, self._tokens.max_rate))

    def succeeded(self, tokens: int) -> None:
        self._failures = self.opened = 0
        self._mean_tokens += 0.05 * (tokens - self._mean_tokens)

    def failed(self, problem: _Refused, *, probe: bool) -> None:
        """`probe`: the call was made to see whether an open breaker may close."""
        now = time.monotonic()
        if problem.result != "waiting":
            self.problem = str(problem)
        if problem.wait is not None:
            self.resting_until = max(self.resting_until, now + problem.wait)
        if not problem.counts:
            return
        self._failures += 1
        # Calls that were under way when it opened say nothing new.
        if probe or (not self.opened and self._failures >= self.settings.breaker_failures):
            self.opened += 1
            pause = min(_LONGEST_OPEN, self.settings.breaker_seconds * 2 ** (self.opened - 1))
            self.resting_until = max(self.resting_until, now + pause)

    async def call(self, messages: Sequence[Message], seed: int, schema: dict[str, Any], timeout: float) -> ChatCompletion:
        llm, settings = self._llm, self.settings
        formats: dict[str, Any] = {
            "json_schema": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
            "json_object": {"type": "json_object"},
            "text": openai.omit,
        }
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=settings.model,
                messages=list(messages),  # type: ignore[arg-type]
                temperature=llm.temperature,
                top_p=llm.top_p,
                max_tokens=llm.max_tokens,
                seed=seed % 2**31 if settings.seed else openai.omit,
                response_format=formats[settings.output],
                extra_body=dict(settings.extra_body) or None,
                timeout=timeout,
            )
            return self._completion(json.loads(raw.content))
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APITimeoutError:
            raise _Refused("timeout", f"no answer within {timeout:.0f} s") from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            result = "unreachable" if cause in ("ConnectError", "ConnectTimeout") else "disconnected"
            raise _Refused(result, f"{result} ({cause})") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Refused("malformed", "what it answered is no chat completion") from None

    def _completion(self, data: dict[str, Any]) -> ChatCompletion:
        choice = data["choices"][0]
        content = choice["message"].get("content") or ""
        if isinstance(content, list):  # as some proxies answer
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if not isinstance(content, str):
            raise TypeError("content is no text")
        usage = data.get("usage") or {}
        return ChatCompletion(
            text=content.encode("utf-8", "replace").decode(),
            ended=str(choice.get("finish_reason")),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            endpoint=self.name,
        )

    def _status(self, error: openai.APIStatusError) -> Exception:
        code = error.status_code
        if code in (401, 403):  # its text may quote part of the key
            return _Refused("refused", f"HTTP {code}: it refuses the key in {self.settings.key_env}", wait=_LONGEST_OPEN)
        said = " ".join(str(error.message).replace(self._key, "[key]").split())[:200]
        if code in _RETRIED or code >= 500:
            wait = _retry_after(error.response.headers) if code in (429, 503) else None
            return _Refused("rate_limited" if code == 429 else "http_5xx", f"HTTP {code}", wait=wait, counts=code != 429)
        if code == 404:
            return _Refused("refused", f"HTTP 404: {said}", wait=_LONGEST_OPEN)
        return SimulatorReplyError(f"{self.name} refused the request (HTTP {code}): {said}")


class EndpointPool:
    """All endpoints of a simulator. `on_call` sees every call that was made."""

    def __init__(self, llm: Llm, account: Account, on_call: Callable[[CallRecord], None] = lambda record: None) -> None:
        self._lines = [_Line(settings, llm) for settings in llm.endpoints]
        self._llm = llm
        self._account = account
        self._on_call = on_call
        self._random = random.Random()  # of its own: training's random state must not depend on retries

    async def close(self) -> None:
        for line in self._lines:
            await line.client.close()

    def is_ready(self) -> bool:
        """Whether any endpoint may be asked now."""
        return any(line.ready for line in self._lines)

    def spent(self) -> Mapping[str, Any]:
        return self._account.summary()

    def states(self) -> dict[str, Literal["ready", "resting", "open"]]:
        """How each endpoint is: open says that its breaker keeps calls from it."""
        return {line.name: "open" if line.opened else "ready" if line.ready else "resting" for line in self._lines}

    async def complete(
        self, messages: Sequence[Message], *, dialogue: str, seed: int, schema: dict[str, Any], deadline: float
    ) -> ChatCompletion:
        """A completion before `deadline` (time.monotonic()).

        Raises SimulatorTransportError when there was none by then, SimulatorReplyError for a request that an endpoint refuses for
        good, BudgetSpent where it cannot be paid for.
        """
        problems: list[str] = []
        tries: Counter[str] = Counter()
        while True:
            self._mind_the_time(0, deadline, problems)
            if rounds := min(tries[line.name] for line in self._lines):
                pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(rounds, 8)) * self._random.uniform(0.5, 1.5)
                await self._sleep(pause, deadline, problems)
            line = await self._choose(dialogue, tries, deadline, problems)
            # Nothing is awaited between the choice and this: of an open breaker one call finds out whether it may close.
            probe = line.probing = bool(line.opened)
            tries[line.name] += 1
            try:
                return await self._attempt(line, messages, seed, schema, deadline, probe=probe)
            except _Refused as problem:
                line.failed(problem, probe=probe)
                problems.append(f"{line.name}: {problem}")
                if problem.result == "waiting":  # it was not asked
                    tries[line.name] -= 1
            finally:
                if probe:
                    line.probing = False

    async def _choose(self, dialogue: str, tries: Counter[str], deadline: float, problems: list[str]) -> _Line:
        """The dialogue's endpoint, or the next in its order that is ready and has room, those first that it tried least; waits
        where none is ready."""
        order = sorted(self._lines, key=lambda line: (tries[line.name], -line.rank(dialogue)))
        while True:
            ready = [line for line in order if line.ready]
            if ready:
                return next((line for line in ready if not line.full), ready[0])
            soonest = min(line.resting_until for line in order) - time.monotonic()
            await self._sleep(max(0.05, soonest) + self._random.uniform(0, 0.05), deadline, problems)

    async def _sleep(self, seconds: float, deadline: float, problems: Sequence[str]) -> None:
        self._mind_the_time(seconds, deadline, problems)
        await asyncio.sleep(seconds)

    def _mind_the_time(self, seconds: float, deadline: float, problems: Sequence[str]) -> None:
        """Raises SimulatorTransportError where so many seconds leave no time for a call."""
        if time.monotonic() + seconds + _SHORTEST_CALL >= deadline:
            resting = [f"{line.name}: {line.problem}" for line in self._lines if line.problem]
            last = next(iter(problems[-1:] or resting), "it had no time left")
            raise SimulatorTransportError(
                f"no endpoint answered within {self._llm.deadline:g} s ({len(problems)} attempts, last: {last})"
            )

    async def _attempt(
        self,
        line: _Line,
        messages: Sequence[Message],
        seed: int,
        schema: dict[str, Any],
        deadline: float,
        *,
        probe: bool,
    ) -> ChatCompletion:
        most = self._most(messages, line.settings.price)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(deadline - time.monotonic() - _SHORTEST_CALL):
                    await stack.enter_async_context(line.slots)
                    await line.within_limits()
            except TimeoutError:
                raise _Refused("waiting", "its limits left no room before the deadline", counts=False) from None
            if not line.ready and not probe:  # others were told to stay away while this one waited
                raise _Refused("waiting", line.problem, counts=False)
            asked = time.monotonic()
            booking = await stack.enter_async_context(self._account.booking(most))
            started = time.monotonic()
            timeout = min(deadline - started, line.settings.timeout)
            # So little of the budget is left that calls go one by one, and wait for longer than they have time.
            held_up = started - asked > timeout
            if timeout < _SHORTEST_CALL:
                booking.cost = Spent()
                raise BudgetSpent(self._account.explain())
            result = "cancelled"
            try:
                async with asyncio.timeout(timeout):
                    answer = await line.call(messages, seed, schema, timeout)
                booking.cost = self._cost(answer, most, line.settings.price)
                line.succeeded(booking.cost.tokens)
                result = "ok"
                return answer
            except TimeoutError:
                result = "timeout"
                if held_up:
                    raise BudgetSpent(self._account.explain()) from None
                raise _Refused("timeout", f"no answer within {timeout:.0f} s") from None
            except _Refused as problem:
                result = problem.result
                if result == "timeout" and held_up:
                    raise BudgetSpent(self._account.explain()) from None
                if result in _FREE:
                    booking.cost = Spent()
                raise
            except SimulatorReplyError:
                result = "refused"
                booking.cost = Spent()
                raise
            finally:
                self._on_call(CallRecord(line.name, result, time.monotonic() - started, booking.cost))

    def _cost(self, answer: ChatCompletion, most: Spent, price: Price) -> Spent:
        """What an endpoint says that it took, or, where it does not say, the most that it can have taken."""
        if not answer.prompt_tokens:
            return most
        return _spent(answer.prompt_tokens, answer.completion_tokens, price)

    def _most(self, messages: Sequence[Message], price: Price) -> Spent:
        """The most that a call can cost: no byte-level vocabulary makes more tokens than bytes."""
        size = sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages)
        return _spent(size, self._llm.max_tokens, price)


def _spent(prompt_tokens: int, completion_tokens: int, price: Price) -> Spent:
    return Spent(1, prompt_tokens, completion_tokens, cost(price, prompt_tokens, completion_tokens))


def _limiter(per_minute: int | None) -> AsyncLimiter | None:
    return None if per_minute is None else AsyncLimiter(per_minute, 60)


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from a Retry-After of either form; at most five minutes."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(_LONGEST_OPEN, max(0.0, seconds)) if math.isfinite(seconds) else None
