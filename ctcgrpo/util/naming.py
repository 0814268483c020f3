"""Names and values in messages: which name was probably meant, whether a text names a path, no more of a value than is read."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_MOST = 200  # characters of a value that a message quotes
_LISTED = 30


def cut(text: str, most: int = _MOST) -> str:
    """The beginning of a text that comes from outside, and how long all of it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def quoted(value: object) -> str:
    """A value from outside, as Python writes it, cut."""
    return cut(repr(value))


def first_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing; libraries add pages of advice."""
    return (str(error) or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    matches = get_close_matches(name[:_MOST], list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest known name, or all of them, some where there are many."""
    known = sorted(known)
    if match := nearest(name, known):
        return f"did you mean {quoted(match)}?"
    more = f", and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"known: {', '.join(cut(name) for name in known[:_LISTED])}{more}"


_WRITTEN_TO = "checkpoints"  # where runs and evaluations are written by default


def is_path(text: str) -> bool:
    """Whether a text can only mean a place on this machine, never the name of something elsewhere (a model of the Hub,
    OWNER/NAME; a bundled pack): it is absolute, begins with `.` or `~`, ends with `/`, or its first part of several is a folder
    here (`checkpoints` counts as one)."""
    first, slash, _ = text.partition("/")
    below = bool(slash) and (first == _WRITTEN_TO or Path(first).is_dir())
    return below or text.startswith((".", "/", "~")) or text.endswith("/")
