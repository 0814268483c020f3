"""The tasks of a recipe: training tasks, held-out tasks, and the environment of an episode.

`ScenarioTasks`: EIBench's scenarios with simulated users (sections `scenarios` and `simulator`). `OwnTasks`: a custom
environment (section `environment`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState

from ctcgrpo.environments.eibench import opening_messages, task_of
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import load_scenes, load_set
from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.played import validation_settings
from ctcgrpo.run.data_digest import COMMITS, SKIPPED, scenarios_digest, tasks_digest
from ctcgrpo.run.recipe import OwnEnvironment, Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.settings import briefing
from ctcgrpo.run.users import episodes_with, opened, other_of, recorded, refuse_unplayed, trained_on
from ctcgrpo.simulator.choice import SCRIPTED
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning
from ctcgrpo.training.tasks import tasks_of
from ctcgrpo.types import Environment, Message, Task
from ctcgrpo.util.files import file_digest
from ctcgrpo.util.hub_data import commit_of, hub_parts, is_hub
from ctcgrpo.util.importing import blame, is_reference, load_object, source_of
from ctcgrpo.util.record_files import FORMATS, read_record_file, record_files
from ctcgrpo.util.terminal import LogLine


class ScenarioTasks:
    """EIBench: scenarios, and simulator servers, embedded or by URL."""

    noun = "scenarios"

    def __init__(self, recipe: Recipe) -> None:
        scenarios = recipe.eibench_scenarios()
        self._recipe = recipe
        self._sets = {"scenarios.train": load_scenes(scenarios.train, scenarios.scenes, scenarios.invalid)}
        if recipe.validation:
            self._sets["validation.scenarios"] = load_set(recipe.validation_source(), "test", scenarios.invalid)
        found = [found.scenarios for found in self._sets.values()]
        self._scenarios = [scenario for part in found for scenario in part]
        self._held_out = found[1] if len(found) > 1 else ()
        self._players, self._unlike = trained_on(recipe), other_of(recipe)
        refuse_unplayed(self._players, self._scenarios)
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

    def start(self, stack: ExitStack, state: PartialState, folder: RunFolder, log_line: LogLine) -> Callable[[], Environment]:
        """The factory of an episode's environment, on every process. `stack` closes what this starts."""
        place = (stack, state, folder, log_line)
        self._users = [opened(player, self._recipe, self._scenarios, *place) for player in self._players]
        self._other = None if self._unlike is None else opened(self._unlike, self._recipe, self._held_out, *place)
        for user in self._users:
            for what, scenarios in self._found.items():
                played = [scenario for scenario in scenarios if user.player.part.plays(scenario)]
                if user.about.get("backend") == SCRIPTED and (warning := unscripted_warning(played, what)):
                    log_line(f"warning: {warning}")
        return episodes_with(self._users, **self._how())

    def other(self) -> Callable[[], Environment] | None:
        """As `start`, after it, with the other user of validations; None without one."""
        return None if self._other is None else episodes_with([self._other], **self._how())

    def _how(self) -> dict[str, Any]:
        recipe = self._recipe
        how = {"briefing": briefing(recipe), "max_turns": recipe.rollout.max_turns}
        return {**how, **recipe.scoring.model_dump(include={"variant", "turn_weights"})}

    def user(self) -> dict[str, Any]:
        """Who plays the users, after `start`; a resumed run requires the same. Empty without a simulator."""
        return recorded(self._users, self._other, lambda user: user.identity)

    def facts(self) -> dict[str, Any]:
        """Fields of summary.json on the environment, at the end of the run."""
        return {
            "scoring_variant": self._recipe.scoring.variant,
            "settings": validation_settings(self._recipe),
            "skipped": {name: found.skipped for name, found in self._sets.items()},
            "simulator": recorded(self._users, self._other, lambda user: user.facts()),
        }


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

    def start(self, stack: ExitStack, state: PartialState, folder: RunFolder, log_line: LogLine) -> Callable[[], Environment]:
        return self._factory

    def openings(self) -> Mapping[str, Sequence[Message]]:
        return {}

    def user(self) -> dict[str, Any]:
        return {}

    def other(self) -> None:
        return None

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
