"""The gain without one rule of the scripted user: by hand on a recorded run, and the registry is left as it was."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ctcgrpo.errors import OutputError
from ctcgrpo.run.scores import improvement
from ctcgrpo.simulator.scripted import rules
from tests.held_out import read_held_out
from tests.recorded_run import write_run
from tests.rules_off import ablation, every_rule, main, together, without

SAID = {
    "support-test-01": "He thanked you for the tea, like a stranger. It must hurt when he asks for your name. I sit here with",
    "repair-test-01": "I left the side gate open. Deacon was gone for two nights, and it was my fault. I want to pay for the",
}
CUT = {name: [[text]] for name, text in SAID.items()}
WHOLE = {
    "support-test-01": [[f"{SAID['support-test-01']} you."]],
    "repair-test-01": [[f"{SAID['repair-test-01']} dressing."]],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {0: CUT, 8: WHOLE})


def test_a_gain_that_hangs_on_one_rule_goes_with_it(run: Path) -> None:
    held_out = read_held_out(run)
    all_on, off = ablation(held_out)
    assert all_on.gain == improvement(held_out.before.validation, held_out.after.validation)
    whole = all_on.gain.overall or 0.0
    assert whole > 0.1
    lost = {name: whole - (found.gain.overall or 0.0) for name, found in off.items()}
    assert max(lost, key=lambda name: lost[name]) == "breaking_off" and lost["breaking_off"] > 0.1
    assert lost["interrogating"] == lost["long_winded"] == 0
    assert not any("breaks off" in why for why in off["breaking_off"].reasons[0])


def test_the_rules_are_as_before(run: Path) -> None:
    spoilers, others = list(rules.SPOILERS), list(rules.RULES)
    for rule in every_rule():
        with pytest.raises(KeyError), without(rule):
            assert rule not in every_rule() and len(every_rule()) == len(spoilers) + len(others) - 1
            raise KeyError
        assert (spoilers, others) == (rules.SPOILERS, rules.RULES)


def test_the_table_is_sorted_and_runs_are_taken_together(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {0: CUT, 8: CUT})
    out = io.StringIO()
    main([run, other], Console(file=out, width=140))
    tables = out.getvalue().split("held-out gain without")
    assert len(tables) == 4 and "all 2 runs together" in tables[2]
    rows = [line.split("│")[1].strip() for line in tables[1].splitlines() if line.startswith("│")]
    assert rows[:2] == ["none", "breaking_off"] and sorted(rows[1:]) == sorted(r.__name__ for r in every_rule())
    both, _ = together([ablation(read_held_out(run)), ablation(read_held_out(other))])
    assert both.gain.overall == pytest.approx(ablation(read_held_out(run))[0].gain.overall / 2)


def test_a_run_that_other_rules_judged_is_refused(run: Path) -> None:
    file = run / "traces/validation-000008.rank-0.jsonl"
    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    info = episodes[0]["turns"][0]["info"]
    anger, trust = info["anger"], info["trust"]
    info["anger"] = anger + 1
    file.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    with pytest.raises(OutputError, match=rf"step 8, support-test-01, rollout 0, turn 1: after = \[{anger + 1}, {trust}\]"):
        ablation(read_held_out(run))


def test_figures_that_are_not_of_these_dialogues_are_refused(run: Path) -> None:
    summary = {name: {"overall": 0.5, "scenes": {}, "n": 2, "step": step} for name, step in (("before", 0), ("after", 8))}
    (run / "summary.json").write_text(json.dumps({**summary, "improvement": {"overall": 0.5, "ci95": [0.4, 0.6], "n": 2}}))
    with pytest.raises(OutputError, match="summary.json: improvement.overall = 0.5"):
        ablation(read_held_out(run))


def test_another_user_is_refused(run: Path) -> None:
    (run / "simulator.json").write_text('{"backend": "llm"}')
    with pytest.raises(OutputError, match="expected a run with the scripted user"):
        ablation(read_held_out(run))


def test_one_validation_is_no_before_and_after(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="only the validation after step 0"):
        read_held_out(write_run(tmp_path / "run", {0: CUT}))


def test_traces_of_other_outcomes_are_refused(run: Path) -> None:
    (run / "traces/validation-000008.rank-0.jsonl").write_text((run / "traces/validation-000000.rank-0.jsonl").read_text())
    with pytest.raises(OutputError, match=r"validation-000008.rank-\*.jsonl: 2 valid dialogues with other outcomes"):
        read_held_out(run)
