"""Where sets of scenarios are written: EIBench's layout (a JSONL file a scene), and `datasets` (Arrow on disk, or the Hub).

Arrow gives every row the same columns and types, which records do not have, so a row carries its record as JSON (column `record`),
beside columns to filter by. Reading takes `record` alone: every value comes back as it was."""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ctcgrpo.environments.eibench.scenario_format import read_record, scene_problem
from ctcgrpo.errors import CtcGrpoError, OutputError, ScenarioError
from ctcgrpo.policy.hub import hub_reason
from ctcgrpo.util.files import parse_json, write_whole
from ctcgrpo.util.naming import quoted

Record = Mapping[str, Any]
_SURROGATE = re.compile(r"[\ud800-\udfff]")
HUB = "hf://datasets/"


def with_origin(record: Record, *, licence: str | None, source: str | None) -> dict[str, Any]:
    """The record with its licence and source; what it says itself stays. Raises ScenarioError where neither it nor they say one."""
    completed = dict(record)
    for field, given in (("licence", licence), ("data_source", source)):
        if not completed.get(field):
            if not given:
                raise ScenarioError(f"scenario {record.get('id')!r} has no {field}; set --{field.removeprefix('data_')}")
            completed[field] = given
    return completed


def write_layout(records: Iterable[Record], folder: Path) -> list[Path]:
    """One `SCENE_final.jsonl` a scene. Raises ScenarioError for a scene's name, OutputError for a file that is there already."""
    files: dict[Path, str] = defaultdict(str)
    for record in records:
        scene = str(record.get("scene_tag")).strip().lower()
        if problem := scene_problem(scene):
            raise ScenarioError(f"scenario {record.get('id')!r}: scene_tag is {scene!r}; {problem}")
        files[folder / f"{scene}_final.jsonl"] += _line(record) + "\n"
    if there := next((file for file in sorted(files) if file.exists()), None):
        raise OutputError(f"{there} already exists; choose another folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files):
            write_whole(file, files[file])
    return sorted(files)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raises OutputError, naming what was to be written, for what the system refuses."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write to {target} ({error.strerror or error}); name another place") from None


def check_new(folder: Path) -> None:
    """Raises OutputError for a folder that holds something, or is none."""
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} already exists; choose another folder")


def to_dataset(records: Sequence[Record]) -> Dataset:
    """Columns id, scene, language, title, source, licence, prompt (chat messages for the policy) and record (JSON)."""
    rows = []
    for k, record in enumerate(records):
        scenario = read_record(record, f"record {k + 1}")
        opening = [{"role": "user", "content": scenario.opening_line}] if scenario.opening_line else []
        row = {name: getattr(scenario, name) for name in ("id", "scene", "language", "title", "source")}
        row["licence"] = str(record.get("licence", ""))
        row["prompt"] = [{"role": "system", "content": scenario.policy_persona}, *opening]
        rows.append(row | {"record": _line(record)})
    return Dataset.from_list(rows)


def from_dataset(rows: Iterable[Mapping[str, Any]], place: str) -> list[dict[str, Any]]:
    """The records of a dataset that `to_dataset` made. Raises ScenarioError for one without the column `record`."""
    records = []
    for k, row in enumerate(rows):
        where = f"{place}, row {k + 1}"
        if not isinstance(row.get("record"), str):
            raise ScenarioError(f"{where}: no column 'record'; it was not written by `ctcgrpo scenarios convert`")
        try:
            record = parse_json(row["record"])
        except (ValueError, RecursionError) as error:
            raise ScenarioError(f"{where}: its record is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ScenarioError(f"{where}: its record is no JSON object")
        read_record(record, where)
        records.append(record)
    return records


def save_dataset(splits: Mapping[str, Sequence[Record]], target: str) -> None:
    """To a folder, or to the Hub (private). Raises OutputError for a folder that is there, and for what the Hub refuses."""
    data = DatasetDict({split: to_dataset(records) for split, records in splits.items()})
    if not target.startswith(HUB):
        check_new(Path(target))
        with writing(Path(target)):
            data.save_to_disk(target)
        return
    name = _hub_name(target, OutputError)
    try:
        data.push_to_hub(name, private=True)
    except Exception as error:  # noqa: BLE001 - what its HTTP library raises changes with it; the records are where they were
        raise OutputError(f"{target}: the upload to the Hub failed: {hub_reason(error)}") from None


def load_splits(source: str) -> dict[str, list[dict[str, Any]]]:
    """By split. Raises ScenarioError for what cannot be had or read."""
    name = _hub_name(source, ScenarioError) if source.startswith(HUB) else None
    try:
        data = load_from_disk(source) if name is None else load_dataset(name)
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{source}: cannot be read as a dataset: {hub_reason(error)}") from None
    splits = data if isinstance(data, DatasetDict) else {"train": data}
    return {str(split): from_dataset(rows, f"{source}, {split}") for split, rows in splits.items()}


def _hub_name(address: str, error: type[CtcGrpoError]) -> str:
    name = address.removeprefix(HUB)
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError("it names no owner")
    except ValueError as problem:
        raise error(f"{quoted(address)}: expected {HUB}OWNER/NAME ({str(problem).splitlines()[0][:300]})") from None
    return name


def _line(record: Record) -> str:
    """One line; lone surrogates, which are no text, stay as the escapes that they came as."""
    line = json.dumps(record, ensure_ascii=False)
    return line if line.isascii() or not _SURROGATE.search(line) else json.dumps(record)
