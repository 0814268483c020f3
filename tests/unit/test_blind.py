"""Blind readings: the sheet shows only what was said, the key says which is which, and the tally is right by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctcgrpo.util.intervals import share_interval
from tests.blind.__main__ import main
from tests.recorded_run import HELD_OUT, ROUNDS, write_run

NAMES = ["support-test-01", "repair-test-01", "charm-test-01"]


def replies(word: str) -> dict[str, list[list[str]]]:
    """Two dialogues of two turns for each scenario, each line of its own."""
    return {name: [[f"The {word} {name} {k} {turn}.\n# Pair 9" for turn in "ab"] for k in range(2)] for name in NAMES}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {0: replies("heron"), 4: replies("unread"), 8: replies("otter")})


def call(*arguments: object) -> tuple[int, str]:
    out = io.StringIO()
    status = main([str(argument) for argument in arguments], Console(file=out, width=160))
    return status, out.getvalue()


def key_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{name}.key.json").read_text())[name]
    return found


def written(file: Path, answers: list[Any]) -> Path:
    file.write_text("".join((a if isinstance(a, str) else json.dumps(a)) + "\n" for a in answers))
    return file


def test_a_pair_is_one_scenario_before_and_after_and_the_key_knows_which(run: Path, tmp_path: Path) -> None:
    status, said = call("pairs", run, "--out", tmp_path / "x", "--pairs", 6)
    assert status == 0 and "in common" not in said
    text = (tmp_path / "x/pairs.md").read_text()
    pairs = re.split(r"^## Pair \d+$", text, flags=re.MULTILINE)[1:]
    key = key_of(tmp_path / "x", "pairs")
    assert len(pairs) == len(key) == 6 and sorted(pair["trained"] for pair in key) == ["A"] * 3 + ["B"] * 3
    for shown, pair in zip(pairs, key, strict=True):
        _, a, b = re.split(r"^### Dialogue [AB]$", shown, flags=re.MULTILINE)
        trained, untrained = (a, b) if pair["trained"] == "A" else (b, a)
        assert f"otter {pair['scenario']} {pair['rollouts']['after']} a" in trained and "heron" not in trained
        assert f"heron {pair['scenario']} {pair['rollouts']['before']} a" in untrained and "otter" not in untrained
        assert HELD_OUT[pair["scenario"]].opening_line in a


def test_the_sheets_show_nothing_but_what_was_said(run: Path, tmp_path: Path) -> None:
    call("pairs", run, "--out", tmp_path / "x", "--pairs", 6)
    call("absolute", run, "--out", tmp_path / "x", "--dialogues", 12)
    traces = [json.loads(line) for file in sorted((run / "traces").glob("*")) for line in file.read_text().splitlines()]
    for sheet in ("pairs", "lines"):
        text = (tmp_path / f"x/{sheet}.md").read_text()
        for trace in traces:
            assert trace["task"] not in re.sub(r"The \w+ [\w-]+ \d", "", text)
            if len(trace["turns"]) == ROUNDS:  # a line of an earlier turn may occur in another dialogue
                assert trace["turns"][-1]["message"] not in text, "the user's answer to the last reply"
            assert not any(turn["info"]["why"] in text for turn in trace["turns"])
        added = re.sub(r'"[^"]*"|^\*\*.*$', "", text.split("\n## ", 1)[1], flags=re.MULTILINE)
        for word in ("trained", "before", "after", "anger", "trust", "score", str(run), "Core goal"):
            assert word not in added, word
        assert "unread" not in text, "a validation in between"
        assert "You want Wanjiru to go home a little less alone than she came." in text
        assert "Known facts" not in text and "\n# Pair 9" not in text, "a reply looks like a heading"


def test_a_seed_decides_the_order_and_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        for command, unit in (("pairs", "--pairs"), ("absolute", "--dialogues")):
            assert call(command, run, "--out", tmp_path / folder, unit, 6, "--seed", seed)[0] == 0
    for sheet in ("pairs.md", "pairs.key.json", "lines.md", "lines.key.json"):
        a, b, c = ((tmp_path / folder / sheet).read_text() for folder in "abc")
        assert a == b != c
    status, said = call("pairs", run, "--out", tmp_path / "a", "--pairs", 6)
    assert status == 2 and "pairs.md exists; choose another folder with --out" in said


def test_more_pairs_than_dialogues_are_said_and_more_than_there_are_refused(run: Path, tmp_path: Path) -> None:
    status, said = call("pairs", run, "--out", tmp_path / "x", "--pairs", 12)
    assert status == 0 and "12 of the pairs have their dialogue before training in common with another pair" in said
    rollouts = {(pair["scenario"], *pair["rollouts"].values()) for pair in key_of(tmp_path / "x", "pairs")}
    assert len(rollouts) == 12, "each pair once"
    status, said = call("pairs", run, "--out", tmp_path / "y")
    assert status == 2 and "64 pairs were asked for; these runs have 12" in said


def test_the_tally_of_pairs_by_hand(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    call("pairs", run, "--out", folder, "--pairs", 6)
    other = {"A": "B", "B": "A"}
    trained = [pair["trained"] for pair in key_of(folder, "pairs")]
    prefers = [trained[0], trained[1], trained[2], other[trained[3]], "tie", trained[5]]
    answers = [{"pair": k, "prefers": said, "reason": f"why {k}"} for k, said in enumerate(prefers, 1)]
    status, said = call("tally", folder, written(tmp_path / "r.jsonl", answers))
    low, high = share_interval(4, 5)
    assert status == 0 and f"80.0% ({low:.1%} to {high:.1%})" in said
    low, high = share_interval(4, 6)
    row = [cell.strip() for cell in next(line for line in said.splitlines() if line.startswith("│")).split("│")[2:-1]]
    assert row[:4] == ["6", "4", "1", "1"] and row[5] == f"66.7% ({low:.1%} to {high:.1%})"
    reasons = said[said.index("for the trained") :]
    assert "for the untrained policy\n  pair 4: why 4\nfor a tie\n  pair 5: why 5\n" in reasons
    assert reasons.startswith("for the trained policy\n  pair 1: why 1\n  pair 2: why 2\n  pair 3: why 3\n  pair 6: why 6\n")
    status, said = call(
        "tally", folder, tmp_path / "r.jsonl", written(tmp_path / "s.jsonl", [*answers[:5], answers[5] | {"prefers": "tie"}])
    )
    assert status == 0 and "r.jsonl and s.jsonl agree on 5 of 6 pairs" in said


def test_malformed_answers_are_named_by_line(run: Path, tmp_path: Path) -> None:
    call("pairs", run, "--out", tmp_path / "x", "--pairs", 3)
    good = {"pair": 1, "prefers": "A", "reason": "r"}
    answers = [good, good | {"pair": 2, "prefers": "C"}, good, good | {"pair": 4}, "no JSON", {"prefers": "A"}]
    answers += [good | {"pair": "2"}, {"pair": 2, "prefers": "A"}, {"line": 1, "passes": True}]
    status, said = call("tally", tmp_path / "x", written(tmp_path / "r.jsonl", answers))
    assert status == 1
    for problem in (
        "line 2: prefers = 'C'; input should be 'A', 'B' or 'tie'",
        "line 3: duplicate pair 1; the first one counts",
        "line 4: pair = 4; expected one of the 3 in the key",
        "line 5: not valid JSON",
        "line 6: expected an answer with either pair or line",
        "line 7: pair = '2'; input should be a valid integer",
        "line 8: reason is missing",
        "line 9: line = 1; expected one of the 0 in the key",
        "no valid answer for 2 of 3 pairs (2, 3)",
    ):
        assert f"warning: r.jsonl, {problem}" in said or f"warning: r.jsonl: {problem}" in said, problem
    assert call("tally", tmp_path, tmp_path / "r.jsonl")[0] == call("tally", tmp_path / "x", tmp_path / "none")[0] == 2


def test_lines_before_and_after_are_mixed_and_counted(run: Path, tmp_path: Path) -> None:
    """Two runs with the same untrained policy: its dialogues are read once and count for both."""
    again = write_run(tmp_path / "again", {0: replies("heron"), 8: replies("newt")})
    folder = tmp_path / "x"
    status, said = call("absolute", run, again, "--out", folder, "--dialogues", 12)
    assert status == 0, said
    key, text = key_of(folder, "lines"), (folder / "lines.md").read_text()
    shown = dict(re.findall(r"\*\*\[line (\d+)\] Person 1:\*\* The (\w+)", text))
    assert list(shown) == [str(line["line"]) for line in key] and text.count("## Dialogue") == 12
    assert len(re.findall(r"heron \S+ \d a", text)) == len(set(re.findall(r"heron \S+ \d a", text))) == 6
    for line in key:
        word = shown[str(line["line"])]
        assert (line["side"] == "before") == (word == "heron")
        assert line["runs"] == {"heron": [str(run), str(again)], "otter": [str(run)], "newt": [str(again)]}[word]
    assert {line["side"] for line in key[: len(key) // 2]} == {"before", "after"}
    answers = [{"line": line["line"], "passes": line["side"] == "after" and line["turn"] == 1} for line in key]
    status, said = call("tally", folder, written(tmp_path / "r.jsonl", answers))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    before, after = ([line for line in key if line["side"] == side] for side in ("before", "after"))
    low, high = share_interval(6, len(after))
    assert status == 0
    assert rows[-1][:4] == ["all", "after", str(len(after)), f"{6 / len(after):.1%} ({low:.1%} to {high:.1%})"]
    assert rows[0][1:3] == rows[2][1:3] == ["before", str(len(before))] and rows[0][3].startswith("0.0%")
    assert rows[-2][1:5] == ["before", str(len(before)), rows[0][3], "6"]
