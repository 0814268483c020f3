"""Validation on held-out scenarios before, during and after training, with the training's scoring and simulator.

Every validation samples with the same seeds, so two of them differ only in the policy and are compared scenario by scenario. With
another user beside that of training, both play the same scenarios with the same seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcgrpo.errors import TooManyFailures, too_many_failed
from ctcgrpo.run.run_records import Best, Summary, resumed_validations
from ctcgrpo.run.scores import Figures, Validation, alarms, gamed, gap, improvement, other_scores
from ctcgrpo.types import NO_TAG, Task
from ctcgrpo.util.files import refuse_to_resume, write_whole

if TYPE_CHECKING:
    from ctcgrpo.rollout.runner import Slot


Play = Callable[[int, Sequence["Slot"]], list[tuple[str, float]]]
"""Plays the slots of a validation after a step, a part on each process; gives (task id, outcome) of all."""


def validation_of(step: int, tasks: Sequence[Task], episodes: Sequence[tuple[str, float]]) -> Validation:
    """From (task id, outcome) pairs; a failed episode's outcome is NaN."""
    outcomes: dict[str, list[float]] = {task.id: [] for task in tasks}
    for name, outcome in episodes:
        if not math.isnan(outcome):
            outcomes[name].append(outcome)
    failed = sum(math.isnan(outcome) for _, outcome in episodes)
    return Validation(step=step, outcomes=outcomes, scenes={task.id: task.tag for task in tasks}, failed=failed)


@dataclass
class Validator:
    """Validates every `every` steps, records results in `file`, and saves the best policy.

    `play` plays slots, a part on each process, and returns (task id, outcome) of all. `keep_best` saves the policy of a step as
    the best. All processes call both. If more than the share `max_failed` of the episodes fail, the validation raises, and the
    resumed run repeats it.
    """

    tasks: Sequence[Task]
    samples: int
    every: int
    file: Path
    play: Play
    keep_best: Callable[[int], None]
    is_main: bool
    log_line: Callable[[str], None]
    max_failed: float = 0.5
    noun: str = "tasks"  # name of the tasks in logs
    play_other: Play | None = None  # as `play`, with another user
    record: Callable[[Validation], None] = lambda validation: None  # called after each validation, on the main process
    done: dict[int, Validation] = field(default_factory=dict)
    best_step: int | None = None

    def rewind(self, step: int, best_step: int | None) -> None:
        """Load the record up to `step`, where the run resumes; `best_step` is the step of the best saved policy. Raises OutputError
        where a line of the record is damaged or missing."""
        self.done, self.best_step = {}, best_step
        if step:
            self.done = {v.step: v for v in resumed_validations(self.file) if v.step <= step}
            lost = [due for due in range(0, step, self.every) if due not in self.done]
            refuse_to_resume(self.file, [f"{self.file.name} lacks the validation after step {due}" for due in lost])

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 and step not in self.done

    def validate(self, step: int) -> Validation:
        """Validate the policy after `step` batches of rollouts."""
        if step in self.done:
            return self.done[step]
        from ctcgrpo.rollout.runner import validation_slots  # it imports transformers, which readers of records do not need

        slots = validation_slots(self.tasks, self.samples, step)
        result = self._played(step, slots, self.play, "")
        if self.play_other is not None:
            other = self._played(step, slots, self.play_other, " with the other user")
            result = result.model_copy(update={"other": other})
        self.done[step] = result
        best = self.best()
        if step and (best is None or result.overall > best.overall):
            self.keep_best(step)
            self.best_step = step
        if self.is_main:
            lines = [json.dumps(validation.model_dump(exclude_none=True)) + "\n" for validation in self._in_order()]
            write_whole(self.file, "".join(lines))
            self.record(result)
        if result.other is not None:
            self.log_line(
                f"validation after step {step}: gap {gap(result)}, the score with the user that is trained on less the other"
            )
        if (alarm := gamed(self._in_order())) is not None:
            self.log_line(f"warning: step {step}: {alarm}; read the dialogues with both: ctcgrpo report {self.file.parent}")
        return result

    def _played(self, step: int, slots: Sequence[Slot], play: Play, how: str) -> Validation:
        self.log_line(f"validation after step {step}{how}: playing {len(slots)} episodes")
        result = validation_of(step, self.tasks, play(step, slots))
        if too_many_failed(result.failed, len(slots), self.max_failed):
            failed = f"{result.failed} of {len(slots)} episodes failed"
            raise TooManyFailures(f"validation after step {step}{how}: {failed}; rollout.max_failed = {self.max_failed}")
        self.log_line(f"validation after step {step}{how}: {_described(result.figures(), self.noun)}")
        return result

    def _in_order(self) -> list[Validation]:
        return [self.done[step] for step in sorted(self.done)]

    def best(self) -> Validation | None:
        """The validation of the best saved policy; the one before training does not count."""
        return None if self.best_step is None else self.done.get(self.best_step)

    def summary(self, **facts: Any) -> Summary:
        """Scores before and after, the paired improvement, the best step, and `facts` that comparisons need."""
        before, after, best = self.done[min(self.done)], self.done[max(self.done)], self.best()
        other = other_scores(self._in_order())
        if other is not None:
            facts = {"other": other, "gamed": alarms(self._in_order()), **facts}
        return Summary(
            before=before.figures(),
            after=after.figures(),
            improvement=improvement(before, after),
            steps=after.step,
            best=None if best is None else Best(step=best.step, overall=best.overall),
            **facts,
        )


def _described(figures: Figures, noun: str) -> str:
    if figures.overall is None:
        return f"no valid episode, {figures.failed} failed"
    scenes = "".join(f"{scene} {value:+.3f}, " for scene, value in figures.scenes.items() if scene != NO_TAG)
    lost = f", {figures.failed} episodes failed" if figures.failed else ""
    return f"{figures.overall:+.3f} ({scenes.removesuffix(', ')}{'; ' if scenes else ''}{figures.n} {noun}{lost})"
