"""`ctcgrpo evaluate`, `compare` and `leaderboard`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ctcgrpo.errors import GateFailed, OutputError, RecipeError, TooManyFailures, too_many_failed
from ctcgrpo.evaluation.benches import named
from ctcgrpo.evaluation.compare import compared, most_changed
from ctcgrpo.evaluation.leaderboard import ranked
from ctcgrpo.evaluation.report import print_comparison, print_leaderboard, print_summary
from ctcgrpo.evaluation.rescoring import rescored
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.run_folder import RunFolder

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

_OUT = Path("checkpoints") / "evaluations"
_MAX_FAILED = 0.5

Given = dict[str, Any]
"""What stands on the command line, by name; what does not stand there is left out."""


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
    prices: Annotated[Path | None, typer.Option(help="A file that tells Inspect what models cost.")] = None,
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
    task: Given = {
        "scenarios": scenarios,
        "data": None if data is None else str(data),
        "rounds": rounds,
        "variant": variant,
        "official": None if official is None else str(official),
        "repeats": repeats,
        "seed": seed,
    }
    task = {name: value for name, value in task.items() if value is not None}
    if rescore is not None:
        known = named(bench)
        other = simulator if known.other == "simulator" else judge
        results, facts = rescored(known.name, rescore, other=other, run=run)
        summary = summarise(known, results, facts)
        if out is not None:
            if (out / "evaluation.json").exists():
                raise OutputError(f"{out} holds an evaluation that was played; choose another with --out")
            write_results(out, results, summary)
        _judge([summary], console, fail_under)
        return
    generation = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    generation = {name: value for name, value in generation.items() if value is not None}
    play = _player(display or ("rich" if sys.stdout.isatty() else "plain"), connections, prices)
    if Path(bench).is_dir():
        _evaluate_run(Path(bench), task, generation, simulator, limit, play, out, console, fail_under)
        return
    known = named(bench)
    if model is None:
        raise RecipeError("--model is missing: a policy's folder, or PROVIDER/NAME")
    wanted = _wanted(known.name, model, task, generation, {"simulator": simulator, "judge": judge}, model_arg or [], limit)
    summary = play(wanted, out or _OUT / known.name / _slug(wanted.model))
    _judge([summary], console, fail_under)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Evaluations; the first is what the others are compared with.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder for the picture and the page; the last evaluation's by default.")
    ] = None,
    dialogues: Annotated[int, typer.Option(min=0, help="How many of those that changed most, in each direction.")] = 3,
) -> None:
    """Compare evaluations scenario by scenario: differences with intervals, a forest plot, the dialogues that changed most."""
    _compare(folders, None, out or folders[-1], dialogues, _console())


def leaderboard(folder: Annotated[Path, typer.Argument(help="Where evaluations are, at any depth.")] = _OUT) -> None:
    """Rank the models of all evaluations below a folder, for each benchmark and each way of playing it."""
    print_leaderboard(ranked(folder), _console())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")


def _player(display: str, connections: int | None, prices: Path | None) -> Any:
    try:
        from ctcgrpo.evaluation.run import evaluate as played
    except ImportError as error:
        raise RecipeError(f"evaluating needs the extra eval: pip install 'ctcgrpo[eval]' ({error})") from None

    def play(wanted: Evaluation, folder: Path) -> dict[str, Any]:
        return played(wanted, folder, display=display, connections=connections, prices=prices)

    return play


def _wanted(
    bench: str,
    model: str,
    task: Given,
    generation: Given,
    others: Mapping[str, str | None],
    model_args: list[str],
    limit: int | None,
) -> Evaluation:
    """Raises RecipeError for an option that the benchmark does not have."""
    from ctcgrpo.evaluation.run import Evaluation, model_name, settled, task_options

    roles: dict[str, str] = {}
    other = named(bench).other
    for role, name in others.items():
        if name is None:
            continue
        if role != other:
            raise RecipeError(f"--{role} is not for {bench}, which has a {other}")
        if bench == "eibench" and (name == "scripted" or name.startswith("http") or name.endswith((".yaml", ".yml"))):
            task = {**task, "simulator": name}
        else:
            roles[role] = model_name(name)
    if unknown := sorted(set(task) - set(task_options(bench))):
        raise RecipeError(f"--{unknown[0].replace('_', '-')} is not for {bench}, which has {', '.join(task_options(bench))}")
    if not roles and "simulator" not in task:
        raise RecipeError(f"--{other} is missing: {bench} needs one beside the model")
    return Evaluation(
        bench=bench,
        model=model_name(model),
        task=task,
        generation=generation,
        roles=roles,
        model_args=settled(model_args),
        limit=limit,
    )


def _judge(summaries: list[dict[str, Any]], console: Console, fail_under: float | None) -> None:
    """Print, and exit with what gates look at: the last one's score, and whether enough of it was played."""
    for summary in summaries:
        print_summary(summary, console)
    summary = summaries[-1]
    if too_many_failed(summary["failed"], summary["results"], _MAX_FAILED):
        raise TooManyFailures(
            f"{summary['failed']} of {summary['results']} failed: what is left says too little; the same command plays them again"
        )
    mean = summary["score"]["mean"]
    if fail_under is not None and mean < fail_under:
        bench = named(summary["bench"])
        raise GateFailed(f"{summary['model']} has {bench.shown(mean)} on {bench.title}, below {bench.shown(fail_under)}")


def _evaluate_run(
    run: Path,
    task: Given,
    generation: Given,
    simulator: str | None,
    limit: int | None,
    play: Any,
    out: Path | None,
    console: Console,
    fail_under: float | None,
) -> None:
    """Base and final policy of a run, as its validation plays them unless options say otherwise, and their comparison."""
    from ctcgrpo.evaluation.of_run import evaluations_of

    out = out or run / "evaluations"
    wanted = evaluations_of(RunFolder(run), task, generation, simulator, limit)
    summaries = []
    folders = []
    for which, evaluation in wanted.items():
        folders.append(out / f"{evaluation.bench}-{which}")
        summaries.append(play(evaluation, folders[-1]))
    for summary in summaries:
        print_summary(summary, console)
    _compare(folders, list(wanted), out, 3, console)
    _judge(summaries[-1:], Console(quiet=True), fail_under)


def _compare(folders: list[Path], names: list[str] | None, out: Path, dialogues: int, console: Console) -> None:
    found = compared(folders, names)
    print_comparison(found, console)
    try:
        from ctcgrpo.evaluation.forest import write_comparison
    except ImportError:
        console.print("the picture and the page need the extra eval: pip install 'ctcgrpo[eval]'", markup=False)
        return
    changed = most_changed(found, dialogues) if dialogues else []
    written = write_comparison(found, changed, out)
    console.print(f"picture and page: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
