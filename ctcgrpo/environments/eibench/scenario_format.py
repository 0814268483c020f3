"""The record format of EIBench, and a record as a Scenario; the dataset's own words (aggressor, defender, rub_goals) stay in here.

Strict where it matters (identity, scene, personas, anchors), tolerant of keys it does not know: they are kept in `Scenario.extras`.
Format: EIBench (Tongyi-ConvAI/Qwen-Character)."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ctcgrpo.environments.eibench.records import SCENE_NAME, SCENES, Anchors, Scenario, UserState, scene_rules
from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.naming import cut, nearest, quoted
from ctcgrpo.util.strict_yaml import load_yaml

Split = Literal["train", "test"]
_HAN = re.compile(r"[\u4e00-\u9fff]")
_MISSPELT_SCENE = 0.75
_TAKEN = ("all", "failed", "overall")
_INITIAL = "initial_calibration"
_ANCHORS = {
    _INITIAL: ("initial_anger", "initial_trust"),
    "rub_goals": ("target_anger", "target_trust"),
    "worst_case": ("worst_anger_min", "worst_trust_min"),
}
_STAND_INS: Mapping[str, Any] = {
    "id": "?",
    "scene_tag": "charm",
    "aggressor_profile": {"system_prompt": "?", "opening_line": "?"},
    "defender_profile": {"system_prompt": "?"},
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSPELT = 0.84
_LONGEST_MESSAGE = 600  # characters of what is wrong with a record: it may quote the record


class Fault(NamedTuple):
    """What keeps a record from being a scenario: its place (file and line), its id ("?" for none), the field, what is wrong."""

    place: str
    id: str
    field: str
    message: str

    def __str__(self) -> str:
        who = "" if self.id == "?" else f"scenario {quoted(self.id)}: "
        return f"{self.place}: {who}{f'{cut(self.field)} ' if self.field else ''}{cut(self.message, _LONGEST_MESSAGE)}"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _User(_Part):
    system_prompt: str
    opening_line: str = ""


class _Policy(_Part):
    system_prompt: str


class _Initial(_Part):
    initial_anger: int = 50
    initial_trust: int = 50


class _Target(_Part):
    target_anger: int | None = None
    target_trust: int | None = None


class _Worst(_Part):
    worst_anger_min: int | None = None
    worst_trust_min: int | None = None


class _Record(_Part):
    id: str
    scene_tag: str
    title: str = ""
    language: str = ""
    aggressor_profile: _User
    defender_profile: _Policy
    goal_one_liner: str = ""
    success_criteria: list[str] = []
    must_avoid: list[str] = []
    initial_calibration: _Initial = _Initial()
    rub_goals: _Target = _Target()
    worst_case: _Worst = _Worst()
    data_source: str = ""
    script: dict[str, Any] = {}


def record_fields(model: type[BaseModel] = _Record, path: str = "") -> Iterator[tuple[str, bool, str]]:
    """(field, whether it is required, what it is for) of a record, in order, without `script`'s own."""
    texts = load_yaml((files("ctcgrpo.environments.eibench") / "record_fields.yaml").read_text(encoding="utf-8"))
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Part):
            yield from record_fields(kind, f"{path}{name}.")
        else:
            yield f"{path}{name}", field.is_required(), texts[f"{path}{name}"]


def read_record(record: Mapping[str, Any], place: str, split: Split = "train") -> Scenario:
    """One record as a Scenario; `place` (file and line) opens every error message. Raises ScenarioError with its first fault."""
    scenario, faults = check_record(record, place, split)
    if scenario is None:
        raise ScenarioError(str(faults[0]))
    return scenario


def check_record(record: Mapping[str, Any], place: str, split: Split = "train") -> tuple[Scenario | None, list[Fault]]:
    """One record as a Scenario, or None and every fault of it."""
    name = record.get("id")
    who = name if isinstance(name, str) and name.strip() else "?"
    faults: list[Fault] = []

    def fault(field: str, message: str) -> None:
        faults.append(Fault(place, who, field.encode(errors="backslashreplace").decode(), message))

    meta = record.get("meta_config")
    if isinstance(meta, Mapping) and _INITIAL in meta:  # the other place in which EIBench's records have it
        own, other = record.get(_INITIAL, meta[_INITIAL]), meta[_INITIAL]
        if own != other:
            fault(_INITIAL, f"is {quoted(own)}, and meta_config.{_INITIAL} is {quoted(other)}; keep one")
        record = {**record, _INITIAL: other}
    misspelt = dict(_misspelt(record, _Record))
    for field, message in (*_lone_surrogates(record), *misspelt.items()):
        fault(field, message)
    ordered = True
    try:
        parsed = _Record.model_validate(record)
    except ValidationError as error:
        for one in error.errors():
            field = ".".join(map(str, one["loc"]))
            ordered = ordered and one["loc"][0] not in _ANCHORS
            if one["type"] != "missing":
                fault(field, f"is {quoted(one['input'])}; {one['msg'].lower()}")
            elif not any(nearest(other, [field], cutoff=_MISSPELT) for other in misspelt):
                fault(field, "is missing")
        parsed = _without(record, [one["loc"] for one in error.errors()])
    if not parsed.id.strip():
        fault("id", f"is {quoted(parsed.id)}; an id cannot be empty")
    scene = parsed.scene_tag.strip().lower()
    if problem := scene_problem(scene):
        fault("scene_tag", f"is {quoted(parsed.scene_tag)}; {problem}")
    user, policy = parsed.aggressor_profile, parsed.defender_profile
    for field, text in (("aggressor_profile", user.system_prompt), ("defender_profile", policy.system_prompt)):
        if not text.strip():
            fault(f"{field}.system_prompt", f"is {text!r}; a persona cannot be empty")
    rules = scene_rules(scene)
    if rules.policy_opens is False and not user.opening_line.strip():
        fault("aggressor_profile.opening_line", f"is {user.opening_line!r}; in {scene} the user speaks first")
    anchors = _anchors(parsed, split, fault, ordered)
    if faults or anchors is None:
        return None, faults
    scenario = Scenario(
        id=parsed.id,
        title=parsed.title,
        scene=scene,
        language=parsed.language or ("zh" if len(_HAN.findall(user.system_prompt)) > 0.2 * len(user.system_prompt) else "en"),
        user_persona=user.system_prompt.strip(),
        opening_line="" if rules.policy_opens else user.opening_line.strip(),
        policy_persona=policy.system_prompt.strip(),
        goal=parsed.goal_one_liner,
        success_criteria=tuple(parsed.success_criteria),
        must_avoid=tuple(parsed.must_avoid),
        anchors=anchors,
        source=parsed.data_source,
        script=MappingProxyType(parsed.script),
        extras=MappingProxyType({key: value for key, value in record.items() if key not in _Record.model_fields}),
    )
    return scenario, []


def scene_problem(scene: str) -> str | None:
    """What is wrong with the name of a scene: its form, or that it is almost one of the published set; None where nothing is."""
    if not re.match(SCENE_NAME, scene):
        return f"expected {', '.join(SCENES)}, or a name of your own (letters, digits, - and _, 40 at most)"
    if scene in _TAKEN:
        return f"{scene!r} is what metrics call all scenes, or failures; choose another name"
    if scene not in SCENES and (meant := nearest(scene, SCENES, cutoff=_MISSPELT_SCENE)):
        return f"did you mean {meant!r}? A scene of your own needs a name less like it"
    return None


def _without(record: Mapping[str, Any], places: Iterable[tuple[int | str, ...]]) -> _Record:
    """The record with stand-ins that have no fault where its fields cannot be read, so that the others can be checked."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in record.items()}
    for section, *fields in places:
        part, stand_ins, key = kept, _STAND_INS, section
        if fields and isinstance(kept.get(str(section)), dict):
            part, stand_ins, key = kept[str(section)], _STAND_INS.get(str(section), {}), fields[0]
        part.pop(str(key), None)
        if key in stand_ins:
            part[str(key)] = stand_ins[str(key)]
    return _Record.model_validate(kept)


def _anchors(parsed: _Record, split: Split, fault: Callable[[str, str], None], ordered: bool) -> Anchors | None:
    """The three anchors, in range and, where all could be read (`ordered`), in order: worst <= initial <= target on trust; on anger
    both initial and target lie at or below worst (a target above the initial value is a boundary that may cost some anger)."""
    fields = [(section, name) for section, names in _ANCHORS.items() for name in names]
    given = {f"{section}.{name}": getattr(getattr(parsed, section), name) for section, name in fields}
    beyond = {field: value for field, value in given.items() if value is not None and not 0 <= value <= 100}
    for field, value in beyond.items():
        fault(field, f"is {value!r}; it must lie in [0, 100]")
    if beyond or not ordered:
        return None
    a0, t0, *_ = given.values()
    # Anchors that a record leaves out: the extremes in training, the authors' evaluation defaults in testing.
    defaults = {"train": (a0, t0, 0, 100, 100, 0), "test": (a0, t0, a0, t0, a0 + 25, max(0, t0 - 20))}[split]
    found = (default if value is None else value for value, default in zip(given.values(), defaults, strict=True))
    a0, t0, a1, t1, a2, t2 = found
    if a2 < max(a0, a1):
        lowest = f"it must not lie below the initial ({a0}) or the target anger ({a1})"
        fault("worst_case.worst_anger_min", f"is {a2}; {lowest}")
    if not t2 <= t0 <= t1:
        fault("trust (worst, initial, target)", f"is {(t2, t0, t1)}; the three must not decrease in this order")
    return Anchors(UserState(a0, t0), UserState(a1, t1), UserState(a2, t2))


def _lone_surrogates(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of every text that holds half a character: no model and no file can take it."""
    if isinstance(value, str):
        if half := _SURROGATE.search(value):
            where = f"({half[0]!r}, character {half.start() + 1})"
            yield path, f"holds a lone surrogate {where}, which is half a character; write the whole character, or remove it"
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if _SURROGATE.search(str(key)):
                yield f"{path}.{key!r}".strip("."), "is a key that holds a lone surrogate; rename it"
            else:
                yield from _lone_surrogates(inner, f"{path}.{key}".strip("."))


def _misspelt(record: Mapping[str, Any], model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Extra keys are welcome, but one that nearly spells a missing known key would silently leave a default behind."""
    missing = set(model.model_fields) - set(record)
    for key in record:
        if key not in model.model_fields and (meant := nearest(str(key), missing, cutoff=_MISSPELT)):
            yield f"{path}{key}", f"is unknown and {path}{meant} is missing; did you mean {meant!r}?"
    for key, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Part) and isinstance(record.get(key), dict):
            yield from _misspelt(record[key], kind, f"{path}{key}.")
