"""EIBench in verifiers: its command plays the bundled scenarios; a dialogue is the one that our runner plays, number by number; a
rollout whose user or policy fails has an error and no reward.

verifiers needs another openai than the extra `eval`: launch/test_verifiers.sh runs these in an environment of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench import EIBench, opening_messages, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.rollout.engine import PolicyEngine, Sampling, request_seed
from ctcgrpo.rollout.runner import Play, RolloutRunner, Slot
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.types import Completion, Episode
from tests.conftest import ROOT
from tests.fake_llm import FakeLlm, answered

vf = pytest.importorskip("verifiers.v1", reason="needs the extra `verifiers`: launch/test_verifiers.sh")

REPLIES = (
    "I am so sorry. Do you want to tell me what happened?",
    "<think>She is angry.</think>That was unfair, and it was my fault.",
    "",
    "You should calm down now.",
)
FAILING = """
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, TurnRequest

class Leaves(SimulatorBackend):
    name = "leaves"

    async def react(self, request: TurnRequest) -> Reaction:
        if request.round == 2:
            raise SimulatorReplyError("invalid response")
        return Reaction("Well.", anger_delta=-5, trust_delta=5, goes_on=True, why="")
"""


class Policy(FakeLlm):
    """An OpenAI-compatible endpoint, whose n-th reply in a dialogue is the n-th of REPLIES."""

    def completion(self, body: dict[str, Any], fault: str = "") -> dict[str, Any]:
        return answered(body, REPLIES[sum(message["role"] == "assistant" for message in body["messages"])])


@pytest.fixture
def policy() -> Iterator[Policy]:
    with Policy().serving() as served:
        yield served


async def played(policy: Policy, source: str, scenario_id: str, agent: Mapping[str, Any] = {}, **env: Any) -> Any:
    """The verifiers episode of one scenario."""
    taskset = {"id": "ctcgrpo-eibench", "scenarios": source}
    config = vf.resolve_env_config({"taskset": taskset, "agent": agent, **env})
    environment = vf.load_environment(config)
    [task] = environment.taskset.include(ids=[scenario_id])
    wire = type(task.data).model_validate_json(task.data.model_dump_json())  # as an environment server receives it
    assert wire == task.data
    context = vf.ModelContext(model="m", client=vf.EvalClientConfig(base_url=policy.url), sampling=vf.SamplingConfig())
    async with environment.serving():
        return await environment.run_slot(environment.slots(type(task)(wire, task.config))[0], context)


class Fixed(PolicyEngine):
    """Samples REPLIES, one after the other."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._left = tokenizer, iter(REPLIES)

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        ids = (*self._tokenizer.encode(next(self._left)), self._tokenizer.eos_token_id)
        return Completion(ids, (0.0,) * len(ids), "stop")


async def as_we_play_it(scenario: Any, tiny: Path, url: str, max_turns: int) -> tuple[Episode, int]:
    """The episode of our runner, and the seed of its user."""
    from transformers import AutoTokenizer

    from ctcgrpo.policy.context import ContextBuilder

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    stop_ids, client = frozenset({tokenizer.eos_token_id}), SimulatorClient(url)
    slot = Slot(task_of(scenario), step=3, group=0, rollout=1)
    runner = RolloutRunner(
        engine=Fixed(tokenizer),
        environment=lambda: EIBench(client, briefing=Briefing(), max_turns=max_turns),
        shared=client,
        contexts=ContextBuilder(tokenizer, stop_ids=stop_ids, max_prompt_tokens=3000),
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        play=Play(Sampling(), max_turns=max_turns, seed=11),
    )
    [episode] = await runner.run([slot])
    return episode, request_seed("user", 11, *slot.seeds)


@pytest.mark.parametrize("scene", ["support", "charm"])
async def test_a_dialogue_is_the_one_that_our_runner_plays(policy: Policy, tiny: Path, simulator_url: str, scene: str) -> None:
    scenario = next(s for s in load_scenarios("english/train") if s.scene == scene)
    ours, seed = await as_we_play_it(scenario, tiny, simulator_url, 3)
    assert ours.failure is None and len(ours.turns) == 3 and len({turn.reward for turn in ours.turns}) > 1
    episode = await played(policy, "english", scenario.id, simulator=simulator_url, max_turns=3, seed=seed)
    [trace] = episode.traces
    assert episode.ok and trace.info["rewards"] == [turn.reward for turn in ours.turns]
    states = [{axis: info[axis] for axis in ("anger", "trust")} for info in (ours.info, *(turn.info for turn in ours.turns))]
    assert trace.info["states"] == states and trace.info["seed"] == seed
    assert trace.reward == trace.rewards["outcome"].score == ours.outcome
    assert trace.metrics == {"final_anger": states[-1]["anger"], "final_trust": states[-1]["trust"]}
    heard = [message.content for message in trace.messages if message.role == "user"]
    assert heard == [*([ours.opening.rpartition("\n\n")[2]] if scene == "support" else []), *(t.message for t in ours.turns[:2])]


def test_the_command_plays_held_out_scenarios(policy: Policy, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("vf-eval")),
        "ctcgrpo-eibench",
        "--env.taskset.split",
        "test",
        "-n",
        "5",
        "-r",
        "2",
    ]
    command += ["--env.max-turns", "3", "-m", "m", "--client.base-url", policy.url, "--no-push", "--no-rich", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = tmp_path.rglob("traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scenarios = {scenario.id: scenario for scenario in load_scenarios("english/test", "test")[:5]}
    assert sorted(e["task"]["data"]["id"] for e in episodes) == sorted([*scenarios] * 2)
    briefing = Briefing(None, load_instructions("eibench"))
    sent = [[{k: m[k] for k in ("role", "content")} for m in body["messages"]] for body in policy.requests]
    for scenario in scenarios.values():  # each dialogue began as in training
        opening = [{k: message[k] for k in ("role", "content")} for message in opening_messages(scenario, briefing)]
        assert sent.count(opening) == 2
    assert len({trace["info"]["seed"] for episode in episodes for trace in episode["traces"]}) == 10


async def test_what_a_trace_says_can_be_played_again(policy: Policy) -> None:
    scenario = load_scenarios("english/test", "test")[-1]
    episode = await played(policy, "english/test", scenario.id, max_turns=4)
    [trace] = episode.traces
    info = trace.info
    environment = EIBench(max_turns=4)
    await environment.reset(task_of(scenario).data, seed=info["seed"])
    rewards = []
    for message in trace.assistant_messages:
        rewards.append((await environment.step(parse_completion(message.content or "", "stop").reply)).reward)
    assert info["rewards"] == rewards and info["outcome"] == environment.outcome() == trace.reward
    # As prime-rl reads them: a finite score of the state for each turn, whose differences are the turns' rewards.
    assert len(info["turn_rewards"]) == trace.num_turns and info["turn_rewards"] == list(accumulate(rewards))


@pytest.mark.parametrize(("split", "variant"), [("train", "training"), ("test", "evaluation")])
def test_the_split_names_the_folder_and_the_scoring(split: str, variant: str) -> None:
    config = vf.taskset_config_type("ctcgrpo_eibench")(id="ctcgrpo_eibench", split=split)
    tasks = list(vf.load_taskset(config))
    assert [task.data.scenario for task in tasks] == load_scenarios(f"english/{split}", split)  # type: ignore[arg-type]
    assert {task.data.variant for task in tasks} == {variant}


async def test_a_user_that_fails_makes_an_error_and_no_reward(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_that_leaves.py").write_text(textwrap.dedent(FAILING))
    (tmp_path / "leaves.yaml").write_text("backend: user_that_leaves:Leaves\n")
    scenario = load_scenarios("english/train")[0]
    episode = await played(policy, "english", scenario.id, simulator=str(tmp_path / "leaves.yaml"), max_turns=3)
    [trace] = episode.traces
    assert not episode.ok and not trace.ok and trace.num_turns == 2
    assert trace.rewards.get("outcome") is None and trace.info == {}
    assert "invalid response" in trace.errors[0].message and "invalid response" in episode.errors[0].message


async def test_a_policy_that_fails_makes_an_error_and_no_reward(policy: Policy) -> None:
    policy.key = "another"  # which answers 401
    episode = await played(policy, "english", load_scenarios("english/train")[0].id)
    [trace] = episode.traces
    assert not episode.ok and not trace.ok and trace.rewards.get("outcome") is None
    assert [error.type for error in trace.errors] == ["ProviderError"] and "Incorrect API key" in trace.errors[0].message


async def test_a_limit_of_the_policy_ends_the_dialogue(policy: Policy) -> None:
    episode = await played(policy, "english", load_scenarios("english/train")[0].id, agent={"max_turns": 2})
    [trace] = episode.traces
    assert episode.ok and trace.stop_condition == "max_turns" and len(trace.info["turn_rewards"]) == trace.num_turns == 2


async def test_without_a_turn_there_is_no_reward(policy: Policy) -> None:
    episode = await played(policy, "english", load_scenarios("english/train")[0].id, agent={"max_turns": 0})
    [trace] = episode.traces
    assert not episode.ok and trace.rewards.get("outcome") is None and "max_turns" in episode.errors[0].message


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--env.simulator", "absent.yaml", r"absent\.yaml"),
        ("--env.max-turns", "0", r"max.turns"),
        ("--env.taskset.split", "held-out", r"split"),
    ],
)
def test_a_wrong_option_is_named(
    option: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from verifiers.v1.cli.eval.main import main

    monkeypatch.setattr(sys, "argv", ["vf-eval"])  # which the command replaces
    with pytest.raises(SystemExit) as stop:
        main(["ctcgrpo-eibench", option, value])
    assert stop.value.code and re.search(problem, f"{stop.value.code} {capsys.readouterr()}")
