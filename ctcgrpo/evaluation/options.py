"""What stands on the command line of `ctcgrpo evaluate`, as an Evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.benches import named
from ctcgrpo.evaluation.played import Trained

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

Given = dict[str, Any]
"""What stands on the command line, by name; what does not stand there is left out."""


def refuse_unused(given: Given, allowed: set[str], what: str) -> None:
    """Raises RecipeError for an option that would do nothing."""
    if unused := sorted(set(given) - allowed):
        raise RecipeError(f"{option_name(unused[0])} is not for {what}")


def option_name(name: str) -> str:
    return {"model_arg": "-M", "generate": "-G"}.get(name) or f"--{name.replace('_', '-')}"


def task_of(given: Given) -> Given:
    names = (
        "scenarios",
        "data",
        "rounds",
        "variant",
        "official",
        "opener",
        "instructions",
        "reasons",
        "repeats",
        "seed",
        "invalid",
        "tries",
        "reasoning",
    )
    return {name: str(given[name]) if isinstance(given[name], Path) else given[name] for name in names if name in given}


def generation_of(given: Given) -> Given:
    return {name: given[name] for name in ("temperature", "top_p", "max_tokens") if name in given}


def roles_of(bench: str, given: Given) -> tuple[dict[str, str], Given]:
    """The models that play a role, and what says who plays the user where that is no model of Inspect's."""
    from ctcgrpo.evaluation.run import model_name

    other = named(bench).other
    if wrong := {"simulator", "judge"} & set(given) - {other}:
        raise RecipeError(f"{option_name(wrong.pop())} is not for {bench}, which has a {other}")
    name = given.get(other)
    if name is None:
        return {}, {}
    if bench == "eibench" and (name == "scripted" or name.startswith("http") or name.endswith((".yaml", ".yml"))):
        return {}, {"simulator": name}
    return {other: model_name(name, option_name(other))}, {}


def wanted_evaluation(bench: str, model: str, given: Given, trained: Trained | None) -> Evaluation:
    """Raises RecipeError for an option that the benchmark does not have."""
    from ctcgrpo.evaluation.generation import split_settings
    from ctcgrpo.evaluation.run import Evaluation, model_name, settled, task_options

    roles, played = roles_of(bench, given)
    settings, role_settings, unset = split_settings(settled(given.get("generate", [])))
    if other := sorted(set(role_settings) - set(roles)):
        raise RecipeError(f"-G {other[0]}...: no model plays the {other[0]} here (--{other[0]} PROVIDER/NAME)")
    task, generation = {**task_of(given), **played}, {**settings, **generation_of(given)}
    if (name := given.get("preset")) is not None:
        if bench != "eibench" or given.get("as_trained"):
            raise RecipeError(
                f"--preset is not for {bench if bench != 'eibench' else '--as-trained: each names all settings'}"
            )
        task, generation, role_settings, unset = with_preset(
            name, played.get("simulator"), task, generation, role_settings, unset, roles
        )
    task |= {"unset": ",".join(sorted(unset))} if unset else {}
    # How a policy was taught to be told what it plays is no matter of taste: as its run has it, unless something says otherwise.
    own_words = "official" in task or given.get("preset") is not None
    briefed = trained.briefed if bench == "eibench" and trained is not None and not own_words else {}
    if given.get("as_trained"):
        if bench != "eibench" or trained is None:
            why = (
                f"is not for {bench}"
                if bench != "eibench"
                else f"needs a policy in the folder of a run on scenarios, and {model} is none"
            )
            raise RecipeError(f"--as-trained {why}; name the folder of a run: --model checkpoints/RUN/best")
        left_out = {"simulator" if roles else "", *(trained.briefed if "official" in task else ())}
        of_run = {name: value for name, value in trained.task.items() if name not in left_out}
        task, generation = {**of_run, **task}, {**trained.sampling, **generation}
    task = {**briefed, **task}
    if unknown := sorted(set(task) - set(task_options(bench))):
        raise RecipeError(f"{option_name(unknown[0])} is not for {bench}, which has {', '.join(task_options(bench))}")
    if not roles and "simulator" not in task:
        raise RecipeError(f"--{named(bench).other} is missing: {bench} needs one beside the model")
    return Evaluation(
        bench=bench,
        model=model_name(model),
        task=task,
        generation=generation,
        roles=roles,
        role_generation=role_settings,
        model_args=settled(given.get("model_arg", [])),
        limit=given.get("limit"),
        preset=given.get("preset"),
    )


def with_preset(
    name: str,
    simulator: str | None,
    task: Given,
    generation: Given,
    roles: Mapping[str, Given],
    unset: Sequence[str],
    models: Mapping[str, str],
) -> tuple[Given, Given, dict[str, Given], list[str]]:
    """Task, generation, generation of roles and what is not sent, with a preset's where no option says otherwise. `simulator` is
    the task's argument; `models` play the roles."""
    from ctcgrpo.evaluation.presets import preset_of

    preset, user = preset_of(name), roles.get("simulator", {})
    words = {} if "official" in task else preset.briefing  # the official mode has its own
    chosen = {*generation, *(f"simulator.{setting}" for setting in user)}
    sampling = {"simulator": {**preset.simulator_generation(unset), **user}} if "simulator" in models else {}
    return (
        {**preset.task(simulator), **words, **task},
        {**preset.generation(unset), **generation},
        {**roles, **sampling},
        [*unset, *(setting for setting in preset.unset if setting not in chosen and setting not in unset)],
    )
