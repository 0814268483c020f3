"""Reading what an LLM answered as the user: tolerant of form, never of meaning. Pure; one exception type.

    {"reflection": ..., "anger_delta": -3, "trust_delta": 2, "reply": ..., "continue": "yes", "stop_reason": ""}

Form that is put up with: reasoning before the answer, code fences, leading plus signs, comments, trailing commas, raw
newlines, unescaped quotes, numbers as strings, an end cut off after all that matters. What could mean two things is not
guessed at: it is refused, with what to mend.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import json_repair

from ctcgrpo.records import MAX_DELTA, UserState

ANGER, TRUST, REPLY, CONTINUE, REFLECTION, STOP_REASON = (
    "anger_delta",
    "trust_delta",
    "reply",
    "continue",
    "reflection",
    "stop_reason",
)

ProblemKind = Literal["empty", "no_object", "several", "missing", "not_a_number", "out_of_range", "not_yes_or_no", "leak"]
_BEYOND = 2 * MAX_DELTA
"""A change of up to this much is an exaggeration and is clipped; anything larger is no change at all."""
_MOST = 50_000
"""Characters: no answer worth reading is longer."""

_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
_SIGNED = re.compile(r'("(?:anger|trust)_delta"\s*:\s*"?\s*)\+\s*(?=\d)')
_NUMBER = re.compile(r"([+-]?)(\d{1,6})(?:\.0{1,6})?")
_YES = {"yes": True, "true": True, "no": False, "false": False, "是": True, "否": False}


class Unreadable(Exception):
    """An answer that says nothing certain: `kind` of problem, and the field and value that it is about."""

    def __init__(self, kind: ProblemKind, field: str = "", value: str = "") -> None:
        self.kind, self.field, self.value = kind, field, value
        super().__init__(": ".join(part for part in (kind.replace("_", " "), field, value) if part))


@dataclass(frozen=True, slots=True)
class Answer:
    """A reading of an answer: deltas are whole numbers in [-10, 10]; `reply` is not empty."""

    reply: str
    anger_delta: int
    trust_delta: int
    goes_on: bool
    reflection: str
    stop_reason: str


def read_answer(text: str, state: UserState) -> Answer:
    """The user's answer in a completion. `state` is the one that the answer changes: it tells a new level from a change.
    Raises Unreadable, and nothing else, for whatever it is given."""
    fields, signed = _fields(text)
    anger, trust = _deltas(_number(fields, ANGER, signed), _number(fields, TRUST, signed), state)
    reply = _text(fields, REPLY)
    if not reply:
        raise Unreadable("missing", REPLY)
    return Answer(reply, anger, trust, _goes_on(fields), _text(fields, REFLECTION), _text(fields, STOP_REASON))


# --- from text to fields -------------------------------------------------------------------------------------------------


def _fields(text: str) -> tuple[Mapping[str, Any], frozenset[str]]:
    """The fields of the one JSON object, and which of them wrote a plus sign."""
    text = _THOUGHTS.sub("", text[:_MOST]).strip()
    if not text:
        raise Unreadable("empty")
    signed = frozenset(match[1].split('"')[1] for match in _SIGNED.finditer(text))
    text = _SIGNED.sub(r"\1", text)
    start = text.find("{")
    if start < 0:
        raise Unreadable("no_object")
    found = list(_exact_objects(text)) or [_repaired(text[start:])]
    if len(found) > 1:
        raise Unreadable("several")
    return found[0], signed


def _exact_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every object in the text that is proper JSON (but for raw newlines) and speaks of the user's state."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_no_key_twice)
    position = 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        if isinstance(value, dict) and ANGER in value:
            yield value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = [(_key(key), value) for key, value in pairs]
    fields = dict(named)
    if len(fields) < len(named):
        raise Unreadable("several")
    return fields


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _repaired(text: str) -> dict[str, Any]:
    """An object that is nearly JSON. Its last field is left out where the end is cut off: half a number is a number too."""
    # A repair may take quoted text for fields; a field that is named twice could be either.
    if any(len(re.findall(rf"\b{name}\b", text)) > 1 for name in (ANGER, TRUST)):
        raise Unreadable("several")
    try:
        value = json_repair.loads(text, skip_json_loads=True)
    except (ValueError, RecursionError, IndexError, TypeError, AttributeError, KeyError):  # it is a heuristic parser
        raise Unreadable("no_object") from None
    if isinstance(value, list):
        value = next((v for v in value if isinstance(v, dict) and ANGER in v), None)
    if not isinstance(value, dict):
        raise Unreadable("no_object")
    fields = {_key(str(key)): part for key, part in value.items()}
    if fields and _is_cut(text):
        fields.popitem()
    return fields


def _is_cut(text: str) -> bool:
    """Whether the text ends before its outermost brace is closed."""
    depth, quoted, escaped = 0, False, False
    for char in text:
        if escaped:
            escaped = False
        elif quoted:
            escaped, quoted = char == "\\", char != '"'
        elif char == '"':
            quoted = True
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if not depth:
                return False
    return True


# --- from fields to values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Number:
    field: str
    value: int
    signed: bool

    def is_change(self) -> bool:
        return abs(self.value) <= _BEYOND

    def is_level(self, now: int) -> bool:
        return not self.signed and 0 <= self.value <= 100 and abs(self.value - now) <= _BEYOND


def _number(fields: Mapping[str, Any], field: str, signed: frozenset[str]) -> _Number:
    if field not in fields or fields[field] is None:
        raise Unreadable("missing", field)
    value = fields[field]
    shown = _shown(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Unreadable("not_a_number", field, shown)
    written = unicodedata.normalize("NFKC", str(value)).replace("\u2212", "-").strip()
    match = _NUMBER.fullmatch(written) if written.isascii() else None
    if match is None:
        raise Unreadable("not_a_number", field, shown)
    return _Number(field, int(match[1] + match[2]), field in signed or bool(match[1]))


def _deltas(anger: _Number, trust: _Number, state: UserState) -> tuple[int, int]:
    """Both as changes; or both as new levels, where they cannot be changes. What can be both is refused."""
    both = (anger, trust)
    changes = all(n.is_change() for n in both)
    levels = anger.is_level(state.anger) and trust.is_level(state.trust)
    inside = all(abs(n.value) <= MAX_DELTA for n in both)
    if not inside and (changes == levels):
        worst = max(both, key=lambda n: abs(n.value))
        raise Unreadable("out_of_range", worst.field, str(worst.value))
    if inside or changes:
        return _clipped(anger.value), _clipped(trust.value)
    return _clipped(anger.value - state.anger), _clipped(trust.value - state.trust)


def _clipped(delta: int) -> int:
    return max(-MAX_DELTA, min(MAX_DELTA, delta))


def _goes_on(fields: Mapping[str, Any]) -> bool:
    if CONTINUE not in fields or fields[CONTINUE] is None:
        raise Unreadable("missing", CONTINUE)
    value = fields[CONTINUE]
    if isinstance(value, bool):
        return value
    meant = _YES.get(str(value).strip().lower().rstrip(".")) if isinstance(value, str) else None
    if meant is None:
        raise Unreadable("not_yes_or_no", CONTINUE, _shown(value))
    return meant


def _text(fields: Mapping[str, Any], field: str) -> str:
    """Without what no text may hold: control characters and halves of surrogate pairs."""
    value = fields.get(field)
    if not isinstance(value, str):
        return ""
    whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")  # joins pairs, drops halves
    return "".join(c for c in whole if c == "\n" or unicodedata.category(c) != "Cc").strip()


def _shown(value: object) -> str:
    return repr(value)[:40]
