"""`ctcgrpo evaluate`, `compare` and `leaderboard`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ctcgrpo.errors import GateFailed, OutputError, RecipeError, TooManyFailures, too_many_failed
from ctcgrpo.evaluation.benches import BENCHES, named
from ctcgrpo.evaluation.compare import compared, most_changed
from ctcgrpo.evaluation.leaderboard import ranked
from ctcgrpo.evaluation.options import (
    Given,
    generation_of,
    option_name,
    refuse_unused,
    roles_of,
    task_of,
    wanted_evaluation,
    with_preset,
)
from ctcgrpo.evaluation.played import Trained, title_of, trained_as, validated_as
from ctcgrpo.evaluation.report import print_comparison, print_leaderboard, print_summary
from ctcgrpo.evaluation.rescoring import rescored
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.folders import is_model, require_folder, require_run
from ctcgrpo.naming import is_path
from ctcgrpo.recipe import resolved_recipe
from ctcgrpo.startup import announce_loading
from ctcgrpo.terminal import Terminal, say

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

_OUT = Path("checkpoints") / "evaluations"
_MAX_FAILED = 0.5
_AS_TRAINED = "-as-trained"
"""What an evaluation's folder ends with that takes a run's settings: the same policy with others has a folder too."""

_ALWAYS = {"out", "fail_under"}
_PLAYED = _ALWAYS | {
    "simulator",
    "repeats",
    "seed",
    "limit",
    "temperature",
    "top_p",
    "max_tokens",
    "connections",
    "price",
    "display",
}
_OF_THIS = ("as_trained", "official", "preset", "tries")
"""What a command with a run's own settings leaves out."""
_OF_RESCORING = {"sage": _ALWAYS | {"rescore", "simulator"}, "eqbench3": _ALWAYS | {"rescore", "run"}}
_OF_RUN = _PLAYED | {"preset", "reasoning", "tries", "scenarios", "rounds", "variant", "official", "opener", "invalid"}
_OF_RUN |= {"instructions", "reasons"}


def evaluate(
    bench: Annotated[str, typer.Argument(help="eibench, sage, eqbench3; or a run's folder: its base and final policy.")],
    model: Annotated[
        str | None, typer.Option(help="A policy's folder, or PROVIDER/NAME of any provider that Inspect knows.")
    ] = None,
    simulator: Annotated[
        str | None,
        typer.Option(
            help="Who plays the user: scripted, a configuration (configs/simulator), a server's URL, or PROVIDER/NAME."
        ),
    ] = None,
    judge: Annotated[str | None, typer.Option(help="eqbench3: PROVIDER/NAME of the judge.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for results; by benchmark and model by default.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="eibench: a path, a pack, or eibench/test.")] = None,
    data: Annotated[Path | None, typer.Option(help="sage, eqbench3: the folder of your copy of its data.")] = None,
    invalid: Annotated[
        Literal["skip", "refuse"] | None,
        typer.Option(
            help="eibench: leave invalid records out, with a warning and a count (skip, the default), or stop (refuse)."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="eibench: replies at most.")] = None,
    variant: Annotated[
        Literal["training", "evaluation"] | None, typer.Option(help="eibench: how states are scored.")
    ] = None,
    official: Annotated[
        Path | None, typer.Option(help="eibench: a copy of the authors' code, for their prompts (runs it).")
    ] = None,
    opener: Annotated[
        str | None, typer.Option(help="eibench: what a user says first where the model would, for providers that need it.")
    ] = None,
    instructions: Annotated[
        str | None,
        typer.Option(
            help="eibench: how to reply, told to the model: eibench, short, none, or a file; a run's policy has its own."
        ),
    ] = None,
    reasons: Annotated[
        bool | None,
        typer.Option(help="eibench: word them for a model that reasons between <think> and </think> before it replies."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Dialogues a scenario.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is sampled.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many scenarios.")] = None,
    preset: Annotated[
        Literal["published"] | None,
        typer.Option(
            help="eibench: settings of published figures: 8 rounds, scoring variant evaluation, temperature 0.7 without top-p, "
            "8,192 tokens, earlier reasoning stripped, 3 tries a turn of an LLM user at temperature 0.7 without top-p and seed. "
            "Options win over it, and the summary names what differs."
        ),
    ] = None,
    reasoning: Annotated[
        Literal["strip", "keep"] | None,
        typer.Option(
            help="eibench: whether the model's own reasoning of earlier turns is left out of its messages (strip, as published and "
            "by default) or stays (keep); a run's policy by default as its recipe says."
        ),
    ] = None,
    tries: Annotated[
        int | None,
        typer.Option(
            min=1, help="eibench: calls to the user's LLM a turn, until its answer can be read. Default: 3, or llm.tries."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of the model. Default: 0.6 and top-p 0.95, as in training, so that validations agree with it (eqbench3: 0.7); "
            "published for eibench: 0.7 without top-p.",
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Of the model; see --temperature.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a reply, reasoning included. Default: 8,192, as published, since fewer cut models that reason to empty "
            "replies; 1,024 for a policy in a folder that does not reason, as in training (eqbench3: 12,000).",
        ),
    ] = None,
    connections: Annotated[int | None, typer.Option(min=1, help="Dialogues at a time, and calls to a provider.")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option("-M", help="NAME=VALUE for the model's provider (hf: model_path=FOLDER).")
    ] = None,
    generate: Annotated[
        list[str] | None,
        typer.Option(
            "-G",
            help="NAME=VALUE of sampling, as Inspect names it (reasoning_effort=low, max_completion_tokens=2000); null sends none "
            "(temperature=null); of another role: judge.temperature=null.",
        ),
    ] = None,
    price: Annotated[
        tuple[float, float] | None, typer.Option(help="US dollars for a million tokens that the model reads, and writes.")
    ] = None,
    fail_under: Annotated[float | None, typer.Option(help="Exit with 9 where the overall score is below this.")] = None,
    rescore: Annotated[
        Path | None, typer.Option(help="sage, eqbench3: a file of results or judgements; nothing is played.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="eqbench3: which run of a file to rescore, by its key or model.")] = None,
    display: Annotated[
        Literal["full", "rich", "plain", "none"] | None, typer.Option(help="Inspect's display while it plays.")
    ] = None,
    as_trained: Annotated[
        bool | None,
        typer.Option(
            "--as-trained", help="eibench: a run's policy with the settings of its own validations, unless options differ."
        ),
    ] = None,
) -> None:
    """Evaluate a model, or a run's base and final policy, on a benchmark.

    The same command resumes an evaluation that was interrupted, and repeats the dialogues that failed.
    """
    console = _console()
    given: Given = {
        name: value for name, value in locals().items() if name not in ("bench", "console") and value is not None
    }
    if bench not in BENCHES and Path(bench).is_dir():
        refuse_unused(given, _OF_RUN, "a run's folder")
        _evaluate_run(Path(bench), given, console)
        return
    if is_path(bench):
        require_folder(Path(bench))
    known = named(bench)
    if rescore is not None:
        if bench not in _OF_RESCORING:
            raise RecipeError(f"--rescore is for {' and '.join(_OF_RESCORING)}; {bench}'s dialogues are played here")
        refuse_unused(given, _OF_RESCORING[bench], f"--rescore of {bench}")
        _rescore(bench, given, console)
        return
    if model is None:
        raise RecipeError("--model is missing: a policy's folder, or PROVIDER/NAME")
    if run is not None:
        raise RecipeError("--run is for --rescore of eqbench3")
    play = _play(given)
    trained = trained_as(Path(model))
    wanted = wanted_evaluation(known.name, model, given, trained)
    if trained is not None:
        _announce(trained, wanted, given, console)
    play_as = f"{_slug(wanted.model)}{_AS_TRAINED if as_trained else ''}{f'-{preset}' if preset else ''}"
    summary = play(wanted, out or _OUT / known.name / play_as)
    print_summary(summary, console)
    _judge(summary, fail_under)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Evaluations; the first is what the others are compared with.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder for the picture and the page; the last evaluation's by default.")
    ] = None,
    dialogues: Annotated[int, typer.Option(min=0, help="How many of those that changed most, in each direction.")] = 3,
    mixed: Annotated[bool, typer.Option("--mixed", help="Although simulator, judge, variant or rounds differ.")] = False,
) -> None:
    """Compare evaluations by paired differences, with a plot and the dialogues that changed most."""
    _compare(compared(folders, mixed=mixed), out or folders[-1], dialogues, _console())


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Where evaluations are, at any depth, inside runs too.")] = _OUT.parent,
) -> None:
    """Rank the models of all evaluations in a folder, inside runs too."""
    print_leaderboard(ranked(folder), _console())


def _console() -> Terminal:
    return Terminal(120)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")


def _play(given: Given) -> Callable[[Evaluation, Path], dict[str, Any]]:
    announce_loading("evaluating", "Inspect AI")
    try:
        from ctcgrpo.evaluation.run import evaluate as played
    except ImportError as error:
        raise RecipeError(f"evaluating needs the extra eval: pip install 'ctcgrpo[eval]' ({error})") from None

    def play(wanted: Evaluation, folder: Path) -> dict[str, Any]:
        return played(
            wanted,
            folder,
            display=given.get("display") or ("rich" if sys.stdout.isatty() else "plain"),
            connections=given.get("connections"),
            price=given.get("price"),
            say=lambda text: say(text, sys.stderr),
        )

    return play


def _announce(trained: Trained, wanted: Evaluation, given: Given, console: Terminal) -> None:
    """Print how a run's policy was trained; and, where it is not evaluated so, what differs and the command that does."""
    lines = [trained.told]
    if wanted.bench == "eibench":
        from ctcgrpo.evaluation.run import settings_before

        if unlike := trained.differences(settings_before(wanted)):
            lines.append(f"this evaluation is not comparable with its validations: {'; '.join(unlike)}")
            lines.append(f"with the run's settings: {_command_as_trained(trained, given)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _command_as_trained(trained: Trained, given: Given) -> str:
    """The same command with the run's settings, in a folder of its own."""
    words = ["ctcgrpo", "evaluate", "eibench"]
    for name, value in given.items():
        if name in trained.task or name in trained.sampling or name in _OF_THIS:
            continue
        if name == "out":
            value = f"{value}{_AS_TRAINED}"
        for one in value if isinstance(value, list) else [value]:
            words += [option_name(name), *map(str, one if isinstance(one, tuple) else (one,))]
    return shlex.join([*words, "--as-trained"])


def _judge(summary: Mapping[str, Any], fail_under: float | None, *, again: bool = True) -> None:
    """Exit with what gates look at: the score, and whether enough of it was played."""
    if too_many_failed(summary["failed"], summary["results"], _MAX_FAILED):
        told = "; the same command plays them again" if again else ""
        raise TooManyFailures(f"{summary['failed']} of {summary['results']} failed: what is left says too little{told}")
    mean = summary["score"]["mean"]
    if fail_under is not None and mean < fail_under:
        bench = named(summary["bench"])
        raise GateFailed(
            f"{summary['model']} has {bench.shown(mean)} ({title_of(summary)}), below {bench.shown(fail_under)}"
        )


def _evaluate_run(run: Path, given: Given, console: Terminal) -> None:
    """Base and final policy of a run, as its validation plays them unless options say otherwise, and their comparison."""
    if is_model(run):
        raise RecipeError(f"{run} is a policy's folder; `ctcgrpo evaluate eibench --model {run}` evaluates it")
    folder = require_run(run)
    resolved_recipe(folder.recipe_file).eibench_scenarios("evaluating a run as it validated")
    play = _play(given)
    from ctcgrpo.evaluation.of_run import evaluations_of

    roles, played = roles_of("eibench", given)
    task = {**task_of(given), **played}
    generation, role_generation = generation_of(given), dict[str, Given]()
    if (preset := given.get("preset")) is not None:
        simulator = (
            None if roles else task.get("simulator", validated_as(resolved_recipe(folder.recipe_file))[0]["simulator"])
        )
        task, generation, role_generation, unset = with_preset(preset, simulator, task, generation, {}, [], roles)
        task["unset"] = ",".join(unset)
    wanted = evaluations_of(folder, task, generation, roles, role_generation, given.get("limit"), preset, say)
    if (trained := trained_as(folder.final)) is not None:
        console.print(trained.told, markup=False, highlight=False, soft_wrap=True)
    out = given.get("out") or run / "evaluations"
    folders = {
        which: out / f"{evaluation.bench}-{which}{f'-{preset}' if preset else ''}" for which, evaluation in wanted.items()
    }
    summaries = [play(evaluation, folders[which]) for which, evaluation in wanted.items()]
    for summary in summaries:
        print_summary(summary, console)
    _compare(compared(list(folders.values()), list(folders)), out, 3, console)
    _judge(summaries[-1], given.get("fail_under"))


def _compare(found: Mapping[str, Any], out: Path, dialogues: int, console: Terminal) -> None:
    print_comparison(found, console)
    try:
        from ctcgrpo.evaluation.forest import write_comparison
    except ImportError:
        console.print("the picture and the page need the extra eval: pip install 'ctcgrpo[eval]'", markup=False)
        return
    written = write_comparison(found, most_changed(found, dialogues) if dialogues else [], out)
    console.print(f"picture and page: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def _rescore(bench: str, given: Given, console: Terminal) -> None:
    results, facts = rescored(bench, given["rescore"], other=given.get("simulator"), run=given.get("run"))
    summary = summarise(named(bench), results, facts)
    if (out := given.get("out")) is not None:
        if (out / "evaluation.json").exists():
            raise OutputError(f"{out} holds an evaluation that was played; choose another with --out")
        write_results(out, results, summary)
    print_summary(summary, console)
    _judge(summary, given.get("fail_under"), again=False)
