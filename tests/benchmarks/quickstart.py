"""The quickstart's training part, against an earlier revision of this repository.

    python -m tests.benchmarks.quickstart BASE [--revision bba9ac7] [--steps 6] [--times 2]

BASE is the policy to start from, so that neither side builds one: checkpoints/quickstart/base, once the quickstart has run. Both
sides run the recipe in alternation, each a process with one thread; what is compared is a step's rollouts and update, as their
metrics say, without the first step (which also checks log-probabilities).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.timing import ratio

ROOT = Path(__file__).parents[2]


def seconds_a_step(tree: Path, base: Path, folder: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "recipes/quickstart.yaml", f"policy.model={base.resolve()}", f"training.max_steps={steps}"]
    command += [f"run.output_dir={folder}", "validation=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()][1:]
    return {part: statistics.median(line[f"seconds/{part}"] for line in lines) for part in ("rollout", "update")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--revision", default="bba9ac7")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--times", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        earlier = folder / "earlier"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(earlier), asked.revision], cwd=ROOT, check=True, capture_output=True
        )
        try:
            runs = [
                [seconds_a_step(tree, asked.base, folder / f"{tree.name}-{k}", asked.steps) for tree in (ROOT, earlier)]
                for k in range(asked.times)
            ]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(earlier)], cwd=ROOT, check=True)
    for part in ("rollout", "update"):
        print(f"{part}: {ratio([now[part] for now, _ in runs], [then[part] for _, then in runs])}")
    whole = ratio([sum(now.values()) for now, _ in runs], [sum(then.values()) for _, then in runs])
    print(f"a step, {asked.revision} to now: {whole}")


if __name__ == "__main__":
    main()
