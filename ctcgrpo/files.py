"""Files that a killed run leaves whole: written in one move, lines that have an end, folders that carry a marker."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

COMPLETE = "COMPLETE"
"""The marker of a folder whose every file is written: it lists them, with their sizes and digests."""
_WHOLE = 2**24
"""Bytes of a file up to which all of it enters its digest; of a larger one (weights) this much, in pieces spread over it."""
_PIECES = 16


def write_whole(file: Path, text: str) -> None:
    """Replace a file's text in one move."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a JSONL file that have an end; none where there is no file. A killed run may leave half a line."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


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
    """The last thing that is written to a folder."""
    files = {
        str(f.relative_to(folder)): [f.stat().st_size, file_digest(f)]
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != COMPLETE
    }
    write_whole(folder / COMPLETE, json.dumps(files, indent=0) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the marker stands there, and every file that it lists, as it was written."""
    return missing_in(folder) is None


def missing_in(folder: Path) -> str | None:
    """What keeps a folder from being complete; None where nothing does."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        if not files:
            return f"{COMPLETE} lists no file"
        for name, (size, digest) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if file_digest(folder / name) != digest:
                return f"{name} is damaged: it is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as error:
        return f"{COMPLETE} cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their number of optimizer steps, complete or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}
