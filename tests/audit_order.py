"""Does the audit's order of credits hold in training? On the example game, where both are cheap.

    python -m tests.audit_order [--groups 1024] [--seeds 1 2 3] [--out FILE.json]

Audits the policy that recipes/examples/guess.yaml starts from, then trains each kind of credit from there with every seed, and
prints the gain that was predicted (relative to `rollout`), the mean outcome over the 40 steps of training, and Spearman's
correlation of the two orders, with the 95 % interval of a bootstrap over seeds.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ctcgrpo.audit.kinds import kinds, package_sections
from ctcgrpo.audit.measure import measure, played_steps
from ctcgrpo.options import CreditOptions
from ctcgrpo.util.terminal import log_line
from recipes.examples.guess import make_trainer

BASELINE = "rollout"
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True}


def curve(folder: str, seed: int, options: CreditOptions) -> list[float]:
    """The mean outcome of each step's episodes."""
    trainer = make_trainer(folder, seed=seed, **QUIET, **asdict(options))
    trainer.train()
    return [entry["outcome/all"] for entry in trainer.state.log_history if "outcome/all" in entry]


def order(predicted: Sequence[float], measured: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Spearman's correlation of the predicted gains (K,) with the means over seeds of `measured` (K, S), and its interval."""
    rng = np.random.default_rng(0)
    seeds = measured.shape[1]
    drawn = [measured[:, rng.integers(seeds, size=seeds)].mean(axis=1) for _ in range(2000)]
    found = [float(stats.spearmanr(predicted, m).statistic) for m in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(stats.spearmanr(predicted, measured.mean(axis=1)).statistic), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    compared = kinds(package_sections(), CreditOptions(alpha=10.0), vine=True)
    compared = {
        name: o if o.credit != "vine" else CreditOptions(**{**asdict(o), "continuations": 2}) for name, o in compared.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, **QUIET, **asdict(compared[BASELINE]) | {"alpha": 10.0}, max_steps=asked.groups // 8)
        steps = played_steps(trainer, asked.groups // trainer.tasks_per_step, continuations=1)
        audit = measure(trainer, steps, compared, "recipes/examples/guess.yaml", baseline=BASELINE)
    areas: dict[str, list[float]] = {}
    for name, options in compared.items():
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as folder:
                areas.setdefault(name, []).append(float(np.mean(curve(folder, seed, options))))
        log_line(
            f"{name:20} gain {audit.credits[name].gain.value:6.2f}   mean outcome {np.mean(areas[name]):.3f}   {areas[name]}"
        )
    predicted = [audit.credits[name].gain.value or 0.0 for name in areas]
    rank, low, high = order(predicted, np.array(list(areas.values())))
    log_line(f"rank correlation of predicted gains and measured outcomes: {rank:.2f} ({low:.2f} to {high:.2f})")
    if asked.out:
        asked.out.write_text(json.dumps({"audit": audit.model_dump(), "areas": areas, "rank": [rank, low, high]}, indent=1))


if __name__ == "__main__":
    main()
