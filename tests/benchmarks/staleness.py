"""What overlap costs in learning, and what old weights cost without importance weights. On the example game.

    python -m tests.benchmarks.staleness [--seeds 1 2 3] [--every 10]

Trains recipes/examples/guess.yaml with every seed: without overlap, with it, and with overlap and an engine that takes new weights
only in every so-many-th step, with importance weights and without. Prints the mean outcome of the last ten steps of each, with
Student's t intervals over seeds, and the metrics that show how far engine and trainer are apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import PrinterCallback

from ctcgrpo import CTCGRPOTrainer
from recipes.examples.guess import make_trainer

LAST = 10
SHOWN = ("importance/gap", "importance/mean", "importance/truncated")


def take_weights_rarely(trainer: CTCGRPOTrainer, every: int) -> None:
    """From now on the engine keeps its weights for `every` steps, whatever it is given."""
    engine: Any = trainer.engine
    take = engine._batcher.take_weights
    taken = iter(range(10**6))
    engine._batcher.take_weights = lambda: take() if next(taken) % every == 0 else None


def run(seed: int, every: int, **options: Any) -> dict[str, float]:
    """Means over the last steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, seed=seed, sampling_dtype="bfloat16", report_to="none", disable_tqdm=True, **options)
        trainer.engine._batcher._dtype = torch.float32  # the copy is exact, so that only its age makes it differ
        if every > 1:
            take_weights_rarely(trainer, every)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "outcome/all" in entry][-LAST:]
        names = ("outcome/all", *(name for name in SHOWN if name in entries[-1]))
        return {name: statistics.fmean(entry[name] for entry in entries) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=10, help="steps for which the engine keeps old weights")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ctcgrpo").setLevel(logging.ERROR)
    kinds: dict[str, tuple[int, dict[str, Any]]] = {
        "overlap 0": (1, {"overlap": 0}),
        "overlap 1": (1, {"overlap": 1}),
        f"weights up to {asked.every} steps old, corrected": (asked.every, {"overlap": 1}),
        f"weights up to {asked.every} steps old, not corrected": (asked.every, {"overlap": 1, "importance": "none"}),
    }
    for name, (every, options) in kinds.items():
        found = [run(seed, every, **options) for seed in asked.seeds]
        outcomes = np.array([f["outcome/all"] for f in found])
        half = float(stats.t.ppf(0.975, len(found) - 1) * outcomes.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else 0.0
        metrics = ", ".join(f"{key} {statistics.fmean(f[key] for f in found):.3f}" for key in found[0] if key != "outcome/all")
        each = ", ".join(f"{outcome:.2f}" for outcome in outcomes)
        mean = outcomes.mean()
        print(f"{name}: outcome {mean:.3f} ({mean - half:.3f} to {mean + half:.3f}; {each}); {metrics}", flush=True)


if __name__ == "__main__":
    main()
