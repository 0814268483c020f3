"""A sweep file: many runs of one recipe, as a search or as variants. What is not understood is refused, not ignored.

A search is W&B's format, as far as a run here can follow it (reference: W&B, sweep configuration options):

    program: recipes/quickstart.yaml          the recipe
    method: grid                              grid, random or bayes (Optuna's TPE)
    metric: {name: validation/overall, goal: maximize}
    parameters:
      credit.alpha: {values: [0, 5, 15]}
      credit.gamma: {min: 0.8, max: 1.0}
      run.seed: {values: [0, 1, 2]}           aggregated over in tables
      training.max_steps: {value: 40}
    command: [...]                            as W&B's agents start a run: ${program} ${args_no_hyphens}
    run_cap: 20                               runs at most (random, bayes)
    early_terminate: {type: hyperband, min_iter: 30, eta: 2}

Variants are compared with one of them, the baseline, by a measure and with seeds that are fixed before the first run:

    program: recipes/study.yaml
    seeds: [1, 2, 3, 4, 5]
    primary: area                             the measure that it is about; the other is printed beside it
    baseline: outcome_only
    environments:                             by name, overrides of the recipe that all variants share
      prompt: {}
      reluctant: {simulator.config: configs/simulator/reluctant.yaml}
    variants:                                 by name, overrides of the recipe that are compared
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

METRIC: Final = "validation/overall"
"""What a sweep here maximises: the score on the recipe's held-out scenarios, after training. W&B knows it by this name."""
SEED = "run.seed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a folder
_OWN = (SEED, "run.name", "run.output_dir")
_VALIDATION = ("validation.scenarios", "validation.tasks", "validation.every", "validation.samples", "validation.seed")
_SHARED = ("policy.model", "training.max_steps", *_VALIDATION)
"""What all variants of an environment share, or their curves could not be compared."""
_SEARCH = ("parameters", "metric", "run_cap", "early_terminate", "project", "entity", "command")
_STUDY = ("environments", "variants", "baseline", "primary")


class Parameter(Section):
    """What one parameter may be: a list of values, or a range."""

    value: Any = Field(None, description="one value, the same for all runs")
    values: tuple[Any, ...] | None = Field(None, min_length=1, description="a list of values, none of them twice")
    distribution: Literal["constant", "categorical", "uniform", "int_uniform", "q_uniform", "log_uniform_values"] | None = Field(
        None, description="how a range is sampled; uniform where absent (int_uniform for whole numbers)"
    )
    min: int | float | None = Field(None, description="the lower end of a range")
    max: int | float | None = Field(None, description="the upper end of a range")
    q: float | None = Field(None, gt=0, description="q_uniform only: the distance between values")

    @model_validator(mode="after")
    def _is_one_thing(self) -> Parameter:
        ranged = self.min is not None or self.max is not None
        given = {"value": "value" in self.model_fields_set, "values": bool(self.values), "min": ranged}
        if sum(given.values()) != 1:
            raise ValueError("give value, values, or min and max")
        kind = next(name for name, there in given.items() if there)
        if ranged and (self.min is None or self.max is None or not self.min < self.max):
            raise ValueError(f"min is {self.min} and max {self.max}; both are needed, and min < max")
        if self.values is not None and any(value in self.values[:k] for k, value in enumerate(self.values)):
            raise ValueError("duplicate value")
        if not all(isinstance(value, bool | int | float | str | None) for value in self.values or (self.value,)):
            raise ValueError("values are numbers, texts, booleans or null; name fields of sections with dots (validation.every)")
        if (self.q is not None) != (self.distribution == "q_uniform"):
            raise ValueError("q belongs to distribution q_uniform, and it needs one")
        fits = {"constant": "value", "categorical": "values"}.get(self.distribution or "", "min")
        if self.distribution is not None and fits != kind:
            raise ValueError(f"distribution {self.distribution!r} does not fit {kind}")
        if self.distribution == "log_uniform_values" and not (self.min or 0) > 0:
            raise ValueError("log_uniform_values needs min > 0")
        if self.distribution == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
            raise ValueError("int_uniform needs whole numbers for min and max")
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
        """Whether a range is of whole numbers: it says so, or says nothing and both ends are written as whole numbers."""
        written = isinstance(self.min, int) and isinstance(self.max, int)
        return self.distribution == "int_uniform" or (self.distribution is None and written)


class Metric(Section):
    """What runs are compared by."""

    name: Literal["validation/overall"] = Field(METRIC, description="the score on the held-out scenarios after training")
    goal: Literal["maximize"] = Field("maximize", description="scores are maximised")


class EarlyTerminate(Section):
    """Stop runs that do worse than others did by then."""

    type: Literal["hyperband"] = Field("hyperband", description="successive halving, as in W&B")
    min_iter: int = Field(ge=1, description="steps before the first comparison")
    eta: float = Field(3, gt=1, description="each comparison is so many times later; of those compared 1/eta go on")


class Sweep(Section):
    """Many runs of a recipe (ctcgrpo sweep): a search over its fields, in W&B's format, or variants that are compared."""

    program: Path = Field(description="the recipe of every run")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="on W&B, and of the folder")
    description: str | None = Field(None, description="for readers; nothing depends on it")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], ...] | None = Field(
        None, min_length=1, description="every trial runs once with each; else the values of run.seed, or the recipe's own"
    )
    seconds: float | None = Field(None, gt=0, description="what a run takes, roughly: for the estimate printed first")

    method: Literal["grid", "random", "bayes"] = Field("grid", description="every point, random draws, or Optuna's TPE")
    metric: Metric = Metric(name=METRIC)  # type: ignore[call-arg]
    parameters: dict[str, Parameter] = Field({}, description="what is searched, by the recipe's field, as section.field")
    project: str | None = Field(None, description="--wandb only: the W&B project")
    entity: str | None = Field(None, description="--wandb only: the W&B team or user")
    command: tuple[str, ...] | None = Field(None, description="--wandb only: how an agent starts a run")
    run_cap: int | None = Field(None, ge=1, description="random and bayes: the number of trials")
    early_terminate: EarlyTerminate | None = None

    environments: dict[str, dict[str, Any]] = Field(
        {"recipe": {}}, min_length=1, description="by name, overrides of the recipe that all variants share"
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="by name, overrides of the recipe that are compared, in place of parameters"
    )
    baseline: str | None = Field(None, description="the variant that the others are compared with")
    primary: Literal["area", "final"] = Field(
        "area",
        description="the measure of variants: the area between held-out curve and its start, or last score minus first",
    )

    @model_validator(mode="after")
    def _can_be_run(self) -> Sweep:
        if bool(self.parameters) == bool(self.variants):
            raise ValueError("give either parameters, which are searched, or variants, which are compared")
        kind, others = ("variants", _SEARCH) if self.variants else ("parameters", _STUDY)
        if other := next((name for name in others if name in self.model_fields_set), None):
            raise ValueError(f"{other} does not go with {kind}")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: duplicate seed")
        if self.variants:
            self._can_be_compared()
            return self
        ranges = [name for name, parameter in self.parameters.items() if parameter.choices is None and parameter.q is None]
        if self.method == "grid" and ranges:
            raise ValueError(f"a grid needs lists of values; {ranges[0]} is a range")
        if self.method != "grid" and self.run_cap is None:
            raise ValueError(f"method {self.method} needs a run_cap: the number of runs")
        if SEED in self.parameters and (self.seeds is not None or self.parameters[SEED].choices is None):
            raise ValueError(f"parameters.{SEED}: seeds are a list, given once")
        return self

    def _can_be_compared(self) -> None:
        if len(self.variants) < 2 or self.seeds is None or len(self.seeds) < 2:
            raise ValueError("variants are compared over seeds; at least two of both are needed")
        if self.method != "grid":
            raise ValueError("all variants are run: method is grid, or left out")
        if self.baseline not in self.variants:
            raise ValueError(f"baseline: {did_you_mean(str(self.baseline), self.variants)}")
        for kind, table, shared in (("environments", self.environments, ()), ("variants", self.variants, _SHARED)):
            for name, changes in table.items():
                if not NAME.fullmatch(name):
                    raise ValueError(f"{kind}: {name[:80]!r} is no name for a folder")
                for field in changes:
                    if "." not in field:
                        raise ValueError(f"{kind}.{name}: {field!r} is a whole section; name fields, as section.field")
                    if taken := _within(field, _OWN):
                        raise ValueError(f"{kind}.{name}: {taken} is the sweep's own to set")
                    if taken := _within(field, shared):
                        raise ValueError(f"{kind}.{name}: {taken} is the same for all variants")

    @property
    def axes(self) -> dict[str, Parameter]:
        """What a trial is a point of: the parameters but for seeds, or the names of environment and variant."""
        if self.variants:
            names = {"environment": self.environments, "variant": self.variants}
            return {axis: Parameter(values=tuple(table)) for axis, table in names.items()}  # type: ignore[call-arg]
        return {name: parameter for name, parameter in self.parameters.items() if name != SEED}

    def grid(self) -> list[dict[str, Any]]:
        """Every point, the last axis changing fastest."""
        values = [_on_grid(parameter) for parameter in self.axes.values()]
        return [dict(zip(self.axes, chosen, strict=True)) for chosen in itertools.product(*values)]

    def changes(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the recipe that a point sets."""
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
    and what would be right: of the file itself, and of every value and every variant that the recipe does not take."""
    sweep = validated(parse_mapping(read_text(file, "sweep"), file, Sweep, "sweep"), Sweep, file)
    fixed = {name: p.choices[0] for name, p in sweep.parameters.items() if p.choices is not None and len(p.choices) == 1}
    seen: dict[str, str] = {}
    for point in sweep.grid() if sweep.variants else ():
        what = f"{point['environment']} with {point['variant']}"
        resolved = _resolved(file, sweep, what, sweep.changes(point), extra).to_yaml()
        if resolved in seen:
            raise RecipeError(f"{file}: {what} is the same recipe as {seen[resolved]}")
        seen[resolved] = what
    for name, parameter in sweep.parameters.items():
        for value in parameter.choices or parameter.ends:
            _resolved(file, sweep, f"parameters.{name}", {**fixed, name: value}, extra)
    recipe = _resolved(file, sweep, f"program {sweep.program}", fixed, extra)
    if recipe.validation is None:
        raise RecipeError(f"{file}: program {sweep.program} has no validation section to compare its runs by")
    return sweep, recipe


def _resolved(file: Path, sweep: Sweep, what: str, changes: Mapping[str, Any], extra: Sequence[str]) -> Recipe:
    try:
        return load_recipe(sweep.program, extra, changes=overrides(changes))
    except RecipeError as error:
        raise RecipeError(f"{file}: {what}: {error}") from None
