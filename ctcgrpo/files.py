"""Files that a killed run leaves whole: written in one move, lines that have an end, folders that carry a marker."""

from __future__ import annotations

import re
from pathlib import Path

COMPLETE = "COMPLETE"
"""The marker of a folder whose every file is written."""


def write_whole(file: Path, text: str) -> None:
    """Replace a file's text in one move."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def whole_lines(file: Path) -> list[str]:
    """The lines of a JSONL file that have an end; none where there is no file. A killed run may leave half a line."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).exists()


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their number of optimizer steps, complete or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}
