"""The data that checks share: the recipe, what was loaded so far, and the findings."""

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
from ctcgrpo.run.users import Player
from ctcgrpo.types import Environment, Message, Task

Level = Literal["ok", "warning", "failed"]

REPLY_TOKENS, REASONED_TOKENS, LINE_TOKENS = 150, 500, 60
"""Assumed average tokens: a policy reply, one with reasoning, a user line. Printed with every estimate that uses them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A result of a check: its level, a text with the problem and the fix, and its subject (default: the check's name)."""

    level: Level
    text: str
    about: str = ""


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
failed = partial(Finding, "failed")
NO_VALIDATION = warning("none: the run will not measure improvement; add the section validation")


@dataclass
class Subject:
    """The recipe, and what checks have loaded of it so far. `factory` to `observations` are for a custom environment."""

    recipe: Recipe
    folder: Path  # for temporary files; removed after the check
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    accelerate_config: Path = Path(default_config_file)
    scenarios: list[Scenario] = field(default_factory=list)
    held_out: list[Scenario] = field(default_factory=list)
    factory: Callable[[], Environment] | None = None
    tasks: Sequence[Task] = ()
    held_out_tasks: Sequence[Task] = ()
    openings: dict[str, Sequence[Message]] = field(default_factory=dict)  # the first messages of some tasks, by id
    observations: list[Sequence[Message]] = field(
        default_factory=list
    )  # after each of the policy's replies, in the episode played
    shape: Shape | None = None
    config: Any = None  # the model's configuration, where it could be loaded
    tokenizer: PreTrainedTokenizerBase | None = None
    contexts: ContextBuilder | None = None
    players: Sequence[Player] = ()  # the users of training, and the other user of validations
    memory: MemoryPlan | None = None
    gpus: int = 0  # of this machine

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights; there must be a configuration."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        return model

    @property
    def examples(self) -> list[Scenario]:
        """The run's scenarios, or the bundled ones where those are not loaded."""
        return self.scenarios or load_scenarios("english/train")

    def about(self, check: str, player: Player) -> str:
        """The subject of a finding on one of the run's users."""
        return check if len(self.players) == 1 else f"{check}, {player.name}"

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
