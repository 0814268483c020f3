"""Two processes against one: the trainer's update on the same samples, one thread a process, over gloo.

    python -m tests.benchmarks.processes [--times 3]

Each run is a launch of its own (torchrun), in alternation; what is timed is `update` alone, plan, gathering and the exchange of
gradients included, after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ctcgrpo.policy.builtin import build_builtin
from tests import sameness
from tests.benchmarks.packing import dialogues, policy

UPDATES = 2


def worker(base: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = sameness.build_trainer(base, folder, tokens_per_row=4096)
        model = trainer.accelerator.prepare(trainer.model)
        n, me = trainer.accelerator.num_processes, trainer.accelerator.process_index
        samples = dialogues(groups=2, turns=6, reasoning=60)
        mine = samples[len(samples) // n * me : len(samples) // n * (me + 1)]
        seconds = []
        for _ in range(UPDATES + 1):
            trainer.accelerator.wait_for_everyone()
            started = time.perf_counter()
            trainer.update(model, mine)
            trainer.accelerator.wait_for_everyone()
            seconds.append(time.perf_counter() - started)
            model.zero_grad()
        if trainer.accelerator.is_main_process:
            imbalance = trainer._metrics["train"]["packing/imbalance"][-1]
            print(json.dumps({"processes": n, "seconds": statistics.median(seconds[1:]), "imbalance": imbalance}))


def launched(base: str, processes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "tests.benchmarks.processes",
        "--worker",
        base,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said: dict[str, float] = next(json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{"))
    assert said["processes"] == processes
    return said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--worker")
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = build_builtin("builtin/tiny", Path(folder), 0)  # for its tokenizer
        policy(torch.device("cpu")).save_pretrained(base)
        pairs = [(launched(base, 1), launched(base, 2)) for _ in range(asked.times)]
    ratios = [one["seconds"] / two["seconds"] for one, two in pairs]
    one, two = (statistics.median(p[k]["seconds"] for p in pairs) for k in (0, 1))
    print(f"two processes to one: {statistics.median(ratios):.2f} x the throughput ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{one:.2f} s against {two:.2f} s an update; imbalance {pairs[0][1]['imbalance']:.3f}")


if __name__ == "__main__":
    main()
