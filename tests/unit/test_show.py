"""What a finished run shows: figures as in summary.json, a typical scenario, and clear words where there is nothing to show."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctcgrpo.errors import OutputError
from ctcgrpo.report.show import show_run, speech, typical_scenario
from tests.conftest import Command


def trace(scenario: str, outcome: float | None, replies: list[str], rollout: int = 0) -> dict[str, Any]:
    turn = {
        "reasoning": "Hm.",
        "message": "[red]So?[/red]",
        "reward": 0.045,
        "info": {"anger": 55, "trust": 44, "why": "noticed (-5/+4)"},
        "faults": [],
        "completion_tokens": 3,
        "dropped_exchanges": 0,
    }
    return {
        "task": scenario,
        "tag": "support",
        "group": ord(scenario[0]),
        "rollout": rollout,
        "outcome": outcome,
        "failure": None if outcome is not None else {"kind": "simulator_transport", "message": "gone"},
        "opening": "Well?",
        "info": {"anger": 60, "trust": 40},
        "turns": [{**turn, "reply": reply} for reply in replies],
    }


def test_a_reply_with_separators_of_unicode_is_one_line(run: Path) -> None:
    file = run / "traces" / "validation-000007.rank-0.jsonl"
    told = "Yes,\u2028the\u2029lamp\x85."
    lines = file.read_text().replace(json.dumps("Yes, the lamp."), json.dumps(told, ensure_ascii=False))
    file.write_text(lines, encoding="utf-8")
    out = io.StringIO()
    show_run(run, Console(file=out, width=120), scenario="a")
    assert told in json.loads(lines.split("\n")[0])["turns"][0]["reply"] and "lamp" in out.getvalue()
    file.write_text(lines + "no JSON\n", encoding="utf-8")
    show_run(run, Console(file=out, width=120))
    assert "warning: validation-000007.rank-0.jsonl, line 4: not valid JSON" in out.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    before = [trace("a", -0.5, ["One two."]), trace("b", -0.4, ["One two."]), trace("c", -0.3, ["Three."])]
    after = [trace("a", 0.5, ["Yes, the lamp."]), trace("b", -0.2, ["No, the sea."]), trace("c", -0.3, ["A bell."])]
    for step, episodes in ((0, before), (7, after)):
        lines = "".join(json.dumps(e) + "\n" for e in episodes)
        (tmp_path / f"traces/validation-{step:06d}.rank-0.jsonl").write_text(lines)
    summary = {
        "before": {"overall": -0.4, "scenes": {"support": -0.4}, "n": 3, "step": 0},
        "after": {"overall": 0.0, "scenes": {"support": 0.0}, "n": 3, "step": 7},
        "improvement": {"overall": 0.4, "ci95": [0.0, 1.0], "n": 3},
        "steps": 7,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def printed(run: Path, scenario: str | None = None) -> str:
    out = io.StringIO()
    show_run(run, Console(file=out, width=120), scenario=scenario)
    return out.getvalue()


def test_a_run_is_shown(run: Path) -> None:
    text = printed(run)
    for part in ("-0.400", "+0.000", "+0.400", "support", "+0.000 to +1.000", "67%", "100%", "+33%"):
        assert part in text, part
    assert "before: b" in text and "after: b" in text  # the median change
    assert "[red]So?[/red]" in text  # markup in what somebody says is shown, not obeyed
    assert "before: a" in printed(run, "a")


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_score_and_the_interval_are_whole_at_every_width(
    run: Path, width: int, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = ctcgrpo("show", str(run), "--scenario", "a")
    assert code == 0, err
    shown, _, _ = out.partition("trained policy")
    assert max(map(len, shown.splitlines())) <= width
    flat = " ".join(out.replace("│", " ").split())
    for part in ("score -0.50", "score +0.50", "improvement +0.400", "95 % interval +0.000 to +1.000", "anger 60 to 55"):
        assert part in flat, out
    assert "…" not in out


def test_a_turn_without_a_score_is_shown(run: Path) -> None:
    for file in (run / "traces").iterdir():
        episodes = [json.loads(line) for line in file.read_text().splitlines()]
        for episode in episodes:
            episode["info"] = {}
            episode["turns"] = [
                {**turn, "info": {}, "reward": reward, "message": message}
                for turn in episode["turns"]
                for reward, message in ((None, "So?"), (0.25, ""))
            ]
        file.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    out = io.StringIO()
    show_run(run, Console(file=out, width=120), scenario="a")
    assert out.getvalue().count("not scored") == 2 == out.getvalue().count("reward +0.250") == out.getvalue().count("User: So?")
    assert out.getvalue().count("User:") == 4  # the last turns heard nothing


def test_speech_and_the_typical_scenario_by_hand() -> None:
    said = speech([trace("a", 0.1, ["One two three.", "One."]), trace("b", 0.1, ["One."]), trace("c", None, ["Lost."])])
    assert (said.words, said.distinct) == pytest.approx((5 / 3, 2 / 3))
    before = [trace(name, 0.0, ["x"]) for name in "abcde"]
    after = [trace(name, value, ["x"]) for name, value in zip("abcde", (0.9, -0.2, 0.3, 0.1, None), strict=True)]
    assert typical_scenario(before, after) == "c"


def test_nothing_to_show_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="'x': not played both before and after; expected one of a, b, c"):
        printed(run, "x")
    (run / "traces/validation-000007.rank-0.jsonl").unlink()
    with pytest.raises(OutputError, match="no dialogues of the validation after step 7"):
        printed(run)
    (run / "summary.json").unlink()
    with pytest.raises(OutputError, match=r"no summary\.json"):
        printed(run)
