"""The rules of SAGE: a user whose emotion is one number, which the model's replies change. Pure.

The user opens; emotion starts at 40. After each reply of the model a simulator first plans (labels Content, TargetCompletion,
Activity, Analyse, Change; the first signed number after Change, clipped to 10 either way, moves the emotion), then speaks (labels
Thinking, Origin, Change, Response), given only the emotion's letter. It ends at a goodbye, at 100, below 10, or with the model's
reply to the tenth line of the user. Source: SAGE (Tencent/digitalhuman), whose data is the user's own copy."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.record_files import read_record_file

START, SUCCESS, FAILURE, USER_TURNS = 40, 100, 10, 10
PROFILES = "simulator_profile_withfirsttalk.jsonl"
_LETTERS = ((100, "S"), (70, "A"), (40, "B"), (10, "C"))
_MOST = 10
_GOODBYES = re.compile(r"再见|拜拜|\bgood ?bye\b|\bbye\b", re.IGNORECASE)
_LABELS = re.compile(
    r"^[\s#*\[【]*(Content|TargetCompletion|Activity|Analyse|Change|Thinking|Origin|Response)[\]】*\s]*[:：]",
    re.MULTILINE | re.IGNORECASE,
)
_DASHES = str.maketrans({"−": "-", "－": "-", "＋": "+", "–": "-"})


class Unreadable(Exception):
    """An answer of the simulator without what was asked for."""


class Profile(NamedTuple):
    """The fields of a SAGE record that are read."""

    id: str
    player: str
    scene: str
    main_cha: str
    task: str
    first_talk: str


def profile_of(record: Mapping[str, Any], place: str) -> Profile:
    """Raises ScenarioError, naming `place` and the field."""
    names = Profile._fields
    if missing := [name for name in names if not isinstance(record.get(name), str) or not record[name].strip()]:
        raise ScenarioError(f"{place}: {missing[0]} is missing or not a text; expected {', '.join(names)}")
    return Profile(*(record[name] for name in names))


def load_profiles(path: Path) -> list[Profile]:
    """The profiles of a file, or of a folder that holds it at any depth. Raises ScenarioError naming file, line and field."""
    file = min(path.rglob(PROFILES), default=path / PROFILES) if path.is_dir() else path
    if not file.is_file():
        source = "git clone https://github.com/Tencent/digitalhuman, folder SAGE (MIT)"
        raise ScenarioError(
            f"{file} not found; expected SAGE's profiles or a folder with them; set --data to your copy: {source}"
        )
    found: dict[str, Profile] = {}
    for place, record in read_record_file(file, ScenarioError):
        profile = profile_of(record, place)
        if profile.id in found:
            raise ScenarioError(f"{place}: duplicate id {profile.id!r}")
        found[profile.id] = profile
    if not found:
        raise ScenarioError(f"{file}: no profiles; expected one JSON object a line")
    return list(found.values())


def letter(emotion: int) -> str:
    """The letter of an emotion in [0, 100]: S from 100, A from 70, B from 40, C from 10, else F."""
    return next((name for least, name in _LETTERS if emotion >= least), "F")


def planned_change(text: str) -> int:
    """The change of a plan, within [-10, 10]. Raises Unreadable for a plan without one."""
    after = _after_label(text, "Change").translate(_DASHES)
    # Without a sign a number is a change only where nothing stands before it: "from 40 to 45, +5" is 5.
    number = re.search(r"[+-]\s*\d+", after) or re.match(r"[\s*]*\d+(?!\d|\s*(?:/|到|至|to\b|->|→))", after)
    if number is None:
        raise Unreadable("no signed number after Change")
    return max(-_MOST, min(_MOST, int(re.sub(r"[\s*]", "", number[0]))))


def analysis(text: str) -> str:
    """Why the emotion moves, as a plan says it."""
    return _after_label(text, "Analyse").strip()


def response_text(text: str) -> str:
    """What the user says in an answer with labels. Raises Unreadable for one that says nothing."""
    if not (response := _after_label(text, "Response").strip().strip('"“”').strip()):
        raise Unreadable("nothing after Response")
    return response


def _after_label(text: str, name: str) -> str:
    """The text behind the last label of that name, up to the next label."""
    _, *parts = _LABELS.split(text)  # label, text, label, text, ...
    found = [part for label, part in zip(parts[::2], parts[1::2], strict=True) if label.lower() == name.lower()]
    return found[-1] if found else ""


def is_over(emotion: int, message: str) -> bool:
    """After a line of the user."""
    return emotion >= SUCCESS or emotion < FAILURE or _GOODBYES.search(message) is not None


def measures(emotion: int, user_turns: int) -> dict[str, float]:
    return {"success": float(emotion >= SUCCESS), "failure": float(emotion < FAILURE), "turns": float(user_turns)}
