"""The contract of an environment: what the runner does with one, whatever it does."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ctcgrpo.centering import make_centering
from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.errors import BudgetSpent
from ctcgrpo.policy.persona import Briefing
from ctcgrpo.records import Scenario
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.scenarios import load_scenarios
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.scripted import ScriptedBackend
from ctcgrpo.simulator.service import answer
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.samples import CreditOptions, step_credit, summarise
from ctcgrpo.types import Environment, Episode, Message, Step, Task
from tests.unit.test_rollout import Parts


class Echo(Environment):
    """Counts down, and pays a tenth a turn. `broken` says what goes wrong, and where."""

    made: list[Echo] = []

    def __init__(self, broken: str = "") -> None:
        self.broken, self.closed, self.left = broken, 0, 2
        Echo.made.append(self)

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Sequence[Message]:
        if self.broken == "reset":
            raise KeyError("no such task")
        self.info = {"left": self.left, "who": "nobody"}
        messages: list[Message] = [{"role": "system", "content": task["role"]}, {"role": "user", "content": "Begin."}]
        return messages[::-1] if self.broken == "order" else messages

    async def step(self, reply: str) -> Step:
        if self.broken == "step":
            raise ValueError("out of words")
        if self.broken == "budget":
            raise BudgetSpent("no money left")
        self.left -= 1
        reward = math.nan if self.broken == "reward" else 0.1
        return Step("Go on.", reward, done=not self.left, info={"left": self.left, "who": "nobody"})

    def outcome(self) -> float:
        return math.inf if self.broken == "outcome" else super().outcome()

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return Parts(tiny)


def play(parts: Parts, *broken: str, deterministic: bool = False, max_turns: int = 3) -> list[Episode]:
    Echo.made.clear()
    runner = parts.runner(
        "http://127.0.0.1:1", sampling=Sampling(max_new_tokens=3), deterministic=deterministic, max_turns=max_turns
    )
    kinds = iter(broken)
    runner.environment, runner.shared = (lambda: Echo(next(kinds))), contextlib.AsyncExitStack()
    slots = [Slot(Task(f"t{k}", {"role": "Count."}, "even" if k % 2 == 0 else "odd"), 1, k, 0) for k in range(len(broken))]
    return asyncio.run(runner.run(slots))


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_episode_of_any_environment_is_recorded_and_becomes_metrics(parts: Parts, deterministic: bool) -> None:
    episodes = play(parts, "", "", deterministic=deterministic)
    for episode, tag in zip(episodes, ("even", "odd"), strict=True):
        assert (episode.task, episode.tag, episode.opening, episode.failure) == (f"t{tag == 'odd':d}", tag, "Begin.", None)
        assert [t.reward for t in episode.turns] == [0.1, 0.1] and episode.outcome == pytest.approx(0.2)  # their sum
        assert [t.done for t in episode.turns] == [False, True] and episode.final_info == {"left": 0, "who": "nobody"}
        text = parts.tokenizer.decode(episode.turns[1].prompt_ids)
        assert "Count." in text and "Begin." in text and "Go on." in text
    assert [e.closed for e in Echo.made] == [1, 1] and Echo.made[0].name == "1/t0/0"
    summaries = [summarise(e, CreditOptions()) for e in episodes]
    metrics = rollout_metrics(summaries, step_credit(summaries, CreditOptions(), make_centering("rollout")))
    assert metrics["outcome/even"] == pytest.approx(0.2) and metrics["final_left/odd"] == 0
    assert not [name for name in metrics if "who" in name or "anger" in name]


def test_an_episode_has_no_more_turns_than_it_may(parts: Parts) -> None:
    (episode,) = play(parts, "", max_turns=1)
    assert [t.done for t in episode.turns] == [True] and episode.outcome == pytest.approx(0.1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_goes_wrong_in_an_environment_is_a_failed_episode_and_never_a_reward(parts: Parts, deterministic: bool) -> None:
    expected = {
        "reset": "turn 1: reset raised KeyError: 'no such task'",
        "order": "turn 1: an episode begins with messages of user, system; expected system, or system and user",
        "step": "turn 1: step raised ValueError: out of words",
        "reward": "turn 1: step gave a reward of nan; expected a finite number",
        "outcome": "turn 3: outcome gave inf; expected a finite number",
        "": None,
    }
    episodes = play(parts, *expected, deterministic=deterministic)
    for episode, (broken, message) in zip(episodes, expected.items(), strict=True):
        assert math.isnan(episode.outcome) == bool(broken)
        assert (episode.failure.message if episode.failure else None) == message
        kind = "policy_engine" if broken == "order" else "environment"
        assert episode.failure is None or episode.failure.kind == kind
    assert [e.closed for e in Echo.made] == [1] * len(expected)


def test_what_stops_a_run_stops_it_and_everything_is_closed(parts: Parts) -> None:
    with pytest.raises(BudgetSpent, match="no money left"):
        play(parts, "", "budget")
    assert [e.closed for e in Echo.made] == [1, 1]


class InProcess:
    async def turn(self, request: TurnRequest) -> TurnReply:
        return await answer(ScriptedBackend(), request)


def test_eibench_weighs_its_axes_by_scene() -> None:
    scenario: Scenario = next(s for s in load_scenarios("english/test", "test") if s.scene == "support")

    async def first(weights: dict[Any, tuple[float, float]]) -> tuple[float, dict[str, Any]]:
        environment = EIBench(InProcess(), briefing=Briefing(), max_turns=4, turn_weights=weights)
        await environment.reset(task_of(scenario).data, seed=1)
        step = await environment.step("You gave everything for that stall, and it is gone.")
        return step.reward, {k: step.info[k] - environment.info[k] for k in ("anger", "trust")}  # type: ignore[operator]

    even, moved = asyncio.run(first({}))
    assert even == pytest.approx((moved["trust"] - moved["anger"]) / 200) and even != 0
    assert asyncio.run(first({"support": (1.0, 0.0)}))[0] == pytest.approx(-moved["anger"] / 100)
    assert asyncio.run(first({"charm": (1.0, 0.0)}))[0] == even


def test_the_tokenizer_sees_the_system_message_of_any_environment(tiny: Path, parts: Parts) -> None:
    """A role that spells control tokens out is words."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    Echo.made.clear()
    dialogue = parts.runner("http://127.0.0.1:1").contexts.start(
        [{"role": "system", "content": "<think>"}, {"role": "user", "content": "Hi."}]
    )
    ids, _ = parts.runner("http://127.0.0.1:1").contexts.prompt(dialogue)
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids
