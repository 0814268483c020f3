"""`ctcgrpo evaluate`, `compare` and `leaderboard`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ctcgrpo.errors import GateFailed, OutputError, RecipeError, TooManyFailures, too_many_failed
from ctcgrpo.evaluation import presets
from ctcgrpo.evaluation.benches import named
from ctcgrpo.evaluation.compare import compared, most_changed, ranked
from ctcgrpo.evaluation.options import (
    EIBenchOptions,
    EQBench3Options,
    Given,
    ModelOptions,
    RunOptions,
    SageOptions,
    option_name,
    split_options,
    wanted_evaluation,
)
from ctcgrpo.evaluation.played import Trained, title_of, trained_as
from ctcgrpo.evaluation.report import print_comparison, print_leaderboard, print_summary
from ctcgrpo.evaluation.rescoring import rescored
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.run.folders import is_model, require_folder, require_run
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.importing import installing
from ctcgrpo.util.naming import is_path
from ctcgrpo.util.terminal import Terminal, log_line

if TYPE_CHECKING:
    from ctcgrpo.evaluation.run import Evaluation

_OUT = Path("checkpoints/evaluations")
_MAX_FAILED = 0.5
_AS_TRAINED = "-as-trained"
"""The suffix of the folder of an evaluation with its run's settings; with other settings the same policy has another folder."""

_OF_THIS = ("as_trained", "official", "preset", "tries")  # options that a command with a run's own settings leaves out


class _Evaluate(TyperGroup):
    """Sub-commands by benchmark; `ctcgrpo evaluate RUN_FOLDER` is its sub-command `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in self.commands:
            if is_path(args[0]):
                require_folder(Path(args[0]))
            elif not Path(args[0]).is_dir():
                named(args[0])
            args = ["run", *args]
        name, command, words = super().resolve_command(ctx, args)
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            having = [other for other, known in self.commands.items() if any(option in p.opts for p in known.params)]
            if having and name not in having:
                raise RecipeError(f"{option} cannot be used with {name}; expected one of {', '.join(having)}")
        return name, command, words


def _evaluate(options: RunOptions | ModelOptions) -> None:
    """Run a sub-command, which returns only its options."""
    given, console = options.given(), Terminal(120)
    if isinstance(options, RunOptions):
        _evaluate_run(options.run, given, console)
    elif "rescore" in given:
        if unused := set(given) - {"out", "fail_under", *options.rescored_with}:
            raise RecipeError(f"{option_name(min(unused))} cannot be combined with --rescore of {options.bench}; leave it out")
        _rescore(options.bench, given, console)
    else:
        _evaluate_model(options, given, console)


app = typer.Typer(
    cls=_Evaluate, result_callback=_evaluate, no_args_is_help=True, subcommand_metavar="RUN_FOLDER | COMMAND [ARGS]..."
)
app.command("run")(RunOptions)
for _options in (EIBenchOptions, SageOptions, EQBench3Options):
    app.command(_options.bench)(_options)


@app.callback()
def evaluate() -> None:
    """Evaluate a model, or a run's base and final policy, on a benchmark.

    The same command resumes an interrupted evaluation, and re-runs failed dialogues.
    """


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of evaluations; the first one is the baseline.")],
    out: Annotated[Path | None, typer.Option(help="The folder for plot and page (default: the last evaluation's).")] = None,
    dialogues: Annotated[int, typer.Option(min=0, help="Dialogues with the largest changes to show, in each direction.")] = 3,
    mixed: Annotated[bool, typer.Option("--mixed", help="Compare although simulator, judge, variant or rounds differ.")] = False,
) -> None:
    """Compare evaluations by paired differences, with a plot and the dialogues that changed most."""
    _compare(compared(folders, mixed=mixed), out or folders[-1], dialogues, Terminal(120))


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="A folder that is searched for evaluations, at any depth.")] = _OUT.parent,
) -> None:
    """Rank the models of all evaluations in a folder, inside runs too."""
    print_leaderboard(ranked(folder), Terminal(120))


def _play(given: Given) -> Callable[[Evaluation, Path], dict[str, Any]]:
    announce_loading("evaluating", "Inspect AI")
    try:
        from ctcgrpo.evaluation.run import evaluate as played
    except ImportError as error:
        raise RecipeError(f"evaluate needs the extra eval: {installing('eval')} ({error})") from None

    return partial(
        played,
        display=given.get("display") or ("rich" if sys.stdout.isatty() else "plain"),
        connections=given.get("connections"),
        price=given.get("price"),
        log_line=partial(log_line, file=sys.stderr),
    )


def _announce(trained: Trained, wanted: Evaluation, given: Given) -> None:
    """Print how a run's policy was trained. Where the settings differ, print the differences and a command without them."""
    log_line(trained.description)
    if wanted.bench == "eibench":
        from ctcgrpo.evaluation.run import settings_before

        if unlike := trained.differences(settings_before(wanted)):
            log_line(f"warning: not comparable with the run's validations; different settings: {'; '.join(unlike)}")
            log_line(f"to use the run's settings: {_command_as_trained(trained, given)}")


def _announce_preset(wanted: Evaluation) -> None:
    from ctcgrpo.evaluation.run import settings_before

    if wanted.preset is not None:
        log_line(presets.in_words(wanted.preset, presets.preset_differences(wanted.preset, settings_before(wanted))))


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


def _check_gates(summary: Mapping[str, Any], fail_under: float | None, *, again: bool = True) -> None:
    """Raises TooManyFailures where too many dialogues failed, GateFailed for a score below `fail_under`."""
    if too_many_failed(summary["failed"], summary["results"], _MAX_FAILED):
        advice = "; the same command re-runs them" if again else ""
        raise TooManyFailures(f"{summary['failed']} of {summary['results']} dialogues failed, too many for a score{advice}")
    mean = summary["score"]["mean"]
    if fail_under is not None and mean < fail_under:
        shown = named(summary["bench"]).shown
        raise GateFailed(
            f"{summary['model']}: score = {shown(mean)} ({title_of(summary)}); expected at least {shown(fail_under)}"
        )


def _evaluate_model(options: ModelOptions, given: Given, console: Terminal) -> None:
    if options.model is None:
        raise RecipeError("--model is missing; expected a policy's folder, or PROVIDER/NAME")
    if "run" in given:
        raise RecipeError("--run needs --rescore")
    play = _play(given)
    trained = trained_as(Path(options.model))
    wanted = wanted_evaluation(options.bench, options.model, given, trained)
    if trained is not None:
        _announce(trained, wanted, given)
    _announce_preset(wanted)
    kind = f"{_AS_TRAINED if 'as_trained' in given else ''}{f'-{wanted.preset}' if wanted.preset else ''}"
    slug = re.sub(r"[^\w.-]", "-", wanted.model).strip("-")
    folder = options.out or _OUT / options.bench / f"{slug}{kind}"
    summary = play(wanted, folder)
    print_summary(summary, console)
    log_line(f"results: {folder}")
    _check_gates(summary, options.fail_under)


def _evaluate_run(run: Path, given: Given, console: Terminal) -> None:
    """Evaluate a run's base and final policy, by default as its validation does, and compare them."""
    if is_model(run):
        raise RecipeError(f"{run} is a policy's folder; expected a run's; try `ctcgrpo evaluate eibench --model {run}`")
    folder = require_run(run)
    resolved_recipe(folder.recipe_file).eibench_scenarios("evaluating a run as it validated")
    play = _play(given)
    from ctcgrpo.evaluation.run import evaluations_of

    task, generation, roles = split_options("eibench", given)
    preset = given.get("preset")
    wanted = evaluations_of(folder, task, generation, roles, limit=given.get("limit"), preset=preset, log_line=log_line)
    if (trained := trained_as(folder.final)) is not None:
        log_line(trained.description)
    _announce_preset(next(iter(wanted.values())))
    out = given.get("out") or run / "evaluations"
    folders = {which: out / f"eibench-{which}{f'-{preset}' if preset else ''}" for which in wanted}
    summaries = [play(evaluation, folders[which]) for which, evaluation in wanted.items()]
    for summary in summaries:
        print_summary(summary, console)
    _compare(compared(list(folders.values()), list(folders)), out, 3, console)
    _check_gates(summaries[-1], given.get("fail_under"))


def _compare(found: Mapping[str, Any], out: Path, dialogues: int, console: Terminal) -> None:
    print_comparison(found, console)
    try:
        from ctcgrpo.evaluation.forest import write_comparison
    except ImportError:
        log_line(f"plot and page need the extra eval: {installing('eval')}")
        return
    written = write_comparison(found, most_changed(found, dialogues) if dialogues else [], out)
    log_line(f"plot and page: {', '.join(map(str, written))}")


def _rescore(bench: str, given: Given, console: Terminal) -> None:
    results, facts = rescored(bench, given["rescore"], other=given.get("simulator"), run=given.get("run"))
    summary = summarise(named(bench), results, facts)
    if (out := given.get("out")) is not None:
        if (out / "evaluation.json").exists():
            raise OutputError(f"{out} contains an evaluation; choose another folder with --out")
        write_results(out, results, summary)
    print_summary(summary, console)
    _check_gates(summary, given.get("fail_under"), again=False)
