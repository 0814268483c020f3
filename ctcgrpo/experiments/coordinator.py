"""A sweep on this machine: one coordinator, several workers, and a folder that records all progress.

    checkpoints/sweeps/NAME/
        sweep.yaml, sweep.json      the sweep's definition
        study.db                    Optuna's record of the trials
        trial-0003/seed-1/          a run's folder; a killed run resumes in it
        runs/ENVIRONMENT/VARIANT/   with variants, in place of trial-0003/; runs keep only their final weights
        best                        a link to the best checkpoint of the best trial, unless all trials are equal
        table.json                  the table, by trial
        curves.svg                  held-out curves, with variants

A trial is a point of the sweep, run with every seed; its score is the mean over seeds. Only the coordinator writes the study.
Trials that were in progress when it was killed, and failed trials, run again; their runs resume from their checkpoints.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from ctcgrpo.errors import BudgetSpent, OutputError, RecipeError, RunInterrupted
from ctcgrpo.experiments.spec import Parameter, Sweep
from ctcgrpo.experiments.table import all_equal, point_of, table_of
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import overrides
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import read_summary, read_validations, valid_validations
from ctcgrpo.util.files import checkpoints, is_complete, read_object, write_whole
from ctcgrpo.util.workers import end_with_parent, lock_folder

TRAIN = (sys.executable, "-m", "ctcgrpo", "train")
_POLL = 0.2
_FOLDER = "folder"
_STOPPED = "stopped: "  # how the last line of a run that paused begins
_PORTS = 100  # distance between the ports of two workers
_FREE = ("seconds", "description")  # fields of a sweep that may change before it is resumed


@dataclass
class _Running:
    """A trial in progress: its remaining runs, and the process of the current run."""

    trial: optuna.Trial
    changes: dict[str, Any]
    seeds: list[int]
    folder: Path
    worker: int
    process: subprocess.Popen[bytes] | None = None
    log_start: int = 0
    reported: set[int] = field(default_factory=set)
    pruned: bool = False

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / f"seed-{self.seeds[0]}")


def run_sweep(
    sweep: Sweep,
    recipe: Recipe,
    folder: Path,
    *,
    workers: int = 1,
    devices: Sequence[str] = (),
    extra: Sequence[str] = (),
    log_line: Callable[[str], None] = lambda text: None,
    train: Sequence[str] = TRAIN,
) -> list[dict[str, Any]]:
    """Run the remaining trials of a sweep; gives its table. `devices`: CUDA_VISIBLE_DEVICES of each worker; `extra`: overrides for
    every run; `train`: the command that takes a run's recipe and overrides.

    Raises OutputError where another coordinator has locked the folder, the folder contains another sweep, or variants cannot be
    compared; RunInterrupted on Ctrl-C, after the current runs have saved.
    """
    with lock_folder(folder):
        _refuse_another_sweep(folder, sweep, recipe, extra)
        seeds = sweep.seeds_of(recipe)
        rows = _Coordinator(sweep, seeds, folder, devices, extra, log_line, train, open_study(sweep, folder)).work(workers)
        _link_best(folder, rows)
        return rows


@dataclass(frozen=True)
class _Coordinator:
    _sweep: Sweep
    _seeds: Sequence[int]
    _folder: Path
    _devices: Sequence[str]
    _extra: Sequence[str]
    _log_line: Callable[[str], None]
    _train: Sequence[str]
    _study: optuna.Study

    def work(self, workers: int) -> list[dict[str, Any]]:
        """Run every remaining trial; gives the table."""
        if again := self._requeue_unfinished():
            self._log_line(f"{again} unfinished trials run again, from their checkpoints")
        self._log_estimate(workers)
        running: list[_Running] = []
        try:
            while True:
                for worker in [k for k in range(workers) if k not in {r.worker for r in running}]:
                    if (begun := self._begin(worker)) is None:
                        break
                    running.append(begun)
                    name = begun.folder.relative_to(self._folder)
                    self._log_line(f"{name}: {', '.join(overrides(begun.changes)) or 'the recipe as it is'}")
                if not running:
                    break
                for one in list(running):
                    if self._advance(one):
                        running.remove(one)
                        self._write_table()
                time.sleep(_POLL)
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted; the same command resumes {self._folder}") from None
        finally:
            _stop(running)
        return self._write_table()

    def _write_table(self) -> list[dict[str, Any]]:
        rows = table_of(self._sweep, self._study, self._folder)
        write_whole(self._folder / "table.json", json.dumps(rows, indent=2) + "\n")
        return rows

    # --- the study ---------------------------------------------------------------------------------------------------------------

    def _requeue_unfinished(self) -> int:
        """Enqueue failed trials again, and those of a killed coordinator, even of one killed while it did this. A point that a
        later trial already has is not enqueued again."""
        study = self._study
        for trial in study.trials:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
        asked = 0
        for trial in [trial for trial in study.trials if trial.state == TrialState.FAIL]:
            point = point_of(trial)
            if point and not any(point_of(later) == point for later in study.trials[trial.number + 1 :]):
                study.enqueue_trial(point, user_attrs={k: v for k, v in trial.user_attrs.items() if k == _FOLDER})
                asked += 1
        return asked

    def _begin(self, worker: int) -> _Running | None:
        if self._left() <= 0:
            return None
        trial = self._study.ask()
        point = {name: _suggested(trial, name, parameter) for name, parameter in self._sweep.axes.items()}
        name = trial.user_attrs.get(_FOLDER) or (
            f"runs/{point['environment']}/{point['variant']}" if self._sweep.variants else f"trial-{trial.number:04d}"
        )
        trial.set_user_attr(_FOLDER, name)
        trial.set_user_attr("seeds", self._seeds)
        return _Running(trial, self._sweep.changes(point), list(self._seeds), self._folder / name, worker)

    def _left(self) -> int:
        """The number of trials that wait, or that are left up to the cap, where each point counts once."""
        waiting = sum(trial.state == TrialState.WAITING for trial in self._study.trials)
        asked = {trial.user_attrs[_FOLDER] for trial in self._study.trials if _FOLDER in trial.user_attrs}
        cap = 0 if self._sweep.method == "grid" else self._sweep.run_cap or 0
        return max(waiting, cap - len(asked))

    def _log_estimate(self, workers: int) -> None:
        left = self._left()
        ended = [trial.duration for trial in self._study.trials if trial.state == TrialState.COMPLETE]
        took = [duration.total_seconds() / len(self._seeds) for duration in ended if duration is not None]
        seconds, source = (statistics.median(took), "measured") if took else (self._sweep.seconds, "from the sweep file")
        text = f"{left} trials x {len(self._seeds)} seeds to run, {workers} at a time"
        if left and seconds is not None:
            minutes = left * len(self._seeds) * seconds / min(workers, left) / 60
            text += f": about {minutes:.0f} minutes at {seconds:.0f} s per run ({source})"
        self._log_line(text)

    # --- a trial -----------------------------------------------------------------------------------------------------------------

    def _advance(self, one: _Running) -> bool:
        """Advance a trial; True when it has ended."""
        if one.process is None:
            if is_complete(one.run.final):
                return self._next_seed(one)
            one.process = self._start(one)
            return False
        code = one.process.poll()
        if code is None:
            if self._sweep.early_terminate is not None and not one.pruned and _is_worse(one):
                one.pruned = True
                one.process.send_signal(signal.SIGINT)
            return False
        one.process = None
        if one.pruned:
            self._study.tell(one.trial, state=TrialState.PRUNED)
            self._log_line(
                f"{one.folder.name}: stopped after step {max(one.reported)} (early_terminate): worse than other trials"
            )
            return True
        if not code:
            return self._next_seed(one)
        reason = _last_words(one.run, one.log_start)
        if reason.startswith(_STOPPED):  # its budget or quota is spent: other trials would stop too
            trial = one.folder.relative_to(self._folder)
            raise BudgetSpent(f"{trial}: {reason.removeprefix(_STOPPED)}. The sweep pauses; its own command resumes it")
        return self._failed(one, reason)

    def _next_seed(self, one: _Running) -> bool:
        try:
            score_of(one.run)
            if self._sweep.variants:  # gigabytes per run, and nothing here reads them
                for weights in (*checkpoints(one.run.path).values(), one.run.best):
                    shutil.rmtree(weights, ignore_errors=True)
            one.seeds.pop(0)
            if one.seeds:
                return False
            scores = [score_of(RunFolder(one.folder / f"seed-{seed}")) for seed in self._seeds]
        except OutputError as error:
            return self._failed(one, str(error))
        mean = sum(scores) / len(scores)
        self._study.tell(one.trial, mean)
        self._log_line(f"{one.folder.relative_to(self._folder)}: held-out score {mean:+.3f}")
        return True

    def _failed(self, one: _Running, reason: str) -> bool:
        one.trial.set_user_attr("reason", reason)
        self._study.tell(one.trial, state=TrialState.FAIL)
        self._log_line(f"{one.folder.relative_to(self._folder)}: failed: {reason}")
        return True

    def _start(self, one: _Running) -> subprocess.Popen[bytes]:
        one.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "MASTER_PORT": str(29500 + _PORTS * one.worker)}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[one.worker % len(self._devices)]
        seed = one.seeds[0]
        place = [f"run.seed={seed}", f"run.name=seed-{seed}", f"run.output_dir={one.folder}"]
        command = [*self._train, str(self._sweep.program), *overrides(one.changes), *self._extra, *place]
        with (one.folder / f"seed-{seed}.log").open("ab") as log:
            one.log_start = log.tell()
            how: dict[str, Any] = {"start_new_session": True, "preexec_fn": end_with_parent}
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, **how)


def open_study(sweep: Sweep, folder: Path) -> optuna.Study:
    """Optuna's record of the trials, created if missing. Raises OutputError for a damaged one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / "study.db"
    storage = f"sqlite:///{file}"
    try:
        known = optuna.load_study(study_name="sweep", storage=storage) if file.exists() else None
    except (KeyError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise OutputError(
            f"{file}: expected Optuna's record of a sweep ({str(error).splitlines()[0]}); remove it: finished runs are kept"
        ) from None
    # A sampler with the same seed after a restart would suggest the same points again.
    seed = len(known.trials) if known is not None else 0
    sampler = optuna.samplers.TPESampler(seed=seed) if sweep.method == "bayes" else optuna.samplers.RandomSampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if early := sweep.early_terminate:
        factor = max(2, round(early.eta))
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=early.min_iter, reduction_factor=factor)
    how: dict[str, Any] = {"sampler": sampler, "pruner": pruner, "direction": "maximize", "load_if_exists": True}
    study = optuna.create_study(study_name="sweep", storage=storage, **how)
    if sweep.method == "grid":
        for point in sweep.grid():
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def _suggested(trial: optuna.Trial, name: str, parameter: Parameter) -> Any:
    if parameter.choices is not None:
        return trial.suggest_categorical(name, parameter.choices)
    low, high = parameter.ends
    if parameter.is_whole:
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, step=parameter.q, log=parameter.distribution == "log_uniform_values")


def score_of(run: RunFolder) -> float:
    """A finished run's score after training. Raises OutputError where its figures are missing or damaged."""
    summary = read_summary(run.path)
    if summary is None:
        raise OutputError(f"{run.path}: no summary.json; expected one, with the score of the trial")
    valid_validations(run.validation_file)  # which the table reads
    if summary.after.overall is None:
        raise OutputError(f"{run.path}/summary.json: after.overall = None; expected a score")
    return summary.after.overall


def _stop(running: Sequence[_Running]) -> None:
    """Interrupt the runs, all at once, and wait until they have saved."""
    under_way = [one.process for one in running if one.process is not None and one.process.poll() is None]
    for process in under_way:
        process.send_signal(signal.SIGINT)
    for process in under_way:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=600)


def _is_worse(one: _Running) -> bool:
    """Report the validations of a trial's first run; True where the pruner stops it."""
    if one.seeds[0] != one.trial.user_attrs["seeds"][0]:
        return False
    for validation in read_validations(one.run.validation_file)[0]:
        step = validation.step
        if step and step not in one.reported and validation.by_scenario:
            one.trial.report(validation.overall, step)
            one.reported.add(step)
            if one.trial.should_prune():
                return True
    return False


def _last_words(run: RunFolder, start: int) -> str:
    """The reason at the end of a run's log, behind byte `start`."""
    log = run.path.parent / f"{run.path.name}.log"
    lines = [line for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith(("error:", _STOPPED))), (lines or ["nothing"])[-1])


# --- the folder ------------------------------------------------------------------------------------------------------------------


def _refuse_another_sweep(folder: Path, sweep: Sweep, recipe: Recipe, extra: Sequence[str]) -> None:
    file = folder / "sweep.json"
    program = recipe.model_dump(mode="json", exclude={"hardware": True, "run": {"name", "output_dir"}})
    asked = json.loads(sweep.model_dump_json(exclude_unset=True, exclude=set(_FREE)))
    asked |= {"overrides": list(extra), "program": program}
    if file.exists() and (before := read_object(file)) != asked:
        changed = [name for name in {*before, *asked} if before.get(name) != asked.get(name)]
        differ = f"{', '.join(sorted(changed))} differ"
        raise OutputError(f"{folder} contains another sweep ({differ}); choose another --name")
    write_whole(file, json.dumps(asked, indent=2) + "\n")


def _link_best(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`best`: the best checkpoint of the best run of the best trial; none where all trials are equal."""
    link = folder / "best"
    link.unlink(missing_ok=True)
    best = max((row for row in rows if row["score"] is not None), key=lambda row: row["score"], default=None)
    if best is None or all_equal(rows):
        return
    seed = max(best["by_seed"], key=lambda s: best["by_seed"][s])
    run = folder / best["trial"] / f"seed-{seed}"
    target = run / "best" if (run / "best").exists() else run / "final"
    link.symlink_to(target.relative_to(folder))


def check_devices(workers: int, devices: Sequence[str]) -> None:
    """Raises RecipeError for fewer sets of devices than workers."""
    if devices and len(devices) < workers:
        raise RecipeError(f"--devices: {len(devices)} sets for {workers} workers; expected one each: --devices 0,1 --devices 2,3")
