"""The `ctcgrpo` command, and the call at the end of every recipe.

Heavy libraries are imported only once a recipe is valid, so that a mistake in it is reported in a moment.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from ctcgrpo import __version__
from ctcgrpo.errors import CtcGrpoError, RecipeError, RunInterrupted, RunPaused
from ctcgrpo.evaluation import commands as evaluation
from ctcgrpo.factory import commands as scenarios
from ctcgrpo.recipe import Recipe, load_recipe
from ctcgrpo.report import commands as reporting
from ctcgrpo.study import commands as studying
from ctcgrpo.sweep import commands as sweeping
from ctcgrpo.terminal import Terminal, say

_LAUNCHED = "CTCGRPO_LAUNCHED"
"""Set for the processes that `ctcgrpo train` starts through accelerate: they run, and launch nothing further."""

app = typer.Typer(
    help="Train language models to manage a user's emotions over several turns, with CTC-GRPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(scenarios.app, name="scenarios")
app.command()(evaluation.evaluate)
app.command()(evaluation.compare)
app.command()(evaluation.leaderboard)
app.command()(sweeping.sweep)
app.command()(studying.study)
app.command()(reporting.report)


def main() -> None:
    """The console script: a user's mistake becomes one line and an exit code, not a traceback."""
    _guarded(app)


def run_recipe(file: str) -> None:
    """Run the recipe that this is called from, with sys.argv as overrides.

    A recipe is imported again by spawned worker processes; only the one that was started may run it.
    """
    if sys._getframe(1).f_globals.get("__name__") != "__main__":
        return
    _guarded(lambda: train_here(load_recipe(file, sys.argv[1:])))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    config_file: Annotated[Path | None, typer.Option(help="An accelerate configuration.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
) -> None:
    """Train a recipe. The same command again goes on where it was interrupted.

    With one process it runs right here; with several GPUs, --processes or --config-file, through accelerate.
    """
    settings = load_recipe(recipe, overrides or [])
    if processes is not None:
        settings.check_processes(processes)
    if config_file is not None and not config_file.is_file():
        raise RecipeError(f"--config-file {config_file} not found")
    if _LAUNCHED in os.environ or (config_file is None and (processes or _gpus()) <= 1):
        train_here(settings)
        return
    if not _gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else processes without GPUs do not find each other
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if config_file is not None:
        command += ["--config_file", str(config_file)]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    if config_file is None:
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
        command += ["--main_process_port", "0"]
    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # else what saves after Ctrl-C is killed after 30 s
    os.execv(sys.executable, [*command, "--module", "ctcgrpo", "train", str(recipe), *(overrides or [])])


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
) -> None:
    """Find what would fail later, before any GPU is taken; then say what the run will need and cost."""
    settings = load_recipe(recipe, overrides or [])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from transformers.utils import logging as transformers_logging

    from ctcgrpo.plan.check import findings
    from ctcgrpo.plan.report import print_findings

    transformers_logging.disable_progress_bar()
    found, subject = findings(settings)
    print_findings(found, subject.memory, Terminal(132), settings.run.name)
    if any(finding.level == "failed" for finding in found):
        sys.exit(RecipeError.exit_code)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration (configs/simulator); else the scripted user.")
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; a token is needed beyond loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8765,
) -> None:
    """Run a simulator server."""
    from ctcgrpo.simulator.config import SCRIPTED_USER, load_simulator_config
    from ctcgrpo.simulator.server import serve_forever

    serve_forever(SCRIPTED_USER if config is None else load_simulator_config(config), host, port)


_CONFIG = typer.Option(help="The simulator's configuration (configs/simulator); else the scripted user.")
_URLS = typer.Option(help="A simulator server that runs already; several for replicas.")


@app.command()
def chat(
    scenario: Annotated[str | None, typer.Option(help="The scenario's id; the first one by default.")] = None,
    scenarios: Annotated[str, typer.Option(help="Where it is: a path, a bundled pack, or a dataset.")] = "english/test",
    config: Annotated[Path | None, _CONFIG] = None,
    url: Annotated[list[str] | None, _URLS] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Replies at most.")] = 8,
) -> None:
    """Play the policy's role yourself: type replies, see the user's state move, and why."""
    import asyncio

    from ctcgrpo.chat import chat, find_scenario
    from ctcgrpo.scenarios import load_scenarios
    from ctcgrpo.simulator.choice import chosen_simulator

    chosen = find_scenario(load_scenarios(scenarios, "test"), scenario)
    with chosen_simulator(config, url or []) as simulator:
        asyncio.run(chat(chosen, simulator, Terminal(80), lambda: input("You: "), rounds=rounds))


@app.command()
def noise(
    run: Annotated[Path, typer.Argument(help="A run's folder, whose recorded dialogues are replayed.")],
    config: Annotated[Path | None, _CONFIG] = None,
    url: Annotated[list[str] | None, _URLS] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="Of each scene.")] = 5,
    replays: Annotated[int, typer.Option(min=2, help="How often each turn is asked for.")] = 8,
) -> None:
    """Measure how noisy a simulator's judgement is: the same turns with different seeds, by scene."""
    import asyncio

    from ctcgrpo.recipe import load_recipe
    from ctcgrpo.run_folder import RunFolder
    from ctcgrpo.scenarios import load_scenarios
    from ctcgrpo.simulator.choice import chosen_simulator, introduced
    from ctcgrpo.simulator.noise import measure, noise_table, recorded_turns

    folder = RunFolder(run)
    recipe = load_recipe(folder.recipe_file)
    scenarios = list(load_scenarios(recipe.scenarios.train, "train"))
    if recipe.validation is not None:
        scenarios += load_scenarios(recipe.validation.scenarios, "test")
    files = sorted(folder.traces.glob("*.jsonl"))
    rounds = recipe.rollout.max_turns
    turns = recorded_turns(
        files, scenarios, dialogues=dialogues, max_rounds=rounds, warn=lambda text: say(f"warning: {text}", sys.stderr)
    )
    with chosen_simulator(config, url or []) as simulator:
        says = asyncio.run(introduced(simulator))
        found = asyncio.run(measure(turns, simulator, replays=replays))
    console = Terminal(120)
    console.print(noise_table(found, f"noise of the simulator on turns of {run}"))
    console.print(f"simulator: {says}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, for example checkpoints/quickstart.")],
    scenario: Annotated[str | None, typer.Option(help="Which held-out scenario to show; a typical one by default.")] = None,
) -> None:
    """Print a finished run: scores before and after, and one scenario played by both policies."""
    from ctcgrpo.show import show_run

    show_run(run, Terminal(120), scenario=scenario)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    which: Annotated[str, typer.Option(help="final, best, or the number of a checkpoint.")] = "final",
    out: Annotated[Path | None, typer.Option(help="Where to; RUN/export by default.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    push: Annotated[str | None, typer.Option(help="Upload to this repository of the Hub as well (private).")] = None,
) -> None:
    """Write a trained policy in one piece: adapters merged, shards joined, with a card of what was measured."""
    from transformers.utils import logging as transformers_logging

    from ctcgrpo import export as exporting

    transformers_logging.disable_progress_bar()
    written = exporting.export(run, out or run / "export", which=which, dtype=dtype)
    say(f"exported to {written}")
    if push is not None:
        say(f"uploaded to {exporting.push(written, push)}")


@app.command()
def version() -> None:
    """Say which version this is."""
    print(__version__)


def train_here(recipe: Recipe) -> None:
    """Run a recipe in this process, without what other libraries say that is of no use to its user."""
    # TRL reports usage to its authors by default; a framework should not do so on a user's behalf.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL's defaults name options that transformers is about to rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6.*", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    from ctcgrpo.train import train

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    train(recipe)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _guarded(run: Callable[[], object]) -> None:
    try:
        run()
    except KeyboardInterrupt:
        print("stopped: at once; what was not saved yet is lost", file=sys.stderr)
        sys.exit(RunInterrupted.exit_code)
    except CtcGrpoError as error:
        what = "stopped" if isinstance(error, RunPaused) else "error"
        rank = os.environ.get("RANK", "0")
        say(f"{what}: {error}" if rank == "0" else f"[process {rank}] {what}: {error}", sys.stderr)
        sys.exit(error.exit_code)
