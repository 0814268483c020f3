"""The held-out dialogues of a run before and after training, for the programs that judge them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_set
from ctcgrpo.errors import OutputError
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import read_traces, valid_validations
from ctcgrpo.run.scores import Validation

Trace = Mapping[str, Any]
"""run_records.Trace; only valid episodes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One validation: its figures, and the dialogues that they were computed from, by group and rollout."""

    validation: Validation
    dialogues: Sequence[Trace]

    def of_scenario(self, name: str) -> list[Trace]:
        return [dialogue for dialogue in self.dialogues if dialogue["task"] == name]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`before` is the first recorded validation and `after` the last one; `scenarios` by id."""

    path: Path
    recipe: Recipe
    scenarios: Mapping[str, Scenario]
    before: Stage
    after: Stage

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def played(self) -> list[str]:
        """The scenarios with a valid dialogue both before and after, in the order of validation.jsonl."""
        return [name for name in self.before.validation.by_scenario if name in self.after.validation.by_scenario]


def read_held_out(path: Path) -> HeldOut:
    """Raises OutputError for a folder that holds no run with two validations, and where traces, validation.jsonl and the set of
    scenarios do not belong together."""
    folder = require_run(path)
    recipe = resolved_recipe(folder.recipe_file)
    if recipe.validation is None:
        raise OutputError(f"{folder.recipe_file}: validation is missing; expected a run with held-out scenarios")
    validations = valid_validations(folder.validation_file)
    if len(validations) < 2:
        raise OutputError(
            f"{folder.validation_file}: it holds only the validation after step {validations[0].step}; expected one before and one "
            "after training"
        )
    found = load_set(recipe.validation.scenarios, "test", recipe.scenarios.invalid).scenarios
    scenarios = {scenario.id: scenario for scenario in found}
    for name in {name for validation in validations for name in validation.outcomes}:
        if name not in scenarios:
            raise OutputError(f"{folder.validation_file}: scenario {name!r} is not in {recipe.validation.scenarios}")
    return HeldOut(path, recipe, scenarios, _stage(folder, validations[0]), _stage(folder, validations[-1]))


def pooled(validations: Sequence[Validation]) -> Validation:
    """Several runs as one: by scenario, the mean of each run."""
    means = [v.by_scenario for v in validations]
    outcomes = {name: [m[name] for m in means] for name in means[0] if all(name in m for m in means)}
    return Validation(step=0, outcomes=outcomes, scenes=validations[0].scenes)


def _stage(folder: RunFolder, validation: Validation) -> Stage:
    pattern = f"validation-{validation.step:06d}.rank-*.jsonl"
    episodes, problems = read_traces(sorted(folder.traces.glob(pattern)))
    if problems:
        raise OutputError(f"{folder.traces}/{problems[0]}")
    dialogues = [episode for episode in episodes if episode["failure"] is None]
    played = Counter((d["task"], round(d["outcome"], 9)) for d in dialogues)
    recorded = Counter((name, round(x, 9)) for name, outcomes in validation.outcomes.items() for x in outcomes)
    if played != recorded:
        raise OutputError(
            f"{folder.traces}/{pattern}: {len(dialogues)} valid dialogues with other outcomes than the {recorded.total()} in "
            f"{folder.validation_file.name}; one of the files is damaged"
        )
    return Stage(validation, dialogues)
