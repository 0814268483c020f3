"""SAGE as something to train in: the protocol by hand, a step against an endpoint, failures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer
from ctcgrpo.environments.sage import Sage, SageEpisodes
from ctcgrpo.environments.sage_protocol import USER_TURNS, Unreadable
from ctcgrpo.errors import RecipeError, ScenarioError, SimulatorReplyError
from tests.conftest import Command
from tests.fake_llm import FakeLlm, answered

PROFILE = {
    "id": "a",
    "player": "小林，二十八岁",
    "scene": "项目被取消了",
    "main_cha": "被动型",
    "task": "希望被倾听",
    "first_talk": "好累。",
}


@dataclass
class Table:
    """Plans with these changes, one after the other; None is a plan that cannot be read."""

    changes: list[int | None]
    line: str = "嗯。"
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next: Iterator[int | None] = itertools.cycle(self.changes)

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        assert dialogue == "a"
        self.prompts.append(prompt)
        self.seeds.append(seed)
        if "TargetCompletion" not in prompt:
            return f"Thinking: 平和\nOrigin: x\nChange: y\nResponse: {self.line}"
        change = next(self._next)
        if change is None:
            raise Unreadable("cut off")
        return f"Content: x\nTargetCompletion: x\nActivity: x\nAnalyse: 觉得被理解了\nChange: {change:+d}"


async def play(user: Table) -> tuple[Sage, list[Any]]:
    environment = Sage(user)
    opening = await environment.reset(PROFILE, seed=7)
    assert [message["role"] for message in opening] == ["system", "user"] and opening[1]["content"] == "好累。"
    steps = []
    while not (steps and steps[-1].done):
        steps.append(await environment.step(f"回复{len(steps) + 1}"))
    return environment, steps


async def test_rewards_are_changes_and_the_outcome_is_what_is_left() -> None:
    user = Table([5, -10, 30])  # 30 counts as 10
    environment, steps = await play(user)
    assert len(steps) == USER_TURNS and [step.done for step in steps] == [False] * 9 + [True]
    assert [step.reward for step in steps] == [0.05, -0.1, 0.1] * 3 + [None]
    assert [step.info["emotion"] for step in steps[:4]] == [45, 35, 45, 50] and steps[0].info["why"] == "觉得被理解了"
    assert environment.outcome() == pytest.approx(0.4 + sum(step.reward or 0 for step in steps)) == pytest.approx(0.55)
    assert steps[-1].message is None and len(user.prompts) == 18 and len(set(user.seeds)) == 18
    assert user.prompts[2].count("对方：回复") == 2 and "人物：好累。\n对方：回复1\n人物：嗯。\n对方：回复2" in user.prompts[2]
    assert "45（0 到 100" in user.prompts[2] and "情绪等级：B" in user.prompts[1]


@pytest.mark.parametrize(
    ("user", "turns", "outcome"),
    [(Table([10]), 6, 1.0), (Table([-10]), 4, 0.0), (Table([3], line="那先这样，再见。"), 1, 0.43)],
)
async def test_it_ends_at_the_top_at_the_bottom_or_with_a_goodbye(user: Table, turns: int, outcome: float) -> None:
    environment, steps = await play(user)
    assert len(steps) == turns and environment.outcome() == pytest.approx(outcome)


async def test_answers_that_cannot_be_read_are_asked_for_again() -> None:
    _, steps = await play(Table([None, None, 10]))
    assert [step.reward for step in steps] == [0.1] * 6
    with pytest.raises(SimulatorReplyError, match="no valid answer in 3 tries; last problem: cut off"):
        await play(Table([None]))
    with pytest.raises(ScenarioError, match="task 'a': task is missing or not a text"):
        await Sage(Table([1])).reset(PROFILE | {"task": ""}, seed=1)


class SageLlm(FakeLlm):
    """An endpoint that plays SAGE's user, in labelled text."""

    def completion(self, body: dict[str, Any], fault: str = "") -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        if fault == "malformed":
            return answered(body, "抱歉，我不能扮演。")
        if "TargetCompletion" not in asked:
            return answered(body, "Thinking: x\nOrigin: x\nChange: x\nResponse: 嗯，继续说。")
        change = self._rng.randint(-6, 10)
        return answered(body, f"Content: x\nTargetCompletion: x\nActivity: x\nAnalyse: 有所触动\nChange: {change:+d}")


def simulator(folder: Path, llm: FakeLlm) -> Path:
    file = folder / "simulator.yaml"
    endpoint = {"url": llm.url, "model": "fake", "price": {"prompt": 1.0, "completion": 5.0}}
    settings = {"backend": "llm", "store": str(folder / "store"), "llm": {"deadline": 20.0, "endpoints": [endpoint]}}
    file.write_text(yaml.safe_dump(settings))
    return file


def traced(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "traces" / f"{name}.rank-0.jsonl").read_text().splitlines()]


def test_a_recipe_trains_on_it(ctcgrpo: Command, tmp_path: Path) -> None:
    with SageLlm(rates={"malformed": 0.1, "500": 0.1}).serving() as llm:
        tasks = tmp_path / "profiles.jsonl"
        tasks.write_text("".join(json.dumps(PROFILE | {"id": name}) + "\n" for name in "ab"))
        recipe = {
            "run": {"name": "sage", "output_dir": str(tmp_path)},
            "policy": {"model": "builtin/tiny"},
            "environment": {
                "factory": "ctcgrpo.environments.sage:SageEpisodes",
                "options": {"simulator": str(simulator(tmp_path, llm))},
                "tasks": str(tasks),
                "per_step": 2,
            },
            "rollout": {"group_size": 2, "max_turns": 10, "max_new_tokens": 4, "max_prompt_tokens": 2000},
            "training": {"max_steps": 1, "learning_rate": 1e-3},
            "validation": {"tasks": str(tasks), "every": 1},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        code, _, err = ctcgrpo("train", str(file))
    assert code == 0, err
    episodes = sorted(traced(tmp_path / "sage", "step-000001"), key=lambda episode: str(episode["task"]))
    assert [(e["task"], e["failure"]) for e in episodes] == [("a", None), ("a", None), ("b", None), ("b", None)]
    for episode in episodes:
        rewards = [turn["reward"] for turn in episode["turns"]]
        assert episode["outcome"] == pytest.approx(0.4 + sum(reward or 0 for reward in rewards))
        assert all(turn["credit"] is not None for turn in episode["turns"])
        assert len(rewards) > 3 and (rewards[-1] is None) == (len(rewards) == USER_TURNS)
    assert len({e["outcome"] for e in episodes}) > 1 and llm.faults["500"] and llm.faults["malformed"]
    assert all("response_format" not in body for body in llm.requests)  # EIBench's endpoints answer in JSON
    (metrics,) = [json.loads(line) for line in (tmp_path / "sage" / "metrics.jsonl").read_text().splitlines()]
    assert metrics["grad_norm"] > 0 and metrics["final_emotion/all"] == pytest.approx(100 * metrics["outcome/all"])


def test_a_trainer_in_python_and_an_endpoint_that_is_down(tmp_path: Path) -> None:
    args = CTCGRPOConfig(
        str(tmp_path / "run"),
        num_generations=2,
        per_device_train_batch_size=2,
        max_turns=2,
        max_completion_length=4,
        max_steps=1,
        max_failed=1.0,
        bf16=False,
        save_strategy="no",
    )
    with SageLlm().serving() as llm:
        environment = SageEpisodes(str(simulator(tmp_path, llm)))
        trainer = CTCGRPOTrainer("builtin/tiny", args, environment, [PROFILE], [PROFILE])
        trainer.train()
        assert trainer.evaluate()["eval_episodes/valid"] == 1  # in another event loop
        llm.rates = {"malformed": 1.0}
        failed = trainer.evaluate()
    assert failed["eval_failed/simulator_reply"] == 1 and failed["eval_episodes/valid"] == 0
    (episode,) = traced(tmp_path / "run", "eval-000001")
    assert "fake: no valid answer in 3 tries; last problem: no signed number" in episode["failure"]["message"]


def test_a_scripted_user_cannot_play_it(tmp_path: Path) -> None:
    file = tmp_path / "scripted.yaml"
    file.write_text("backend: scripted\n")
    with pytest.raises(RecipeError, match="backend = 'scripted'; expected 'llm', whose endpoints play SAGE's user"):
        SageEpisodes(str(file))
