"""EIBench's task as an environment: a simulated user, whose anger and trust change with each reply of the policy.

The reward of a turn is the turn score of its change of state; the outcome is the score of the final state.
Source: EIBench (arXiv 2606.15532)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ctcgrpo.environments.eibench.persona import Briefing, together
from ctcgrpo.environments.eibench.records import Scenario, UserState
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.environments.eibench.scoring import Variant, outcome_score, turn_score
from ctcgrpo.options import RolloutOptions
from ctcgrpo.rollout.engine import request_seed
from ctcgrpo.simulator.protocol import ScenarioCard, TurnReply, TurnRequest, Utterance, turn_request
from ctcgrpo.simulator.scripted import ScriptedBackend
from ctcgrpo.simulator.service import InProcess
from ctcgrpo.types import Environment, Message, Step, Task

_PERSONA = Briefing()  # the whole role, and no instructions


class User(Protocol):
    """Whoever plays the user: the client of a simulator server, or a simulator in this process."""

    async def turn(self, request: TurnRequest) -> TurnReply: ...


class SharedUser(User, Protocol):
    """A user that many episodes share, over a connection that is open within `async with`."""

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *error: Any) -> Any: ...


class EIBench(Environment):
    """One dialogue with `user`, the scripted one where absent. A task's `scenario` is a Scenario (`scenario_tasks`).

    `briefing`: the policy's prompt of its role; `max_turns`: limit on its replies, which the user knows; `turn_weights`: of
    anger and trust in a turn's reward, by scene. After a step `state` and `answer` are the user's."""

    def __init__(
        self,
        user: User | None = None,
        *,
        briefing: Briefing = _PERSONA,
        max_turns: int = RolloutOptions.max_turns,
        variant: Variant = "training",
        turn_weights: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self._user: User = InProcess(ScriptedBackend()) if user is None else user
        self._briefing = briefing
        self._max_turns = max_turns
        self._variant: Variant = variant
        self._turn_weights = turn_weights or {}

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Sequence[Message]:
        self._scenario: Scenario = task["scenario"]
        self._seed = seed
        self._card = ScenarioCard.of(self._scenario)
        self.state = self._scenario.anchors.initial
        opening = self._scenario.opening_line
        self._history = (Utterance(speaker="user", text=opening),) if opening else ()
        self.info = self.state._asdict()
        return opening_messages(self._scenario, self._briefing)

    async def step(self, reply: str) -> Step:
        """Raises the simulator's errors where it has no answer."""
        self._history = (*self._history, Utterance(speaker="policy", text=reply))
        round = sum(utterance.speaker == "policy" for utterance in self._history)
        request = turn_request(
            self._card,
            self._history,
            self.state,
            request_id=f"{self.name}/{self._seed:x}/{round}",
            max_rounds=self._max_turns,
            seed=request_seed(self._seed, round),
        )
        self.answer = answer = await self._user.turn(request)
        before, self.state = self.state, UserState(answer.state.anger, answer.state.trust)
        self._history = (*self._history, Utterance(speaker="user", text=answer.reply, reflection=answer.reflection))
        return Step(
            message=answer.reply,
            reward=turn_score(before, self.state, self._turn_weights.get(self._scenario.scene, (0.5, 0.5))),
            done=not answer.goes_on,
            info={**self.state._asdict(), "why": answer.why},
        )

    def branch(self, *, seed: int) -> EIBench:
        made = copy.copy(self)  # whose attributes no method changes in place
        made._seed = seed
        return made

    def outcome(self) -> float:
        return outcome_score(self.state, self._scenario.anchors, self._variant)


class EIBenchEpisodes(contextlib.AbstractAsyncContextManager["EIBenchEpisodes"]):
    """Makes the environment of each episode; all ask one `user`, entered while a batch is played. `options`: of `EIBench`."""

    def __init__(self, user: SharedUser, **options: Any) -> None:
        self._user, self._options = user, options

    def __call__(self) -> EIBench:
        return EIBench(self._user, **self._options)

    async def __aenter__(self) -> EIBenchEpisodes:
        await self._user.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._user.__aexit__(*error)


def opening_messages(scenario: Scenario, briefing: Briefing) -> list[Message]:
    """The policy's first messages. Raises as `Briefing.parts`."""
    role, instructions = briefing.parts(scenario)
    system: Message = {"role": "system", "content": together(role, instructions), "instructions": instructions}
    line = scenario.opening_line.strip()
    return [system, {"role": "user", "content": line}] if line else [system]


def task_of(scenario: Scenario) -> Task:
    return Task(scenario.id, {"scenario": scenario}, scenario.scene)


def scenario_tasks(source: str, split: Split = "train") -> list[Task]:
    """The scenarios of a file, a folder or a pack (english/train) as tasks, with the scene as tag. Raises as `load_scenarios`."""
    return [task_of(scenario) for scenario in load_scenarios(source, split)]
