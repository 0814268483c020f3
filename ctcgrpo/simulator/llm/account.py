"""What the simulator's calls cost, and a budget that is never exceeded.

A call is booked with the most that it can cost before it is made, and with what it did cost afterwards. When the next call does
not fit, it waits for those under way; when none is under way, the budget is spent: the run pauses, and nothing is scored on
what was not paid for. What was under way when a process was killed stays booked with the most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ctcgrpo.errors import BudgetSpent, OutputError
from ctcgrpo.simulator.config import Budget, Price
from ctcgrpo.simulator.store import Store

MICRO = 1_000_000
_NAME = "account"


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

    def times(self, factor: int) -> Spent:
        return Spent(*(factor * n for n in asdict(self).values()))

    def plus(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def cost(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """In millionths of the currency unit, which add up exactly."""
    return round(prompt_tokens * price.prompt + completion_tokens * price.completion)


def _allows(budget: Budget, spent: Spent) -> bool:
    return (budget.money is None or spent.money <= budget.money * MICRO) and (
        budget.tokens is None or spent.tokens <= budget.tokens
    )


class Account:
    """Books calls; what was spent is kept in the store, over restarts and by all processes that share it."""

    def __init__(self, budget: Budget, store: Store | None) -> None:
        self._budget = budget
        self._store = store
        self._here = Spent()
        self._under_way = 0
        self._settled = asyncio.Condition()

    @property
    def spent(self) -> Spent:
        """Calls under way stand in it with the most that they can cost."""
        return Spent(**self._store.counters(_NAME)) if self._store is not None else self._here

    @property
    def is_limited(self) -> bool:
        return self._budget.money is not None or self._budget.tokens is not None

    @asynccontextmanager
    async def booking(self, most: Spent) -> AsyncIterator[Booking]:
        """Around one call: `most` is the most that it can cost, and what it is booked with unless `cost` is set: a call that was
        cancelled or killed may have been charged for. Raises BudgetSpent where that cannot be had any more."""
        async with self._settled:
            while not self._add(most):
                if not self._under_way:
                    raise BudgetSpent(self.explain())
                await self._settled.wait()
            self._under_way += 1
        booking = Booking(most)
        try:
            yield booking
        finally:
            self._under_way -= 1
            try:
                self._add(booking.cost.plus(most.times(-1)), check=False)
            finally:  # those who wait for the budget must be woken whatever becomes of this call
                async with self._settled:
                    self._settled.notify_all()

    def _add(self, more: Spent, *, check: bool = True) -> bool:
        def allowed(sums: Spent) -> bool:
            return not check or _allows(self._budget, sums)

        if self._store is not None:
            return self._counted(more, allowed)
        if allowed(sums := self._here.plus(more)):
            self._here = sums
            return True
        return False

    def _counted(self, more: Spent, allowed: Callable[[Spent], bool]) -> bool:
        """In the store. Raises BudgetSpent, which pauses the run, where it cannot be written to."""
        assert self._store is not None
        try:
            return self._store.count(_NAME, asdict(more), lambda sums: allowed(Spent(**sums)))
        except OutputError as error:
            raise BudgetSpent(f"what calls cost cannot be kept: {error}; make room there, then resume") from None

    def explain(self) -> str:
        """That the budget is spent, for an error."""
        spent, budget = self.spent, self._budget
        limits = [f"{budget.money:g} {budget.currency}"] if budget.money is not None else []
        limits += [f"{budget.tokens} tokens"] if budget.tokens is not None else []
        return (
            f"the budget of {' and '.join(limits)} is spent: {spent.calls} calls took {spent.tokens} tokens and "
            f"{spent.money / MICRO:.2f} {budget.currency}, and another call could exceed it; "
            "raise it in the configuration that sets it (budget)"
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

    def __init__(self, most: Spent) -> None:
        self.cost = most
