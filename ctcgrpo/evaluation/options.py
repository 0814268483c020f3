"""The options of `ctcgrpo evaluate` by sub-command, and what was typed as an Evaluation.

Each sub-command is a class: Typer reads its fields as options, and makes an instance of what was typed; None is not given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typer import Argument, Option

from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.benches import named
from ctcgrpo.evaluation.played import BRIEFING, SAMPLING, Trained, briefed_as
from ctcgrpo.evaluation.presets import with_preset
from ctcgrpo.simulator.choice import names_a_simulator

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

Given = dict[str, Any]  # what was typed, by name; what was not is left out
Data = Annotated[str | None, Option(metavar="PATH", help="The folder of your copy of its data.")]
Rescore = Annotated[Path | None, Option(help="A file of results or judgements; nothing is played.")]


@dataclass(frozen=True, kw_only=True)
class _OfAModel:
    model: Annotated[str | None, Option(help="A policy's folder, or PROVIDER/NAME of any provider that Inspect knows.")] = None
    model_arg: Annotated[list[str] | None, Option("-M", help="NAME=VALUE for the model's provider (hf: model_path=FOLDER).")] = (
        None
    )
    generate: Annotated[
        list[str] | None,
        Option(
            "-G",
            help="NAME=VALUE of sampling, as Inspect names it (reasoning_effort=low, max_completion_tokens=2000); null sends none "
            "(temperature=null); of another role: judge.temperature=null.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Scenarios:
    simulator: Annotated[
        str | None,
        Option(help="Who plays the user: scripted, a configuration (configs/simulator), a server's URL, or PROVIDER/NAME."),
    ] = None
    scenarios: Annotated[str | None, Option(help="A path, a pack, or eibench/test.")] = None
    invalid: Annotated[
        Literal["skip", "refuse"] | None,
        Option(help="Leave invalid records out, with a warning and a count (skip, the default), or stop (refuse)."),
    ] = None
    rounds: Annotated[int | None, Option(min=1, help="Replies at most.")] = None
    variant: Annotated[Literal["training", "evaluation"] | None, Option(help="How states are scored.")] = None
    official: Annotated[str | None, Option(metavar="PATH", help="A copy of the authors' code, for their prompts (runs it).")] = (
        None
    )
    opener: Annotated[str | None, Option(help="What a user says first where the model would, for providers that need it.")] = None
    instructions: Annotated[
        str | None,
        Option(help="How to reply, told to the model: eibench, short, none, or a file; a run's policy has its own."),
    ] = None
    reasons: Annotated[
        bool | None, Option(help="Word them for a model that reasons between <think> and </think> before it replies.")
    ] = None
    reasoning: Annotated[
        Literal["strip", "keep"] | None,
        Option(
            help="Whether the model's own reasoning of earlier turns is left out of its messages (strip, as published and by "
            "default) or stays (keep); a run's policy by default as its recipe says."
        ),
    ] = None
    tries: Annotated[
        int | None,
        Option(min=1, help="Calls to the user's LLM a turn, until its answer can be read. Default: 3, or llm.tries."),
    ] = None
    preset: Annotated[
        Literal["published"] | None,
        Option(
            help="Settings of published figures: 8 rounds, scoring variant evaluation, temperature 0.7 without top-p, 8,192 "
            "tokens, earlier reasoning stripped, 3 tries a turn of an LLM user at temperature 0.7 without top-p and seed. "
            "Options win over it, and the summary names what differs."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Played:
    repeats: Annotated[int | None, Option(min=1, help="Dialogues a scenario.")] = None
    seed: Annotated[int | None, Option(help="Of what is sampled.")] = None
    limit: Annotated[int | None, Option(min=1, help="The first so many scenarios.")] = None
    temperature: Annotated[
        float | None,
        Option(
            min=0,
            help="Of the model. Default: 0.6 and top-p 0.95, as in training, so that validations agree with it (eqbench3: 0.7); "
            "published for eibench: 0.7 without top-p.",
        ),
    ] = None
    top_p: Annotated[float | None, Option(min=0, max=1, help="Of the model; see --temperature.")] = None
    max_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Of a reply, reasoning included. Default: 8,192, as published, since fewer cut models that reason to empty "
            "replies; 1,024 for a policy in a folder that does not reason, as in training (eqbench3: 12,000).",
        ),
    ] = None
    connections: Annotated[int | None, Option(min=1, help="Dialogues at a time, and calls to a provider.")] = None
    price: Annotated[
        tuple[float, float] | None, Option(help="US dollars for a million tokens that the model reads, and writes.")
    ] = None
    display: Annotated[Literal["full", "rich", "plain", "none"] | None, Option(help="Inspect's display while it plays.")] = None
    out: Annotated[Path | None, Option(help="The folder for results; by benchmark and model by default.")] = None
    fail_under: Annotated[float | None, Option(help="Exit with 9 where the overall score is below this.")] = None

    def given(self) -> Given:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class RunOptions(_Played, _Scenarios):
    """Evaluate a run's base and final policy as its validation does, and compare them; `run` may be left out."""

    run: Annotated[Path, Argument(help="A run's folder.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(_Played, _OfAModel):
    bench: ClassVar[str]
    rescored_with: ClassVar[tuple[str, ...]] = ()  # options that go with --rescore, beside --out and --fail-under


@dataclass(frozen=True, kw_only=True)
class EIBenchOptions(ModelOptions, _Scenarios):
    """Evaluate a model on EIBench's task: the state that it leaves the user in."""

    bench = "eibench"
    as_trained: Annotated[
        bool | None,
        Option("--as-trained", help="A run's policy with the settings of its own validations, unless options differ."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SageOptions(ModelOptions):
    """Evaluate a model on SAGE: the user's final emotion."""

    bench = "sage"
    rescored_with = ("rescore", "simulator")
    simulator: Annotated[str | None, Option(help="PROVIDER/NAME of who plays the user; any name with --rescore.")] = None
    data: Data = None
    rescore: Rescore = None


@dataclass(frozen=True, kw_only=True)
class EQBench3Options(ModelOptions):
    """Evaluate a model on EQ-Bench 3: a judge's rubric."""

    bench = "eqbench3"
    rescored_with = ("rescore", "run")
    judge: Annotated[str | None, Option(help="PROVIDER/NAME of the judge.")] = None
    data: Data = None
    rescore: Rescore = None
    run: Annotated[str | None, Option(help="Which run of a file to rescore, by its key or model.")] = None


def option_name(name: str) -> str:
    return {"model_arg": "-M", "generate": "-G"}.get(name) or f"--{name.replace('_', '-')}"


def asked(bench: str, given: Given) -> tuple[Given, Given, dict[str, str]]:
    """The arguments of the benchmark's task, those of sampling, and the models that play a role. Who plays the user is an argument
    where that is no model of Inspect's."""
    from ctcgrpo.evaluation import _registry
    from ctcgrpo.evaluation.run import model_name

    task = {name: given[name] for name in inspect.signature(getattr(_registry, bench)).parameters if name in given}
    generation = {name: given[name] for name in SAMPLING if name in given}
    other = named(bench).other
    name = given.get(other)
    if name is None or (bench == "eibench" and names_a_simulator(name)):
        return task, generation, {}
    task.pop(other, None)
    return task, generation, {other: model_name(name, option_name(other))}


def wanted_evaluation(bench: str, model: str, given: Given, trained: Trained | None) -> Evaluation:
    """Raises RecipeError for options that do not go together, and for a simulator or judge that is missing."""
    from ctcgrpo.evaluation.generation import split_settings
    from ctcgrpo.evaluation.run import Evaluation, model_name, settled

    task, generation, roles = asked(bench, given)
    settings, role_settings, unset = split_settings(settled(given.get("generate", [])))
    if other := sorted(set(role_settings) - set(roles)):
        raise RecipeError(f"-G {other[0]}...: no model plays the {other[0]} here (--{other[0]} PROVIDER/NAME)")
    generation = {**settings, **generation}
    preset = given.get("preset")
    if preset is not None:
        if "as_trained" in given:
            raise RecipeError("--preset is not for --as-trained: each names all settings")
        task, generation, role_settings, unset = with_preset(
            preset, task.get("simulator"), task, generation, role_settings, unset, roles
        )
    if unset:
        task["unset"] = ",".join(sorted(unset))
    of_run: Mapping[str, Any] = {}
    if "as_trained" in given:
        if trained is None:
            raise RecipeError(
                f"--as-trained needs a policy in the folder of a run on scenarios, and {model} is none; name the folder of a run: "
                "--model checkpoints/RUN/best"
            )
        of_run, generation = trained.task, {**trained.sampling, **generation}
    elif bench == "eibench" and trained is not None and preset is None:
        # How a policy was taught to be told what it plays is no matter of taste: as its run has it, unless options say otherwise.
        of_run = briefed_as(trained.recipe)
    left_out = {"simulator" if roles else "", *(BRIEFING if "official" in task else ())}
    task = {**{name: value for name, value in of_run.items() if name not in left_out}, **task}
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
        preset=preset,
    )
