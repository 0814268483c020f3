"""Two sides, run in turns on the same machine, and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Of `slow` to `fast` seconds: the median of the pairs, and the smallest and largest."""

    fast: float
    slow: float
    median: float
    spread: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.2f} x ({low:.2f} to {high:.2f}); {self.slow:.3f} s against {self.fast:.3f} s"


def alternate(sides: Mapping[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of each side, `times` times, in turns, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(times + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if k:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(fast: list[float], slow: list[float]) -> Ratio:
    pairs = [b / a for a, b in zip(fast, slow, strict=True)]
    return Ratio(statistics.median(fast), statistics.median(slow), statistics.median(pairs), (min(pairs), max(pairs)))
