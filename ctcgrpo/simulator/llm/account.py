"""What the simulator's calls cost, and a budget that is never exceeded.

A call books the most that it can cost before it is made, and what it did cost afterwards. When the next call does not fit, it
waits for those under way; when none is under way, the budget is spent: the run pauses, and nothing is scored on what was not
paid for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ctcgrpo.errors import BudgetSpent
from ctcgrpo.simulator.store import Store

MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Money for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In millionths of the currency unit, which add up exactly."""
        return round(prompt_tokens * self.prompt + completion_tokens * self.completion)


@dataclass(frozen=True, slots=True)
class Spent:
    """Sums over all calls that were ever booked. `money` is in millionths of the currency unit."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True, slots=True)
class Budget:
    """None for no limit."""

    money: float | None = None
    tokens: int | None = None
    currency: str = "USD"

    def allows(self, spent: Spent) -> bool:
        return (self.money is None or spent.money <= self.money * MICRO) and (
            self.tokens is None or spent.tokens <= self.tokens
        )


class Account:
    """Books calls; what was spent is kept in the store, across restarts and processes on this machine."""

    def __init__(self, budget: Budget, store: Store | None) -> None:
        self._budget = budget
        self._store = store
        self._here = Spent()
        self._reserved: dict[object, Spent] = {}
        self._settled = asyncio.Condition()

    @property
    def spent(self) -> Spent:
        return Spent(**self._store.counters("account")) if self._store is not None else self._here

    @asynccontextmanager
    async def booking(self, most: Spent) -> AsyncIterator[Booking]:
        """Around one call: `most` is the most that it can cost. Raises BudgetSpent where that cannot be had any more."""
        await self._reserve(booking := Booking(), most)
        try:
            yield booking
        finally:
            async with self._settled:
                del self._reserved[booking]
                self._add(booking.cost)
                self._settled.notify_all()

    async def _reserve(self, booking: Booking, most: Spent) -> None:
        async with self._settled:
            while not self._fits(most):
                if not self._reserved:
                    raise BudgetSpent(self._explain())
                await self._settled.wait()
            self._reserved[booking] = most

    def _fits(self, most: Spent) -> bool:
        if self._budget.money is None and self._budget.tokens is None:
            return True
        total = self.spent.plus(most)
        for reserved in self._reserved.values():
            total = total.plus(reserved)
        return self._budget.allows(total)

    def _add(self, cost: Spent) -> None:
        if self._store is not None:
            self._store.count("account", asdict(cost))
        else:
            self._here = self._here.plus(cost)

    def _explain(self) -> str:
        spent, budget = self.spent, self._budget
        limits = [f"{budget.money:g} {budget.currency}"] if budget.money is not None else []
        limits += [f"{budget.tokens} tokens"] if budget.tokens is not None else []
        return (
            f"the simulator's budget of {' and '.join(limits)} is spent: {spent.calls} calls took {spent.tokens} tokens and "
            f"{spent.money / MICRO:.2f} {budget.currency}, and another call could exceed it; "
            "raise it in the simulator's configuration (budget)"
        )

    def summary(self) -> Mapping[str, Any]:
        spent = self.spent
        return {
            "calls": spent.calls,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
            "money": spent.money / MICRO,
            "currency": self._budget.currency,
        }


class Booking:
    """A call under way; `cost` is what it turned out to cost."""

    def __init__(self) -> None:
        self.cost = Spent()
