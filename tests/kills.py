"""Runs killed at random moments, and what becomes of them: the same command again must end with the same weights, bit by bit.

    python -m tests.kills [N] [--seed S] [--overlap]    N kills (default 20), in rollouts, updates and saving; prints a table

With `--overlap` the next step is played during the update, which depends on the clock, so weights differ. Then each step must have
been trained once, on one episode for each group and rollout, of the same tasks as in the uninterrupted run. All turns must have a
credit, and all episodes of a step one version of the weights: the current one, or the one a step before.

The heavy libraries are imported once; each run is a fork of this process. Exits with 1 where a run does not end as it must.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.train import train
from ctcgrpo.training.trainer import CTCGRPOTrainer
from ctcgrpo.util.files import is_complete
from tests.conftest import ROOT

STEPS, UPDATES = 4, 2
PHASES = {"rollout": "_take_played", "update": "update_rows", "saving": "_save_checkpoint"}


@dataclass(frozen=True)
class Kill:
    """`delay` seconds into the `nth` time that a phase begins."""

    phase: str
    nth: int
    delay: float


def recipe(folder: Path, name: str, overlap: bool) -> Recipe:
    overrides = [
        f"run.output_dir={folder}",
        f"run.name={name}",
        f"training.max_steps={STEPS}",
        f"training.updates_per_step={UPDATES}",
        "credit.centering=scene",
    ]
    overrides += ["validation.scenarios=english/test", "validation.every=2", f"rollout.deterministic={not overlap}"]
    overrides += ["rollout.overlap=1", "rollout.dtype=bfloat16", "training.save_every=1"] if overlap else []
    return load_recipe(ROOT / "recipes" / "tiny.yaml", overrides)


def in_a_fork(do: Callable[[], object], log: Path) -> int:
    """The exit code, negative for a signal."""
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hooked(phase: str, on_begin: Callable[[int], None], on_end: Callable[[], None] = lambda: None) -> None:
    """In this process, tell when a phase of training begins and ends."""
    plain, count = getattr(CTCGRPOTrainer, PHASES[phase]), iter(range(1, 10**6))

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        on_begin(next(count))
        result = plain(self, *arguments, **options)
        on_end()
        return result

    setattr(CTCGRPOTrainer, PHASES[phase], method)


def killed(what: Recipe, kill: Kill) -> None:
    def on_begin(n: int) -> None:
        if n == kill.nth:
            threading.Timer(kill.delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    hooked(kill.phase, on_begin)
    train(what)


def timed(what: Recipe, file: Path) -> None:
    """Train undisturbed, and note how long phases take."""
    taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        hooked(
            phase,
            lambda n, p=phase: taken[p].append(-time.perf_counter()),
            lambda p=phase: taken[p].append(taken[p].pop() + time.perf_counter()),
        )
    train(what)
    file.write_text(json.dumps(taken))


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def episodes_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The episodes of training, by step."""
    found: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(run.glob("traces/step-*.jsonl")):
        found.setdefault(int(file.name[5:11]), []).extend(map(json.loads, file.read_text().splitlines()))
    return found


def wrong_with_overlap(run: RunFolder, whole: RunFolder) -> str:
    """What is wrong with the steps of a run, or nothing."""
    if steps_in(run.metrics_file) != list(range(1, STEPS + 1)):
        return f"trained steps {steps_in(run.metrics_file)}"
    expected = episodes_of(whole.path)
    for step, episodes in episodes_of(run.path).items():
        places = sorted((e["group"], e["rollout"], e["task"]) for e in episodes)
        if places != sorted((e["group"], e["rollout"], e["task"]) for e in expected.pop(step, [])):
            return f"step {step}: {len(episodes)} episodes, or others"
        versions = {e["version"] for e in episodes}
        if len(versions) != 1 or not versions <= {UPDATES * (step - 1), UPDATES * (step - 2)}:
            return f"step {step}: versions {sorted(versions)}"
        if not all("credit" in turn for e in episodes if not e["failure"] for turn in e["turns"]):
            return f"step {step}: turns without credit"
    return f"no episodes of steps {sorted(expected)}" if expected else ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    same_what = ("steps and episodes", "versions") if args.overlap else ("same weights", "same metrics and validation")
    table = Table("killed", "went on from", *same_what, title=f"{args.kills} kills")
    good = hit = 0
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        whole = RunFolder(folder / "whole")
        if in_a_fork(lambda: timed(recipe(folder, "whole", args.overlap), folder / "taken.json"), log):
            print(log.read_text()[-3000:])
            return 1
        taken = json.loads((folder / "taken.json").read_text())
        for k in range(args.kills):
            phase = list(PHASES)[k % len(PHASES)]
            nth = rng.randrange(1, len(taken[phase]) + 1)
            kill = Kill(phase, nth, rng.uniform(0, taken[phase][nth - 1]))
            run = recipe(folder, f"killed-{k}", args.overlap)
            code = in_a_fork(lambda run=run, kill=kill: killed(run, kill), log)
            hit += code == -signal.SIGKILL
            left = RunFolder(run.folder)
            kept = left.newest_checkpoint()
            partial = [p.name for p in run.folder.glob("checkpoint-*") if not is_complete(p)]
            again = in_a_fork(lambda run=run: train(run), log) if code == -signal.SIGKILL else code
            done = again == 0 and is_complete(left.final)
            if args.overlap:
                wrong = wrong_with_overlap(left, whole) if done else "did not end"
                shown = wrong or "all once", ", ".join(str(es[0]["version"]) for es in episodes_of(run.folder).values())
                good += not wrong
            else:
                same = done and weights(run.folder) == weights(whole.path)
                logged = done and steps_in(left.metrics_file) == steps_in(whole.metrics_file)
                logged = logged and left.validation_file.read_text() == whole.validation_file.read_text()
                shown = str(same), str(logged)
                good += same and logged
            moment = f"{kill.phase} {kill.nth}, after {kill.delay:.2f} s" + ("" if code < 0 else f" (ended with {code})")
            table.add_row(
                moment,
                (kept.name if kept else "the start") + (f", not {partial[0]}" if partial else ""),
                *shown,
            )
        if good < args.kills:
            print(log.read_text()[-3000:])
    Console(width=120).print(table)
    ended = "without a lost, repeated or mixed episode" if args.overlap else "as if nothing had happened"
    print(f"{good} of {args.kills} {ended}; {hit} were killed, others ended before")
    return int(good < args.kills)


if __name__ == "__main__":
    sys.exit(main())
