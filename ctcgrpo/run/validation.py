"""How good the policy is on held-out scenarios: before, during and after training, with the same scoring and simulator.

Every validation samples with the same seeds, so two of them differ in the policy alone and are compared scenario by scenario.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ctcgrpo.errors import OutputError, TooManyFailures, too_many_failed
from ctcgrpo.types import NO_TAG, Episode, Task
from ctcgrpo.util.files import by_step, collect_records, refuse_to_resume, write_whole
from ctcgrpo.util.intervals import interval, means, paired

if TYPE_CHECKING:
    from ctcgrpo.rollout.runner import Slot


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcomes (EIBench's as fractions in [-1, 1]) of every valid episode after `step` batches of rollouts, by scenario."""

    step: int
    outcomes: Mapping[str, Sequence[float]]
    scenes: Mapping[str, str]
    failed: int = 0

    @property
    def by_scenario(self) -> dict[str, float]:
        """Mean outcome of each scenario that has a valid episode."""
        return means((name, value) for name, values in self.outcomes.items() for value in values)

    @property
    def overall(self) -> float:
        """Mean over scenarios; NaN where no episode was valid."""
        return _mean(list(self.by_scenario.values()))

    def figures(self) -> dict[str, Any]:
        """overall (None where no episode was valid) and by scene, the number of scenarios, of episodes and of failed ones."""
        means = self.by_scenario
        by_scene = {
            scene: [m for name, m in means.items() if self.scenes[name] == scene]
            for scene in dict.fromkeys(self.scenes.values())
        }
        return {
            "overall": self.overall if means else None,
            "scenes": {scene: _mean(values) for scene, values in by_scene.items() if values},
            "n": len(means),
            "episodes": sum(map(len, self.outcomes.values())),
            "failed": self.failed,
            "step": self.step,
        }


def validation_of(step: int, tasks: Sequence[Task], episodes: Sequence[tuple[str, float]]) -> Validation:
    """From (task id, outcome) pairs; a failed episode's outcome is NaN."""
    outcomes: dict[str, list[float]] = {task.id: [] for task in tasks}
    failed = 0
    for name, outcome in episodes:
        if math.isnan(outcome):
            failed += 1
        else:
            outcomes[name].append(outcome)
    return Validation(step, outcomes, {task.id: task.tag for task in tasks}, failed)


class _Line(BaseModel):
    """A line of validation.jsonl."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    step: int
    outcomes: dict[str, list[float]]
    scenes: dict[str, str]
    failed: int = 0


def read_validations(file: Path, *, whole_only: bool = False) -> tuple[list[Validation], list[str]]:
    """By step, each once, and what is wrong with the other lines of validation.jsonl. `whole_only` skips half a line at the end."""

    def read(record: dict[str, Any]) -> Validation:
        return Validation(**_Line.model_validate(record).model_dump())

    found, problems = collect_records(file, read, whole_only=whole_only)
    return by_step(file, found, lambda validation: validation.step, problems)


def valid_validations(file: Path) -> list[Validation]:
    """By step, at least one, each with a valid episode. Raises OutputError where a line is damaged: for readers whose figures are
    of all of them."""
    found, problems = read_validations(file)
    if not found and not problems:
        problems = [f"{file.name} holds no validation"]
    problems += [f"{file.name}: no valid episode after step {v.step}" for v in found if not v.by_scenario]
    if problems:
        raise OutputError(f"{file.parent}/{problems[0]}")
    return found


def resumed_validations(file: Path) -> list[Validation]:
    """Those that a run has recorded, to resume from. Raises OutputError where a line is damaged."""
    found, problems = read_validations(file, whole_only=True)
    refuse_to_resume(file, problems)
    return found


def improvement(before: Validation, after: Validation, *, seed: int = 0) -> dict[str, Any]:
    """The mean paired difference over the scenarios that both have, and its 95 % interval by a bootstrap over them."""
    differences = list(paired(before.by_scenario, after.by_scenario).values())
    if not differences:
        return {"overall": None, "ci95": None, "n": 0}
    mean = math.fsum(differences) / len(differences)
    return {"overall": mean, "ci95": list(interval(differences, seed=seed)), "n": len(differences)}


@dataclass
class Validator:
    """Validates when it is time, keeps the record in `file`, and says when the policy is the best so far.

    `play` plays slots on this process; `gather` collects pairs from all processes; `keep_best` saves the policy as the best,
    that after a step. All are called on every process alike. More than a share of `max_failed` failed episodes is no
    validation: it stops the run, to be done again.
    """

    tasks: Sequence[Task]
    samples: int
    every: int
    file: Path
    play: Callable[[int, Sequence[Slot]], list[Episode]]
    gather: Callable[[list[tuple[str, float]]], list[tuple[str, float]]]
    keep_best: Callable[[int], None]
    share: Callable[[Sequence[Slot]], Sequence[Slot]]
    is_main: bool
    say: Callable[[str], None]
    max_failed: float = 0.5
    noun: str = "tasks"
    """What the tasks are called in logs."""
    record: Callable[[Validation], None] = lambda validation: None
    """Hears of each validation, on the main process."""
    done: dict[int, Validation] = field(default_factory=dict)
    best_step: int | None = None

    def rewind(self, step: int, best_step: int | None) -> None:
        """Take up the record of an earlier life of the run, up to `step`, where it goes on; `best_step` is that of the
        policy kept as the best. Raises OutputError where a line of the record is damaged or missing."""
        self.done, self.best_step = {}, best_step
        if step:
            self.done = {v.step: v for v in resumed_validations(self.file) if v.step <= step}
            lost = [due for due in range(0, step, self.every) if due not in self.done]
            refuse_to_resume(self.file, [f"{self.file.name} lacks the validation after step {due}" for due in lost])

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 and step not in self.done

    def validate(self, step: int) -> Validation:
        """Validate the policy as it stands after `step` batches of rollouts."""
        if step in self.done:
            return self.done[step]
        from ctcgrpo.rollout.runner import validation_slots  # it imports transformers, which readers of a record do without

        slots = validation_slots(self.tasks, self.samples, step)
        self.say(f"validating after step {step}: {len(slots)} episodes")
        played = self.play(step, self.share(slots))
        result = validation_of(step, self.tasks, self.gather([(e.task, e.outcome) for e in played]))
        if too_many_failed(result.failed, len(slots), self.max_failed):
            raise TooManyFailures(
                f"validation after step {step}: {result.failed} of {len(slots)} episodes failed, "
                f"and max_failed is {self.max_failed}"
            )
        self.done[step] = result
        best = self.best()
        if step and (best is None or result.overall > best.overall):
            self.keep_best(step)
            self.best_step = step
        if self.is_main:
            write_whole(self.file, "".join(json.dumps(asdict(self.done[k])) + "\n" for k in sorted(self.done)))
            self.record(result)
        self.say(f"validation after step {step}: {_described(result.figures(), self.noun)}")
        return result

    def best(self) -> Validation | None:
        """That of the policy kept as the best, of those after some training."""
        return None if self.best_step is None else self.done.get(self.best_step)

    def summary(self, **facts: Any) -> dict[str, Any]:
        """summary.json: before, after, the paired improvement, the best step; and the facts needed to compare."""
        before, after, best = self.done[min(self.done)], self.done[max(self.done)], self.best()
        return {
            "before": before.figures(),
            "after": after.figures(),
            "improvement": improvement(before, after),
            "steps": after.step,
            "best": None if best is None else {"step": best.step, "overall": best.overall},
            **facts,
        }


def _described(figures: Mapping[str, Any], noun: str) -> str:
    if figures["overall"] is None:
        return f"no valid episode, {figures['failed']} failed"
    scenes = "".join(f"{scene} {value:+.3f}, " for scene, value in figures["scenes"].items() if scene != NO_TAG)
    lost = f", {figures['failed']} episodes failed" if figures["failed"] else ""
    return f"{figures['overall']:+.3f} ({scenes.removesuffix(', ')}{'; ' if scenes else ''}{figures['n']} {noun}{lost})"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
