"""A run's base and final policy as evaluations: the way that its recipe validates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.evaluation.played import briefed_as, validated_as
from ctcgrpo.evaluation.run import LOCAL, Evaluation
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.util.files import missing_in


def evaluations_of(
    folder: RunFolder,
    task: dict[str, Any],
    generation: dict[str, Any],
    roles: dict[str, str],
    role_generation: Mapping[str, Mapping[str, Any]],
    limit: int | None,
    preset: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Evaluation]:
    """By name (base, final). `task`, `generation`, `roles` and `role_generation` go before what the recipe says; with a `preset`
    they are whole, and the recipe says only what is played (scenarios, repeats, seed) and by whom. Raises OutputError for a folder
    without a finished run, PolicyError for a base policy that cannot be fetched, RecipeError where neither the recipe nor an option
    says what to evaluate on."""
    if (lacks := missing_in(folder.final)) is not None:
        raise OutputError(
            f"{folder.path} holds no finished run (final/: {lacks}); evaluate a folder in it: --model {folder.path}/best"
        )
    recipe = resolved_recipe(folder.recipe_file)
    validated, sampled = validated_as(recipe)
    if preset is not None:
        kept = ("scenarios", "repeats", "seed", "invalid", "simulator")
        validated, sampled = {name: validated[name] for name in kept if name in validated}, {}
    if "official" in task:  # which words what the policy is told
        validated = {name: value for name, value in validated.items() if name not in briefed_as(recipe)}
    played = {**validated, **task}
    if roles:
        del played["simulator"]
    if "scenarios" not in played:
        raise RecipeError(f"{folder.recipe_file} has no validation section; say what to evaluate on with --scenarios")
    base = folder.starting_policy(recipe, say)
    return {
        name: Evaluation(
            bench="eibench",
            model=f"{LOCAL}{model}",
            task=played,
            generation={**sampled, **generation},
            roles=roles,
            role_generation=role_generation,
            model_args={"recipe": str(folder.recipe_file), "max_batch": recipe.rollout.max_batch},
            limit=limit,
            preset=preset,
        )
        for name, model in (("base", base), ("final", str(folder.final)))
    }
