"""A sweep file: many runs of one recipe, as a search or as variants. Unknown fields are refused, not ignored.

A search is the part of W&B's format that this package supports (reference: W&B, sweep configuration options):

    program: recipes/quickstart.yaml          the recipe
    method: grid                              grid, random or bayes (Optuna's TPE)
    metric: {name: eval/outcome/all, goal: maximize}
    parameters:
      credit.alpha: {values: [0, 5, 15]}
      credit.gamma: {min: 0.8, max: 1.0}
      run.seed: {values: [0, 1, 2]}           aggregated over in tables
      training.max_steps: {value: 40}
    command: [...]                            how W&B's agents start a run: ${program} ${args_no_hyphens}
    run_cap: 20                               limit on the number of trials (random, bayes)
    early_terminate: {type: hyperband, min_iter: 30, eta: 2}

Variants are compared with one of them, the baseline. Measure and seeds are fixed before the first run:

    program: recipes/study.yaml
    seeds: [1, 2, 3, 4, 5]
    primary: area                             the main measure; the other one is printed as well
    baseline: outcome_only
    environments:                             by name, recipe overrides that all variants share
      prompt: {}
      reluctant: {simulator.config: configs/simulator/reluctant.yaml}
    variants:                                 by name, recipe overrides that are compared
      outcome_only: {credit.alpha: 0}
      rollout: {credit.centering: rollout}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from ctcgrpo.errors import RecipeError
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe, overrides
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated

METRIC: Final = "eval/outcome/all"
"""The objective of a sweep: the score on the recipe's held-out scenarios after training. W&B logs it under this name."""
SEED = "run.seed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a folder
_OWN = (SEED, "run.name", "run.output_dir")
_VALIDATION = ("validation.scenarios", "validation.tasks", "validation.every", "validation.samples", "validation.seed")
_SHARED = ("policy.model", "training.max_steps", *_VALIDATION)
"""Fields that all variants of an environment share, so that their curves are comparable."""
_SEARCH = ("parameters", "metric", "run_cap", "early_terminate", "project", "entity", "command")
_STUDY = ("environments", "variants", "baseline", "primary")


class Parameter(Section):
    """The values of one parameter: a list or a range."""

    value: Any = Field(None, description="one value, the same for all runs")
    values: tuple[Any, ...] | None = Field(None, min_length=1, description="a list of values without duplicates")
    distribution: Literal["constant", "categorical", "uniform", "int_uniform", "q_uniform", "log_uniform_values"] | None = Field(
        None, description="sampling distribution of a range; absent: uniform (int_uniform for whole numbers)"
    )
    min: int | float | None = Field(None, description="the lower end of a range")
    max: int | float | None = Field(None, description="the upper end of a range")
    q: float | None = Field(None, gt=0, description="q_uniform only: the distance between values")

    @model_validator(mode="after")
    def _is_one_thing(self) -> Parameter:
        ranged = self.min is not None or self.max is not None
        given = {"value": "value" in self.model_fields_set, "values": bool(self.values), "min": ranged}
        if sum(given.values()) != 1:
            raise ValueError("expected value, values, or min and max")
        kind = next(name for name, there in given.items() if there)
        if ranged and (self.min is None or self.max is None or not self.min < self.max):
            raise ValueError(f"min = {self.min}, max = {self.max}; expected both, with min < max")
        if self.values is not None and any(value in self.values[:k] for k, value in enumerate(self.values)):
            raise ValueError("duplicate value")
        if not all(isinstance(value, bool | int | float | str | None) for value in self.values or (self.value,)):
            raise ValueError("expected numbers, texts, booleans or null; name fields of sections with dots (validation.every)")
        if (self.q is not None) != (self.distribution == "q_uniform"):
            raise ValueError("expected q with distribution q_uniform, and with no other")
        fits = {"constant": "value", "categorical": "values"}.get(self.distribution or "", "min")
        if self.distribution is not None and fits != kind:
            raise ValueError(f"distribution = {self.distribution!r} does not fit {kind}")
        if self.distribution == "log_uniform_values" and not (self.min or 0) > 0:
            raise ValueError(f"min = {self.min}; expected min > 0 with log_uniform_values")
        if self.distribution == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
            raise ValueError(f"min = {self.min}, max = {self.max}; expected whole numbers with int_uniform")
        return self

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """The values of a list; None for a range."""
        if self.values is not None:
            return self.values
        return (self.value,) if self.min is None else None

    @property
    def ends(self) -> tuple[float, float]:
        """Of a range."""
        assert self.min is not None and self.max is not None
        return (int(self.min), int(self.max)) if self.is_whole else (self.min, self.max)

    @property
    def is_whole(self) -> bool:
        """Whether a range is of whole numbers: by its distribution, or, without one, by both ends."""
        written = isinstance(self.min, int) and isinstance(self.max, int)
        return self.distribution == "int_uniform" or (self.distribution is None and written)


class Metric(Section):
    """The objective by which runs are compared."""

    name: Literal["eval/outcome/all"] = Field(METRIC, description="the score on the held-out scenarios after training")
    goal: Literal["maximize"] = Field("maximize", description="scores are maximised")


class EarlyTerminate(Section):
    """Stop runs that score below others at the same step."""

    type: Literal["hyperband"] = Field("hyperband", description="successive halving, as in W&B")
    min_iter: int = Field(ge=1, description="steps before the first comparison")
    eta: float = Field(3, gt=1, description="factor between the steps of two comparisons; 1/eta of the runs continue")


class Sweep(Section):
    """Many runs of a recipe (ctcgrpo sweep): a search over its fields, in W&B's format, or variants that are compared."""

    program: Path = Field(description="the recipe of every run")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name on W&B, and of the folder")
    description: str | None = Field(None, description="a note for readers; has no effect")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], ...] | None = Field(
        None, min_length=1, description="seeds of every trial; absent: the values of run.seed, or the recipe's seed"
    )
    seconds: float | None = Field(None, gt=0, description="approximate duration of a run, for the first estimate")

    method: Literal["grid", "random", "bayes"] = Field("grid", description="every point, random draws, or Optuna's TPE")
    metric: Metric = Metric(name=METRIC)  # type: ignore[call-arg]
    parameters: dict[str, Parameter] = Field({}, description="the search space, by recipe field, as section.field")
    project: str | None = Field(None, description="--wandb only: the W&B project")
    entity: str | None = Field(None, description="--wandb only: the W&B team or user")
    command: tuple[str, ...] | None = Field(None, description="--wandb only: how an agent starts a run")
    run_cap: int | None = Field(None, ge=1, description="random and bayes: the number of trials")
    early_terminate: EarlyTerminate | None = None

    environments: dict[str, dict[str, Any]] = Field(
        {"recipe": {}}, min_length=1, description="by name, recipe overrides that all variants share"
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="by name, recipe overrides that are compared, in place of parameters"
    )
    baseline: str | None = Field(None, description="the variant with which the others are compared")
    primary: Literal["area", "final"] = Field(
        "area",
        description="the main measure: area between the held-out curve and its start, or final: last score minus first",
    )

    @model_validator(mode="after")
    def _can_be_run(self) -> Sweep:
        if bool(self.parameters) == bool(self.variants):
            raise ValueError("expected either parameters (a search) or variants (a comparison)")
        kind, others = ("variants", _SEARCH) if self.variants else ("parameters", _STUDY)
        if other := next((name for name in others if name in self.model_fields_set), None):
            raise ValueError(f"{other} cannot be combined with {kind}")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: duplicate seed")
        if self.variants:
            self._can_be_compared()
            return self
        ranges = [name for name, parameter in self.parameters.items() if parameter.choices is None and parameter.q is None]
        if self.method == "grid" and ranges:
            raise ValueError(f"parameters.{ranges[0]} is a range; expected a list of values with method grid")
        if self.method != "grid" and self.run_cap is None:
            raise ValueError(f"method = {self.method}; expected a run_cap, the number of trials")
        if SEED in self.parameters and (self.seeds is not None or self.parameters[SEED].choices is None):
            raise ValueError(f"parameters.{SEED}: expected a list of seeds, and no field seeds beside it")
        return self

    def _can_be_compared(self) -> None:
        if len(self.variants) < 2 or self.seeds is None or len(self.seeds) < 2:
            raise ValueError("expected at least two variants and two seeds for a comparison")
        if self.method != "grid":
            raise ValueError(f"method = {self.method}; expected grid, or none, with variants")
        if self.baseline not in self.variants:
            raise ValueError(f"baseline: {did_you_mean(str(self.baseline), self.variants)}")
        for kind, table, shared in (("environments", self.environments, ()), ("variants", self.variants, _SHARED)):
            for name, changes in table.items():
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{kind}: {name[:80]!r}; expected letters, digits, dots, - and _ (64 at most): it names a folder"
                    )
                for field in changes:
                    if "." not in field:
                        raise ValueError(f"{kind}.{name}: {field!r} is a section; expected a field, as section.field")
                    if taken := _within(field, _OWN):
                        raise ValueError(f"{kind}.{name}: {taken} is set by the sweep; leave it out")
                    if taken := _within(field, shared):
                        raise ValueError(f"{kind}.{name}: {taken} must be the same for all variants; set it in the recipe")

    @property
    def axes(self) -> dict[str, Parameter]:
        """The axes of the search space: the parameters without seeds, or the names of environment and variant."""
        if self.variants:
            names = {"environment": self.environments, "variant": self.variants}
            return {axis: Parameter(values=tuple(table)) for axis, table in names.items()}  # type: ignore[call-arg]
        return {name: parameter for name, parameter in self.parameters.items() if name != SEED}

    def grid(self) -> list[dict[str, Any]]:
        """Every point, the last axis changing fastest."""
        values = [_on_grid(parameter) for parameter in self.axes.values()]
        return [dict(zip(self.axes, chosen, strict=True)) for chosen in itertools.product(*values)]

    def changes(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe fields that a point sets."""
        if self.variants:
            return {**self.environments[point["environment"]], **self.variants[point["variant"]]}
        return dict(point)

    def seeds_of(self, recipe: Recipe) -> list[int]:
        if self.seeds is not None:
            return list(self.seeds)
        return list(self.parameters[SEED].choices or ()) if SEED in self.parameters else [recipe.run.seed]


def _within(field: str, fields: Sequence[str]) -> str | None:
    return next((f for f in fields if field == f or field.startswith(f"{f}.")), None)


def _on_grid(parameter: Parameter) -> list[Any]:
    if parameter.choices is not None:
        return list(parameter.choices)
    assert parameter.q is not None
    low, high = parameter.ends
    return [low + k * parameter.q for k in range(int((high - low) / parameter.q + 1e-9) + 1)]


def load_sweep(file: Path, extra: Sequence[str] = ()) -> tuple[Sweep, Recipe]:
    """The sweep in a file, and its recipe; `extra`: overrides from the command line. Raises RecipeError naming file, field, value
    and what is expected: for the file itself, and for every value and variant that the recipe refuses."""
    sweep = validated(parse_mapping(read_text(file, "sweep"), file, Sweep, "sweep"), Sweep, file)
    fixed = {name: p.choices[0] for name, p in sweep.parameters.items() if p.choices is not None and len(p.choices) == 1}
    seen: dict[str, str] = {}
    for point in sweep.grid() if sweep.variants else ():
        what = f"{point['environment']} with {point['variant']}"
        resolved = _resolved(file, sweep, what, sweep.changes(point), extra).to_yaml()
        if resolved in seen:
            raise RecipeError(f"{file}: {what} resolves to the same recipe as {seen[resolved]}")
        seen[resolved] = what
    for name, parameter in sweep.parameters.items():
        for value in parameter.choices or parameter.ends:
            _resolved(file, sweep, f"parameters.{name}", {**fixed, name: value}, extra)
    recipe = _resolved(file, sweep, f"program {sweep.program}", fixed, extra)
    if recipe.validation is None:
        raise RecipeError(f"{file}: program = {sweep.program}; expected a recipe with a validation section")
    return sweep, recipe


def _resolved(file: Path, sweep: Sweep, what: str, changes: Mapping[str, Any], extra: Sequence[str]) -> Recipe:
    try:
        return load_recipe(sweep.program, extra, changes=overrides(changes))
    except RecipeError as error:
        raise RecipeError(f"{file}: {what}: {error}") from None
