"""Files that a killed run leaves whole: written in one move, lines that have an end, folders that carry a marker."""

from __future__ import annotations

import json
import re
from pathlib import Path

COMPLETE = "COMPLETE"
"""The marker of a folder whose every file is written: it lists them, with their sizes."""


def write_whole(file: Path, text: str) -> None:
    """Replace a file's text in one move."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a JSONL file that have an end; none where there is no file. A killed run may leave half a line."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


def mark_complete(folder: Path) -> None:
    """The last thing that is written to a folder."""
    files = {
        str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file() and f.name != COMPLETE
    }
    write_whole(folder / COMPLETE, json.dumps(files, indent=0) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the marker stands there, and every file that it lists, in its whole length."""
    return missing_in(folder) is None


def missing_in(folder: Path) -> str | None:
    """What keeps a folder from being complete; None where nothing does."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        for name, size in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, OSError) as error:
        return f"{COMPLETE} cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their number of optimizer steps, complete or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}
