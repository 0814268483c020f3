"""A second judge for a finished run: a person or another model reads its held-out dialogues without knowing which are trained.

    python -m tests.blind pairs RUN [RUN ...] --out FOLDER [--pairs 64] [--seed 0]
    python -m tests.blind absolute RUN [RUN ...] --out FOLDER [--dialogues 64] [--seed 0]
    python -m tests.blind tally FOLDER ANSWERS.jsonl [ANSWERS.jsonl ...]

`pairs` writes FOLDER/pairs.md: the same scenario before and after training, as A and B in random order. `absolute` writes
FOLDER/lines.md: single dialogues before and after training, mixed, each line of the policy numbered. Give the reader that file
alone. The answers are in FOLDER/pairs.key.json and FOLDER/lines.key.json.

One ANSWERS file holds all answers of one reader, JSON lines in either form:

    {"pair": 3, "prefers": "A", "reason": "..."}        prefers: A, B or tie
    {"line": 12, "passes": true, "reason": "..."}       the reason is optional here

`tally` prints the share of pairs in which the trained policy is preferred, and the share of lines that pass before and after
training, each with its 95 % interval (Wilson). The intervals treat pairs and lines as independent; those of one scenario are
not. The exit status is 1 where an answer is malformed (FILE, line: what is wrong) or missing.

Dialogues end with the last reply of the policy: the user's answer to it would show what the user, whose judgement was
trained against, made of it. The user's lines in between depend on that judgement too; the sheets ask not to go by them. Runs
with the same `validation.seed` share their untrained dialogues, and a reader who meets one of them again may recognise it:
with several seeds, write one folder for each run, each with another --seed, and give each to a reader who has seen no other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ctcgrpo.errors import CtcGrpoError
from tests.blind.sheets import write_lines, write_pairs
from tests.blind.tally import tally
from tests.held_out import read_held_out


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.blind", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, unit in (("pairs", "pairs"), ("absolute", "dialogues")):
        sheet = commands.add_parser(name)
        sheet.add_argument("runs", metavar="RUN", type=Path, nargs="+")
        sheet.add_argument("--out", metavar="FOLDER", type=Path, required=True)
        sheet.add_argument(f"--{unit}", dest="number", type=int, default=64, help="how many (default: 64)")
        sheet.add_argument("--seed", type=int, default=0, help="of the choice and of the order (default: 0)")
    counted = commands.add_parser("tally")
    counted.add_argument("folder", metavar="FOLDER", type=Path)
    counted.add_argument("answers", metavar="ANSWERS", type=Path, nargs="+")
    return parser.parse_args(argv)


def main(argv: Sequence[str], console: Console) -> int:
    """The exit status: 0, 1 for malformed or missing answers, 2 for what cannot be read or written."""
    arguments = _arguments(argv)
    try:
        if arguments.command == "tally":
            return 1 if tally(arguments.folder, arguments.answers, console) else 0
        write = write_pairs if arguments.command == "pairs" else write_lines
        runs = [read_held_out(run) for run in arguments.runs]
        for message in write(runs, arguments.out, arguments.number, arguments.seed):
            console.print(message, markup=False, highlight=False, soft_wrap=True)
    except CtcGrpoError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Console(width=130)))
