"""The options of `ctcgrpo evaluate` by sub-command, and the Evaluation that they describe.

Each sub-command is a class: Typer reads its fields as options, and makes an instance of the given ones; None means not given.
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

Given = dict[str, Any]  # the given options by name
Data = Annotated[str | None, Option(metavar="PATH", help="The folder of your copy of the benchmark's data.")]
Rescore = Annotated[Path | None, Option(help="Score a published file of results or judgements; no model is called.")]


@dataclass(frozen=True, kw_only=True)
class _OfAModel:
    model: Annotated[str | None, Option(help="A policy's folder, or PROVIDER/NAME of any provider that Inspect knows.")] = None
    model_arg: Annotated[list[str] | None, Option("-M", help="NAME=VALUE for the provider (hf: model_path=FOLDER).")] = None
    generate: Annotated[
        list[str] | None,
        Option(
            "-G",
            help="NAME=VALUE, a sampling setting of Inspect (reasoning_effort=low, max_completion_tokens=2000). null leaves it out "
            "(temperature=null). Prefix the name of another role: judge.temperature=null.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Scenarios:
    simulator: Annotated[
        str | None,
        Option(help="Who plays the user: scripted, a configuration (configs/simulator), a server's URL, or PROVIDER/NAME."),
    ] = None
    scenarios: Annotated[str | None, Option(help="A path, a pack, eibench/test, or hf://...")] = None
    invalid: Annotated[
        Literal["skip", "refuse"] | None,
        Option(help="Invalid records: skip (default) leaves them out with a warning, refuse stops."),
    ] = None
    rounds: Annotated[int | None, Option(min=1, help="Limit on the model's replies.")] = None
    variant: Annotated[Literal["training", "evaluation"] | None, Option(help="Scoring of the final state.")] = None
    official: Annotated[str | None, Option(metavar="PATH", help="A copy of the authors' code, to use its prompts (runs it).")] = (
        None
    )
    opener: Annotated[str | None, Option(help="A first line of the user where the model opens, if needed.")] = None
    instructions: Annotated[
        str | None,
        Option(help="Instructions on how to reply: eibench, short, none, or a file (default: eibench, or the run's)."),
    ] = None
    reasons: Annotated[
        bool | None, Option(help="Instructions for a model that reasons between <think> and </think> before it replies.")
    ] = None
    reasoning: Annotated[
        Literal["strip", "keep"] | None,
        Option(
            help="The model's reasoning of earlier turns: strip leaves it out of later prompts (default, as published), keep "
            "includes it. The default for a run's policy is its recipe's."
        ),
    ] = None
    tries: Annotated[
        int | None,
        Option(min=1, help="Calls at most to the user's LLM per turn, until its answer is valid (default: 3, or llm.tries)."),
    ] = None
    preset: Annotated[
        Literal["published"] | None,
        Option(
            help="The settings of published figures: 8 rounds, scoring variant evaluation, temperature 0.7 without top-p, 8,192 "
            "tokens, earlier reasoning stripped, 3 tries a turn of an LLM user at temperature 0.7 without top-p and seed. "
            "Other options take precedence, and the summary lists the differences."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Played:
    repeats: Annotated[int | None, Option(min=1, help="Dialogues a scenario.")] = None
    seed: Annotated[int | None, Option(help="The sampling seed.")] = None
    limit: Annotated[int | None, Option(min=1, help="Play only the first N scenarios.")] = None
    temperature: Annotated[
        float | None,
        Option(
            min=0,
            help="Sampling temperature of the model. Default: 0.6 with top-p 0.95, as in training and validation (eqbench3: 0.7). "
            "Published for eibench: 0.7 without top-p.",
        ),
    ] = None
    top_p: Annotated[float | None, Option(min=0, max=1, help="Top-p of the model; see --temperature.")] = None
    max_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Limit on the tokens of a reply, reasoning included. Default: 8,192, as published; with fewer, replies of models "
            "that reason can be empty. 1,024 for a local policy that does not reason, as in training. eqbench3: 12,000.",
        ),
    ] = None
    connections: Annotated[int | None, Option(min=1, help="Concurrent dialogues, and calls to a provider.")] = None
    price: Annotated[
        tuple[float, float] | None,
        Option(
            metavar="INPUT OUTPUT",
            help="The model's price: US dollars per million input tokens and per million output tokens, as --price 2.5 10.",
        ),
    ] = None
    display: Annotated[Literal["full", "rich", "plain", "none"] | None, Option(help="Inspect's display while it plays.")] = None
    out: Annotated[Path | None, Option(help="The folder for results (default: by benchmark and model).")] = None
    fail_under: Annotated[float | None, Option(help="Exit with 9 if the overall score is lower.")] = None

    def given(self) -> Given:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class RunOptions(_Played, _Scenarios):
    """Evaluate a run's base and final policy as its validation does, and compare them. `run` is optional."""

    run: Annotated[Path, Argument(help="A run's folder.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(_Played, _OfAModel):
    bench: ClassVar[str]
    rescored_with: ClassVar[tuple[str, ...]] = ()  # options allowed with --rescore, beside --out and --fail-under


@dataclass(frozen=True, kw_only=True)
class EIBenchOptions(ModelOptions, _Scenarios):
    """Evaluate a model on EIBench's task: the user's final state."""

    bench = "eibench"
    as_trained: Annotated[
        bool | None,
        Option("--as-trained", help="Use the settings of the run's own validations; other options take precedence."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SageOptions(ModelOptions):
    """Evaluate a model on SAGE: the user's final emotion."""

    bench = "sage"
    rescored_with = ("rescore", "simulator")
    simulator: Annotated[
        str | None,
        Option(
            help="Who plays the user: a configuration (configs/simulator, backend llm) or PROVIDER/NAME; with --rescore a name."
        ),
    ] = None
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
    run: Annotated[str | None, Option(help="The run to rescore in a file, by its key or model.")] = None


def option_name(name: str) -> str:
    return {"model_arg": "-M", "generate": "-G"}.get(name) or f"--{name.replace('_', '-')}"


def split_options(bench: str, given: Given) -> tuple[Given, Given, dict[str, str]]:
    """The arguments of the benchmark's task, those of sampling, and the models by role. A simulator that is no model of Inspect's
    is an argument of the task."""
    from ctcgrpo.evaluation import _registry
    from ctcgrpo.evaluation.run import model_name

    task = {name: given[name] for name in inspect.signature(getattr(_registry, bench)).parameters if name in given}
    generation = {name: given[name] for name in SAMPLING if name in given}
    other = named(bench).other
    name = given.get(other)
    if name is None or (other == "simulator" and names_a_simulator(name)):
        return task, generation, {}
    task.pop(other, None)
    return task, generation, {other: model_name(name, option_name(other))}


def wanted_evaluation(bench: str, model: str, given: Given, trained: Trained | None) -> Evaluation:
    """The Evaluation of the given options. Raises RecipeError for options that contradict, and for a missing simulator or judge."""
    from ctcgrpo.evaluation.generation import split_settings
    from ctcgrpo.evaluation.run import Evaluation, model_name, parse_settings

    task, generation, roles = split_options(bench, given)
    settings, role_settings, unset = split_settings(parse_settings(given.get("generate", [])))
    if other := sorted(set(role_settings) - set(roles)):
        raise RecipeError(f"-G {other[0]}...: no model has the role {other[0]}; set --{other[0]} PROVIDER/NAME")
    generation = {**settings, **generation}
    preset = given.get("preset")
    if preset is not None:
        if "as_trained" in given:
            raise RecipeError("--preset and --as-trained: both given; expected one, since each sets all settings")
        task, generation, role_settings, unset = with_preset(
            preset, task.get("simulator"), task, generation, role_settings, unset, roles
        )
    if unset:
        task["unset"] = ",".join(sorted(unset))
    run_settings: Mapping[str, Any] = {}
    if "as_trained" in given:
        if trained is None:
            raise RecipeError(
                f"--as-trained: --model = {model}; expected a policy in the folder of a run on scenarios; try "
                "--model checkpoints/RUN/best"
            )
        run_settings, generation = trained.task, {**trained.sampling, **generation}
    elif bench == "eibench" and trained is not None and preset is None:
        # A policy expects the briefing of its training: the run's own, unless options differ.
        run_settings = briefed_as(trained.recipe)
    left_out = {"simulator" if roles else "", *(BRIEFING if "official" in task else ())}
    task = {**{name: value for name, value in run_settings.items() if name not in left_out}, **task}
    if not roles and "simulator" not in task:
        raise RecipeError(f"--{named(bench).other} is missing; {bench} needs it beside --model")
    return Evaluation(
        bench=bench,
        model=model_name(model),
        task=task,
        generation=generation,
        roles=roles,
        role_generation=role_settings,
        model_args=parse_settings(given.get("model_arg", [])),
        limit=given.get("limit"),
        preset=preset,
    )
