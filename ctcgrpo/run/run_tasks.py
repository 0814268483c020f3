"""The tasks of a recipe: training tasks, held-out tasks, and the environment of an episode.

`ScenarioTasks`: EIBench's scenarios with a simulated user (sections `scenarios` and `simulator`). `OwnTasks`: a custom
environment (section `environment`).
"""

import asyncio
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState

from ctcgrpo.environments.eibench import EIBenchEpisodes, opening_messages, task_of
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import load_scenes, load_set
from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.played import validation_settings
from ctcgrpo.run.data_digest import COMMITS, SKIPPED, scenarios_digest, tasks_digest
from ctcgrpo.run.recipe import OwnEnvironment, Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.settings import briefing
from ctcgrpo.simulator.choice import SCRIPTED, SimulatorChoice, check_timeout, read_health, simulator_of
from ctcgrpo.simulator.logs import json_log
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning
from ctcgrpo.training.tasks import tasks_of
from ctcgrpo.types import Environment, Message, Task
from ctcgrpo.util.files import file_digest
from ctcgrpo.util.hub_data import commit_of, hub_parts, is_hub
from ctcgrpo.util.importing import blame, is_reference, load_object, source_of
from ctcgrpo.util.processes import on_main
from ctcgrpo.util.record_files import FORMATS, read_record_file, record_files

Say = Callable[[str], None]


class ScenarioTasks:
    """EIBench: scenarios, and a simulator server, embedded or by URL."""

    noun = "scenarios"

    def __init__(self, recipe: Recipe) -> None:
        scenarios = recipe.eibench_scenarios()
        self._recipe = recipe
        self._sets = {"scenarios.train": load_scenes(scenarios.train, scenarios.scenes, scenarios.invalid)}
        if recipe.validation:
            self._sets["validation.scenarios"] = load_set(recipe.validation_source(), "test", scenarios.invalid)
        found = [found.scenarios for found in self._sets.values()]
        self._scenarios = [scenario for part in found for scenario in part]
        self._found = dict(zip(("training scenarios", "held-out scenarios"), found, strict=False))
        self.train, self.held_out = ([task_of(scenario) for scenario in part] for part in [*found, []][:2])
        self.warnings = [line for part in self._sets.values() for line in part.report()]

    def data(self) -> dict[str, dict[str, str]]:
        """Digests of the tasks, by the recipe field that names them."""
        data = {name: scenarios_digest(found.scenarios) for name, found in self._sets.items()}
        data |= commits({name: found.source for name, found in self._sets.items()})
        if faults := [fault for found in self._sets.values() for fault in found.faults]:
            data[SKIPPED] = {fault.place: str(fault) for fault in faults}
        return data

    def openings(self) -> Mapping[str, Sequence[Message]]:
        """The first messages of each task, by id, where they are known before an episode."""
        instructed = briefing(self._recipe)
        return {scenario.id: opening_messages(scenario, instructed) for scenario in self._scenarios}

    def start(self, stack: ExitStack, state: PartialState, folder: RunFolder, say: Say) -> Callable[[], Environment]:
        """The factory of an episode's environment, on every process. `stack` closes what this starts."""
        settings, scoring = self._recipe.simulator, self._recipe.scoring
        choice = simulator_of(settings)
        options: dict[str, Any] = {"timeout": settings.timeout, "patience": settings.patience, "say": say}
        self._client = choice.client(self._urls(choice, stack, state, folder), settings.token_env, **options)
        self._about = asyncio.run(read_health(self._client))
        check_timeout(self._about, settings.timeout)
        if self._about.get("backend") == SCRIPTED:
            for what, scenarios in self._found.items():
                if warning := unscripted_warning(scenarios, what):
                    say(f"warning: {warning}")
        how = {"max_turns": self._recipe.rollout.max_turns, **scoring.model_dump(include={"variant", "turn_weights"})}
        return EIBenchEpisodes(self._client, briefing=briefing(self._recipe), **how)

    def user(self) -> dict[str, Any]:
        """The simulator's description of itself, after `start`; a resumed run requires the same. Empty without a simulator."""
        return {k: v for k, v in self._about.items() if k not in ("status", "version", "deadline")}

    def facts(self) -> dict[str, Any]:
        """Fields of summary.json on the environment, at the end of the run."""
        return {
            "scoring_variant": self._recipe.scoring.variant,
            "settings": validation_settings(self._recipe),
            "skipped": {name: found.skipped for name, found in self._sets.items()},
            "simulator": {**self._about, "spent": asyncio.run(self._account())},
        }

    async def _account(self) -> dict[str, Any]:
        async with self._client:
            return await self._client.account()

    def _urls(self, choice: SimulatorChoice, stack: ExitStack, state: PartialState, folder: RunFolder) -> tuple[str, ...]:
        """The simulator's URLs for all processes; the main one runs the embedded server."""
        if choice.urls:
            return choice.urls
        if state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)):
            raise RecipeError(
                "simulator.url is 'embedded', which other nodes cannot reach; start `ctcgrpo serve CONFIG --host 0.0.0.0` with a "
                "token, and set simulator.url=http://HOST:8765; launch/slurm.sbatch does both"
            )

        def start() -> tuple[str, ...]:
            log = json_log(stack.enter_context(folder.simulator_log.open("a", encoding="utf-8")))
            return stack.enter_context(choice.served(self._scenarios, log=log, port=self._recipe.simulator.port))

        return tuple(on_main(state, start))


class OwnTasks:
    """Tasks from files or a data set, and an environment named as `module:attribute`; methods as those of ScenarioTasks."""

    noun = "tasks"
    warnings: Sequence[str] = ()

    def __init__(self, recipe: Recipe, settings: OwnEnvironment) -> None:
        self._settings = settings
        self._factory = environment_factory(settings)
        self.train = read_tasks(settings.tasks, "environment.tasks", settings.folder)
        held_out = recipe.validation_source() if recipe.validation else None
        self.held_out = [] if held_out is None else read_tasks(held_out, "validation.tasks", settings.folder, "test")
        self._sources = {"environment.tasks": settings.tasks, "validation.tasks": held_out or ""}
        refuse_uneven_tags(settings, self.train)

    def data(self) -> dict[str, dict[str, str]]:
        data = {"environment.tasks": tasks_digest(self.train)}
        if self.held_out:
            data["validation.tasks"] = tasks_digest(self.held_out)
        data |= commits(self._sources)
        if (source := source_of(self._settings.factory)) is not None:
            data["environment.factory"] = {source.name: file_digest(source)}
        return data

    def start(self, stack: ExitStack, state: PartialState, folder: RunFolder, say: Say) -> Callable[[], Environment]:
        return self._factory

    def openings(self) -> Mapping[str, Sequence[Message]]:
        return {}

    def user(self) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"environment": self._settings.factory}


def run_tasks(recipe: Recipe) -> ScenarioTasks | OwnTasks:
    """Raises RecipeError or ScenarioError for tasks that cannot be read."""
    return ScenarioTasks(recipe) if recipe.environment is None else OwnTasks(recipe, recipe.environment)


def environment_factory(settings: OwnEnvironment) -> Callable[[], Environment]:
    """The factory of an episode's environment: the recipe's with its options, or an instance of an asynchronous context manager
    class, shared by all episodes. Raises RecipeError where it cannot be imported."""
    factory = load_object(settings.factory, "environment.factory", settings.folder)
    if isinstance(factory, type) and issubclass(factory, AbstractAsyncContextManager):
        shared: Any = factory(**settings.options)
        return cast("Callable[[], Environment]", shared)
    return functools.partial(factory, **settings.options) if settings.options else factory


def refuse_uneven_tags(settings: OwnEnvironment, tasks: Sequence[Task]) -> None:
    """Raises RecipeError where a step cannot play the same number of tasks of each tag."""
    tags = sorted({task.tag for task in tasks})
    if settings.per_step % len(tags):
        raise RecipeError(
            f"environment.per_step = {settings.per_step}; expected a multiple of {len(tags)}, the number of tags in "
            f"environment.tasks = {settings.tasks!r} ({', '.join(tags[:5])}): a step plays the same number of each"
        )


def commits(sources: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The entry COMMITS of data.json, by the field that names a data set on the Hub; nothing where none does."""
    found = {field: commit_of(source, RecipeError) for field, source in sources.items() if is_hub(source)}
    return {COMMITS: found} if found else {}


def read_tasks(source: str, what: str, folder: Path | None = None, split: Split = "train") -> list[Task]:
    """The tasks of a file of records, of a folder of such files, or of a data set on the Hub; or those that `module:function`
    returns. `Environment.reset` gets the whole object; `id` names it (default: its position, from 0), `tag` stratifies. `split` is
    read of a folder or data set that has splits. Raises RecipeError, naming the field `what`, for a source that cannot be read or
    has no task, and for duplicate ids."""
    where = f"{what} = {source!r}"
    if is_hub(source):
        rows = [row for part in hub_parts(source, split, RecipeError) for _, row in part.read(None)]
    elif is_reference(source):
        give = load_object(source, what, folder)
        try:
            rows = give()
        except Exception as error:  # whatever a user's function does
            raise RecipeError(f"{what} = {source!r} raised {blame(error)}") from error
    else:
        rows = [row for file in _task_files(Path(source), where, split) for _, row in read_record_file(file, RecipeError)]
    try:
        return list(tasks_of(rows, where))
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error)) from None


def _task_files(path: Path, where: str, split: Split) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RecipeError(
            f"{where}: no such file; expected records in {FORMATS}, a folder, hf://datasets/NAME, or module:function"
        )
    folder = path / split if (path / split).is_dir() else path
    if not (files := record_files(folder)):
        raise RecipeError(f"{where}: no {FORMATS} files in {folder}")
    return files
