"""`ctcgrpo evaluate`, `compare` and `leaderboard`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ctcgrpo.errors import GateFailed, OutputError, RecipeError, TooManyFailures, too_many_failed
from ctcgrpo.evaluation.benches import BENCHES, named
from ctcgrpo.evaluation.compare import compared, most_changed
from ctcgrpo.evaluation.leaderboard import ranked
from ctcgrpo.evaluation.report import print_comparison, print_leaderboard, print_summary
from ctcgrpo.evaluation.rescoring import rescored
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.terminal import Terminal, say

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

_OUT = Path("checkpoints") / "evaluations"
_MAX_FAILED = 0.5

Given = dict[str, Any]
"""What stands on the command line, by name; what does not stand there is left out."""
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
_OF_RESCORING = {"sage": _ALWAYS | {"rescore", "simulator"}, "eqbench3": _ALWAYS | {"rescore", "run"}}
_OF_RUN = _PLAYED | {"scenarios", "rounds", "variant", "official", "opener"}


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
    repeats: Annotated[int | None, typer.Option(min=1, help="Dialogues a scenario.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is sampled.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many scenarios.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of the model.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Of the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a reply.")] = None,
    connections: Annotated[int | None, typer.Option(min=1, help="Dialogues at a time, and calls to a provider.")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option("-M", help="NAME=VALUE for the model's provider (hf: model_path=FOLDER).")
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
) -> None:
    """Evaluate a model on a benchmark; the same command goes on where it was interrupted, and plays again what failed."""
    console = _console()
    given: Given = {
        name: value for name, value in locals().items() if name not in ("bench", "console") and value is not None
    }
    if bench not in BENCHES and Path(bench).is_dir():
        _only(given, _OF_RUN, "a run's folder")
        _evaluate_run(Path(bench), given, console)
        return
    known = named(bench)
    if rescore is not None:
        if bench not in _OF_RESCORING:
            raise RecipeError(f"--rescore is for {' and '.join(_OF_RESCORING)}; {bench}'s dialogues are played here")
        _only(given, _OF_RESCORING[bench], f"--rescore of {bench}")
        _rescore(bench, given, console)
        return
    if model is None:
        raise RecipeError("--model is missing: a policy's folder, or PROVIDER/NAME")
    if run is not None:
        raise RecipeError("--run is for --rescore of eqbench3")
    wanted = _wanted(known.name, model, given)
    summary = _play(given)(wanted, out or _OUT / known.name / _slug(wanted.model))
    print_summary(summary, console)
    _judge(summary, fail_under)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Evaluations; the first is what the others are compared with.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder for the picture and the page; the last evaluation's by default.")
    ] = None,
    dialogues: Annotated[int, typer.Option(min=0, help="How many of those that changed most, in each direction.")] = 3,
    mixed: Annotated[bool, typer.Option("--mixed", help="Although simulator, judge or variant differ.")] = False,
) -> None:
    """Compare evaluations scenario by scenario: differences with intervals, a forest plot, the dialogues that changed most."""
    _compare(compared(folders, mixed=mixed), out or folders[-1], dialogues, _console())


def leaderboard(folder: Annotated[Path, typer.Argument(help="Where evaluations are, at any depth.")] = _OUT) -> None:
    """Rank the models of all evaluations below a folder, for each benchmark and each way of playing it."""
    print_leaderboard(ranked(folder), _console())


def _console() -> Console:
    return Terminal(120)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")


def _only(given: Given, allowed: set[str], what: str) -> None:
    """Raises RecipeError for an option that would do nothing."""
    if unused := sorted(set(given) - allowed):
        raise RecipeError(f"{_option(unused[0])} is not for {what}")


def _option(name: str) -> str:
    return "-M" if name == "model_arg" else f"--{name.replace('_', '-')}"


def _play(given: Given) -> Callable[[Evaluation, Path], dict[str, Any]]:
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


def _task(given: Given) -> Given:
    names = ("scenarios", "data", "rounds", "variant", "official", "opener", "repeats", "seed")
    return {name: str(given[name]) if isinstance(given[name], Path) else given[name] for name in names if name in given}


def _generation(given: Given) -> Given:
    return {name: given[name] for name in ("temperature", "top_p", "max_tokens") if name in given}


def _others(bench: str, given: Given) -> tuple[dict[str, str], Given]:
    """The models that play a role, and what says who plays the user where that is no model of Inspect's."""
    from ctcgrpo.evaluation.run import model_name

    other = named(bench).other
    if wrong := {"simulator", "judge"} & set(given) - {other}:
        raise RecipeError(f"{_option(wrong.pop())} is not for {bench}, which has a {other}")
    name = given.get(other)
    if name is None:
        return {}, {}
    if bench == "eibench" and (name == "scripted" or name.startswith("http") or name.endswith((".yaml", ".yml"))):
        return {}, {"simulator": name}
    return {other: model_name(name, _option(other))}, {}


def _wanted(bench: str, model: str, given: Given) -> Evaluation:
    """Raises RecipeError for an option that the benchmark does not have."""
    from ctcgrpo.evaluation.run import Evaluation, model_name, settled, task_options

    roles, played = _others(bench, given)
    task = {**_task(given), **played}
    if unknown := sorted(set(task) - set(task_options(bench))):
        raise RecipeError(f"{_option(unknown[0])} is not for {bench}, which has {', '.join(task_options(bench))}")
    if not roles and "simulator" not in task:
        raise RecipeError(f"--{named(bench).other} is missing: {bench} needs one beside the model")
    return Evaluation(
        bench=bench,
        model=model_name(model),
        task=task,
        generation=_generation(given),
        roles=roles,
        model_args=settled(given.get("model_arg", [])),
        limit=given.get("limit"),
    )


def _judge(summary: Mapping[str, Any], fail_under: float | None, *, again: bool = True) -> None:
    """Exit with what gates look at: the score, and whether enough of it was played."""
    if too_many_failed(summary["failed"], summary["results"], _MAX_FAILED):
        told = "; the same command plays them again" if again else ""
        raise TooManyFailures(f"{summary['failed']} of {summary['results']} failed: what is left says too little{told}")
    mean = summary["score"]["mean"]
    if fail_under is not None and mean < fail_under:
        bench = named(summary["bench"])
        raise GateFailed(f"{summary['model']} has {bench.shown(mean)} on {bench.title}, below {bench.shown(fail_under)}")


def _evaluate_run(run: Path, given: Given, console: Console) -> None:
    """Base and final policy of a run, as its validation plays them unless options say otherwise, and their comparison."""
    play = _play(given)
    from ctcgrpo.evaluation.of_run import evaluations_of

    roles, played = _others("eibench", given)
    task = {**_task(given), **played}
    wanted = evaluations_of(RunFolder(run), task, _generation(given), roles, given.get("limit"))
    out = given.get("out") or run / "evaluations"
    folders = {which: out / f"{evaluation.bench}-{which}" for which, evaluation in wanted.items()}
    summaries = [play(evaluation, folders[which]) for which, evaluation in wanted.items()]
    for summary in summaries:
        print_summary(summary, console)
    _compare(compared(list(folders.values()), list(folders)), out, 3, console)
    _judge(summaries[-1], given.get("fail_under"))


def _compare(found: Mapping[str, Any], out: Path, dialogues: int, console: Console) -> None:
    print_comparison(found, console)
    try:
        from ctcgrpo.evaluation.forest import write_comparison
    except ImportError:
        console.print("the picture and the page need the extra eval: pip install 'ctcgrpo[eval]'", markup=False)
        return
    written = write_comparison(found, most_changed(found, dialogues) if dialogues else [], out)
    console.print(f"picture and page: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def _rescore(bench: str, given: Given, console: Console) -> None:
    results, facts = rescored(bench, given["rescore"], other=given.get("simulator"), run=given.get("run"))
    summary = summarise(named(bench), results, facts)
    if (out := given.get("out")) is not None:
        if (out / "evaluation.json").exists():
            raise OutputError(f"{out} holds an evaluation that was played; choose another with --out")
        write_results(out, results, summary)
    print_summary(summary, console)
    _judge(summary, given.get("fail_under"), again=False)
