"""Finds and loads sets of scenarios.

A source is a file of records (util/record_files.py), a folder of them, a folder with `train/` and `test/`, or a data set on the Hub
(util/hub_data.py). A record has EIBench's format (scenario_format.py), optionally wrapped as {"row": {...}}, or as JSON in a column
`record`, as `ctcgrpo scenarios convert` writes it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.environments.eibench.scenario_format import Fault, Split, check_record
from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.files import parse_json, reason_of, reject
from ctcgrpo.util.hub_data import Part, hub_parts, is_hub
from ctcgrpo.util.naming import did_you_mean, is_path, quoted
from ctcgrpo.util.record_files import FORMATS, OnBad, is_record_file, read_record_file, record_files

Invalid = Literal["skip", "refuse"]
PACKS = Path(__file__).parent / "packs"
BUNDLED = ("english", "chinese")
_SHOWN = 20  # faults that a report of a set names, at most
_MOST_INVALID = 0.5  # the share of a set beyond which skipping would hide that it is another format, or damaged
EIBENCH_DATA = "EIBench"  # how `described` calls the published data set, and no other


def data_home() -> Path:
    """Where datasets that do not come with the package live: $CTCGRPO_DATA, by default ~/.cache/ctcgrpo."""
    return Path(os.environ.get("CTCGRPO_DATA") or Path.home() / ".cache" / "ctcgrpo")


@dataclass(frozen=True, slots=True)
class ScenarioSet:
    """The scenarios of a source in file order (files by name), and what is wrong with its other records.

    `records` counts all records of the source, `faults` lists what keeps some of them from being scenarios, and `refusals` says why
    the set cannot be played without them. `unasked` counts by scene those that a recipe leaves out, of scenes of one's own."""

    source: str
    scenarios: list[Scenario]
    faults: list[Fault]
    records: int
    refusals: list[str]
    unasked: str = ""

    @property
    def skipped(self) -> int:
        return len({fault.place for fault in self.faults})

    def report(self) -> list[str]:
        """Lines that name what is left out: invalid records, and scenes of one's own that a recipe does not ask for."""
        lines = []
        if self.unasked:
            lines.append(f"{self.source}: {self.unasked} left out; scenarios.scenes names the scenes that are trained on")
        if self.faults:
            count = f"{self.skipped} of {self.records} records are invalid and left out"
            lines += [f"{self.source}: {count} (skip; refuse stops instead)", *(f"  {f}" for f in self.faults[:_SHOWN])]
        if (more := len(self.faults) - _SHOWN) > 0:
            lines.append(f"  and {more} more; `ctcgrpo scenarios validate {self.source}` lists all")
        return lines


def load_set(source: str | Path, split: Split = "train", invalid: Invalid = "skip") -> ScenarioSet:
    """A source whose invalid records are left out (`skip`), or refused (`refuse`).

    `source` is a path, the name of a bundled pack ("english/train"), or a folder under `data_home()` ("eibench/train").
    `split` chooses the folder where the source has both, and the defaults for missing anchors: in training the best
    and the worst possible state, in testing those of the authors' evaluation code.

    An invalid record is a line without a JSON object, a field that is missing, malformed or out of range, anchors out of order, or
    a repetition. Raises ScenarioError for a source that cannot be read or holds no record; with `refuse` for any invalid record;
    with `skip` for two different records with one id, a file without a valid record, and a set of which over half is invalid."""
    found = read_scenarios(source, split)
    if wrong := found.faults if invalid == "refuse" else found.refusals:
        others = len(found.faults) - 1
        more = f" ({others} more; `ctcgrpo scenarios validate {source}` lists all)" if others else ""
        raise ScenarioError(f"{wrong[0]}{more}")
    if not found.scenarios:
        raise ScenarioError(f"{source}: holds no scenarios; expected records in {FORMATS}")
    return found


def load_scenarios(source: str | Path, split: Split = "train") -> list[Scenario]:
    """The scenarios of a source whose every record has to be one (`load_set` with `refuse`)."""
    return load_set(source, split, "refuse").scenarios


def read_scenarios(source: str | Path, split: Split = "train") -> ScenarioSet:
    """The scenarios of a source, and every fault of its other records. Raises ScenarioError for a source that is not there."""
    scenarios: list[Scenario] = []
    faults: list[Fault] = []
    refusals: list[str] = []
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    records = 0

    def unreadable(place: str, message: str) -> None:
        faults.append(Fault(place, "?", "", message))

    for part in _parts(source, split):
        valid_before, faults_before = len(scenarios), len(faults)
        for place, record in _records_of(part, unreadable):
            scenario, wrong = check_record(record, place, split)
            faults += wrong
            name = record.get("id")
            if not isinstance(name, str) or not name.strip():
                continue
            if name in seen:
                first, earlier = seen[name]
                again = Fault(place, "?", "id", f"{name!r} is already used at {first}; ids must be unique")
                faults.append(again)
                if record != earlier:
                    refusals.append(str(again))
                continue
            seen[name] = (place, record)
            if scenario is not None:
                scenarios.append(scenario)
        valid, of_file = len(scenarios) - valid_before, faults[faults_before:]
        lines = valid + len({fault.place for fault in of_file})
        records += lines
        if lines and not valid:
            problem = "its only record is invalid" if lines == 1 else f"none of its {lines} records is valid"
            refusals.append(f"{of_file[0]} ({part.name.rpartition('/')[2]}: {problem})")
    found = ScenarioSet(str(source), scenarios, faults, records, refusals)
    if found.skipped > _MOST_INVALID * records and not refusals:
        why = f"{found.skipped} of {records} records are invalid, more than half: the set is damaged, or has another format"
        refusals.append(f"{source}: {why}, and is refused with `skip` too; the first problem: {faults[0]}")
    return found


def read_records(source: str | Path, split: Split = "train", on_bad: OnBad | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The raw records of a source in file order, unwrapped, each with its place (file and line). Raises ScenarioError for a source
    that is not there, and, unless `on_bad` takes them (place, message), for what holds no JSON object."""
    for part in _parts(source, split):
        yield from _records_of(part, on_bad)


def _records_of(part: Part, on_bad: OnBad | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, record in part.read(on_bad):
        if part.table and isinstance(record.get("record"), str):
            try:
                record = parse_json(record["record"])
            except (ValueError, RecursionError) as problem:
                reject(place, f"its column 'record' is not valid JSON: {reason_of(problem)}", ScenarioError, on_bad)
                continue
            if not isinstance(record, dict):
                reject(place, "its column 'record' holds no JSON object", ScenarioError, on_bad)
                continue
        elif part.table:
            record = _without_nulls(record)
        yield place, record["row"] if isinstance(record.get("row"), dict) else record


def _without_nulls(value: Any) -> Any:
    """A row of a table without the fields that its record does not have."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def load_scenes(source: str | Path, scenes: Sequence[str], invalid: Invalid = "skip") -> ScenarioSet:
    """`load_set` of training scenarios, those of these scenes. Raises ScenarioError for a scene that has none."""
    every = load_set(source, "train", invalid)
    found = [s for s in every.scenarios if s.scene in scenes]
    if missing := set(scenes) - {s.scene for s in found}:
        left_out = f"; {every.skipped} invalid records are left out" if every.skipped else ""
        asked = f"scenarios.scenes asks for {', '.join(sorted(missing))}, which {source} has none of"
        there = ",".join(sorted({s.scene for s in every.scenarios}))
        advice = f"; try 'scenarios.scenes=[{there}]'" if there else ""
        raise ScenarioError(f"{asked}{left_out}; it has {by_scene(every.scenarios)}{advice}")
    return replace(every, scenarios=found, unasked=by_scene(s for s in every.scenarios if s.scene not in (*scenes, *SCENES)))


def by_scene(scenarios: Iterable[Scenario]) -> str:
    """How many there are of each scene, in words."""
    return ", ".join(f"{n} {scene}" for scene, n in sorted(Counter(s.scene for s in scenarios).items()))


def has_splits(source: str | Path) -> bool:
    """Whether a source has folders train/ and test/."""
    return any((path / "train").is_dir() and (path / "test").is_dir() for path in _tried(source))


def described(source: str | Path) -> str:
    """A source in words: EIBench's own data under `data_home()`, a bundled pack, or the path or name as it is."""
    found = next((path for path in _tried(source) if path.exists()), data_home() / source).resolve()
    if found.is_relative_to((data_home() / "eibench").resolve()):
        return f"{EIBENCH_DATA} ({source})"
    packs = PACKS.resolve()
    return f"the bundled pack {found.relative_to(packs)}" if found.is_relative_to(packs) else str(source)


def _tried(source: str | Path) -> list[Path]:
    if str(source).startswith((".", "/", "~")):
        return [Path(source).expanduser()]
    return [Path(source), PACKS / source, data_home() / source]


def _parts(source: str | Path, split: Split) -> list[Part]:
    if is_hub(source):
        return hub_parts(str(source), split, ScenarioError)
    return [Part(str(file), partial(_read_file, file)) for file in _files(source, split)]


def _read_file(file: Path, on_bad: OnBad | None) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_record_file(file, ScenarioError, on_bad=on_bad)


def _files(source: str | Path, split: Split) -> list[Path]:
    try:
        found = next((path for path in _tried(source) if path.exists()), None)
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScenarioError(f"scenarios {quoted(str(source))}: {reason}") from None
    if found is None:
        raise _not_found(str(source))
    if found.is_file():
        return [found]
    folder = found / split if (found / split).is_dir() else found
    try:
        files = record_files(folder)
    except OSError as error:
        raise ScenarioError(f"{folder}: cannot be read: {error.strerror}") from None
    if not files:
        raise ScenarioError(f"{folder}: no {FORMATS} files in this folder")
    return files


def _not_found(source: str) -> ScenarioError:
    if is_path(source) or is_record_file(source):
        return ScenarioError(f"scenarios {source!r}: no such file or folder")
    if source.split("/")[0] == "eibench":
        hint = "ctcgrpo scenarios fetch eibench puts it there; CC BY-NC 4.0, not part of this package"
        return ScenarioError(f"scenarios {source!r} not found under {data_home()} ({hint})")
    here = {path.parents[1].name for path in data_home().glob("*/*/*") if is_record_file(path.name)}
    here |= {path.parent.name for path in data_home().glob("*/*") if is_record_file(path.name)}
    names = [f"{name}{part}" for name in (*BUNDLED, *here, "eibench") for part in ("", "/train", "/test")]
    tried = ", ".join(map(str, _tried(source)))
    return ScenarioError(f"scenarios {source!r} not found; {did_you_mean(source, set(names))} (looked at {tried})")
