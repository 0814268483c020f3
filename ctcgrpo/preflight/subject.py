"""What the checks share: the recipe, what was loaded of it so far, and what they find."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.commands.config.config_args import default_config_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.model.shapes import Shape
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.preflight.memory import MemoryPlan
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.types import Environment, Message, Task

Level = Literal["ok", "warning", "failed"]

REPLY_TOKENS, REASONED_TOKENS, LINE_TOKENS = 150, 500, 60
"""What a reply of the policy, the same with its reasoning, and a line of the user are assumed to have on average; named beside
every figure that rests on it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check says: how bad it is, what is so or would have to change, and of what (the check's name where empty)."""

    level: Level
    text: str
    about: str = ""


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
failed = partial(Finding, "failed")
NO_VALIDATION = warning("none: the run will not say whether it got better (section validation)")


@dataclass
class Subject:
    """The recipe, and what checks have loaded of it so far. `factory` to `heard` are of an environment of one's own."""

    recipe: Recipe
    folder: Path  # for what is built in passing; gone after the check
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    accelerate_config: Path = Path(default_config_file)
    scenarios: list[Scenario] = field(default_factory=list)
    held_out: list[Scenario] = field(default_factory=list)
    factory: Callable[[], Environment] | None = None
    tasks: Sequence[Task] = ()
    held_out_tasks: Sequence[Task] = ()
    openings: dict[str, Sequence[Message]] = field(default_factory=dict)  # the first messages of some tasks, by id
    heard: list[Sequence[Message]] = field(default_factory=list)  # after each of the policy's replies, in the episode played
    shape: Shape | None = None
    config: Any = None  # the model's own configuration, where it is at hand
    tokenizer: PreTrainedTokenizerBase | None = None
    contexts: ContextBuilder | None = None
    simulator: SimulatorConfig | None = None
    memory: MemoryPlan | None = None

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights; there must be a configuration."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        return model

    @property
    def examples(self) -> list[Scenario]:
        """The run's own scenarios, or the bundled ones while those are not here."""
        return self.scenarios or load_scenarios("english/train")

    @property
    def longest(self) -> int:
        return self.recipe.rollout.max_prompt_tokens + self.recipe.rollout.max_new_tokens


Check = Callable[[Subject], Iterator[Finding]]


def sample(scenarios: Sequence[Scenario], of_each: int) -> list[Scenario]:
    """At most so many of each scene, evenly over the list."""
    chosen = []
    for scene in sorted({x.scene for x in scenarios}):
        of_scene = [x for x in scenarios if x.scene == scene]
        chosen += of_scene[:: max(1, len(of_scene) // of_each)][:of_each]
    return chosen
