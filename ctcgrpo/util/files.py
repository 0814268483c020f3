"""Crash-safe files (atomic writes; folders with a completion marker), and the reader of JSON and JSON lines."""

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ctcgrpo.errors import CtcGrpoError, OutputError

COMPLETE = "COMPLETE"  # the marker of a completely written folder: lists its files with sizes and digests
_WHOLE = 2**24
"""Files up to this many bytes are digested completely; of larger ones (weights) this many, in pieces spread over the file."""
_PIECES = 16
UTF8_MARK = b"\xef\xbb\xbf"  # which some editors put before a text
_T = TypeVar("_T")


def write_whole(file: Path, text: str) -> None:
    """Replace a file's text atomically."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def read_json_lines(
    file: Path,
    error: type[CtcGrpoError] = OutputError,
    *,
    on_bad: Callable[[str, str], None] | None = None,
    whole_only: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file (UTF-8, one JSON object a line) in file order, each with its place ("FILE, line 3").

    Only "\\n" ends a line: U+2028, U+2029 and U+0085 may stand inside a JSON string. Blank lines are skipped. `whole_only` also
    skips a last line without an end, which a killed run leaves. `on_bad` is called with (place, message) for a line that cannot be
    read, which is then skipped. Without it `error` is raised, for a line that is not UTF-8 text, no JSON object, or holds a
    duplicate key. A file that is not there raises `error` in any case.
    """
    yield from json_lines(file_bytes(file, str(file), error), str(file), error, on_bad=on_bad, whole_only=whole_only)


def file_bytes(file: Path, name: str, error: type[CtcGrpoError]) -> bytes:
    """Raises `error`, naming the file as `name`, where it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise error(f"{name}: no such file") from None
    except OSError as problem:
        raise error(f"{name}: cannot be read: {problem.strerror}") from None


def json_lines(
    data: bytes,
    name: str,
    error: type[CtcGrpoError],
    *,
    on_bad: Callable[[str, str], None] | None = None,
    whole_only: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_json_lines` of the content of a file, which places call `name`."""
    lines = data.removeprefix(UTF8_MARK).split(b"\n")
    for number, line in enumerate(lines[:-1] if whole_only else lines, 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            value = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as problem:
            reject(
                place, f"cannot be read as UTF-8 text: {problem.reason} at byte {problem.start + 1} of the line", error, on_bad
            )
        except json.JSONDecodeError as problem:
            reject(place, f"not valid JSON: {problem.msg} at column {problem.colno}", error, on_bad)
        except (ValueError, RecursionError) as problem:  # a duplicate key, thousands of digits, brackets without end
            reject(place, f"not JSON that can be read: {reason_of(problem)}", error, on_bad)
        else:
            if isinstance(value, dict):
                yield place, value
            else:
                reject(place, f"expected a JSON object, got a {type(value).__name__}", error, on_bad)


def reject(place: str, message: str, error: type[CtcGrpoError], on_bad: Callable[[str, str], None] | None) -> None:
    """Give a problem to `on_bad`; without it raise `error`."""
    if on_bad is None:
        raise error(f"{place}: {message}")
    on_bad(place, message)


def parse_json(text: str) -> Any:
    """As json.loads, and raises ValueError for a duplicate key, of which Python silently keeps the last."""
    return json.loads(text, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(duplicate, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {duplicate!r}; keep one of them")
    return found


def read_json(file: Path) -> Any:
    """The value of a JSON file. Raises OutputError for an unreadable file, invalid JSON, or a duplicate key."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file} cannot be read: {reason_of(error)}") from None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OutputError as `read_json`, and for any other value."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise OutputError(f"{file}: expected a JSON object, got a {type(found).__name__}")
    return found


def collect_records(file: Path, read: Callable[[dict[str, Any]], _T], *, whole_only: bool = False) -> tuple[list[_T], list[str]]:
    """The results of `read` on the objects in a JSON lines file, and the problems of invalid lines ("NAME, line 3: ..."): no
    objects, or `read` raises ValueError. Both are empty for a missing file. `whole_only`: as in `read_json_lines`."""
    if not file.exists():
        return [], []
    found: list[_T] = []
    problems: list[str] = []

    def bad(place: str, message: str) -> None:
        problems.append(f"{file.name}{place.removeprefix(str(file))}: {message}")

    for place, record in read_json_lines(file, on_bad=bad, whole_only=whole_only):
        try:
            found.append(read(record))
        except (ValueError, OverflowError) as error:
            bad(place, reason_of(error))
    return found, problems


def once_each(
    file: Path, records: Iterable[_T], key_of: Callable[[_T], Any], what: str, problems: Sequence[str]
) -> tuple[list[_T], list[str]]:
    """Records in the order of their keys, each key once; and the problems, with those of duplicates. `what` names a record by its
    key, as "step {}"."""
    found: dict[Any, _T] = {}
    duplicates = []
    for record in records:
        key = key_of(record)
        if key in found:
            named = what.format(*(key if isinstance(key, tuple) else (key,)))
            duplicates.append(f"{file.name}: duplicate {named}; the first one counts")
        found.setdefault(key, record)
    return [found[key] for key in sorted(found)], [*problems, *duplicates]


RESTORE = "restore the file to resume, or start another run with run.name=NAME"


def refuse_to_resume(file: Path, problems: Sequence[str]) -> None:
    """Raises OutputError where `collect_records` or `once_each` found problems in a file that a run resumes from."""
    if problems:
        raise OutputError(f"{file.parent}/{problems[0]}; {RESTORE}")


def reason_of(error: BaseException) -> str:
    """Why something cannot be read, in a line."""
    if isinstance(error, ValidationError):
        return explained(error)
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def explained(error: ValidationError) -> str:
    """The first problem: field, value, and what is expected."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{field} is missing"
    expected = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    value = repr(first["input"])[:80]
    return f"{field} = {value}; {expected}" if field else f"{value}; expected an object"


def file_digest(file: Path) -> str:
    """12 hexadecimal digits of a file's content; of one above 16 MiB, of its size and of 16 pieces of a MiB spread over it, since
    checkpoints of large models take minutes to read."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    piece, pieces = (size, 1) if size <= _WHOLE else (_WHOLE // _PIECES, _PIECES)
    with file.open("rb") as source:
        for k in range(pieces):
            source.seek((size - piece) * k // max(1, pieces - 1))
            digest.update(source.read(piece))
    return digest.hexdigest()[:12]


def mark_complete(folder: Path) -> None:
    """Write the marker COMPLETE, after all other files of the folder."""
    files = {
        str(f.relative_to(folder)): [f.stat().st_size, file_digest(f)]
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != COMPLETE
    }
    write_whole(folder / COMPLETE, json.dumps(files, indent=0) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the folder has its marker and every file that it lists, undamaged."""
    return missing_in(folder) is None


def missing_in(folder: Path) -> str | None:
    """The reason why a folder is incomplete; None for a complete one."""
    try:
        files = parse_json((folder / COMPLETE).read_text(encoding="utf-8"))
        if not files:
            return f"{COMPLETE} lists no file"
        for name, (size, digest) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes; expected {size}"
            if file_digest(folder / name) != digest:
                return f"{name} is damaged: its digest differs from that in {COMPLETE}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, TypeError, OSError, RecursionError) as error:
        return f"{COMPLETE} cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their number of optimizer steps, complete or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint in a run's folder with the most optimizer steps."""
    found = {step: checkpoint for step, checkpoint in checkpoints(folder).items() if is_complete(checkpoint)}
    return found[max(found)] if found else None


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_TORCH_SAVE = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")


def disk_problem(error: BaseException) -> str | None:
    """The disk's problem that made a write fail, if there is one; libraries that write weights hide the system's error."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    text = str(error)
    if reason := next((os.strerror(number) for number in _DISK if os.strerror(number) in text), None):
        return reason
    if any(mark in text for mark in _TORCH_SAVE):
        return "a file could not be written completely"
    return disk_problem(error.__context__) if error.__context__ is not None else None
