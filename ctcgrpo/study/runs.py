"""The runs of a study: several a process, so that libraries are imported once; what is finished is not run again.

checkpoints/studies/NAME/
    study.json                          what is studied
    base/                               the policy that every run begins with, where runs build it (builtin/tiny)
    runs/ENVIRONMENT/VARIANT/seed-1/    a run's folder without its checkpoints and best policy, and beside it its log
    times.json                          what each run took, in seconds
    table.json, curves.svg              what came of it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ctcgrpo.errors import CtcGrpoError, OutputError, RunFailed, RunInterrupted
from ctcgrpo.files import checkpoints, is_complete, read_json, write_whole
from ctcgrpo.policy.builtin import build_builtin, is_built
from ctcgrpo.recipe import Recipe, load_recipe, overrides
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.scenario_format import Split
from ctcgrpo.scenarios import read_records
from ctcgrpo.study.figures import Curves, curves_of
from ctcgrpo.study.spec import Run, Study
from ctcgrpo.validation import valid_validations
from ctcgrpo.workers import alone, end_with_pool

_RUNS_A_PROCESS = 20


def run_study(
    study: Study, recipe: Recipe, folder: Path, *, workers: int = 1, say: Callable[[str], None] = lambda text: None
) -> dict[str, str]:
    """Run what is left of a study, after saying how long that will take; gives the runs that failed, each with its reason.

    Raises OutputError where another process has the folder or it holds another study, RunInterrupted on Ctrl-C.
    """
    with alone(folder):
        _keep_to(folder, study, recipe)
        policy = str(folder / "base") if is_built(recipe.policy.model) else recipe.policy.model
        recipes = {run: run.recipe(study, folder, policy=policy) for run in study.runs()}
        left = [run for run, of_run in recipes.items() if not _is_finished(of_run)]
        times = _times(folder)
        say(_plan(study, len(recipes), len(left), times, workers))
        if not left:
            return {}
        _build(recipe, folder / "base", say)
        return _run_all({run: recipes[run] for run in left}, folder, times, workers, say)


def found_curves(study: Study, folder: Path) -> dict[str, dict[str, Curves]]:
    """The curves of the finished runs, by environment and variant."""
    found: dict[str, dict[str, Curves]] = {}
    for environment in study.environments:
        user: tuple[str, Any] | None = None
        for variant in study.variants:
            runs = [Run(environment, variant, seed) for seed in study.seeds]
            finished = {run: RunFolder(run.folder(folder)) for run in runs if is_complete(run.folder(folder) / "final")}
            for run, place in finished.items():
                said = read_json(place.path / "simulator.json")
                user = user or (run.name, said)
                if said != user[1]:
                    raise OutputError(
                        f"{folder}: {run.name} met another simulator than {user[0]} (simulator.json of both); remove one of them"
                    )
            if finished:
                try:
                    found.setdefault(environment, {})[variant] = curves_of({r.seed: _curve(f) for r, f in finished.items()})
                except ValueError as error:
                    raise OutputError(f"{folder}: {environment}/{variant}: {error}") from None
    return found


def _curve(run: RunFolder) -> list[tuple[int, float]]:
    return [(validation.step, validation.overall) for validation in valid_validations(run.validation_file)]


def _keep_to(folder: Path, study: Study, recipe: Recipe) -> None:
    file = folder / "study.json"
    asked = json.loads(study.model_dump_json(exclude={"seconds", "description"}))
    asked["policy"] = [recipe.policy.model, recipe.run.seed]
    asked["texts"] = _texts(study)
    if file.exists() and (before := read_json(file)) != asked:
        before = before if isinstance(before, dict) else {}
        changed = ", ".join(sorted(name for name in {*before, *asked} if before.get(name) != asked.get(name)))
        raise OutputError(
            f"{folder} holds another study ({changed} differ); what is studied is fixed, give this one another --name"
        )
    write_whole(file, json.dumps(asked, indent=2) + "\n")


def _texts(study: Study) -> dict[str, str]:
    """By environment a digest of what its runs read beside the recipe: who plays the user, and the scenarios."""
    told = {}
    for environment, changes in study.environments.items():
        recipe = load_recipe(study.program, changes=overrides(changes))
        read = [] if recipe.simulator.config is None else [recipe.simulator.config.read_text(encoding="utf-8")]
        sources: list[tuple[str, Split]] = [(recipe.eibench_scenarios().train, "train")]
        if recipe.validation is not None:
            sources.append((recipe.validation_source(), "test"))
        for source, split in sources:
            records = read_records(source, split, on_bad=lambda place, message: None)  # the runs report such lines
            read += [json.dumps(record) for _, record in records]
        told[environment] = hashlib.sha256("\n".join(read).encode()).hexdigest()[:16]
    return told


def _is_finished(recipe: Recipe) -> bool:
    run = RunFolder(recipe.folder)
    if not is_complete(run.final):
        return False
    if changed := run.changes(recipe):
        raise OutputError(
            f"{run.path} is of another recipe ({'; '.join(changed[:3])}); undo the change, or give the study another --name"
        )
    return True


def _times(folder: Path) -> dict[str, float]:
    file = folder / "times.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _plan(study: Study, runs: int, left: int, times: Mapping[str, float], workers: int) -> str:
    seconds = statistics.median(times.values()) if times else study.seconds
    known = "measured" if times else "by the file"
    at_a_time = min(workers, left) or 1
    return (
        f"{runs} runs ({len(study.environments)} environments x {len(study.variants)} variants x {len(study.seeds)} seeds), "
        f"{left} to go, {at_a_time} at a time: {left * seconds / at_a_time / 60:.0f} minutes at {seconds:.0f} s a run ({known})"
    )


def _build(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    model, seed = recipe.policy.model, recipe.run.seed
    if not (is_built(model) and is_complete(folder)):
        build_builtin(model, folder, seed, say=say)


# --- the processes ---------------------------------------------------------------------------------------------------------------


def _run_all(
    recipes: Mapping[Run, Recipe], folder: Path, times: dict[str, float], workers: int, say: Callable[[str], None]
) -> dict[str, str]:
    failed: dict[str, str] = {}
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=end_with_pool,
        max_tasks_per_child=_RUNS_A_PROCESS,
    )
    waiting = list(recipes)
    under_way: dict[Future[float], Run] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < workers:  # no more: what is handed to the pool cannot be taken back from it
                run = waiting.pop(0)
                under_way[pool.submit(_train, recipes[run], run.folder(folder).with_suffix(".log"))] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                try:
                    times[run.name] = future.result()
                except RunInterrupted:
                    raise KeyboardInterrupt from None
                except RunFailed as error:
                    failed[run.name] = str(error)
                    say(f"{run.name} failed: {error}")
                else:
                    write_whole(folder / "times.json", json.dumps(times, indent=0) + "\n")
                    say(f"{_told(run, recipes[run])} in {times[run.name]:.0f} s, {len(waiting) + len(under_way)} to go")
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted; the same command goes on in {folder}") from None
    except BrokenProcessPool:
        names = ", ".join(run.name for run in under_way.values())
        raise RunFailed(
            f"a worker process died ({run.name}{', ' if names else ''}{names}); the logs in {folder} may say why, and the same "
            "command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _told(run: Run, recipe: Recipe) -> str:
    curve = _curve(RunFolder(recipe.folder))
    return f"{run.name}: {curve[0][1]:+.3f} -> {curve[-1][1]:+.3f}"


def _train(recipe: Recipe, log: Path) -> float:
    """In a worker: the seconds that the run took. What it prints, and what ends it, goes to its log, and ends no other run. Raises
    RunFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with _printing_to(log):
        from ctcgrpo.cli import train_here

        started = time.monotonic()
        try:
            train_here(recipe)
        except RunInterrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is in the log, and the run's failure
            traceback.print_exc()
            told = str(error) if isinstance(error, CtcGrpoError) else f"{type(error).__name__}: {error}"
            raise RunFailed(told) from None
        run = RunFolder(recipe.folder)
        for weights in (*checkpoints(run.path).values(), run.best):  # gigabytes a run, and a study reads none of them
            shutil.rmtree(weights, ignore_errors=True)
        return time.monotonic() - started


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
