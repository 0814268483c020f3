"""EIBench as an environment of verifiers 0.4, for its commands (`vf-eval ctcgrpo-eibench`) and for trainers that use it (prime-rl).

`ScenarioTaskset` makes a task of each scenario, `EIBenchEnv` plays `EIBench` against the agent, whose calls `ChatHarness` makes.
verifiers finds all three by the module `ctcgrpo_eibench`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import fields
from itertools import accumulate
from typing import Any

import verifiers.v1 as vf
from pydantic import Field, field_serializer, field_validator

from ctcgrpo.environments.eibench import EIBench, opening_messages, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import load_set
from ctcgrpo.environments.eibench.scoring import Variant
from ctcgrpo.errors import CtcGrpoError, EnvironmentFailed
from ctcgrpo.options import RolloutOptions
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS, load_instructions
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.simulator.choice import SCRIPTED, named_simulator, read_health

_log = logging.getLogger(__name__)
VARIANTS: dict[Split, Variant] = {"train": "training", "test": "evaluation"}


class ScenarioData(vf.TaskData):  # type: ignore[misc]
    scenario: Scenario
    variant: Variant

    @field_serializer("scenario")
    def _plain(self, scenario: Scenario) -> dict[str, Any]:
        found = {field.name: getattr(scenario, field.name) for field in fields(scenario)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


class ScenarioTask(vf.Task[ScenarioData]):  # type: ignore[misc]
    @vf.reward  # type: ignore[untyped-decorator]
    async def outcome(self, trace: vf.Trace) -> float:
        return float(trace.info["outcome"])

    @vf.metric  # type: ignore[untyped-decorator]
    async def final_state(self, trace: vf.Trace) -> dict[str, float]:
        return {f"final_{axis}": value for axis, value in trace.info["states"][-1].items()}


class ScenariosConfig(vf.TasksetConfig):  # type: ignore[misc]
    scenarios: str = "english"
    """A bundled pack, a dataset under $CTCGRPO_DATA (eibench), a file, a folder, or a data set on the Hub."""
    split: Split = "train"
    """The folder of the source where it has both. The outcome is scored as in training (train) or in evaluations (test)."""
    instructions: str = DEFAULT_INSTRUCTIONS
    """How to reply, after the policy's role: eibench, short, none, a template, or a folder of LANGUAGE.j2."""
    reasons: bool = False
    """Whether these are for a model that reasons between <think> and </think>."""


class ScenarioTaskset(vf.Taskset[ScenarioTask, ScenariosConfig]):  # type: ignore[misc]
    def load(self) -> Iterator[ScenarioTask]:
        config = self.config
        briefing = Briefing(None, load_instructions(config.instructions), config.reasons)
        found = load_set(config.scenarios, config.split)
        for line in found.report():
            _log.warning("%s", line)
        for scenario in found.scenarios:
            system, *opening = opening_messages(scenario, briefing)
            data = ScenarioData(
                id=scenario.id,
                name=scenario.title,
                system_prompt=system["content"],
                prompt=[vf.UserMessage(content=line["content"]) for line in opening],  # empty where the policy opens
                scenario=scenario,
                variant=VARIANTS[config.split],
            )
            yield ScenarioTask(data, config.task)


class EIBenchConfig(vf.EnvConfig):  # type: ignore[misc]
    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    simulator: str = SCRIPTED
    """The user: scripted, a configuration's file, or the URL of a server."""
    max_turns: int = Field(RolloutOptions.max_turns, ge=1)
    """Limit on the policy's replies; the user knows it."""
    seed: int | None = Field(None, ge=0)
    """The user's seed in every rollout; absent: a random one each, recorded in `trace.info`."""

    @field_validator("simulator")
    @classmethod
    def _is_a_simulator(cls, name: str) -> str:
        try:
            named_simulator(name)
        except CtcGrpoError as error:
            raise ValueError(str(error)) from None
        return name


class EIBenchEnv(vf.Env[EIBenchConfig]):  # type: ignore[misc]
    async def start(self) -> None:
        """Start the simulator, or connect to it: one for all rollouts."""
        self._stack = AsyncExitStack()
        choice = named_simulator(self.config.simulator)
        urls = self._stack.enter_context(choice.served())
        await read_health(choice.client(urls))  # at once, where no server answers
        self._user = await self._stack.enter_async_context(choice.client(urls))

    async def stop(self) -> None:
        await self._stack.aclose()

    async def run(self, task: ScenarioTask, agents: vf.Agents) -> None:
        """One dialogue. An error of the simulator is raised, which makes an errored rollout without a reward."""
        environment = EIBench(self._user, max_turns=self.config.max_turns, variant=task.data.variant)
        async with agents.agent.interaction(task) as dialogue:
            seed = secrets.randbits(32) if self.config.seed is None else self.config.seed
            environment.name = f"{task.data.id}/{dialogue.trace.id}"
            await environment.reset(task_of(task.data.scenario).data, seed=seed)
            states, rewards = [environment.state._asdict()], []
            turn = await dialogue.turn()
            while not turn.terminated:
                step = await environment.step(parse_completion(turn.last_reply, "stop").reply)
                states.append(environment.state._asdict())
                rewards.append(step.reward or 0.0)
                if step.done:
                    break
                turn = await dialogue.turn(step.message)
            trace: Any = dialogue.trace
            if trace.errors:  # of the model call: the rollout has failed with it
                return
            if not rewards or len(rewards) != trace.num_turns:
                calls = f"{trace.num_turns} model calls for {len(rewards)} turns (stopped by {trace.stop_condition})"
                raise EnvironmentFailed(f"{calls}; expected one call a turn, and at least one")
            # prime-rl's turn credit takes the differences of `turn_rewards`, as scores of the state after each turn.
            trace.info |= {"seed": seed, "states": states, "rewards": rewards, "turn_rewards": list(accumulate(rewards))}
            trace.info["outcome"] = environment.outcome()
