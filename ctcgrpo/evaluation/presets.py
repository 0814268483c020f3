"""Named settings of an evaluation of eibench. Explicit options win over a preset; the summary names what differs from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ctcgrpo.environments.eibench.scoring import Variant
from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.played import shown_name, shown_value
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS
from ctcgrpo.simulator.choice import named_simulator
from ctcgrpo.util.naming import did_you_mean

TRIES = 3
"""Tries of the user's LLM a turn, until its answer can be read, where nobody says otherwise."""


_BRIEFING = ["instructions", "reasons", "opener"]


@dataclass(frozen=True, slots=True)
class Preset:
    """`rounds`: replies of the model at most. `tries`: calls to the user's LLM a turn, until its answer can be read. `reasoning`:
    whether the model's earlier reasoning stays in its messages. A setting that is None is not sent. The official mode has words of
    its own for the `instructions` (worded for a model that `reasons`) and the `opener`, which asks for a first line."""

    name: str
    rounds: int
    variant: Variant
    reasoning: Literal["strip", "keep"]
    tries: int
    temperature: float
    top_p: float | None
    max_tokens: int
    instructions: str
    reasons: bool
    opener: str
    simulator_temperature: float
    simulator_top_p: float | None
    simulator_seed: int | None

    def task(self, simulator: str | None) -> dict[str, Any]:
        """Arguments of the task, for its argument `simulator`."""
        found: dict[str, Any] = {"rounds": self.rounds, "variant": self.variant, "reasoning": self.reasoning}
        return found | ({"tries": self.tries} if asks_an_llm(simulator) else {})

    @property
    def briefing(self) -> dict[str, Any]:
        """What the model is told, as arguments of the task."""
        return {name: getattr(self, name) for name in _BRIEFING}

    def generation(self, unset: Collection[str]) -> dict[str, Any]:
        """Sampling of the model, without the settings that are `unset` by name."""
        sent = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in sent.items() if value is not None and name not in unset}

    def simulator_generation(self, unset: Collection[str]) -> dict[str, Any]:
        """Sampling of a model that plays the user."""
        return {} if "simulator.temperature" in unset else {"temperature": self.simulator_temperature}

    @property
    def unset(self) -> list[str]:
        """Settings that are not sent, as `generation.names_of` reads them."""
        sent = {"top_p": self.top_p, "simulator.top_p": self.simulator_top_p, "simulator.seed": self.simulator_seed}
        return [name for name, value in sent.items() if value is None]

    def differences(self, played: Mapping[str, Any]) -> list[str]:
        """In what the settings that were played differ: "temperature 0.6 (published: 0.7)". `played`: by the names of this
        record; tries and the simulator's sampling only where an LLM plays the user."""
        names = ["rounds", "variant", "reasoning", "temperature", "top_p", "max_tokens"]
        names += [] if played.get("official") is not None else _BRIEFING
        names += ["tries", "simulator_temperature", "simulator_top_p"] if "tries" in played else []
        return [
            f"{shown_name(name)} {shown_value(name, played.get(name))} ({self.name}: {shown_value(name, getattr(self, name))})"
            for name in names
            if played.get(name) != getattr(self, name)
        ]


PUBLISHED = Preset(
    name="published",
    rounds=8,
    variant="evaluation",
    reasoning="strip",
    tries=3,
    temperature=0.7,
    top_p=None,
    max_tokens=8192,
    instructions=DEFAULT_INSTRUCTIONS,
    reasons=True,
    opener="You speak first.",
    simulator_temperature=0.7,
    simulator_top_p=None,
    simulator_seed=None,
)
"""Of the figures in EIBench's paper (arXiv 2606.15532), by its authors' evaluation code."""
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (PUBLISHED,)}


def preset_of(name: str) -> Preset:
    """Raises RecipeError for a preset that there is not."""
    if name not in PRESETS:
        raise RecipeError(f"--preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def with_preset(
    name: str,
    simulator: str | None,
    task: Mapping[str, Any],
    generation: Mapping[str, Any],
    roles: Mapping[str, dict[str, Any]],
    unset: Sequence[str],
    models: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Task, generation, generation of roles and what is not sent, with a preset's where no option says otherwise. `simulator` is
    the task's argument; `models` play the roles."""
    preset, user = preset_of(name), roles.get("simulator", {})
    words = {} if "official" in task else preset.briefing  # the official mode has its own
    chosen = {*generation, *(f"simulator.{setting}" for setting in user)}
    sampling = {"simulator": {**preset.simulator_generation(unset), **user}} if "simulator" in models else {}
    return (
        {**preset.task(simulator), **words, **task},
        {**preset.generation(unset), **generation},
        {**roles, **sampling},
        [*unset, *(setting for setting in preset.unset if setting not in chosen and setting not in unset)],
    )


def asks_an_llm(simulator: str | None) -> bool:
    """Whether calls to an LLM are made here, with settings of ours: for a model of Inspect's (None) and a configuration; the
    scripted user asks none, and a server has settings of its own. Raises RecipeError for a configuration that cannot be read."""
    return simulator is None or named_simulator(simulator).llm is not None
