"""What each process sends the others of a step's samples: as arrays with shared prefixes, against pickled tuples.

    python -m tests.benchmarks.exchange [--times 5] [--groups 16] [--reasoning 150]

1,024 turn samples of about 1,050 tokens: 16 groups of 8 rollouts of 8 turns. Prints bytes, and the seconds to make and read them.
"""

from __future__ import annotations

import argparse
import pickle

from ctcgrpo.training.exchange import packed, unpacked
from tests.benchmarks.packing import dialogues
from tests.benchmarks.timing import alternate, ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--reasoning", type=int, default=150)
    asked = parser.parse_args()
    samples = dialogues(groups=asked.groups, reasoning=asked.reasoning)
    as_tuples = [(tuple(s.prompt_ids.tolist()), tuple(s.completion_ids.tolist()), s.advantage) for s in samples]
    pickled, arrays = len(pickle.dumps(as_tuples)), sum(array.nbytes for array in packed(samples))
    print(f"{len(samples):,} samples, {sum(map(len, samples)):,} tokens")
    print(f"bytes: {pickled:,} pickled tuples, {arrays:,} arrays: {pickled / arrays:.1f} times fewer")
    seconds = alternate(
        {
            "arrays": lambda: unpacked(packed(samples)),
            "tuples": lambda: pickle.loads(pickle.dumps(as_tuples)),
        },
        asked.times,
    )
    print(f"seconds to make and read: pickled tuples to arrays {ratio(seconds['arrays'], seconds['tuples'])}")


if __name__ == "__main__":
    main()
