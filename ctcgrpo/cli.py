"""The `ctcgrpo` command, and the call at the end of every recipe.

Heavy libraries are imported only after the recipe is valid, so errors in it are reported in under a second.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ctcgrpo import __version__
from ctcgrpo.audit import commands as auditing
from ctcgrpo.chat import commands as chatting
from ctcgrpo.environments.eibench.scenarios import load_scenes
from ctcgrpo.errors import CtcGrpoError, RecipeError, RunInterrupted, RunPaused
from ctcgrpo.evaluation import commands as evaluation
from ctcgrpo.experiments import commands as experiments
from ctcgrpo.factory import commands as scenarios
from ctcgrpo.options import RolloutOptions
from ctcgrpo.reference import commands as reference
from ctcgrpo.report import commands as reporting
from ctcgrpo.run.folders import check_model, require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.startup import LAUNCHED, SHUTDOWN_TIMEOUT, announce_loading
from ctcgrpo.util.importing import installing, load_object
from ctcgrpo.util.naming import cut
from ctcgrpo.util.proxies import settle_environment
from ctcgrpo.util.terminal import Terminal, log_line

_LONGEST_MESSAGE = 4000  # characters; longer errors are cut

app = typer.Typer(
    help="Train language models to manage a user's emotions over several turns, with CTC-GRPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script. A user's error is printed as one line, with an exit code and no traceback."""
    _guarded(app)


def run_recipe(file: str) -> None:
    """Run the recipe file that calls this, with sys.argv as overrides.

    Spawned worker processes import the recipe again; only the main process runs it.
    """
    if sys._getframe(1).f_globals.get("__name__") != "__main__":
        return
    _guarded(lambda: train_here(load_recipe(file, sys.argv[1:])))


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    config_file: Annotated[Path | None, typer.Option(help="An accelerate configuration file.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
) -> None:
    """Train a recipe; the same command resumes an interrupted run.

    One process trains directly; several GPUs, --processes or --config-file start accelerate.
    """
    settings = load_recipe(recipe, overrides or [])
    if processes is not None:
        settings.check_processes(processes)
    if config_file is not None and not config_file.is_file():
        raise RecipeError(f"--config-file {config_file} not found")
    _before_loading(settings)
    if LAUNCHED in os.environ or (config_file is None and (processes or _gpus()) <= 1):
        train_here(settings)
        return
    if not _gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, CPU processes do not join one process group
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if config_file is not None:
        command += ["--config_file", str(config_file)]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    if config_file is None:
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
        command += ["--main_process_port", "0"]
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # forwarded to the processes
    os.environ.setdefault(SHUTDOWN_TIMEOUT, "3600")  # the default, 30 s, kills a process that saves after Ctrl-C
    os.execv(sys.executable, [*command, "--module", "ctcgrpo", "train", str(recipe), *(overrides or [])])


def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
) -> None:
    """Validate a recipe without a GPU, and print the estimated memory, time and cost of its run."""
    settings = load_recipe(recipe, overrides or [])
    announce_loading(f"checking {settings.run.name}")
    gpus = _gpus()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from transformers.utils import logging as transformers_logging

    from ctcgrpo.preflight.check import findings, print_findings

    transformers_logging.disable_progress_bar()
    found, subject = findings(settings, gpus=gpus)
    print_findings(found, subject.memory, Terminal(132), settings.run.name)
    if any(finding.level == "failed" for finding in found):
        sys.exit(RecipeError.exit_code)


def serve(
    config: Annotated[Path | None, typer.Argument(help="A file of configs/simulator; default: the scripted user.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; all but loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8765,
    openenv: Annotated[bool, typer.Option("--openenv", help="Serve whole dialogues as an OpenEnv environment.")] = False,
    scenarios: Annotated[str, typer.Option(help="With --openenv: a path, a bundled pack, or a dataset.")] = "english/train",
    max_turns: Annotated[int, typer.Option(min=1, help="With --openenv: maximum number of replies.")] = RolloutOptions.max_turns,
    instructions: Annotated[str, typer.Option(help="With --openenv: eibench, short, none, or a file.")] = "eibench",
) -> None:
    """Run a simulator server.

    ctcgrpo/simulator/README.md documents its HTTP contract, with a curl example; `ctcgrpo fields simulator-config` lists the
    fields of its configuration. With --openenv the server plays whole dialogues for clients of OpenEnv.
    """
    from ctcgrpo.simulator.config import SCRIPTED_USER, SimulatorConfig, load_simulator_config
    from ctcgrpo.simulator.server import serve_forever

    chosen = SCRIPTED_USER if config is None else load_simulator_config(config)
    if not openenv:
        serve_forever(chosen, host, port)
        return
    from ctcgrpo.environments.eibench.persona import Briefing
    from ctcgrpo.environments.eibench.scenarios import load_set
    from ctcgrpo.policy.instructions import load_instructions

    found = load_set(scenarios)
    for line in found.report():
        log_line(line, sys.stderr)
    briefing = Briefing(instructions=load_instructions(instructions))
    try:
        from ctcgrpo.simulator.openenv import OpenEnvServer
    except ModuleNotFoundError as error:
        raise RecipeError(f"--openenv needs the extra openenv: {installing('openenv')} ({error})") from None

    def make(settings: SimulatorConfig, **options: Any) -> OpenEnvServer:
        return OpenEnvServer(settings, found.scenarios, briefing=briefing, max_turns=max_turns, **options)

    serve_forever(chosen, host, port, make)


_CONFIG = typer.Option(help="Simulator configuration (configs/simulator); default: the scripted user.")
_URLS = typer.Option(help="URL of a running simulator server; repeat for replicas.")


def noise(
    run: Annotated[Path, typer.Argument(help="Run folder; its recorded dialogues are replayed.")],
    config: Annotated[Path | None, _CONFIG] = None,
    url: Annotated[list[str] | None, _URLS] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="Dialogues per scene.")] = 5,
    replays: Annotated[int, typer.Option(min=2, help="Simulator calls per turn.")] = 8,
) -> None:
    """Replay a run's turns and measure how much the simulator's judgement varies."""
    import asyncio

    from ctcgrpo.environments.eibench.scenarios import load_set
    from ctcgrpo.report.noise import measure, noise_table, recorded_turns
    from ctcgrpo.run.recipe_file import resolved_recipe
    from ctcgrpo.simulator.choice import chosen_simulator, read_health

    folder = require_run(run)
    recipe = resolved_recipe(folder.recipe_file)
    section = recipe.eibench_scenarios("ctcgrpo noise")
    sets = [load_set(section.train, "train", section.invalid)]
    if recipe.validation is not None:
        sets.append(load_set(recipe.validation_source(), "test", section.invalid))
    for line in [line for found in sets for line in found.report()]:
        log_line(line, sys.stderr)
    scenarios = [scenario for found in sets for scenario in found.scenarios]
    files = sorted(folder.traces.glob("*.jsonl"))
    rounds = recipe.rollout.max_turns
    turns = recorded_turns(
        files, scenarios, dialogues=dialogues, max_rounds=rounds, warn=lambda text: log_line(f"warning: {text}", sys.stderr)
    )
    console = Terminal(120)
    with chosen_simulator(config, url or [], console) as simulator:
        says = asyncio.run(read_health(simulator))
        measured = asyncio.run(measure(turns, simulator, replays=replays))
    console.print(noise_table(measured, f"noise of the simulator on turns of {run}"))
    console.print(f"simulator: {says}", markup=False, highlight=False, soft_wrap=True)


def show(
    run: Annotated[Path, typer.Argument(help="Run folder, for example checkpoints/quickstart.")],
    scenario: Annotated[str | None, typer.Option(help="Held-out scenario to show; default: a typical one.")] = None,
) -> None:
    """Print a finished run: held-out scores and one scenario before and after training."""
    from ctcgrpo.report.show import show_run

    show_run(run, Terminal(120), scenario=scenario)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    which: Annotated[str, typer.Option(help="final, best, or a checkpoint's number.")] = "final",
    out: Annotated[Path | None, typer.Option(help="Output folder; default: RUN/export.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Data type of the weights.")] = "bfloat16",
    push: Annotated[str | None, typer.Option(help="Also upload to this (private) Hub repository.")] = None,
) -> None:
    """Export a trained policy as one model folder with a model card."""
    require_run(run)
    announce_loading(f"exporting {which} of {run}")
    from transformers.utils import logging as transformers_logging

    from ctcgrpo.run import export as exporting

    transformers_logging.disable_progress_bar()
    written = exporting.export(run, out or run / "export", which=which, dtype=dtype, log_line=log_line)
    log_line(f"exported to {written}")
    if push is not None:
        log_line(f"uploaded to {exporting.push(written, push)}")


def version() -> None:
    """Print the version."""
    print(__version__)


def train_here(recipe: Recipe) -> None:
    """Run a recipe in this process, without other libraries' progress bars and irrelevant warnings."""
    _before_loading(recipe)
    from transformers.utils import logging as transformers_logging

    from ctcgrpo.run.train import train

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    train(recipe)


def _before_loading(recipe: Recipe) -> None:
    """Before PyTorch is loaded: refuse a broken scenario, a missing environment or a missing model; log the loading."""
    if recipe.environment is None:
        section = recipe.eibench_scenarios()
        load_scenes(section.train, section.scenes, section.invalid)
    else:
        load_object(recipe.environment.factory, "environment.factory", recipe.environment.folder)
    check_model(recipe.policy.model, "policy.model")
    announce_loading(f"training {recipe.run.name}")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


_PANELS: Mapping[str, Sequence[Callable[..., None]]] = {
    "Train and look at a run": (train, show, chatting.chat, reporting.report),
    "Check, evaluate, export": (check, evaluation.compare, evaluation.leaderboard, export),
    "Many runs": (experiments.sweep, auditing.audit),
    "Scenarios and the simulated user": (serve, noise),
    "Reference": (reference.fields, reference.metrics, version),
}
"""Commands in the groups and order of `ctcgrpo --help`."""
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(evaluation.app, name="evaluate", rich_help_panel="Check, evaluate, export")
app.add_typer(scenarios.app, name="scenarios", rich_help_panel="Scenarios and the simulated user")


def _guarded(run: Callable[[], object]) -> None:
    settle_environment()
    try:
        run()
    except KeyboardInterrupt:
        print("stopped immediately; steps after the last checkpoint are lost", file=sys.stderr)
        sys.exit(RunInterrupted.exit_code)
    except CtcGrpoError as error:
        what = "stopped" if isinstance(error, RunPaused) else "error"
        rank = os.environ.get("RANK", "0")
        message = cut(str(error), _LONGEST_MESSAGE)
        log_line(f"{what}: {message}" if rank == "0" else f"[process {rank}] {what}: {message}", sys.stderr)
        sys.exit(error.exit_code)
