"""Saying which name was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest known name, or all of them."""
    known = sorted(known)
    match = nearest(name, known)
    return f"did you mean {match!r}?" if match else f"known: {', '.join(known)}"
