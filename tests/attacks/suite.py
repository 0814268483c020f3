"""What an attack is: a function that makes tries and says what did not hold. Its time and its tries are bounded.

    @attack("server", seconds=20)
    def slow_heads(tries: Tries) -> None:
        with tries.one("a byte a second"):
            assert ...

Attacks that take less than a second are `quick`: tests/unit/test_attacks.py runs them too.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUBJECTS = ("server", "user", "endpoints", "client", "texts", "models", "run_files", "clocks", "secrets", "processes")
"""The modules that hold attacks; each is a subject."""
_MOST_SHOWN = 20
_SHOW_EVERY = 30.0


class TimeIsUp(TimeoutError):
    """An attack has taken as long as it may."""


@dataclass
class Tries:
    """Of one attack: how many were made and which did not hold. `mutations` is how many random ones a fuzzer makes, `seed` decides
    them, `folder` is empty and goes away."""

    folder: Path
    seed: int = 0
    mutations: int = 300
    count: int = 0
    now: str = ""
    """What is tried."""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    deadline: float = 0.0
    """On time.monotonic()'s clock: when a fuzzer stops."""
    show: Callable[[str], None] = lambda line: None
    """Gets a line for each failure as it happens, and for the progress of a fuzzer."""
    shown_at: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def one(self, what: str) -> Iterator[None]:
        """A try: what it raises is a failure of it, and the next one is made."""
        self.count += 1
        self.now = what
        try:
            yield
        except TimeIsUp:
            raise
        except Exception as error:  # noqa: BLE001 - whatever escapes is what the attack looks for
            self.failed(what, error)

    def failed(self, what: str, error: BaseException) -> None:
        said = " ".join((str(error) or type(error).__name__).split())
        kind = "" if isinstance(error, AssertionError | TimeIsUp) else f"{type(error).__name__}: "
        self.failures.append(f"{what}: {kind}{said[:600]}")
        self.show(f"failed: {self.failures[-1]}")

    def progress(self, done: int) -> None:
        """Show how many mutations were made, every 30 s at most: a fuzzer may run for an hour."""
        if time.monotonic() > self.shown_at + _SHOW_EVERY:
            self.shown_at = time.monotonic()
            self.show(f"{done} of {self.mutations} mutations, {len(self.failures)} failed")

    def rng(self, *parts: object) -> random.Random:
        return random.Random(":".join(map(str, (self.seed, *parts))))


@dataclass(frozen=True)
class Result:
    tries: int
    failures: list[str]
    notes: list[str]
    seconds: float

    @property
    def held(self) -> bool:
        return not self.failures

    @property
    def shown(self) -> list[str]:
        more = len(self.failures) - _MOST_SHOWN
        return [*self.failures[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]


@dataclass(frozen=True)
class Attack:
    subject: str
    name: str
    about: str
    make: Callable[[Tries], None]
    seconds: float
    quick: bool

    def run(
        self,
        *,
        seed: int = 0,
        mutations: int = 300,
        seconds: float | None = None,
        show: Callable[[str], None] = lambda line: None,
    ) -> Result:
        """Raises nothing: an attack that takes longer than it may, or that makes no try, has failed."""
        bound = seconds or self.seconds
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as folder:
            tries = Tries(Path(folder), seed, mutations, deadline=started + 0.9 * bound, show=show)
            try:
                with _bounded(bound):
                    self.make(tries)
            except Exception as error:  # noqa: BLE001 - an attack that ends with an error has not shown that anything holds
                tries.failed(f"after {tries.count} tries" + (f", in {tries.now!r}" if tries.now else ""), error)
        if not tries.count:
            tries.failures.append("no try was made")
        return Result(tries.count, tries.failures, tries.notes, time.monotonic() - started)


ATTACKS: dict[str, Attack] = {}


def attack(
    subject: str, *, seconds: float = 30.0, quick: bool = False
) -> Callable[[Callable[[Tries], None]], Callable[[Tries], None]]:
    """Register a function by its name; the first line of its docstring says what is tried."""

    def register(make: Callable[[Tries], None]) -> Callable[[Tries], None]:
        name = make.__name__.replace("_", "-")
        assert name not in ATTACKS, f"two attacks are named {name}"
        assert make.__doc__, f"{name} does not say what it tries"
        ATTACKS[name] = Attack(subject, name, make.__doc__.strip().splitlines()[0], make, seconds, quick)
        return make

    return register


def load() -> dict[str, Attack]:
    """All attacks by name, in the order of SUBJECTS."""
    for subject in SUBJECTS:
        importlib.import_module(f"tests.attacks.{subject}")
    return dict(sorted(ATTACKS.items(), key=lambda item: SUBJECTS.index(item[1].subject)))


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after so many seconds. SIGUSR2 is the one signal that the product leaves alone."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeIsUp(f"it was still at work after {seconds:g} s")

    main = threading.main_thread()
    previous = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(main.ident or 0, signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, previous)
