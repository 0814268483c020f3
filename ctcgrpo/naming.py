"""Saying which name was probably meant, and whether a text names a path at all."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest known name, or all of them."""
    known = sorted(known)
    match = nearest(name, known)
    return f"did you mean {match!r}?" if match else f"known: {', '.join(known)}"


_WRITTEN_TO = "checkpoints"
"""Where runs and evaluations are written by default."""


def is_path(text: str) -> bool:
    """Whether a text can only mean a place on this machine, never the name of something elsewhere (a model of the Hub,
    OWNER/NAME; a bundled pack): it is absolute, begins with `.` or `~`, ends with `/`, or its first part of several is a folder
    here (`checkpoints` counts as one)."""
    first, slash, _ = text.partition("/")
    return (
        text.startswith((".", "/", "~"))
        or text.endswith("/")
        or bool(slash and (first == _WRITTEN_TO or Path(first).is_dir()))
    )
