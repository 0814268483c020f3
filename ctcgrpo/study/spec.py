"""A study file: what is compared, with which seeds, by which measure. Fixed before the first run; a folder keeps to one.

program: recipes/study.yaml           the recipe of every run
seeds: [1, 2, 3, 4, 5]
primary: area                         the measure that the study is about; the others are printed beside it
baseline: outcome_only                the variant that the others are compared with
seconds: 45                           what a run takes, for the estimate that is printed first
environments:                         by name, overrides of the recipe
  prompt: {}
  reluctant: {simulator.config: configs/simulator/reluctant.yaml}
variants:                             by name, overrides of the recipe
  outcome_only: {credit.alpha: 0}
  rollout: {credit.centering: rollout}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ctcgrpo.errors import RecipeError
from ctcgrpo.naming import did_you_mean
from ctcgrpo.recipe import Recipe, load_recipe, overrides
from ctcgrpo.sections import Section, parse_mapping, read_text, validated

_BY_THE_STUDY = ("run.seed", "run.name", "run.output_dir", "policy.model")
_MEASURE = ("validation.scenarios", "validation.every", "validation.samples", "validation.seed", "training.max_steps")
"""What every variant of an environment shares, or their curves could not be compared."""
RUNS = "runs"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Study(Section):
    """Variants of a recipe compared over environments and seeds (ctcgrpo study)."""

    program: Path = Field(description="the recipe of every run")
    description: str | None = Field(None, description="for readers; nothing depends on it")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], ...] = Field(
        min_length=2, description="every variant runs once with each"
    )
    primary: Literal["area", "final"] = Field(
        "area", description="the measure: the area between held-out curve and its start, or the last score minus the first"
    )
    baseline: str = Field(description="the variant that the others are compared with")
    seconds: float = Field(gt=0, description="what a run takes, roughly: for the estimate that is printed first")
    environments: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name, overrides of the recipe that all variants share"
    )
    variants: dict[str, dict[str, Any]] = Field(
        min_length=2, description="by name, overrides of the recipe that are compared"
    )

    @model_validator(mode="after")
    def _can_be_run(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("duplicate seed")
        if self.baseline not in self.variants:
            raise ValueError(f"baseline: {did_you_mean(self.baseline, self.variants)}")
        for kind, table, fixed in (
            ("environments", self.environments, _BY_THE_STUDY),
            ("variants", self.variants, (*_BY_THE_STUDY, *_MEASURE)),
        ):
            for name, changes in table.items():
                if not NAME.fullmatch(name):
                    raise ValueError(f"{kind}: {name[:80]!r} is no name for a folder")
                for field in changes:
                    if "." not in field:
                        raise ValueError(f"{kind}.{name}: {field!r} is a whole section; name fields, as section.field")
                    if taken := next((f for f in fixed if field == f or field.startswith(f"{f}.")), None):
                        why = "the study's own to set" if taken in _BY_THE_STUDY else "the same for all variants"
                        raise ValueError(f"{kind}.{name}: {taken} is {why}")
        return self

    def runs(self) -> list[Run]:
        """Every run, a seed after the other, so that a study that is half done is half done everywhere."""
        return [Run(e, v, seed) for seed in self.seeds for e in self.environments for v in self.variants]


@dataclass(frozen=True, slots=True)
class Run:
    environment: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.environment}/{self.variant}/seed-{self.seed}"

    def folder(self, study: Path) -> Path:
        return study / RUNS / self.name

    def recipe(self, study: Study, folder: Path, *, policy: str) -> Recipe:
        """The run's recipe, under the study's folder; `policy` is the path or Hub id that every run begins with."""
        place = {
            "run.seed": self.seed,
            "run.name": f"seed-{self.seed}",
            "run.output_dir": str(folder / RUNS / self.environment / self.variant),
            "policy.model": policy,
        }
        changes = {**study.environments[self.environment], **study.variants[self.variant], **place}
        return load_recipe(study.program, changes=overrides(changes))


def load_study(file: Path) -> tuple[Study, Recipe]:
    """The study in a file, and its recipe as it stands. Raises RecipeError naming file, field, value and what would be right: of
    the file itself, and of every combination that the recipe does not take."""
    study = validated(parse_mapping(read_text(file, "study"), file, Study, "study"), Study, file)
    recipe = load_recipe(study.program)
    if recipe.validation is None:
        raise RecipeError(f"{file}: program {study.program} has no validation section, so there is no curve to compare")
    seen: dict[str, str] = {}
    for environment, setting in study.environments.items():
        for variant, changes in study.variants.items():
            said = _resolved(file, study.program, f"{environment} with {variant}", {**setting, **changes})
            if said in seen:
                raise RecipeError(f"{file}: {environment} with {variant} is the same recipe as {seen[said]}")
            seen[said] = f"{environment} with {variant}"
    return study, recipe


def _resolved(file: Path, program: Path, what: str, changes: Mapping[str, Any]) -> str:
    try:
        return load_recipe(program, changes=overrides(changes)).to_yaml()
    except RecipeError as error:
        raise RecipeError(f"{file}: {what}: {error}") from None
