"""Names and values in messages: suggestions for misspelt names, detection of paths, shortened values,
differences."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_MOST = 200  # characters of a value that a message quotes
_LISTED = 30


def cut(text: str, most: int = _MOST) -> str:
    """A text, cut to `most` characters with a note on its length."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def quoted(value: object) -> str:
    """The repr of a value, cut."""
    return cut(repr(value))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The fields in which two mappings (of resolved recipes, of options) differ, each as "field: old -> new"."""
    found: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{cut(name)}: {cut(str(a))} -> {cut(str(b))}")
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where that is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    matches = get_close_matches(name[:_MOST], list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the closest known name, or the list of known names, at most 30."""
    known = sorted(known)
    if match := nearest(name, known):
        return f"did you mean {quoted(match)}?"
    more = f", and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"known: {', '.join(cut(name) for name in known[:_LISTED])}{more}"


_WRITTEN_TO = "checkpoints"  # where runs and evaluations are written by default


def is_path(text: str) -> bool:
    """Whether a text can only be a local path, never another name (a Hub model OWNER/NAME, a bundled pack): it is absolute, begins
    with `.` or `~`, ends with `/`, or has several parts of which the first is an existing folder (`checkpoints` counts as
    one)."""
    first, slash, _ = text.partition("/")
    below = bool(slash) and (first == _WRITTEN_TO or Path(first).is_dir())
    return below or text.startswith((".", "/", "~")) or text.endswith("/")
