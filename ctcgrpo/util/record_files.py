"""Files of JSON records: JSON lines (.jsonl) and JSON (.json: an array of records, or one record), each also compressed (.gz)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.util.files import UTF8_MARK, file_bytes, json_lines, parse_json, reason_of, reject

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
FORMATS = "*.jsonl or *.json (also .gz)"
OnBad = Callable[[str, str], None]


def is_record_file(name: str) -> bool:
    """Whether a file has the name of one with records, in upper or lower case."""
    return name.lower().endswith(SUFFIXES)


def record_files(folder: Path) -> list[Path]:
    """The files with records in a folder, by name: those of JSON lines, or where there are none, of JSON (beside JSON lines a .json
    file is a report or the like). Hidden files, such as the ._NAME that macOS writes, are left out."""
    names = sorted(path for path in folder.iterdir() if is_record_file(path.name) and not path.name.startswith("."))
    files = [path for path in names if path.is_file()]
    return [file for file in files if not _is_json(file)] or files


def read_record_file(
    file: Path, error: type[CtcGrpoError], *, name: str | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file in order, each with its place: "FILE, line 3", or "FILE, record 3" in an array. A file of another name
    is read as JSON lines, and so is a .json file with a JSON object a line.

    `name` names the file in places. `on_bad` is called with (place, message) for what is no record; without it `error` is raised.
    A file that cannot be read or decompressed raises `error` in any case."""
    shown = str(file) if name is None else name
    data = file_bytes(file, shown, error)
    if file.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as problem:
            raise error(f"{shown}: cannot be decompressed: {problem}; expected a file written by gzip") from None
    if _is_json(file) and not _is_lines(data):
        yield from _document(data, shown, error, on_bad)
    else:
        yield from json_lines(data, shown, error, on_bad=on_bad)


def _is_json(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(".json")


def _is_lines(data: bytes) -> bool:
    """Whether a file holds several lines, of which the first is a JSON object by itself."""
    first, _, others = data.removeprefix(UTF8_MARK).strip().partition(b"\n")
    if not first.startswith(b"{") or not others.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _document(data: bytes, name: str, error: type[CtcGrpoError], on_bad: OnBad | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        value = parse_json(data.removeprefix(UTF8_MARK).decode("utf-8"))
    except UnicodeDecodeError as problem:
        reject(name, f"cannot be read as UTF-8 text: {problem.reason} at byte {problem.start + 1}", error, on_bad)
        return
    except json.JSONDecodeError as problem:
        reject(f"{name}, line {problem.lineno}", f"not valid JSON: {problem.msg} at column {problem.colno}", error, on_bad)
        return
    except (ValueError, RecursionError) as problem:
        reject(name, f"not JSON that can be read: {reason_of(problem)}", error, on_bad)
        return
    if isinstance(value, dict):
        yield f"{name}, record 1", value
        return
    if not isinstance(value, list):
        reject(name, f"expected an array of JSON objects, or one, got a {type(value).__name__}", error, on_bad)
        return
    for number, record in enumerate(value, 1):
        if isinstance(record, dict):
            yield f"{name}, record {number}", record
        else:
            reject(f"{name}, record {number}", f"expected a JSON object, got a {type(record).__name__}", error, on_bad)
