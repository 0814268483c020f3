"""Credit by continuations: episodes are played on from their turns, through the runner that training uses."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctcgrpo.centering import make_centering
from ctcgrpo.credit import credit_terms, turn_advantages, vine_credits
from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import CreditError, TooManyFailures
from ctcgrpo.options import CreditOptions
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.rollout.traces import trace_record
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.scripted import ScriptedBackend
from ctcgrpo.simulator.service import answer
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.samples import step_credit, summarise
from ctcgrpo.types import Completion, Environment, Episode, Step, Task
from tests.unit.test_python_api import trainer
from tests.unit.test_rollout import Parts


def test_by_hand() -> None:
    """Two rollouts: values 0.5 (the sibling's outcome), 0.2, then the outcome 1; a turn without a valid continuation shares."""
    first, second = vine_credits([1.0, 0.5], [[[0.0, 0.4], []], [[], [0.3], []]])
    assert first == pytest.approx([0.2 - 0.5, 1.0 - 0.2])
    assert second == pytest.approx([(0.3 - 1.0) / 2, (0.3 - 1.0) / 2, 0.5 - 0.3])
    assert vine_credits([1.0], [[[0.2], []]])[0].tolist() == [0.0, 0.0]


def test_credits_of_a_rollout_sum_to_the_advantage_of_its_outcome() -> None:
    continuations = [[[0.1], [0.2], []], [[], []], [[]]]
    scores = [[9.0] * len(turns) for turns in continuations]
    options = {"credit": "vine", "alpha": 1.0, "centering": "none", "scale": "none", "outcome_weight": 0.0}
    advantages = turn_advantages([0.6, 0.0, -0.6], [0, 0, 0], scores, continuations=continuations, **options)
    assert [float(a.sum()) for a in advantages] == pytest.approx([0.9, 0.0, -0.9])


def test_without_continuations_there_is_no_such_credit() -> None:
    for missing in (None, [[[0.1]], [[0.1]]]):
        with pytest.raises(ValueError, match="credit 'vine' needs the outcomes of the continuations from after every turn"):
            credit_terms([0.0, 1.0], [0, 0], [[0.1, 0.2], [0.1]], credit="vine", continuations=missing)


# --- played ------------------------------------------------------------------------------------------------------------------


class Dice(Environment):
    """Three turns; each adds what the dice show, whatever the policy says. `broken`: branches fail in their next step."""

    made: list["Dice"] = []

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.closed, self.shown = broken, 0, ()
        Dice.made.append(self)

    def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
        self.dice, self.branched = random.Random(seed), False
        return "Begin."

    def step(self, reply: str) -> Step:
        if self.broken and self.branched:
            raise OSError("the dice are lost")
        self.shown = (*self.shown, self.dice.randrange(6))
        return Step("Go on.", 0.1 * self.shown[-1], done=len(self.shown) == 3)

    def branch(self, *, seed: int) -> "Dice":
        made = Dice(self.broken)
        made.shown, made.dice, made.branched = self.shown, random.Random(seed), True
        return made

    def outcome(self) -> float:
        assert self.episode_return == pytest.approx(sum(self.shown) / 10)  # in a branch too, which did not copy it
        return float(sum(self.shown))

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return Parts(tiny)


def played(parts: Parts, make: Callable[[], Environment], continuations: int = 3, **options: Any) -> list[Episode]:
    runner = parts.runner("http://127.0.0.1:1", sampling=Sampling(max_new_tokens=3), max_turns=4, **options)
    runner.play = replace(runner.play, continuations=continuations)
    runner.environment, runner.shared = make, contextlib.AsyncExitStack()
    slots = [Slot(Task("t", {}, "all"), 1, 0, k) for k in range(2)]
    return asyncio.run(runner.run(slots))


@pytest.mark.parametrize("deterministic", [True, False])
def test_episodes_are_played_on_from_each_turn_but_the_last(parts: Parts, deterministic: bool) -> None:
    Dice.made.clear()
    episodes = played(parts, Dice, deterministic=deterministic)
    alone = played(parts, Dice, 0, deterministic=True)
    for episode, other in zip(episodes, alone, strict=True):
        assert [len(turn.continuations) for turn in episode.turns] == [3, 3, 0]
        assert [t.completion.token_ids for t in episode.turns] == [t.completion.token_ids for t in other.turns]
        assert episode.outcome == other.outcome  # continuations change nothing of what they continue
        for k, turn in enumerate(episode.turns, 1):
            for continued in turn.continuations:
                assert continued.failure is None and len(continued.turns) == 3
                assert continued.turns[:k] == tuple(replace(t, continuations=()) for t in episode.turns[:k])
                assert continued.outcome == pytest.approx(sum(10 * (t.reward or 0) for t in continued.turns))
                # Its prompts hold what was said before.
                assert continued.turns[k].prompt_ids == episode.turns[k].prompt_ids
    every = [c for e in episodes for t in e.turns for c in t.continuations]
    assert len({tuple(t.completion.token_ids for t in c.turns) for c in every}) == len(every)  # each has a seed of its own
    assert len({c.outcome for c in every}) > 3
    assert [made.closed for made in Dice.made] == [1] * len(Dice.made) and len(Dice.made) == 2 + 12 + 2
    recorded = trace_record(episodes[0])["turns"][1]["continuations"]
    assert recorded == [c.outcome for c in episodes[0].turns[1].continuations]


def test_a_continuation_that_fails_enters_no_value(parts: Parts) -> None:
    options = CreditOptions(credit="vine", centering="none", alpha=1.0, scale_rewards="none", outcome_weight=0.0)
    episodes = played(parts, lambda: Dice(broken=True))
    reasons = {c.failure.message.partition(" (")[0] for e in episodes for t in e.turns for c in t.continuations if c.failure}
    assert reasons == {f"turn {k}: step raised OSError: the dice are lost" for k in (2, 3)}
    assert trace_record(episodes[0])["turns"][0]["continuations"] == [None, None, None]
    summaries = [summarise(e, options) for e in episodes]
    assert [s.failed_continuations for s in summaries] == [6, 6]
    credit = step_credit(summaries, options, make_centering("none"))
    ahead = episodes[0].outcome - episodes[1].outcome
    assert credit.advantages[0, 0] == pytest.approx([ahead / 3] * 3)
    metrics = rollout_metrics(summaries, credit)
    assert (metrics["continuations/played"], metrics["continuations/failed"]) == (12.0, 12.0)


def test_an_environment_has_to_branch(parts: Parts) -> None:
    class NoBranch(Dice):
        branch = Environment.branch  # type: ignore[assignment]

    with pytest.raises(CreditError, match=r"credit 'vine' .* needs NoBranch\.branch; define it"):
        played(parts, NoBranch)

    class Itself(Dice):
        def branch(self, *, seed: int) -> Dice:
            return self

    [reason, _] = [e.failure.message for e in played(parts, Itself) if e.failure]
    assert "branch returned" in reason and "expected another Environment" in reason


def test_training_on_it(tmp_path: Path) -> None:
    options = {"credit": "vine", "continuations": 2, "centering": "none", "outcome_weight": 0.0, "max_turns": 3}
    made = trainer(tmp_path, Dice, max_steps=1, **options)
    made.train()
    [log] = [entry for entry in made.state.log_history if "continuations/played" in entry]
    assert log["continuations/played"] == 4 * log["episodes/valid"] and log["continuations/failed"] == 0
    assert made.play([Slot(Task("t", {}, "all"), 1, 0, 0)], "again")[0].turns[0].continuations
    metrics = made.evaluate([{"id": "t"}])
    assert metrics["eval_outcome/all"] >= 0 and "eval_continuations/played" not in metrics
    plain = trainer(tmp_path / "plain", Dice, max_steps=1)
    plain.train()
    assert not any("continuations/played" in entry for entry in plain.state.log_history)
    broken = trainer(tmp_path / "broken", lambda: Dice(broken=True), max_steps=1, **options)
    with pytest.raises(TooManyFailures, match=r"16 of 16 continuations failed.*the dice are lost"):
        broken.train()


# --- a user who resists at first ---------------------------------------------------------------------------------------------

GOOD = "He asked your name and thanked you, and told you that you are the lady who brings the tea. It must hurt from a father."
POOR = "That is how such an illness goes with most people who have it."
SECOND = ("So it goes on for a while with most people.", "It hurts that the man who named you does not know your name.")


class Coin(PolicyEngine):
    """A policy that says one of two things in each of two turns, at random."""

    def __init__(self, parts: Parts) -> None:
        self.tokenizer = parts.tokenizer

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        before = self.tokenizer.decode(prompt_ids)
        said = random.Random(seed).choice(SECOND if GOOD in before or POOR in before else (POOR, GOOD))
        ids = (*self.tokenizer.encode(said), self.tokenizer.eos_token_id)
        return Completion(ids, (0.0,) * len(ids), "stop")


class Reluctant:
    """configs/simulator/reluctant.yaml, in this process."""

    async def turn(self, request: TurnRequest) -> TurnReply:
        return await answer(ScriptedBackend(0.5), request)


def test_what_pays_off_later_has_its_credit(parts: Parts) -> None:
    """What does the reluctant user good moves them no more than a platitude does in its own turn, and pays off with the next."""
    scenario = next(s for s in load_scenarios("english/test", "test") if s.scene == "support")
    runner = parts.runner("http://127.0.0.1:1", engine=Coin(parts), max_turns=2)
    runner.play = replace(runner.play, continuations=4)
    runner.environment, runner.shared = lambda: EIBench(Reluctant(), max_turns=2), contextlib.AsyncExitStack()
    episodes = asyncio.run(runner.run([Slot(task_of(scenario), 1, 0, k) for k in range(24)]))

    began = {reply: [e for e in episodes if e.turns[0].reply == reply] for reply in (GOOD, POOR)}

    def ahead(credit: str) -> float:
        """How much more credit a good first reply has than a poor one, on the mean."""
        options = CreditOptions(credit=credit, centering="none", alpha=1.0, scale_rewards="none", outcome_weight=0.0)
        found = step_credit([summarise(e, options) for e in episodes], options, make_centering("none"))
        by_reply = {reply: [found.advantages[0, e.rollout][0] for e in began[reply]] for reply in (GOOD, POOR)}
        return float(np.mean(by_reply[GOOD]) - np.mean(by_reply[POOR]))

    truth = float(np.mean([e.outcome for e in began[GOOD]]) - np.mean([e.outcome for e in began[POOR]]))
    assert truth > 0.1
    assert ahead("immediate") == pytest.approx(0.0, abs=1e-9)
    assert ahead("vine") == pytest.approx(truth, rel=0.2)
