"""The cost of LLM calls, and a budget that all processes of a store share and never exceed.

Before a call, its maximum cost is booked; afterwards the booking is settled with its real cost. A call that does not fit beside the
bookings waits for calls in progress, also of other processes. When none is in progress, the budget is spent and the run pauses, so
that no episode is scored on missing answers. Calls in progress of a killed process are settled with the mean cost of a call, since
the provider charged for some of them.
"""

from __future__ import annotations

import asyncio
import operator
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import Any

from ctcgrpo.errors import BudgetSpent, OutputError
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator.config import Budget

MICRO = 1_000_000
_SPENT, _BOOKED = "account", "booked"
_LOOK_SECONDS = 0.02
"""Seconds between two checks of the store by a call that waits for room in the budget; one call of a process at a time."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Sums over calls. `money` is in millionths of the currency unit, which add up exactly."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Spent) -> Spent:
        """Not below 0."""
        return Spent(*(max(0, a - b) for a, b in zip(astuple(self), astuple(other), strict=True)))

    def mean(self, calls: int, most: Spent) -> Spent:
        """The mean cost of `calls` calls, at most `most`."""
        each = max(1, self.calls)
        return Spent(calls, *(min(calls * n // each, m) for n, m in zip(astuple(self)[1:], astuple(most)[1:], strict=True)))


@dataclass
class _Book:
    """Total spending, and by process the maximum cost of its calls in progress."""

    spent: Spent
    booked: dict[str, Spent]

    @property
    def under_way(self) -> Spent:
        return sum(self.booked.values(), Spent())

    def settle(self, owner: str, most: Spent, cost: Spent) -> None:
        self.spent += cost
        left = self.booked.pop(owner, Spent()) - most
        if left.calls:
            self.booked[owner] = left

    def settle_lost(self, is_alive: Callable[[str], bool]) -> None:
        """Settle the calls of processes that ended without doing so."""
        for owner in [name for name in self.booked if not is_alive(name)]:
            most = self.booked[owner]
            self.settle(owner, most, self.spent.mean(most.calls, most))


class Account:
    """Books calls. The store keeps the total over restarts, for all processes that share it."""

    def __init__(self, budget: Budget, store: Store | None) -> None:
        self._budget = budget
        self.is_limited = budget.is_limited
        self._store = store
        self._here: dict[str, dict[str, Any]] = {}  # counters, where there is no store
        self._unsettled: list[tuple[Spent, Spent]] = []  # most and cost of calls that ended, until the store has them
        self._queue = asyncio.Lock()

    @property
    def spent(self) -> Spent:
        """The cost of all calls that ended. Raises OutputError for a store that cannot be read."""
        return Spent(**(self._store.counters() if self._store else self._here).get(_SPENT, {}))

    @asynccontextmanager
    async def booking(self, most: Spent, seconds: float = 60.0) -> AsyncIterator[Booking]:
        """A booking around one call. `most`: its maximum cost, also its cost unless `Booking.cost` is set, since a cancelled call
        may be charged for. Raises BudgetSpent where it does not fit into the budget and no call is in progress, or not within
        `seconds`, and where the store cannot be written to."""
        try:
            async with asyncio.timeout(seconds), self._queue:
                while not self._book(most):
                    # A random time, so that no process takes all the free room.
                    await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))
        except TimeoutError:
            raise BudgetSpent(f"{self.explain()} (waited {seconds:.1f} s for calls in progress)") from None
        booking = Booking(most)
        try:
            yield booking
        finally:
            self._unsettled.append((most, booking.cost))
            with self._open():
                pass

    def _book(self, most: Spent) -> bool:
        """Book a call; False where it has to wait. Raises BudgetSpent where it can never be made."""
        with self._open() as (book, owner):
            total, money, tokens = book.spent + book.under_way + most, self._budget.money, self._budget.tokens
            if (money is None or total.money <= money * MICRO) and (tokens is None or total.tokens <= tokens):
                book.booked[owner] = book.booked.get(owner, Spent()) + most
                return True
            if not book.under_way.calls:
                raise BudgetSpent(self._explain(book))
            return False

    @contextmanager
    def _open(self) -> Iterator[tuple[_Book, str]]:
        """The book, to change it, and the name of this process in it. Raises BudgetSpent, which pauses the run, where the store
        cannot be written."""
        try:
            with self._store.changing_counters() if self._store else nullcontext((self._here, None)) as (counters, owner):
                name = owner.name if owner else ""
                booked = {other: Spent(**most) for other, most in counters.get(_BOOKED, {}).items()}
                book = _Book(Spent(**counters.get(_SPENT, {})), booked)
                for most, cost in self._unsettled:
                    book.settle(name, most, cost)
                if owner:
                    book.settle_lost(owner.is_alive)
                yield book, name
                counters[_SPENT] = asdict(book.spent)
                counters[_BOOKED] = {other: asdict(most) for other, most in book.booked.items()}
        except OutputError as error:
            raise BudgetSpent(f"the cost of calls cannot be recorded: {error}") from None
        self._unsettled.clear()

    def explain(self) -> str:
        """The reason why another call cannot be made, for an error."""
        with self._open() as (book, _):
            return self._explain(book)

    def _explain(self, book: _Book) -> str:
        spent, under_way, budget = book.spent, book.under_way, self._budget
        limits = [f"{budget.money:g} {budget.currency}"] if budget.money is not None else []
        limits += [f"{budget.tokens} tokens"] if budget.tokens is not None else []

        def took(verb: str, what: Spent) -> str:
            return f"{verb} {what.tokens} tokens and {what.money / MICRO:.2f} {budget.currency}"

        state = "has no room for another call now" if under_way.calls else "is spent"
        booked = f"{under_way.calls} calls in progress {took('may take', under_way)}, " if under_way.calls else ""
        return (
            f"the budget of {' and '.join(limits)} {state}: {spent.calls} calls {took('took', spent)}, {booked}and another call "
            "could exceed it; raise budget in the configuration"
        )

    def summary(self) -> Mapping[str, Any]:
        """Raises OutputError for a store that cannot be read."""
        spent = asdict(self.spent)
        return spent | {"money": spent["money"] / MICRO, "currency": self._budget.currency}


class Booking:
    """A call in progress. Set `cost` to its real cost when it ends."""

    def __init__(self, most: Spent) -> None:
        self.cost = most
