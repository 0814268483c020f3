"""The one reader of JSON lines: what ends a line, and what is an error with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctcgrpo.errors import OutputError, ScenarioError
from ctcgrpo.evaluation.results import read_results
from ctcgrpo.report.noise import recorded_turns
from ctcgrpo.util.files import collect_records, read_json, read_json_lines

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = ODD.replace("\x0b", "").replace("\x0c", "").replace("\x1c", "")
    file.write_bytes(b"\xef\xbb\xbf" + f'{{"text": "{text}"}}\r\n\n{{"text": "z"}}'.encode())
    assert list(read_json_lines(file)) == [(f"{file}, line 1", {"text": text}), (f"{file}, line 3", {"text": "z"})]
    # The last line has no end: a killed run wrote half of it.
    assert list(read_json_lines(file, whole_only=True)) == [(f"{file}, line 1", {"text": text})]
    assert collect_records(file, dict, whole_only=True) == ([{"text": text}], [])
    assert collect_records(tmp_path / "none.jsonl", dict) == ([], [])


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "not valid JSON: .* at column 2"),
        (b"[1]", "expected a JSON object, got a list"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
        (b'{"a": "\xff"}', "cannot be read as UTF-8 text: .* at byte 8"),
        (b"[" * 200_000, "not "),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(OutputError, match=rf"a.jsonl, line 2: .*{message}"):
        list(read_json_lines(file))
    with pytest.raises(ScenarioError, match="a.jsonl, line 2"):
        list(read_json_lines(file, ScenarioError))
    bad: list[str] = []
    assert [r["a"] for _, r in read_json_lines(file, on_bad=lambda place, _: bad.append(place))] == [1, 2]
    assert bad == [f"{file}, line 2"]
    found, problems = collect_records(file, lambda record: record["a"])
    assert found == [1, 2] and len(problems) == 1 and problems[0].startswith("a.jsonl, line 2: ")
    file.write_bytes(line)
    if not line.startswith(b"[1]"):
        with pytest.raises(OutputError, match="a.jsonl cannot be read: "):
            read_json(file)


def test_readers_of_runs_and_results_name_the_bad_line(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"scenario": \n')
    with pytest.raises(OutputError, match="results.jsonl, line 1: not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "step-000001.rank-0.jsonl").write_text("no JSON\n")
    with pytest.raises(OutputError, match=r"no recorded dialogues .*\(step-000001.rank-0.jsonl, line 1: not valid JSON"):
        recorded_turns([tmp_path / "step-000001.rank-0.jsonl"], [], dialogues=1, max_rounds=1)
    with pytest.raises(OutputError, match="gone.jsonl: no such file"):
        list(read_json_lines(tmp_path / "gone.jsonl"))
