"""Attacks on the product, over loopback and in temporary folders, bounded in time and number.

    python -m tests.attacks                                 all of them; a table at the end
    python -m tests.attacks slow-heads run-files            some, by name or by subject
    python -m tests.attacks read-run-files --mutations 10000 --seed 1
    python -m tests.attacks --list

Exits with 1 where one failed, and prints with which seed.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from tests.attacks.suite import SUBJECTS, Attack, load


def chosen(names: list[str], attacks: dict[str, Attack]) -> list[Attack]:
    """By name or subject. Exits with 2 for a name that is neither."""
    subjects = {name.replace("-", "_") for name in names} & set(SUBJECTS)
    unknown = [name for name in names if name not in attacks and name.replace("-", "_") not in subjects]
    if unknown:
        print(f"no attack is named {', '.join(unknown)}; --list names them", file=sys.stderr)
        sys.exit(2)
    return [a for a in attacks.values() if not names or a.name in names or a.subject in subjects]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks")
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks or subjects; all of them by default")
    parser.add_argument("--list", action="store_true", help="name the attacks")
    parser.add_argument("--mutations", type=int, default=300, help="how many random ones a fuzzer makes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    attacks = load()
    console = Console(width=None if sys.stdout.isatty() else 132)
    if args.list:
        table = Table("attack", "subject", "quick", "what is tried")
        for one in attacks.values():
            table.add_row(one.name, one.subject, "yes" if one.quick else "", one.about)
        console.print(table)
        return 0
    table = Table("attack", "tries", "result", "seconds", title=f"attacks, seed {args.seed}")
    failed = 0
    for one in chosen(args.names, attacks):
        scale = max(1.0, args.mutations / 300)
        result = one.run(
            seed=args.seed,
            mutations=args.mutations,
            seconds=one.seconds * scale,
            show=lambda line, name=one.name: print(f"{name}: {line}", flush=True),  # type: ignore[misc]
        )
        failed += not result.held
        verdict = "held" if result.held else f"{len(result.failures)} failed"
        table.add_row(f"{one.subject}/{one.name}", str(result.tries), verdict, f"{result.seconds:.1f}")
        print(f"{one.subject}/{one.name}: {verdict} ({result.tries} tries, {result.seconds:.1f} s)", flush=True)
        for line in result.notes:
            print(f"    {line}")
        for line in result.shown:
            print(f"    FAILED (seed {args.seed}) {line}", flush=True)
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
