"""A sweep without W&B: one coordinator, several workers, and a folder that says at any time what has been done.

    checkpoints/sweeps/NAME/
        sweep.yaml          what is swept
        study.db            Optuna's record of the trials
        trial-0003/seed-1/  a run's folder; what was killed goes on in it
        best                a link to the best checkpoint of the best trial, unless all trials are equal
        table.json          the table, by trial

A trial is a point of the sweep, played with every value of run.seed; its score is the mean of theirs. The coordinator alone owns
the study. Trials that it left under way when it was killed are asked for again, and their runs go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
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

from ctcgrpo.errors import OutputError, RecipeError, RunInterrupted
from ctcgrpo.files import is_complete, read_json, write_whole
from ctcgrpo.recipe import Recipe, overrides
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.run_records import Outcome, read_summary
from ctcgrpo.sweep.spec import SEED, Parameter, Sweep
from ctcgrpo.sweep.table import all_equal, table_of
from ctcgrpo.validation import read_validations, valid_validations
from ctcgrpo.workers import alone, end_with_parent

TRAIN = (sys.executable, "-m", "ctcgrpo", "train")
_POLL = 0.2
_FOLDER = "folder"
_PORTS = 100
"""How far apart the ports of two workers are."""


@dataclass
class _Running:
    """A trial under way: the runs that it still has to make, and the process of the one being made."""

    trial: optuna.Trial
    chosen: dict[str, Any]
    seeds: list[int]
    folder: Path
    worker: int
    process: subprocess.Popen[bytes] | None = None
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
    say: Callable[[str], None] = lambda text: None,
    train: Sequence[str] = TRAIN,
) -> list[dict[str, Any]]:
    """Run what is left of a sweep; gives its table. `devices`: for each worker what CUDA_VISIBLE_DEVICES is to be; `extra`:
    overrides for every run; `train`: the command that a run's recipe and overrides are given to.

    Raises OutputError where another coordinator has the folder, or it holds another sweep; RunInterrupted on Ctrl-C, after the runs
    under way have saved.
    """
    with alone(folder):
        _keep_to(folder, sweep, extra)
        study = _study(sweep, recipe, folder)
        again = _take_up(study, sweep)
        if again:
            say(f"{again} trials were left under way; they go on")
        running: list[_Running] = []
        try:
            while True:
                free = [k for k in range(workers) if k not in {r.worker for r in running}]
                for worker in free:
                    if (begun := _begin(study, sweep, recipe, folder, worker)) is None:
                        break
                    running.append(begun)
                    say(f"{begun.folder.name}: {', '.join(overrides(begun.chosen)) or 'the recipe as it is'}")
                if not running:
                    break
                for one in list(running):
                    if _advance(study, one, sweep, devices, extra, say, train):
                        running.remove(one)
                        write_whole(folder / "table.json", json.dumps(table_of(study, folder), indent=2) + "\n")
                time.sleep(_POLL)
        except KeyboardInterrupt:
            raise RunInterrupted(f"interrupted; the same command goes on in {folder}") from None
        finally:
            _stop(running)
        rows = table_of(study, folder)
        write_whole(folder / "table.json", json.dumps(rows, indent=2) + "\n")
        _link_best(folder, rows)
        return rows


# --- the study -------------------------------------------------------------------------------------------------------------------


def _study(sweep: Sweep, recipe: Recipe, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / "study.db"
    storage = f"sqlite:///{file}"
    try:
        known = optuna.load_study(study_name="sweep", storage=storage) if file.exists() else None
    except (KeyError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise OutputError(
            f"{file} is no record of a sweep ({str(error).splitlines()[0]}); remove it: finished runs are kept, and read again"
        ) from None
    # A sampler that begins with the same seed after a restart would ask for the same points again.
    seed = len(known.trials) if known is not None else 0
    sampler = optuna.samplers.TPESampler(seed=seed) if sweep.method == "bayes" else optuna.samplers.RandomSampler(seed=seed)
    early = sweep.early_terminate
    pruner: optuna.pruners.BasePruner = (
        optuna.pruners.NopPruner()
        if early is None
        else optuna.pruners.SuccessiveHalvingPruner(min_resource=early.min_iter, reduction_factor=max(2, round(early.eta)))
    )
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )
    if sweep.method == "grid":
        for point in _points(sweep):
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def _points(sweep: Sweep) -> list[dict[str, Any]]:
    """The grid without seeds, each point once."""
    points = [{name: value for name, value in point.items() if name != SEED} for point in sweep.grid()]
    return [point for k, point in enumerate(points) if point not in points[:k]]


def _take_up(study: optuna.Study, sweep: Sweep) -> int:
    """Ask again for trials that a coordinator left when it was killed, be it in the middle of asking again. A trial that ended
    without a reason was left; one with its point that came later asks for it again."""
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
    ended = [trial for trial in study.trials if trial.state == TrialState.FAIL and "reason" not in trial.user_attrs]
    asked = 0
    for trial in ended:
        point = _point(trial)
        if point and not any(_point(later) == point for later in study.trials[trial.number + 1 :]):
            attributes = {_FOLDER: trial.user_attrs[_FOLDER]} if _FOLDER in trial.user_attrs else {}
            study.enqueue_trial(point, user_attrs=attributes)
            asked += 1
    return asked


def _point(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial, those included that were asked for and not taken up yet; empty where none was chosen."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _begin(study: optuna.Study, sweep: Sweep, recipe: Recipe, folder: Path, worker: int) -> _Running | None:
    """The next trial; None where there is none."""
    waiting = any(trial.state == TrialState.WAITING for trial in study.trials)
    done = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)]
    failed = [t for t in study.trials if t.state == TrialState.FAIL and "reason" in t.user_attrs]
    enough = sweep.method == "grid" or len(done) + len(failed) >= (sweep.run_cap or 0)
    if not waiting and enough:
        return None
    trial = study.ask()
    chosen = {name: _suggested(trial, name, parameter) for name, parameter in sweep.parameters.items() if name != SEED}
    name = trial.user_attrs.get(_FOLDER, f"trial-{trial.number:04d}")
    trial.set_user_attr(_FOLDER, name)
    seeds = list(sweep.parameters[SEED].choices or ()) if SEED in sweep.parameters else [recipe.run.seed]
    trial.set_user_attr("seeds", seeds)
    return _Running(trial, chosen, list(seeds), folder / name, worker)


def _suggested(trial: optuna.Trial, name: str, parameter: Parameter) -> Any:
    if parameter.choices is not None:
        return trial.suggest_categorical(name, parameter.choices)
    assert parameter.min is not None and parameter.max is not None
    if parameter.is_whole:
        return trial.suggest_int(name, int(parameter.min), int(parameter.max))
    log = parameter.distribution == "log_uniform_values"
    return trial.suggest_float(name, parameter.min, parameter.max, step=parameter.q, log=log)


# --- a trial ---------------------------------------------------------------------------------------------------------------------


def _advance(
    study: optuna.Study,
    one: _Running,
    sweep: Sweep,
    devices: Sequence[str],
    extra: Sequence[str],
    say: Callable[[str], None],
    train: Sequence[str],
) -> bool:
    """Take a trial further; True once it is over."""
    if one.process is None:
        if is_complete(one.run.final):
            return _next_seed(study, one, say)
        one.process = _start(one, sweep, devices, extra, train)
        return False
    code = one.process.poll()
    if code is None:
        if sweep.early_terminate is not None and not one.pruned and _is_worse(one):
            one.pruned = True
            one.process.send_signal(signal.SIGINT)
        return False
    one.process = None
    if one.pruned:
        study.tell(one.trial, state=TrialState.PRUNED)
        say(f"{one.folder.name}: stopped after step {max(one.reported)}, behind the others")
        return True
    if code:
        return _failed(study, one, _last_words(one.run), say)
    return _next_seed(study, one, say)


def _next_seed(study: optuna.Study, one: _Running, say: Callable[[str], None]) -> bool:
    one.seeds.pop(0)
    if one.seeds:
        return False
    try:
        scores = [score_of(RunFolder(one.folder / f"seed-{seed}")) for seed in one.trial.user_attrs["seeds"]]
    except OutputError as error:
        return _failed(study, one, str(error), say)
    mean = sum(scores) / len(scores)
    study.tell(one.trial, mean)
    say(f"{one.folder.name}: {mean:+.3f}")
    return True


def _failed(study: optuna.Study, one: _Running, reason: str, say: Callable[[str], None]) -> bool:
    one.trial.set_user_attr("reason", reason)
    study.tell(one.trial, state=TrialState.FAIL)
    say(f"{one.folder.name}: failed: {reason}")
    return True


def score_of(run: RunFolder) -> float:
    """The score after training of a finished run. Raises OutputError where its figures are missing or damaged."""
    summary = read_summary(run.path, Outcome)
    if summary is None:
        raise OutputError(f"{run.path} holds no summary.json; without it a trial has no score")
    valid_validations(run.validation_file)  # what the table is made of
    return summary.after.overall


def _start(
    one: _Running, sweep: Sweep, devices: Sequence[str], extra: Sequence[str], train: Sequence[str]
) -> subprocess.Popen[bytes]:
    one.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MASTER_PORT": str(29500 + _PORTS * one.worker)}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[one.worker % len(devices)]
    seed = one.seeds[0]
    arguments = [*overrides(one.chosen), *extra, f"run.seed={seed}", f"run.name=seed-{seed}", f"run.output_dir={one.folder}"]
    command = [*train, str(sweep.program), *arguments]
    with (one.folder / f"seed-{seed}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )


def _stop(running: Sequence[_Running]) -> None:
    """Let the runs save, all at once, and wait for them."""
    under_way = [one.process for one in running if one.process is not None and one.process.poll() is None]
    for process in under_way:
        process.send_signal(signal.SIGINT)
    for process in under_way:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=600)


def _is_worse(one: _Running) -> bool:
    """Report the validations of a trial's first run, and say whether the pruner gives it up."""
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


def _last_words(run: RunFolder) -> str:
    log = run.path.parent / f"{run.path.name}.log"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith(("error:", "stopped:"))), (lines or ["nothing"])[-1])


# --- the folder ------------------------------------------------------------------------------------------------------------------


def _keep_to(folder: Path, sweep: Sweep, extra: Sequence[str]) -> None:
    file = folder / "sweep.json"
    asked = {**sweep.model_dump(mode="json", exclude_unset=True), "overrides": list(extra)}
    if file.exists() and (before := read_json(file)) != json.loads(json.dumps(asked)):
        before = before if isinstance(before, dict) else {}
        changed = [name for name in {*before, *asked} if before.get(name) != asked.get(name)]
        raise OutputError(
            f"{folder} holds another sweep ({', '.join(sorted(changed))} differ); give this one another --name"
        )
    write_whole(file, json.dumps(asked, indent=2) + "\n")


def _link_best(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`best`: the best checkpoint of the best run of the best trial; none where all trials are equal."""
    link = folder / "best"
    link.unlink(missing_ok=True)
    best = next((row for row in rows if row["score"] is not None), None)
    if best is None or all_equal(rows):
        return
    seed = max(best["by_seed"], key=lambda s: best["by_seed"][s])
    run = folder / best["trial"] / f"seed-{seed}"
    target = run / "best" if (run / "best").exists() else run / "final"
    link.symlink_to(target.relative_to(folder))


def check_devices(workers: int, devices: Sequence[str]) -> None:
    """Raises RecipeError for fewer sets of devices than workers."""
    if devices and len(devices) < workers:
        raise RecipeError(f"--devices names {len(devices)} sets for {workers} workers; name one each, as 0,1 2,3")
