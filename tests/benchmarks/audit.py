"""The gradients of a credit audit against the update of the same turns: seconds and peak memory.

    python -m tests.benchmarks.audit [--turns 2 8] [--times 3] [--threads 2] [--groups 1] [--layers 8] [--width 512]

Dialogues as in packing.py. The update shares prefixes, and computes gradients of weights; the audit does neither, and works one
sequence a turn. What it computes serves all kinds of credit at once.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment
from ctcgrpo.audit.kinds import package_sections
from ctcgrpo.policy.builtin import build_builtin
from ctcgrpo.policy.loading import load_tokenizer
from tests.benchmarks.packing import dialogues, most_resident, random_qwen3
from tests.benchmarks.timing import alternate, ratio


def sides(turns: int, groups: int, layers: int, width: int, folder: str) -> Mapping[str, Callable[[], object]]:
    tokenizer = load_tokenizer(build_builtin("builtin/tiny", Path(folder), 0), None)
    args = CTCGRPOConfig(
        folder,
        bf16=False,
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
        tokens_per_row=4096,
        gradient_checkpointing=False,
        report_to="none",
    )
    made = CTCGRPOTrainer(random_qwen3(layers, width), args, Environment, [{}], processing_class=tokenizer)
    samples = dialogues(groups=groups, turns=turns)

    def update() -> None:
        made.update(made.model, samples)
        made.model.zero_grad(set_to_none=True)

    return {"update": update, "audit": lambda: made.sketches(samples)}


def peak(name: str, threads: int, *rest: int) -> int:
    """MiB of one side, in a process of its own."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        return most_resident(sides(*rest, folder=folder)[name])  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("times", 3), ("threads", 2), ("groups", 1), ("layers", 8), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 8])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # what is freed goes back to the system, and is not counted twice
    for turns in asked.turns:
        rest = (turns, asked.groups, asked.layers, asked.width)
        with tempfile.TemporaryDirectory() as folder:
            seconds = alternate(sides(*rest, folder), asked.times)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as alone:
            mib = {name: alone.apply(peak, (name, asked.threads, *rest)) for name in ("update", "audit")}
        took = ratio(seconds["update"], seconds["audit"])
        print(
            f"{turns} turns: {took}, for all {len(package_sections())} kinds of credit; peak memory {mib['audit']} MiB against "
            f"{mib['update']} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
