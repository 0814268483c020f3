"""Planning and packing a step, against TRL's trie on the same samples.

    python -m tests.benchmarks.planning [--times 5]

1,024 turn samples of about 1,050 tokens: 16 groups of 8 rollouts of 8 turns. Both sides make what a forward pass takes, from
samples as they come, for one process and rows of 16,384 tokens.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ctcgrpo.training.packing import Costs
from ctcgrpo.training.planning import plan
from ctcgrpo.types import TurnSample
from tests.benchmarks.packing import dialogues
from tests.benchmarks.timing import alternate, ratio

TOKENS_PER_ROW = 16384


def ours(samples: Sequence[TurnSample]) -> int:
    costs = Costs(token=1.0, pair=0.0005, trained=0.3)
    return plan(samples, packed=True, tokens_per_row=TOKENS_PER_ROW, pad_id=0, costs=costs).forwarded


def theirs(samples: Sequence[dict[str, Any]]) -> int:
    """As TRL's asynchronous trainer fills its rows: each sample into the one at hand, while it fits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.async_grpo.packing import TreeRow

    rows = [TreeRow()]
    for sample in samples:
        if not rows[-1].fits(sample, TOKENS_PER_ROW):
            rows.append(TreeRow())
        rows[-1].add(sample)
    return sum(len(row.pack()["input_ids"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    samples = dialogues(groups=16, reasoning=150)
    for_trl = [
        {
            "input_ids": torch.tensor([*s.prompt_ids, *s.completion_ids]),
            "completion_mask": torch.tensor([0] * len(s.prompt_ids) + [1] * len(s.completion_ids)),
            "old_log_probs": torch.zeros(len(s)),
            "advantage": s.advantage,
            "group_id": k // 64,
        }
        for k, s in enumerate(samples)
    ]
    total = sum(map(len, samples))
    print(f"{len(samples):,} samples, {total:,} tokens; forwarded: {ours(samples):,} here, {theirs(for_trl):,} in TRL's rows")
    seconds = alternate({"ours": lambda: ours(samples), "theirs": lambda: theirs(for_trl)}, asked.times)
    print(f"planning and packing, TRL's trie to ours: {ratio(seconds['ours'], seconds['theirs'])}")


if __name__ == "__main__":
    main()
