"""Two users: the gap and the alarm by hand and by property, a gamed user in real runs, and what shows both scores."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcgrpo.report.page import figures_of, write_report
from ctcgrpo.report.reading import read_run
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.run.run_records import checked_summary, read_validations
from ctcgrpo.run.scores import Validation, alarms, gamed, gap, other_scores
from ctcgrpo.run.tracking import validation_metrics
from ctcgrpo.run.validation import Validator
from tests.browsing import with_browser
from tests.conftest import Command
from tests.unit.test_report import EPISODES, made, opened
from tests.unit.test_run import TINY
from tests.unit.test_validation import TASKS

NAMES = [f"s{k}" for k in range(8)]
scores = st.lists(st.floats(-1, 1), min_size=len(NAMES), max_size=len(NAMES))


def validation(step: int, trained: Sequence[float] | float, other: Sequence[float] | float | None) -> Validation:
    def of(values: Sequence[float] | float) -> dict[str, list[float]]:
        each = [values] * len(NAMES) if isinstance(values, float | int) else values
        return {name: [value] for name, value in zip(NAMES, each, strict=True)}

    scenes = dict.fromkeys(NAMES, "support")
    unlike = None if other is None else Validation(step=step, outcomes=of(other), scenes=scenes)
    return Validation(step=step, outcomes=of(trained), scenes=scenes, other=unlike)


def test_the_gap_is_paired_over_scenarios() -> None:
    found = gap(validation(0, [0.1 * k for k in range(8)], [0.1 * k - 0.2 for k in range(8)]))
    assert found.overall == pytest.approx(0.2) and found.ci95 == pytest.approx((0.2, 0.2))
    assert gap(validation(0, 0.1, None)).overall is None


def test_a_gamed_user_raises_the_alarm() -> None:
    run = [validation(0, 0.0, 0.0), validation(5, 0.3, 0.1), validation(10, 0.6, -0.1)]
    assert gamed(run[:1]) is None and gamed(run[:2]) is None
    alarm = gamed(run)
    assert alarm is not None and (alarm.step, alarm.since) == (10, 0)
    assert alarm.trained.overall == pytest.approx(0.6) and alarm.other.overall == pytest.approx(-0.1)
    assert "rose (+0.600, 95 % interval +0.600 to +0.600)" in str(alarm) and "fell (-0.100, 95 %" in str(alarm)
    assert alarms(run) == [alarm]


def test_what_is_learned_first_and_lost_later_raises_it_too() -> None:
    run = [validation(0, 0.0, 0.0), validation(5, 0.3, 0.4), validation(10, 0.6, 0.2)]
    alarm = gamed(run)
    assert alarm is not None and alarm.since == 5  # though the other user's score is above that of the start
    noisy = [0.2, -0.6, 0.3, 0.2, 0.3, 0.3, 0.3, 0.2]  # falls from 0.16 to 0.15, within its interval
    assert gamed([run[0], validation(5, 0.3, [*noisy[1:], 0.2]), validation(10, 0.6, noisy)]) is None


@settings(max_examples=30)  # each takes a dozen bootstraps
@given(scores, scores, scores, scores)
def test_the_alarm_is_a_rise_beyond_its_interval_beside_a_fall(
    a: list[float], b: list[float], c: list[float], d: list[float]
) -> None:
    first, last = validation(0, a, b), validation(1, c, d)
    alarm, change = gamed([first, last]), sum(d) - sum(b)
    if alarm is not None:
        assert alarm.trained.ci95 is not None and alarm.trained.ci95[0] > 0 and change < 1e-9
        assert gamed([last, first]) is None  # the other way round the trained-on score falls
    better = validation(1, [min(1.0, x + 0.5) for x in a], [x - 0.01 for x in b])
    if max(a) <= 0.5:  # every scenario rises by as much, so beyond any interval
        assert gamed([first, better]) is not None
    # A score that does not rise, or another user's that does not fall, raises none.
    assert gamed([first, validation(1, a, d)]) is None
    assert gamed([first, validation(1, c, [min(1.0, x + 0.1) for x in b])]) is None or max(b) > 0.9
    assert gamed([first, validation(1, c, None)]) is None


class Games:
    """Plays slots: with each step the user of training scores higher, and the other one lower."""

    def __init__(self, by_step: Mapping[int, float]) -> None:
        self.by_step = by_step

    def __call__(self, step: int, slots: Sequence[Slot]) -> list[tuple[str, float]]:
        return [(slot.task.id, self.by_step[step]) for slot in slots]


def test_the_validator_records_both_and_says_the_alarm(tmp_path: Path) -> None:
    said: list[str] = []
    how: dict[str, Any] = {"tasks": TASKS, "samples": 1, "every": 5, "file": tmp_path / "validation.jsonl", "is_main": True}
    how |= {"play": Games({0: -0.5, 5: 0.1, 10: 0.4}), "play_other": Games({0: -0.5, 5: -0.4, 10: -0.7})}
    first = Validator(**how, keep_best=lambda step: None, log_line=said.append)
    first.rewind(0, None)
    for step in (0, 5):
        first.validate(step)
    assert not [line for line in said if "warning" in line]
    assert any("validation after step 5 with the other user: -0.400" in line for line in said)
    assert any(line.startswith("validation after step 5: gap +0.500") for line in said)
    first.validate(10)
    (warning,) = [line for line in said if line.startswith("warning: step 10: ")]
    assert "rose (+0.900" in warning and "fell (-0.200" in warning and f"ctcgrpo report {tmp_path}" in warning
    found, problems = read_validations(how["file"])
    assert not problems and [v.other.overall for v in found if v.other] == pytest.approx([-0.5, -0.4, -0.7])
    again = Validator(**how, keep_best=lambda step: None, log_line=said.append)
    again.rewind(10, None)
    summary = again.summary(run="r")
    assert summary.other == other_scores(found) and summary.other is not None and [a.step for a in summary.gamed] == [10]
    assert summary.other.gap_before.overall == pytest.approx(0) and summary.other.gap_after.overall == pytest.approx(1.1)


def test_the_report_repeats_the_alarm(tmp_path: Path) -> None:
    run = read_run(gaming(tmp_path / "r"))
    found = figures_of(run)
    assert [v["gap"]["overall"] for v in found["validations"]] == pytest.approx([-0.1, 0.3, 0.6])
    (warning,) = found["warnings"]
    assert warning.startswith("Warning, step 2: from step 0 to step 2 the score with the user that is trained on rose (+0.400, ")
    assert warning.endswith("what only the first one rewards (earlier after step 1).")


def gaming(folder: Path) -> Path:
    """A run with a validation before, one in which both users' scores have parted, and one in which they part further."""
    run = made(folder, EPISODES)
    validations = [validation(0, 0.0, 0.1), validation(1, 0.2, -0.1), validation(2, 0.4, -0.2)]
    (run / "validation.jsonl").write_text("".join(v.model_dump_json(exclude_none=True) + "\n" for v in validations))
    return run


@with_browser
def test_a_browser_shows_both_scores_the_gap_and_the_alarm(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report(read_run(gaming(tmp_path / "r")), file)
    page, asked, wrong = opened(browser, file)
    assert (asked, wrong) == ([], [])
    assert "Warning, step 2: " in page.locator("#notes").inner_text()
    told = page.locator("#headline").inner_text()
    assert "improvement with the other user" in told and "−0.300" in told and "gap after training" in told and "+0.600" in told
    drawn = page.evaluate("[...document.querySelectorAll('polyline')].map(line => line.dataset.series)")
    assert {"user of training", "other user", "gap"} <= set(drawn)


def test_trackers_get_both_and_the_gap() -> None:
    metrics = validation_metrics(validation(3, 0.5, 0.2))
    names = {"eval_outcome/all": 0.5, "eval_other_user/outcome/all": 0.2, "eval_other_user/outcome/support": 0.2, "eval_gap": 0.3}
    assert {name: metrics[name] for name in names} == pytest.approx(names)
    assert not [name for name in validation_metrics(validation(3, 0.5, None)) if "other" in name or "gap" in name]


LEARNS = ["training.max_steps=6", "training.updates_per_step=1", "training.learning_rate=3e-2", "training.schedule=constant"]
LEARNS += ["training.warmup=0", "training.save_every=6", "rollout.max_turns=1", "rollout.max_new_tokens=16"]
LEARNS += ["rollout.group_size=16", "credit.alpha=0"]
BACKEND = """
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, TurnRequest

class Likes(SimulatorBackend):
    name = "likes"

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign

    async def react(self, request: TurnRequest) -> Reaction:
        letters = request.history[-1].text.lower()
        change = self.sign * round(100 * (letters.count("e") / max(1, len(letters)) - 0.08))
        return Reaction("Well.", anger_delta=-change, trust_delta=change, goes_on=True, why="letters")
"""


@pytest.fixture
def users(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The configurations of a user who likes a letter, and of one who dislikes it."""
    module = f"likes_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(BACKEND))
    files = tmp_path / "fond.yaml", tmp_path / "averse.yaml"
    for file, sign in zip(files, (1, -1), strict=True):
        file.write_text(f"backend: {module}:Likes\noptions: {{sign: {sign}}}\n")
    return files


def test_a_policy_that_games_its_user_is_noticed(ctcgrpo: Command, users: tuple[Path, Path], tmp_path: Path) -> None:
    """The policy learns to write the letter that the user of training likes, and that the other one dislikes."""
    fond, averse = users
    command = ["train", TINY, f"run.output_dir={tmp_path}", f"simulator.config={fond}", *LEARNS]
    command += [f"validation={{scenarios: english/test, every: 6, simulator: {{config: {averse}}}}}"]
    code, out, err = ctcgrpo(*command)
    assert code == 0, err
    assert out.count("with the other user: playing 16 episodes") == 2 and "validation after step 6: gap +0." in out
    told = " ".join(out.split())
    assert "warning: step 6: from step 0 to step 6 the score with the user that is trained on rose (+0." in told
    assert "and the score with the other user fell (-0." in told
    run = tmp_path / "tiny"
    found, problems = read_validations(run / "validation.jsonl")
    assert not problems and [v.step for v in found] == [0, 6]
    for v in found:
        assert v.other is not None and v.other.outcomes.keys() == v.outcomes.keys()
    # The same replies, since seeds and first lines are the same: what one user likes, the other dislikes.
    played = (
        [json.loads(line) for line in (run / "traces" / f"{kind}-000006.rank-0.jsonl").read_text().splitlines()]
        for kind in ("validation", "other_user")
    )
    for mine, theirs in zip(*played, strict=True):
        assert mine["task"] == theirs["task"] and mine["turns"][0]["reply"] == theirs["turns"][0]["reply"]
        assert mine["turns"][0]["reward"] == pytest.approx(-theirs["turns"][0]["reward"])
    recorded = json.loads((run / "simulator.json").read_text())
    assert recorded["sign"] == 1 and recorded["validation"]["sign"] == -1

    summary, problems = checked_summary(run)
    assert not problems and summary is not None and summary.other == other_scores(found) and summary.gamed == alarms(found)
    assert read_run(run).problems == []
    code, out, err = ctcgrpo("show", str(run))
    told = " ".join(out.split())
    assert code == 0 and "with the other user" in told and "warning: step 6: from step 0 to step 6 the score" in told, err
    shown = figures_of(read_run(run))
    assert [v["other"]["mean"] for v in shown["validations"]] == pytest.approx([v.other.overall for v in found if v.other])
    assert shown["headline"]["other"]["improvement"]["n"] == 16
    (warning,) = shown["warnings"]
    assert warning.startswith("Warning, step 6: from step 0 to step 6 the score") and shown["facts"]["other user"] == "likes"

    averse.write_text(averse.read_text().replace("-1", "-2"))
    code, _, err = ctcgrpo(*command, "training.max_steps=7")
    assert code == 6 and "simulator.json: simulator changed" in err and "validation.sign: -1 -> -2" in err
