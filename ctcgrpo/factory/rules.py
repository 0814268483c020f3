"""The rules for records, one small function each.

A rule takes a raw record and yields (field, problem). A new rule is a function of a few lines, listed in RULES. The format is
checked first: for a record that cannot be read as a Scenario no other rule is checked."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenario_format import Split, check_record
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.factory.anchors import anchor_problems
from ctcgrpo.factory.layout import Role, layout_problems
from ctcgrpo.simulator.scripted.knowledge import script_problems
from ctcgrpo.simulator.scripted.language import load_language

Record = Mapping[str, Any]
Found = Iterator[tuple[str, str]]

SHORTEST, LONGEST = 60, 6000  # characters of a persona
_FOREIGN = {
    "contains a placeholder": re.compile(
        r"\{\{|\}\}|\bTODO\b|\bTBD\b|lorem ipsum|<[a-z_]+>|\[(?:name|place|age|insert[^\]]*)\]|［?(?:此处|在此)填写", re.I
    ),
    "contains markup of a model's answer": re.compile(r"```|</?think>"),
    "reads like a refusal": re.compile(
        r"\bas an ai\b|\b(?:i am|i'm) (?:sorry|unable)[^.]{0,40}\b(?:assist|help|create|generate|comply)|"
        r"作为(?:一个|一名)?(?:AI|人工智能)|我(?:无法|不能)(?:协助|提供|生成|创作)",
        re.I,
    ),
    "contains characters that are not text": re.compile(r"[\ud800-\udfff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]"),
}
_HAN, _LATIN = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[A-Za-z]")


class Problem(NamedTuple):
    """A broken rule; `place` is the record's file and line."""

    place: str
    id: str
    rule: str
    field: str
    message: str

    def __str__(self) -> str:
        field = f"{self.field}: " if self.field else ""
        name = self.id.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be printed
        who = "" if name == "?" else f"{name}: "
        return f"{self.place}: {who}{field}{self.message} [{self.rule}]"


def problems(records: Iterable[tuple[str, Record]], split: Split = "train") -> Iterator[Problem]:
    """All broken rules, in the order of the records (place, record)."""
    seen: dict[str, str] = {}
    for place, record in records:
        scenario, faults = check_record(record, place, split)
        for fault in faults:
            yield Problem(place, fault.id, "format", fault.field, fault.message)
        name = record.get("id")
        if isinstance(name, str) and name.strip():
            if name in seen:
                yield Problem(place, name, "unique", "id", f"is used at {seen[name]} already")
            seen.setdefault(name, place)
        if scenario is None:
            continue
        for rule in RULES:
            for field, message in rule(record, scenario):
                yield Problem(place, scenario.id, rule.__name__, field, message)


def anchors(record: Record, scenario: Scenario) -> Found:
    yield from anchor_problems(record, scenario.scene)


def layout(record: Record, scenario: Scenario) -> Found:
    for profile, role, persona in _personas(scenario):
        for message in layout_problems(persona, role, scenario.language):
            yield f"{profile}.system_prompt", message


def whole(record: Record, scenario: Scenario) -> Found:
    """The fields that prompts and reports need are there."""
    # A missing language is detected from the text.
    for field in ("title", "goal_one_liner", "data_source", *({"language"} & record.keys())):
        if not str(record.get(field) or "").strip():
            yield field, "is missing or empty"
    for field in ("success_criteria", "must_avoid"):
        if not [text for text in record.get(field) or () if text.strip()]:
            yield field, "is missing or empty"


def length(record: Record, scenario: Scenario) -> Found:
    for profile, _, persona in _personas(scenario):
        if not SHORTEST <= len(persona) <= LONGEST:
            yield f"{profile}.system_prompt", f"has {len(persona)} characters; expected {SHORTEST} to {LONGEST}"


def prompt(record: Record, scenario: Scenario) -> Found:
    """`prompt` equals the profiles that it is made of."""
    if "prompt" not in record:
        return
    wanted = [("system", scenario.policy_persona)]
    wanted += [("user", scenario.opening_line)] if scenario.opening_line else []
    if not isinstance(record["prompt"], list):
        yield "prompt", f"is {record['prompt']!r}; expected a list of chat messages"
        return
    found = [(m.get("role"), str(m.get("content", "")).strip()) for m in record["prompt"] if isinstance(m, Mapping)]
    roles, expected = ([role for role, _ in messages] for messages in (found, wanted))
    if roles != expected:
        yield "prompt", f"has the roles {roles}; expected {expected} in {scenario.scene}"
        return
    for (role, text), (_, expected_text) in zip(found, wanted, strict=True):
        if text != expected_text:
            yield "prompt", f"its {role} message differs from the profile"


def written(record: Record, scenario: Scenario) -> Found:
    """No remains of a template or of a model's answer."""
    for field, text in texts(record):
        for message, pattern in _FOREIGN.items():
            if match := pattern.search(text):
                yield field, f"{message} ({match[0]!r})"


def language(record: Record, scenario: Scenario) -> Found:
    """The texts are in the record's language."""
    if scenario.language not in ("zh", "en"):
        return
    for field, text in texts(record):
        han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text)) / 3
        if han + latin >= 10 and (han > latin) != (scenario.language == "zh"):
            yield field, f"is not in {scenario.language!r}"


def script(record: Record, scenario: Scenario) -> Found:
    """The scripted user can play the script, if it has rules for the language."""
    if not scenario.script:
        return
    yield from script_problems(scenario.script)
    try:
        load_language(scenario.language)
    except SimulatorReplyError as error:
        yield "script", str(error)


def _personas(scenario: Scenario) -> tuple[tuple[str, Role, str], ...]:
    return ("aggressor_profile", "user", scenario.user_persona), ("defender_profile", "policy", scenario.policy_persona)


RULES = (anchors, layout, whole, length, prompt, written, language, script)


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """(field, text) of all texts that models and people read."""
    for field in ("title", "goal_one_liner"):
        yield field, str(record.get(field) or "")
    for field in ("aggressor_profile.system_prompt", "aggressor_profile.opening_line", "defender_profile.system_prompt"):
        profile, _, name = field.partition(".")
        yield field, str((record.get(profile) or {}).get(name) or "")
    for field in ("success_criteria", "must_avoid"):
        for k, text in enumerate(record.get(field) or ()):
            yield f"{field}.{k}", str(text)
