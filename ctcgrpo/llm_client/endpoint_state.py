"""One endpoint with its limits and availability. It is unavailable until a Retry-After has passed, while its circuit breaker is
open, and while it refuses every request."""

import asyncio
import hashlib
import math
import time

from aiolimiter import AsyncLimiter

from ctcgrpo.llm_client.calls import ChatClient
from ctcgrpo.llm_client.reasons import LONGEST_WAIT, CallFailed, Result
from ctcgrpo.simulator.config import Calls, Endpoint

_DIALOGUES_FORBIDDEN = 3
"""Consecutive dialogues refused with 403 until the cause is taken to be the account, not their content."""


class EndpointState:
    """One endpoint. Raises RecipeError for a key that is not set."""

    def __init__(self, settings: Endpoint, calls: Calls) -> None:
        self.settings = settings
        self.name = settings.label
        self.client = ChatClient(settings, calls)
        self.slots = asyncio.Semaphore(settings.concurrency)
        limits = (settings.requests_per_minute, settings.tokens_per_minute)
        self._requests, self._tokens = (AsyncLimiter(most, 60) if most else None for most in limits)
        self._mean_tokens = 2000.0
        self.unavailable_until = 0.0  # on time.monotonic()'s clock
        self.problem = ""  # the last failure
        self.probing = False
        self.opened = 0  # consecutive openings of its breaker
        self._result: Result | None = None
        self._failures = 0
        self._forbidden: set[str] = set()
        self._has_answered = False

    def rank(self, key: str) -> float:
        """Its rank for a dialogue (weighted rendezvous hashing); the endpoint with the highest rank is preferred."""
        digest = hashlib.sha256(f"{self.settings.url}|{self.settings.model}|{key}".encode()).digest()
        return -self.settings.weight / math.log((int.from_bytes(digest[:8], "big") + 1) / (2**64 + 2))

    @property
    def ready(self) -> bool:
        """Whether it may be called now. After an open breaker's time, one probe call at a time is allowed."""
        return time.monotonic() >= self.unavailable_until and not (self.opened and self.probing)

    @property
    def out_of_quota(self) -> bool:
        return self._result == "quota"

    @property
    def hopeless(self) -> bool:
        """Whether waiting cannot help: no quota is left, or the key never worked."""
        return self.out_of_quota or (self._result == "key_refused" and not self._has_answered)

    @property
    def may_return(self) -> bool:
        """Whether to wait for it beyond a turn's deadline: not for a wrong key, or a url or model that was never found."""
        return not self.hopeless and (self._has_answered or self._result != "not_found")

    async def within_limits(self) -> None:
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None:
            await self._tokens.acquire(min(self._mean_tokens, self._tokens.max_rate))

    def succeeded(self, tokens: int) -> None:
        self._is_alive()
        self._has_answered = True
        if time.monotonic() >= self.unavailable_until:  # else the reason still applies: this call began before it
            self._result, self.problem = None, ""
        self._mean_tokens += 0.05 * (tokens - self._mean_tokens)

    def _is_alive(self) -> None:
        self._failures = self.opened = 0
        self._forbidden.clear()

    def failed(self, failure: CallFailed, *, dialogue: str, probe: bool) -> None:
        """Record a failure. `probe`: the call tested whether an open breaker may close."""
        if failure.result == "waiting":
            return
        if failure.result == "refused":  # the endpoint works, and refuses this request
            self._is_alive()
            return
        self.problem, self._result = str(failure), failure.result
        if failure.wait is not None:
            self._cool_down(failure.wait)
        if failure.result == "rate_limited":
            return
        if failure.result == "quota":
            self._cool_down(LONGEST_WAIT)
            return
        if failure.result == "forbidden":
            self._forbidden.add(dialogue)
            opens = len(self._forbidden) >= _DIALOGUES_FORBIDDEN
        else:
            self._failures += 1
            opens = failure.result in ("key_refused", "not_found") or self._failures >= self.settings.breaker_failures
        # Calls that were in progress when it opened add no information.
        if probe or (opens and not self.opened):
            self.opened += 1
            self._cool_down(min(LONGEST_WAIT, self.settings.breaker_seconds * 2 ** (self.opened - 1)))

    def _cool_down(self, seconds: float) -> None:
        self.unavailable_until = max(self.unavailable_until, time.monotonic() + seconds)
