"""Runs killed at random moments, and what becomes of them: the same command again must end with the same weights, bit by bit.

    python -m tests.kills [N] [--seed S]        N kills (default 20), in rollouts, updates and saving in turn; prints a table

The heavy libraries are imported once; each run is a fork of this process. Exits with 1 where a run does not end as the one that
nobody disturbed.
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

STEPS = 4
PHASES = {"rollout": "_new_batch", "update": "update_rows", "saving": "_save_checkpoint"}


@dataclass(frozen=True)
class Kill:
    """`delay` seconds into the `nth` time that a phase begins."""

    phase: str
    nth: int
    delay: float


def recipe(folder: Path, name: str) -> Recipe:
    overrides = [f"run.output_dir={folder}", f"run.name={name}", f"training.max_steps={STEPS}", "rollout.deterministic=true"]
    overrides += ["credit.centering=scene", "validation.scenarios=english/test", "validation.every=2"]
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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    table = Table("killed", "went on from", "same weights", "same metrics and validation", title=f"{args.kills} kills")
    good = 0
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        whole = RunFolder(folder / "whole")
        if in_a_fork(lambda: timed(recipe(folder, "whole"), folder / "taken.json"), log):
            print(log.read_text()[-3000:])
            return 1
        taken = json.loads((folder / "taken.json").read_text())
        for k in range(args.kills):
            phase = list(PHASES)[k % len(PHASES)]
            nth = rng.randrange(1, len(taken[phase]) + 1)
            kill = Kill(phase, nth, rng.uniform(0, taken[phase][nth - 1]))
            run = recipe(folder, f"killed-{k}")
            code = in_a_fork(lambda run=run, kill=kill: killed(run, kill), log)
            left = RunFolder(run.folder)
            kept = left.newest_checkpoint()
            partial = [p.name for p in run.folder.glob("checkpoint-*") if not is_complete(p)]
            again = in_a_fork(lambda run=run: train(run), log) if code == -signal.SIGKILL else code
            done = again == 0 and is_complete(left.final)
            same = done and weights(run.folder) == weights(whole.path)
            told = done and steps_in(left.metrics_file) == steps_in(whole.metrics_file)
            told = told and left.validation_file.read_text() == whole.validation_file.read_text()
            good += same and told
            moment = f"{kill.phase} {kill.nth}, after {kill.delay:.2f} s" + ("" if code < 0 else f" (ended with {code})")
            table.add_row(
                moment,
                (kept.name if kept else "the start") + (f", not {partial[0]}" if partial else ""),
                str(same),
                str(told),
            )
        if good < args.kills:
            print(log.read_text()[-3000:])
    Console(width=120).print(table)
    print(f"{good} of {args.kills} as if nothing had happened")
    return int(good < args.kills)


if __name__ == "__main__":
    sys.exit(main())
