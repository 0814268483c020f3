"""How long the scenario factory takes for sets of the sizes that it is made for, and how much memory.

    python -m tests.benchmarks.scenarios

Records are those of the English pack with seven of ten long words exchanged at random, so that sizes and vocabularies are those of
real sets and none is like another.
"""

from __future__ import annotations

import copy
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from ctcgrpo.environments.eibench.scenarios import read_records
from ctcgrpo.factory.duplicates import duplicates
from ctcgrpo.factory.rules import problems

Record = dict[str, Any]
SEVERAL = 3


def records(count: int, seed: int) -> list[Record]:
    base = [record for _, record in read_records("english", "train")]
    words = sorted({w for r in base for w in re.findall(r"[a-z]{4,}", r["aggressor_profile"]["system_prompt"].lower())})
    rng = random.Random(seed)

    def other(found: re.Match[str]) -> str:
        return rng.choice(words) if rng.random() < 0.7 else found[0]

    told = []
    for k in range(count):
        record = copy.deepcopy(base[k % len(base)])
        record["id"] = f"r-{seed}-{k}"
        for profile in ("aggressor_profile", "defender_profile"):
            lines = record[profile]["system_prompt"].splitlines()
            record[profile]["system_prompt"] = "\n".join(
                line if line.startswith("#") else re.sub(r"[a-z]{4,}", other, line) for line in lines
            )
        told.append(record)
    return told


def timed(what: str, do: Callable[[], object], times: int = SEVERAL) -> None:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    told = f"{sorted(seconds)[len(seconds) // 2]:.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
    print(f"{what}: {told}, peak of the process so far {peak:.0f} MB", flush=True)


def main() -> None:
    ours, held = records(2_000, 1), records(213, 2)
    placed = [(f"line {k}", record) for k, record in enumerate(ours)]
    timed("every rule on 2,000 records", lambda: list(problems(placed)))
    timed("2,000 within and against 213", lambda: (duplicates(ours), duplicates(ours, held)))
    many, more = records(20_000, 3), records(2_000, 4)
    timed("20,000 against 2,000", lambda: duplicates(many, more), 1)
    timed("20,000 within", lambda: duplicates(many), 1)


if __name__ == "__main__":
    main()
