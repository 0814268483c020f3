"""EIBench's scenarios: whether they can be read, and whether validation is of others."""

from __future__ import annotations

from collections.abc import Iterator

from ctcgrpo.environments.eibench.scenarios import ScenarioSet, load_scenes, load_set
from ctcgrpo.preflight.subject import Finding, Subject


def scenarios(s: Subject) -> Iterator[Finding]:
    found = load_scenes(
        s.recipe.eibench_scenarios().train, s.recipe.eibench_scenarios().scenes, s.recipe.eibench_scenarios().invalid
    )
    s.scenarios = found.scenarios
    yield from _left_out("scenarios", found)
    yield Finding("scenarios", "ok", f"{len(s.scenarios)} to train on")


def validation(s: Subject) -> Iterator[Finding]:
    if s.recipe.validation is None:
        yield Finding("validation", "warning", "none: the run will not say whether it got better (section validation)")
        return
    found = load_set(s.recipe.validation_source(), "test", s.recipe.eibench_scenarios().invalid)
    s.held_out = found.scenarios
    yield from _left_out("validation", found)
    if both := {x.id for x in s.held_out} & {x.id for x in s.scenarios}:
        yield Finding(
            "validation", "failed", f"validation.scenarios holds {len(both)} that are trained on, {min(both)!r} among them"
        )
    else:
        yield Finding("validation", "ok", f"{len(s.held_out)} held out")


def _left_out(about: str, found: ScenarioSet) -> Iterator[Finding]:
    if lines := found.report():
        yield Finding(about, "warning", "\n".join(lines))
