"""Files of records: the same records in every format are the same scenarios and tasks; hidden files are left out; errors keep file
and line, or the number of a record."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcgrpo.environments.eibench.scenarios import load_scenarios, read_records, read_scenarios
from ctcgrpo.errors import RecipeError, ScenarioError
from ctcgrpo.run.run_tasks import read_tasks
from ctcgrpo.util.record_files import is_record_file, read_record_file, record_files
from tests.conftest import Command

Record = dict[str, Any]
RECORDS = [record for _, record in read_records("english/test", "test")]


def as_lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_array(records: list[Record]) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


FORMATS: dict[str, Callable[[list[Record]], bytes]] = {
    "a.jsonl": as_lines,
    "a.JSONL": as_lines,
    "a.json": as_array,
    "b.json": as_lines,  # as some data sets on the Hub name it
    "c.json": lambda records: b"\xef\xbb\xbf" + as_array(records),
    "a.Json": as_array,
    "a.jsonl.gz": lambda records: gzip.compress(as_lines(records)),
    "a.json.gz": lambda records: gzip.compress(as_array(records)),
    "a.JSON.GZ": lambda records: gzip.compress(as_array(records)),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(range(len(RECORDS))), min_size=1, max_size=4, unique=True), TEXT, st.booleans())
def test_the_same_records_are_the_same_scenarios_in_every_format(which: list[int], text: str, wrapped: bool) -> None:
    records = [{**RECORDS[k], "title": text, "note": {text: [text, None, 1.5]}} for k in which]
    given = [{"row": record} for record in records] if wrapped else records
    with tempfile.TemporaryDirectory() as folder:
        expected = None
        for name, written in FORMATS.items():
            file = Path(folder, f"in-{name}", name)
            file.parent.mkdir()
            file.write_bytes(written(given))
            found = load_scenarios(file, "test")
            assert load_scenarios(file.parent, "test") == found
            assert [task.data for task in read_tasks(str(file), "environment.tasks")] == given
            assert expected is None or found == expected
            expected = found
        assert expected is not None and [s.title for s in expected] == [text] * len(which)
        assert [s.extras["note"] for s in expected] == [record["note"] for record in records]


def test_one_record_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert [scenario.id for scenario in load_scenarios(tmp_path, "test")] == [RECORDS[0]["id"]]
    assert [place for place, _ in read_record_file(tmp_path / "one.json", ScenarioError)] == [
        f"{tmp_path / 'one.json'}, record 1"
    ]


def test_a_folder_without_what_systems_hide(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(as_lines(RECORDS[:2]))
    (tmp_path / "a.JSONL.gz").write_bytes(gzip.compress(as_lines(RECORDS[2:4])))
    for name in ("._b.jsonl", ".hidden.jsonl", "notes.txt", "report.json"):  # of macOS, of an editor, of a person, of the factory
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "folder.jsonl").mkdir()
    assert [file.name for file in record_files(tmp_path)] == ["a.JSONL.gz", "b.jsonl"]
    assert [s.id for s in load_scenarios(tmp_path, "test")] == [RECORDS[k]["id"] for k in (2, 3, 0, 1)]
    assert [t.id for t in read_tasks(str(tmp_path), "environment.tasks")] == [RECORDS[k]["id"] for k in (2, 3, 0, 1)]
    assert not is_record_file("a.jsonl.zip") and is_record_file("A.Json.Gz")


def test_tasks_of_a_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "tasks.json").write_text(json.dumps([{"id": split}]))
    assert [task.id for task in read_tasks(str(tmp_path), "environment.tasks")] == ["train"]
    assert [task.id for task in read_tasks(str(tmp_path), "validation.tasks", None, "test")] == ["test"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[{"id": "a"},\n {"id": }]', r"a\.json, line 2: not valid JSON: .* at column 9"),
        ("a.json", b'[{"id": "a"}, 3]', r"a\.json, record 2: expected a JSON object, got a int"),
        ("a.json", b'"text"', r"a\.json: expected an array of JSON objects, or one, got a str"),
        ("a.json", b'[{"id": "a", "id": "b"}]', r"a\.json: not JSON that can be read: duplicate key 'id'"),
        ("a.json", b'[{"id": "\xff"}]', r"a\.json: cannot be read as UTF-8 text: .* at byte 10"),
        ("a.json", b"[" * 100_000, r"a\.json: not JSON that can be read: nested too deep"),
        ("a.json", b'{"id": "a"}\n{"id": \n', r"a\.json, line 2: not valid JSON"),
        ("a.json", b"", r"a\.json, line 1: not valid JSON"),
        ("a.json.gz", gzip.compress(b'[{"id": "a"}, 3]', mtime=0), r"a\.json\.gz, record 2: expected a JSON object"),
        ("a.jsonl.gz", gzip.compress(b'{"id": "a"}\n3\n', mtime=0), r"a\.jsonl\.gz, line 2: expected a JSON object"),
        ("a.jsonl.gz", b'{"id": "a"}\n', r"a\.jsonl\.gz: cannot be decompressed: .*expected a file written by gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"id": "a"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz: cannot be decompressed"),
    ],
)
def test_errors_keep_file_and_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ScenarioError, match=problem):
        list(read_records(file))
    with pytest.raises(RecipeError, match=problem):
        read_tasks(str(file), "environment.tasks")


def test_an_invalid_record_is_left_out_by_its_number(tmp_path: Path, ctcgrpo: Command) -> None:
    (tmp_path / "a.json").write_text(json.dumps([RECORDS[0], {**RECORDS[1], "scene_tag": "suport"}, 3, *RECORDS[2:6]]))
    found = read_scenarios(tmp_path / "a.json", "test")
    assert [fault.place.rpartition(", ")[2] for fault in found.faults] == ["record 2", "record 3"] and len(found.scenarios) == 5
    code, out, err = ctcgrpo("scenarios", "validate", str(tmp_path / "a.json"), "--split", "test", "--loose")
    assert code == 3 and "a.json, record 2" in out and "a.json, record 3" in out and "2 of 7 records" in " ".join(err.split())


def test_a_source_without_files_names_the_formats(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"no \*\.jsonl or \*\.json \(also \.gz\) files"):
        load_scenarios(tmp_path)
    with pytest.raises(RecipeError, match=r"environment\.tasks = .*no \*\.jsonl or \*\.json"):
        read_tasks(str(tmp_path), "environment.tasks")
    with pytest.raises(RecipeError, match=r"environment\.tasks = 'absent\.json'.*no such file; expected .*hf://datasets"):
        read_tasks("absent.json", "environment.tasks")
    with pytest.raises(ScenarioError, match=r"'absent\.JSON\.gz': no such file or folder"):
        load_scenarios("absent.JSON.gz")
