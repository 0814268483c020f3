"""Reading scenarios in the EIBench record format; the dataset's own words (aggressor, defender, rub_goals) stay in here.

A source is a JSONL file, a folder of JSONL files, or a folder with `train/` and `test/`. Strict where it matters (identity,
scene, personas, anchors), tolerant of keys it does not know: they are kept in `Scenario.extras`.

Format: EIBench (Tongyi-ConvAI/Qwen-Character), one JSON object a line, optionally wrapped as {"row": {...}}.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ctcgrpo.errors import ScenarioError
from ctcgrpo.naming import did_you_mean, nearest, quoted
from ctcgrpo.records import SCENES, Anchors, Scenario, Scene, UserState

Split = Literal["train", "test"]
PACKS = Path(__file__).parent / "packs"
BUNDLED = ("english", "chinese")
EIBENCH_DATA = "EIBench"
"""How `described` calls the published data set, and no other."""


def data_home() -> Path:
    """Where datasets that do not come with the package live: $CTCGRPO_DATA, by default ~/.cache/ctcgrpo."""
    return Path(os.environ.get("CTCGRPO_DATA") or Path.home() / ".cache" / "ctcgrpo")


def load_scenarios(source: str | Path, split: Split = "train") -> list[Scenario]:
    """All scenarios of a source, in file order (files by name).

    `source` is a path, the name of a bundled pack ("english/train"), or a folder under `data_home()` ("eibench/train").
    `split` chooses the folder where the source has both, and the defaults for missing anchors: in training the best
    and the worst possible state, in testing those of the authors' evaluation code. Raises ScenarioError naming file,
    line, field and value.
    """
    scenarios: dict[str, Scenario] = {}
    places: dict[str, str] = {}
    for place, record in read_records(source, split):
        scenario = read_record(record, place, split)
        if scenario.id in scenarios:
            raise ScenarioError(
                f"{place}: id {quoted(scenario.id)} is already used at {places[scenario.id]}; ids must be unique"
            )
        scenarios[scenario.id], places[scenario.id] = scenario, place
    if not scenarios:
        raise ScenarioError(f"{source}: holds no scenarios; expected one JSON object a line in *.jsonl")
    return list(scenarios.values())


def read_records(source: str | Path, split: Split = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """The raw records of a source in file order, unwrapped, each with its place (file and line). Raises ScenarioError for a source
    that is not there and a line that holds no JSON object."""
    for file in _files(source, split):
        yield from _records(file)


def load_scenes(source: str | Path, scenes: Sequence[Scene]) -> list[Scenario]:
    """The training scenarios of these scenes. Raises ScenarioError for a scene that has none."""
    found = [s for s in load_scenarios(source, "train") if s.scene in scenes]
    if missing := set(scenes) - {s.scene for s in found}:
        raise ScenarioError(f"scenarios.scenes asks for {', '.join(sorted(missing))}, which {source} has none of")
    return found


def by_scene(scenarios: Iterable[Scenario]) -> str:
    """How many there are of each scene, in words."""
    return ", ".join(f"{n} {scene}" for scene, n in sorted(Counter(s.scene for s in scenarios).items()))


def has_splits(source: str | Path) -> bool:
    """Whether a source has folders train/ and test/."""
    return any((path / "train").is_dir() and (path / "test").is_dir() for path in _tried(source))


def described(source: str | Path) -> str:
    """A source in words: EIBench's own data under `data_home()`, a bundled pack, or the path or name as it is."""
    found = next((path for path in _tried(source) if path.exists()), None)
    published = data_home() / "eibench"
    if (found or data_home() / source).resolve().is_relative_to(published.resolve()):
        return f"{EIBENCH_DATA} ({source})"
    if found is None:
        return str(source)
    if found.resolve().is_relative_to(PACKS.resolve()):
        return f"the bundled pack {found.resolve().relative_to(PACKS.resolve())}"
    return str(source)


def _tried(source: str | Path) -> list[Path]:
    return [Path(source), PACKS / source, data_home() / source]


def _files(source: str | Path, split: Split) -> list[Path]:
    tried = _tried(source)
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        hint = ""
        if str(source).split("/")[0] == "eibench":
            hint = " (ctcgrpo scenarios fetch eibench puts it there; CC BY-NC 4.0, not part of this package)"
        raise ScenarioError(f"scenarios {str(source)!r} not found; looked at {', '.join(map(str, tried))}{hint}")
    if found.is_file():
        return [found]
    folder = found / split if (found / split).is_dir() else found
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ScenarioError(f"{folder}: no *.jsonl files in this folder")
    return files


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # Not splitlines(): a JSON string may hold U+2028 and its like, which end no line of JSONL.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScenarioError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            raise ScenarioError(f"{place}: not JSON that can be read: {error}") from None
        if isinstance(record, dict) and isinstance(record.get("row"), dict):
            record = record["row"]
        if not isinstance(record, dict):
            raise ScenarioError(f"{place}: a scenario is a JSON object, this is a {type(record).__name__}")
        yield place, record


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
    aggressor_profile: _User
    defender_profile: _Policy
    title: str = ""
    goal_one_liner: str = ""
    success_criteria: list[str] = []
    must_avoid: list[str] = []
    initial_calibration: _Initial = _Initial()
    rub_goals: _Target = _Target()
    worst_case: _Worst = _Worst()
    data_source: str = ""
    language: str = ""
    script: dict[str, Any] = {}


def read_record(record: Mapping[str, Any], place: str, split: Split = "train") -> Scenario:
    """One record as a Scenario; `place` (file and line) opens every error message."""
    _refuse_misspelt(record, _Record, place)
    try:
        parsed = _Record.model_validate(record)
    except ValidationError as error:
        raise ScenarioError(f"{place}: {_explain(error, record)}") from None

    def fail(field: str, value: object, right: str) -> ScenarioError:
        return ScenarioError(f"{place}: scenario {quoted(parsed.id)}: {field} is {quoted(value)}; {right}")

    scene = next((s for s in SCENES if s == parsed.scene_tag.strip().lower()), None)
    if scene is None:
        raise fail("scene_tag", parsed.scene_tag, did_you_mean(parsed.scene_tag.lower(), SCENES))
    user, policy = parsed.aggressor_profile, parsed.defender_profile
    for field, text in (("aggressor_profile", user.system_prompt), ("defender_profile", policy.system_prompt)):
        if not text.strip():
            raise fail(f"{field}.system_prompt", text, "a persona cannot be empty")
    if scene != "charm" and not user.opening_line.strip():
        raise fail("aggressor_profile.opening_line", user.opening_line, f"in {scene} the user speaks first")
    if not parsed.id.strip():
        raise fail("id", parsed.id, "an id cannot be empty")
    known = set(_Record.model_fields)
    return Scenario(
        id=parsed.id,
        title=parsed.title,
        scene=scene,
        language=parsed.language or _language(user.system_prompt),
        user_persona=user.system_prompt.strip(),
        opening_line="" if scene == "charm" else user.opening_line.strip(),
        policy_persona=policy.system_prompt.strip(),
        goal=parsed.goal_one_liner,
        success_criteria=tuple(parsed.success_criteria),
        must_avoid=tuple(parsed.must_avoid),
        anchors=_anchors(parsed, split, fail),
        source=parsed.data_source,
        script=MappingProxyType(parsed.script),
        extras=MappingProxyType({key: value for key, value in record.items() if key not in known}),
    )


def _anchors(parsed: _Record, split: Split, fail: Any) -> Anchors:
    """The three anchors, in range and in order: worst <= initial <= target on trust; on anger both initial and target
    lie at or below worst (a target above the initial value is a boundary that may cost some anger)."""
    start, target, worst = parsed.initial_calibration, parsed.rub_goals, parsed.worst_case
    given = {
        "initial_calibration.initial_anger": start.initial_anger,
        "initial_calibration.initial_trust": start.initial_trust,
        "rub_goals.target_anger": target.target_anger,
        "rub_goals.target_trust": target.target_trust,
        "worst_case.worst_anger_min": worst.worst_anger_min,
        "worst_case.worst_trust_min": worst.worst_trust_min,
    }
    for field, value in given.items():
        if value is not None and not 0 <= value <= 100:
            raise fail(field, value, "it must lie in [0, 100]")
    a0, t0 = start.initial_anger, start.initial_trust
    # Anchors that a record leaves out: the extremes in training, the authors' evaluation defaults in testing.
    best_default, worst_default = {
        "train": (UserState(0, 100), UserState(100, 0)),
        "test": (UserState(a0, t0), UserState(a0 + 25, max(0, t0 - 20))),
    }[split]
    anchors = Anchors(
        UserState(a0, t0),
        UserState(_or(target.target_anger, best_default.anger), _or(target.target_trust, best_default.trust)),
        UserState(_or(worst.worst_anger_min, worst_default.anger), _or(worst.worst_trust_min, worst_default.trust)),
    )
    if anchors.worst.anger < max(anchors.initial.anger, anchors.target.anger):
        raise fail(
            "worst_case.worst_anger_min",
            anchors.worst.anger,
            f"it must not lie below the initial ({a0}) or the target anger ({anchors.target.anger})",
        )
    if not anchors.worst.trust <= anchors.initial.trust <= anchors.target.trust:
        raise fail(
            "trust (worst, initial, target)",
            (anchors.worst.trust, anchors.initial.trust, anchors.target.trust),
            "the three must not decrease in this order",
        )
    return anchors


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _refuse_misspelt(record: Mapping[str, Any], model: type[BaseModel], place: str, path: str = "") -> None:
    """Extra keys are welcome, but one that nearly spells a missing known key would silently leave a default behind."""
    missing = set(model.model_fields) - set(record)
    for key in record:
        if key not in model.model_fields and (meant := nearest(str(key), missing, cutoff=0.84)):
            raise ScenarioError(
                f"{place}: field {path}{quoted(key)} is unknown and {path}{meant!r} is missing; did you mean {meant!r}?"
            )
    for key, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Part) and isinstance(record.get(key), dict):
            _refuse_misspelt(record[key], kind, place, f"{key}.")


def _explain(error: ValidationError, record: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    who = f"scenario {quoted(record['id'])}: " if isinstance(record.get("id"), str) else ""
    if first["type"] == "missing":
        return f"{who}field {field!r} is missing"
    return f"{who}{field} is {quoted(first['input'])}; {first['msg'].lower()}"


_HAN = re.compile(r"[\u4e00-\u9fff]")


def _language(text: str) -> str:
    return "zh" if len(_HAN.findall(text)) > 0.2 * len(text) else "en"
