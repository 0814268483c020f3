"""The folder that a run writes to, and what the same command finds there the next time.

checkpoints/RUN/
    recipe.yaml       the resolved recipe
    base/             the starting policy, where the recipe has it built
    metrics.jsonl     one line a step
    simulator.json    who plays the user
    sharding.json     how DeepSpeed or FSDP2 is configured
    simulator.jsonl   the log of the embedded simulator server
    validation.jsonl  one line a validation
    summary.json      before, after, and the improvement between them
    traces/*.jsonl    one line an episode
    checkpoint-N/     after N optimizer steps; complete once COMPLETE stands in it, with the size of every file
    best/             the policy that did best in a validation
    final/            the trained policy and its tokenizer; the run is finished once COMPLETE stands in it
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.files import checkpoints, is_complete, mark_complete, missing_in, read_run_records, write_whole
from ctcgrpo.recipe import Recipe, differences
from ctcgrpo.sections import parse_mapping, read_text
from ctcgrpo.workers import alone

BEST_STEP = "STEP"
_PATIENCE = 120.0
"""Seconds for a run that was told to stop to save what it has."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation_file(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def simulator_log(self) -> Path:
        return self.path / "simulator.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keep other runs out of the folder, which is made, for as long as the context lasts. Raises OutputError where it cannot be
        written, and where another run has it and does not end."""
        with alone(self.path, patience=_PATIENCE, say=say):
            try:
                self.traces.mkdir(exist_ok=True)
                probe = self.traces / ".writable"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise OutputError(
                    f"cannot write to {self.traces} ({error.strerror}); choose another with run.output_dir=FOLDER"
                ) from None
            yield

    def open(self, recipe: Recipe) -> Path | None:
        """Make the folder ready for this recipe; gives the checkpoint to go on from, or None to start.

        Raises OutputError where it holds a finished run, or one of another recipe that has trained already.
        """
        started = self.newest_checkpoint()
        if self.recipe_file.exists() and (started or is_complete(self.final)):
            self._refuse_other_run(recipe)
        if is_complete(self.final):
            raise OutputError(
                f"{self.path} holds a finished run of this recipe; take {self.final}, or start another with run.name=NAME"
            )
        return started

    def begin(self, recipe: Recipe, steps: int) -> None:
        """Training begins after `steps` batches of rollouts: record the recipe, forget what an earlier life of the run wrote
        of later steps, and all that it wrote where nothing of it goes on."""
        write_whole(self.recipe_file, recipe.to_yaml())
        for trace in self.traces.glob("*.jsonl"):
            step = re.fullmatch(r"\w+-(\d+)\.rank-\d+", trace.stem)
            if step and (not steps or int(step[1]) > steps):
                trace.unlink()
        if not steps:
            self.validation_file.unlink(missing_ok=True)
            self.discard_best()
        self._rewind(steps)

    def keep_to(self, name: str, now: Mapping[str, Any], *, resumes: bool) -> None:
        """Record in a file what decides the run beside its recipe (who plays the user, how it is sharded); raises OutputError where
        a run that goes on would meet something else."""
        file = self.path / name
        if resumes and file.exists() and (changed := differences(json.loads(file.read_text(encoding="utf-8")), now)):
            raise OutputError(
                f"{self.path} was trained with another {name.removesuffix('.json')} ({'; '.join(changed)}); go on with that one, "
                "or start another run with run.name=NAME"
            )
        write_whole(file, json.dumps(now) + "\n")

    @property
    def best_step(self) -> int | None:
        """After how many batches of rollouts the policy in best/ was the best; None where there is none."""
        file = self.best / BEST_STEP
        return int(file.read_text()) if file.exists() else None

    def take_best(self, saved: Path, step: int) -> None:
        """Make a saved policy the best one."""
        (saved / BEST_STEP).write_text(f"{step}\n")
        self.discard_best()
        saved.rename(self.best)

    def discard_best(self) -> None:
        if self.best.exists():
            shutil.rmtree(self.best)

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most optimizer steps."""
        found = {step: folder for step, folder in checkpoints(self.path).items() if is_complete(folder)}
        return found[max(found)] if found else None

    def passed_over(self) -> list[str]:
        """Checkpoints that would be newer than the newest complete one, and what they lack."""
        kept = self.newest_checkpoint()
        found = checkpoints(self.path)
        newer = (found[step] for step in sorted(found) if kept is None or step > int(kept.name.rpartition("-")[2]))
        return [f"{folder.name}: {missing_in(folder)}" for folder in newer]

    def _rewind(self, steps: int) -> None:
        if self.metrics_file.exists():
            kept = [json.dumps(record) + "\n" for record in read_run_records(self.metrics_file) if record["step"] <= steps]
            write_whole(self.metrics_file, "".join(kept))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(metrics) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def finish(self) -> None:
        mark_complete(self.final)

    def _refuse_other_run(self, recipe: Recipe) -> None:
        if changed := self.changes(recipe):
            raise OutputError(
                f"{self.path} holds a run of another recipe ({'; '.join(changed[:5])}); "
                "undo the change to go on with it, or start another with run.name=NAME"
            )

    def changes(self, recipe: Recipe) -> list[str]:
        """What the recorded recipe and this one differ in; `hardware` says what a run was meant for, not what it is."""
        try:
            old = parse_mapping(read_text(self.recipe_file, "recipe"), self.recipe_file, Recipe, "recipe")
        except RecipeError as error:
            raise OutputError(
                f"{self.path} holds a run, but not what it was: {error}; start another with run.name=NAME"
            ) from None
        with contextlib.suppress(ValidationError):  # what an older version did not know yet had its default
            old = Recipe.model_validate(old).model_dump(mode="json")
        now = recipe.model_dump(mode="json")
        for told in (old, now):
            told.pop("hardware", None)
        return differences(old, now)
