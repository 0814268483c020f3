"""Validation: figures by hand, paired intervals, what failed is counted apart, and the record survives a resume."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench import task_of
from ctcgrpo.errors import TooManyFailures
from ctcgrpo.rollout.runner import Slot, validation_slots
from ctcgrpo.run.scores import Validation, improvement
from ctcgrpo.run.validation import Validator, validation_of
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY
from tests.unit.test_training_parts import scenario

TASKS = [task_of(s) for s in (scenario("support", "a"), scenario("support", "b"), scenario("charm", "c"))]


def test_figures_by_hand() -> None:
    pairs = [("a", 0.2), ("a", 0.6), ("b", -0.4), ("c", 0.5), ("c", math.nan), ("b", math.nan)]
    figures = validation_of(3, TASKS, pairs).figures()
    # Means over scenarios: a 0.4, b -0.4, c 0.5.
    assert figures.overall == pytest.approx(0.5 / 3)
    assert figures.scenes == pytest.approx({"support": 0.0, "charm": 0.5})
    assert (figures.n, figures.episodes, figures.failed) == (3, 4, 2)


def test_what_failed_is_no_score() -> None:
    nothing = validation_of(0, TASKS, [("a", math.nan)])
    assert nothing.figures().model_dump() == {"overall": None, "scenes": {}, "n": 0, "episodes": 0, "failed": 1, "step": 0}
    assert improvement(nothing, nothing).model_dump() == {"overall": None, "ci95": None, "n": 0}
    json.loads(json.dumps(nothing.figures().model_dump(), allow_nan=False))


def test_the_improvement_is_paired() -> None:
    before = validation_of(0, TASKS, [("a", 0.1), ("b", -0.9), ("c", 0.5)])
    better = validation_of(9, TASKS, [("a", 0.3), ("b", -0.7), ("c", 0.7)])
    # Every scenario gains 0.2, however different they are: the interval is a point.
    gain = improvement(before, better)
    assert gain.overall == pytest.approx(0.2) and gain.ci95 == pytest.approx([0.2, 0.2])
    mixed = improvement(before, validation_of(9, TASKS, [("a", 0.3), ("b", -1.0), ("c", 0.5)]))
    assert mixed.ci95 is not None and mixed.ci95[0] < 0 < mixed.ci95[1]
    alone = improvement(before, validation_of(9, TASKS, [("b", -0.8)]))
    assert alone.n == 1 and alone.overall == pytest.approx(0.1)


def test_slots_are_the_same_every_time() -> None:
    assert [s.seeds for s in validation_slots(TASKS, 2, 0)] == [s.seeds for s in validation_slots(TASKS, 2, 9)]
    assert [(s.task.id, s.group, s.rollout) for s in validation_slots(TASKS, 2, 0)][:3] == [
        ("a", 0, 0),
        ("a", 0, 1),
        ("b", 1, 0),
    ]


class Scores:
    """Plays slots with outcomes that depend on the step."""

    def __init__(self, by_step: dict[int, float]) -> None:
        self.by_step = by_step
        self.played: list[int] = []
        self.saved: list[int] = []

    def __call__(self, step: int, slots: Sequence[Slot]) -> list[tuple[str, float]]:
        self.played.append(step)
        return [(slot.task.id, self.by_step[step]) for slot in slots]


def validator(scores: Scores, file: Path, **options: Any) -> Validator:
    made = Validator(
        tasks=TASKS,
        samples=2,
        every=5,
        file=file,
        play=scores,
        keep_best=scores.saved.append,
        is_main=True,
        log_line=lambda text: None,
    )
    made.rewind(options.get("step", 0), options.get("best"))
    return made


def test_the_best_is_kept_and_the_record_survives(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    scores = Scores({0: -0.5, 5: 0.1, 10: 0.4, 15: 0.2, 20: -0.1})
    first = validator(scores, file)
    assert [k for k in range(21) if first.is_due(k)] == [0, 5, 10, 15, 20]
    for step in (0, 5, 10, 15, 20):
        first.validate(step)
    assert scores.saved == [5, 10] and not first.is_due(10)
    best = first.best()
    assert best is not None and best.step == 10

    file.write_text(file.read_text() + '{"step": 25, "outc')  # killed in the middle of a line
    again = validator(scores, file, step=10, best=10)
    assert sorted(again.done) == [0, 5, 10] and again.is_due(15)
    scores.by_step[15] = 0.9
    again.validate(15)
    summary = again.summary(run="x")
    assert summary.before.overall == -0.5 and summary.after.overall == pytest.approx(0.9)
    assert summary.improvement.overall == pytest.approx(1.4)
    assert summary.best is not None and (summary.best.step, summary.run) == (15, "x")
    assert summary.best.overall == pytest.approx(0.9)
    lines = [Validation(**json.loads(line)) for line in file.read_text().splitlines()]
    assert [v.step for v in lines] == [0, 5, 10, 15]


def test_a_validation_that_failed_is_none(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    scores = Scores({0: math.nan})
    broken = validator(scores, file)
    with pytest.raises(TooManyFailures, match="validation after step 0: 6 of 6 episodes failed"):
        broken.validate(0)
    assert broken.is_due(0) and not file.exists()
    scores.by_step[0] = 0.3
    assert broken.validate(0).overall == pytest.approx(0.3)


def test_a_run_that_starts_takes_nothing_from_another_life(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    scores = Scores({0: -0.5, 5: 0.9})
    first = validator(scores, file)
    first.validate(0)
    first.validate(5)
    anew = validator(scores, file, step=0)
    assert anew.is_due(0) and anew.best() is None
    # best/ of step 5 was lost with the steps after 3: a worse one that exists is kept now.
    resumed = validator(scores, file, step=3, best=None)
    scores.by_step[5] = 0.1
    resumed.validate(5)
    best = resumed.best()
    assert best is not None and (best.step, best.overall) == (5, pytest.approx(0.1))


def test_a_run_with_validation_leaves_a_summary(ctcgrpo: Command, tmp_path: Path) -> None:
    held_out = ["validation.scenarios=english/test", "validation.every=1", "validation.samples=1"]
    code, out, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", *held_out)
    assert code == 0, err
    folder = tmp_path / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary[when]["n"] == 16 and set(summary[when]["scenes"]) == {"support", "defense", "repair", "charm"}
    assert len(summary["improvement"]["ci95"]) == 2 and summary["improvement"]["n"] == 16
    assert summary["simulator"]["backend"] == "scripted" and summary["scoring_variant"] == "training"
    assert (folder / "best" / "model.safetensors").exists() and (folder / "best" / "STEP").read_text() == "1\n"
    assert len(re.findall(r"validation after step \d: [-+]\d", out)) == 2
    assert len((folder / "traces" / "validation-000001.rank-0.jsonl").read_text().splitlines()) == 16
