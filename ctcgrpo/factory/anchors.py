"""The rules of anchors, and the smallest change that satisfies them.

every value    a multiple of 5 in [0, 100]
anger          target < initial < worst    (target and initial below worst where anger may rise: defense, scenes of your own)
trust          worst < initial < target"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from ctcgrpo.environments.eibench.records import scene_rules

STEP = 5
_FAR_OFF = 1000  # a larger number is not a mistyped level, and counts as missing
_LEVELS = tuple(range(0, 101, STEP))
_MISSING = "is missing, or not a number near [0, 100]"

FIELDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "anger": (("initial_calibration", "initial_anger"), ("rub_goals", "target_anger"), ("worst_case", "worst_anger_min")),
    "trust": (("initial_calibration", "initial_trust"), ("rub_goals", "target_trust"), ("worst_case", "worst_trust_min")),
}  # by axis: the fields of initial, target and worst

Levels = tuple[float, float, float]  # initial, target, worst of one axis


class Move(NamedTuple):
    field: str
    before: float
    after: int

    def __str__(self) -> str:
        return f"{self.field}: {self.before:g} -> {self.after}"


def anchor_problems(record: Mapping[str, Any], scene: str) -> Iterator[tuple[str, str]]:
    """(field, problem) for each broken rule. For an axis with a missing value only that is reported."""
    for axis in FIELDS:
        values, missing = _levels(record, axis)
        for field in missing:
            yield field, _MISSING
        if missing:
            continue
        for field, value in values.items():
            if value not in _LEVELS:
                yield field, f"is {value:g}; expected a multiple of {STEP} in [0, 100]"
        initial, target, worst = values.values()
        may_rise = scene_rules(scene).anger_may_rise
        if not _in_order(axis, may_rise, (initial, target, worst)):
            yield axis, f"initial {initial:g}, target {target:g}, worst {worst:g}; {_order(axis, may_rise)}"


def repaired(record: Mapping[str, Any], scene: str) -> tuple[dict[str, Any], list[Move]]:
    """The record with valid anchors (whole numbers), changed as little as possible (sum of absolute changes), and the changes.
    Raises ValueError for a value that is missing or not a number, since nothing determines a repair."""
    result = dict(record)
    moves = []
    for axis, places in FIELDS.items():
        values, missing = _levels(record, axis)
        if missing:
            raise ValueError(f"{missing[0]} {_MISSING}")
        after = nearest_levels(axis, scene, tuple(values.values()))  # type: ignore[arg-type]
        for (section, field), old, new in zip(places, values.values(), after, strict=True):
            result[section] = {**result[section], field: new}
            if old != new:
                moves.append(Move(f"{section}.{field}", old, new))
    return result, moves


def nearest_levels(axis: str, scene: str, values: Levels) -> tuple[int, int, int]:
    """The valid levels nearest to `values`. Ties: those that keep initial, then target."""

    def distance(levels: tuple[int, int, int]) -> Levels:
        moved = [abs(a - b) for a, b in zip(levels, values, strict=True)]
        return sum(moved), moved[0], moved[1]

    return min(_allowed(axis, scene_rules(scene).anger_may_rise), key=distance)


@cache
def _allowed(axis: str, anger_may_rise: bool) -> Sequence[tuple[int, int, int]]:
    return [levels for levels in product(_LEVELS, _LEVELS, _LEVELS) if _in_order(axis, anger_may_rise, levels)]


def _in_order(axis: str, anger_may_rise: bool, levels: Levels) -> bool:
    initial, target, worst = levels
    if axis == "trust":
        return worst < initial < target
    return initial < worst and target < worst if anger_may_rise else target < initial < worst


def _order(axis: str, anger_may_rise: bool) -> str:
    if axis == "trust":
        return "expected worst < initial < target"
    return "expected both below worst" if anger_may_rise else "expected target < initial < worst"


def _levels(record: Mapping[str, Any], axis: str) -> tuple[dict[str, float], list[str]]:
    """The values of an axis by field, and the fields without a usable number."""
    values, missing = {}, []
    for section, field in FIELDS[axis]:
        part = record.get(section)
        value = part.get(field) if isinstance(part, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FAR_OFF:
            values[f"{section}.{field}"] = value
        else:
            missing.append(f"{section}.{field}")
    return values, missing
