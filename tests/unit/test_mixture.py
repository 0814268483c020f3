"""Several users of training: who plays which group, by property; a real run with two; what is refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctcgrpo.environments.eibench.mixture import Part, drawn, mean_shares, shares
from ctcgrpo.errors import RecipeError
from ctcgrpo.rollout.runner import Slot, validation_slots
from ctcgrpo.rollout.session import Session
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.users import refuse_unplayed, trained_on
from ctcgrpo.simulator.choice import name_of, who_played
from ctcgrpo.types import Environment, Step
from tests.conftest import Command
from tests.fake_llm import FakeLlm
from tests.unit.test_check import look
from tests.unit.test_run import FAST, TINY
from tests.unit.test_training_parts import scenario
from tests.unit.test_validation import TASKS

SUPPORT, CHARM = scenario("support", "a"), scenario("charm", "b")
RELUCTANT = "{config: configs/simulator/reluctant.yaml}"
MIXED = f"simulator.users=[{{config: configs/simulator/scripted.yaml, weight: 3}}, {RELUCTANT}]"
names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)


@given(names, st.lists(st.floats(0.01, 100), min_size=5, max_size=5), st.integers(0, 2**31 - 1))
def test_a_user_is_drawn_from_those_that_play_the_scenario(names: list[str], weights: list[float], seed: int) -> None:
    parts = [Part(n, w, ["support"] if k % 2 else None) for k, (n, w) in enumerate(zip(names, weights, strict=False))]
    for asked in (SUPPORT, CHARM):
        found = shares(parts, asked)
        assert sum(found.values()) == pytest.approx(1)
        assert found.keys() == {part.name for part in parts if part.plays(asked)}
        assert drawn(parts, asked, seed) in found and drawn(parts, asked, seed) == drawn(parts, asked, seed)


def test_weights_are_shares_in_the_long_run() -> None:
    parts = [Part("often", 3), Part("seldom", 1), Part("elsewhere", 9, languages=["zh"])]
    counted = Counter(drawn(parts, SUPPORT, seed) for seed in range(4000))
    assert counted["often"] == pytest.approx(3000, abs=120) and counted["elsewhere"] == 0
    only = [*parts[:2], Part("charming", 4, scenes=["charm"])]
    assert mean_shares(only, [SUPPORT, CHARM]) == pytest.approx(
        {"often": (3 / 4 + 3 / 8) / 2, "seldom": (1 / 4 + 1 / 8) / 2, "charming": 1 / 4}
    )


def test_a_group_has_one_seed_and_a_validation_the_same_after_any_step() -> None:
    task = TASKS[0]
    same = {Slot(task, 3, 1, rollout).group_seeds for rollout in range(4)} | {Slot(task, 3, 1, 0, continues=(2, 1)).group_seeds}
    assert len(same) == 1 and Slot(task, 4, 1, 0).group_seeds not in same and Slot(task, 3, 2, 0).group_seeds not in same
    assert [s.group_seeds for s in validation_slots(TASKS, 2, 0)] == [s.group_seeds for s in validation_slots(TASKS, 2, 9)]


async def test_an_environment_and_its_branches_get_the_seed_of_the_group() -> None:
    class Counts(Environment):
        def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
            return str(self.group_seed)

        def step(self, reply: str) -> Step:
            return Step("", reward=0.0)

        def branch(self, *, seed: int) -> Environment:
            return copy.copy(self)

    session = Session(Counts, "1/a/0", group_seed=7)
    assert (await session.reset({}, seed=0))[0]["content"] == "7"
    branched = await session.branch("1/a/0/after-1/0", seed=1)
    assert branched._made().group_seed == 7


def test_a_run_with_two_users(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, "training.max_steps=3", f"run.output_dir={tmp_path}", MIXED]
    command += ["validation={scenarios: english/test, every: 3}"]
    code, _, err = ctcgrpo(*command)
    assert code == 0, err
    run = tmp_path / "tiny"

    def played(name: str) -> dict[int, set[str]]:
        """The users of each group."""
        found: dict[int, set[str]] = {}
        for line in (run / "traces" / f"{name}.rank-0.jsonl").read_text().splitlines():
            episode = json.loads(line)
            found.setdefault(episode["group"], set()).add(episode["info"]["user"])
        return found

    steps = [played(f"step-{step:06d}") for step in (1, 2, 3)]
    assert all(len(users) == 1 for step in steps for users in step.values())
    assert {user for step in steps for users in step.values() for user in users} == {"scripted", "reluctant"}
    assert played("validation-000000") == played("validation-000003")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, metrics in zip(steps, logged, strict=True):
        counted = Counter(user for users in step.values() for user in users)
        assert {
            n.split("/")[1]: m / 2 for n, m in metrics.items() if n.startswith("user/") and n.endswith("/episodes")
        } == counted
        assert all(f"user/{user}/outcome" in metrics for user in counted)
    recorded = json.loads((run / "simulator.json").read_text())
    assert recorded["users"]["scripted"]["weight"] == 3 and recorded["users"]["reluctant"]["backend"] == "scripted"
    assert who_played(recorded) == "scripted: scripted; reluctant: scripted, reluctance 0.5"
    assert {file.name for file in run.glob("simulator-*.jsonl")} == {"simulator-scripted.jsonl", "simulator-reluctant.jsonl"}

    code, _, err = ctcgrpo("evaluate", str(run), "--limit", "1")
    assert code == 2 and "the run has several users (simulator.users); expected --simulator" in err

    whole = (run / "traces" / "step-000003.rank-0.jsonl").read_text()
    for name in ("final", "checkpoint-3"):
        (run / name / "COMPLETE").unlink()
    code, out, err = ctcgrpo(*command)  # resumes after step 2, and plays step 3 with the same users
    assert code == 0 and "resumes from checkpoint-2" in out, err
    assert played("step-000003") == steps[2] and _without_times(whole) == _without_times(
        (run / "traces" / "step-000003.rank-0.jsonl").read_text()
    )
    (run / "final" / "COMPLETE").unlink()
    code, _, err = ctcgrpo(*[part.replace("weight: 3", "weight: 2") for part in command], "training.max_steps=4")
    assert code == 6 and "users.scripted.weight: 3.0 -> 2.0" in err


def _without_times(text: str) -> list[dict[str, object]]:
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in text.splitlines()]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("simulator.config=[a.yaml, b.yaml]", "simulator.config is .*; expected one file; several users .* simulator.users"),
        ("simulator.users=[{config: a.yaml}, {config: b/a.yaml}]", "two are called 'a'; expected different names"),
        ("simulator.users=[{weight: -1}]", "simulator.users.0.weight is -1; input should be greater than 0"),
        ("simulator.users=[{wieght: 1}]", r"unknown field simulator.users.0.wieght; did you mean 'weight'\?"),
        ("simulator.users=[{scenes: [charme]}]", r"simulator.users.0.scenes: 'charme'; did you mean 'charm'\?"),
        ("simulator={users: [{}], config: a.yaml}", "config and users: both given"),
        ("simulator={users: [{}], port: 8765}", "port and users: both given"),
        ("simulator.users=[{url: 'http://x', config: a.yaml}]", "config is 'a.yaml', but url names a server"),
        ("validation={scenarios: english/test, simulator: {weight: 2}}", "unknown field validation.simulator.weight"),
    ],
)
def test_what_cannot_be_is_refused(override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(TINY, [override])


def test_a_scenario_that_nobody_plays_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["simulator.users=[{scenes: [charm]}, {name: other, languages: [zh]}]"])
    players = trained_on(recipe)
    refuse_unplayed(players, [CHARM])
    with pytest.raises(RecipeError, match="simulator.users: none plays scenario 'a' .scene 'support', language 'en'"):
        refuse_unplayed(players, [CHARM, SUPPORT])
    assert name_of(recipe.simulator) is None and name_of(load_recipe(TINY).simulator) == "scripted"


def test_a_check_asks_and_counts_each_user(tmp_path: Path) -> None:
    mixed = "simulator.users=[{config: configs/simulator/scripted.yaml, weight: 3}, {config: LLM}]"
    with FakeLlm().serving() as llm:
        (tmp_path / "llm.yaml").write_text(f"backend: llm\nllm: {{samples: 2, endpoints: [{{url: '{llm.url}', model: m}}]}}\n")
        validated = "validation={scenarios: english/test, every: 9, simulator: {config: configs/simulator/reluctant.yaml}}"
        found = look(tmp_path, mixed.replace("LLM", str(tmp_path / "llm.yaml")), validated)
    assert found["simulator, scripted"][0].text.startswith("scripted answered a test turn")
    assert found["simulator, llm"][0].text.startswith("m answered a test turn")
    assert found["simulator, other user"][0].text.startswith("scripted answered a test turn")
    # 16 episodes of 3 turns a step for 2 steps; two validations of 16 episodes with each of both: 192 turns in training and
    # validation. The LLM answers twice, and plays a quarter of them. The other user has 96 turns.
    (calls,) = found["simulator calls"]
    assert f"up to {36 + 24} per step, {144 + 96 + 96} in total, validation included" in calls.text
    (cost,) = found["cost, llm"]
    assert "million tokens per step" in cost.text and found["cost, other user"][0].text.startswith("none: the scripted")
