"""Rollouts with a real tiny model and a real server: what was sampled is what is trained, seeds decide what is sampled,
and whatever fails is recorded and never scored."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from ctcgrpo.centering import make_centering
from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.environments.eibench.scoring import outcome_score, turn_score
from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.options import CreditOptions
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import PolicyEngine, Sampling, request_seed
from ctcgrpo.rollout.runner import Play, RolloutRunner, Slot
from ctcgrpo.rollout.sampler import draw, log_kept
from ctcgrpo.rollout.traces import TraceWriter
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.samples import step_credit, summarise
from ctcgrpo.types import Completion, Episode, Failure
from tests.unit.test_packing import model_of
from tests.unit.test_server import GOOD, misbehaving, plays, says

SCENARIOS = [next(s for s in load_scenarios("english/train") if s.scene == scene) for scene in ("support", "charm")]
SLOTS = [Slot(task_of(scenario), 3, group, rollout) for group, scenario in enumerate(SCENARIOS) for rollout in range(3)]


class Parts:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.stop_ids = frozenset({self.tokenizer.eos_token_id})

    def batcher(self, max_batch: int = 16) -> TransformersBatcher:
        return TransformersBatcher(self.model, pad_id=self.tokenizer.pad_token_id, stop_ids=self.stop_ids, max_batch=max_batch)

    def engine(self, max_batch: int = 16, **options: Any) -> ContinuousEngine:
        engine = ContinuousEngine(self.batcher(max_batch), **options)
        engine.take_weights(0)
        return engine

    def runner(
        self, url: str, *, sampling: Sampling = Sampling(max_new_tokens=12), engine: Any = None, **options: Any
    ) -> RolloutRunner:
        play = {k: options.pop(k) for k in ("deterministic", "seed", "max_turns", "deadline") if k in options}
        client, turns = SimulatorClient(url, timeout=5, patience=0.05, backoff=0.01), play.get("max_turns", 3)
        return RolloutRunner(
            engine=engine or self.engine(),
            environment=lambda: EIBench(client, briefing=Briefing(), max_turns=turns),
            shared=client,
            contexts=ContextBuilder(self.tokenizer, stop_ids=self.stop_ids, max_prompt_tokens=1000),
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
            play=Play(**{"sampling": sampling, "max_turns": 3, "seed": 11} | play),
            **options,
        )

    def logits(self, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        """(n, V), at the tokens of a reply."""
        with torch.no_grad():
            found: torch.Tensor = self.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
        return found

    def full_logprobs(self, prompt: Sequence[int], reply: Sequence[int]) -> list[float]:
        """At temperature 1."""
        return torch.log_softmax(self.logits(prompt, reply), -1)[range(len(reply)), list(reply)].tolist()


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return Parts(tiny)


def sampled(episodes: Sequence[Episode]) -> list[tuple[int, ...]]:
    return [turn.completion.token_ids for e in episodes for turn in e.turns]


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.7, "top_k": 40}, {"top_k": 5}])
async def test_recorded_logprobs_are_the_recomputed_ones(parts: Parts, simulator_url: str, truncation: dict[str, Any]) -> None:
    sampling = Sampling(temperature=0.7, max_new_tokens=12, **truncation)
    episodes = await parts.runner(simulator_url, sampling=sampling).run(SLOTS)
    lost = 0.0
    for turn in (turn for e in episodes for turn in e.turns):
        done = turn.completion
        logits = parts.logits(turn.prompt_ids, done.token_ids)
        now = torch.log_softmax(logits / 0.7, -1)[range(len(done.token_ids)), list(done.token_ids)]
        kept = log_kept(logits, torch.tensor(done.token_ids), sampling)
        assert np.add(done.logprobs, kept) == pytest.approx(now, abs=1e-4)
        assert max(done.logprobs) <= 1e-6 and float(kept.max()) <= 1e-6
        lost = min(lost, float(kept.min()))
    assert (lost < -0.01) == bool(truncation)


async def test_an_episode_adds_up(parts: Parts, simulator_url: str) -> None:
    seen: list[Episode] = []
    episodes = await parts.runner(simulator_url).run(SLOTS, seen.append)
    assert [(e.group, e.rollout, e.step) for e in episodes] == [(s.group, s.rollout, 3) for s in SLOTS]
    assert {e.name for e in seen} == {e.name for e in episodes}
    for episode in episodes:
        scenario = next(s for s in SCENARIOS if s.id == episode.task)
        states = [UserState(int(i["anger"]), int(i["trust"])) for i in (episode.info, *(t.info for t in episode.turns))]
        assert states[0] == scenario.anchors.initial and episode.failure is None
        assert [t.reward for t in episode.turns] == [turn_score(a, b) for a, b in pairwise(states)]
        assert episode.outcome == outcome_score(states[-1], scenario.anchors)
        assert [t.done for t in episode.turns] == [False] * (len(episode.turns) - 1) + [True]
        charm = not scenario.opening_line
        assert ("<|im_start|>user" in parts.tokenizer.decode(episode.turns[0].prompt_ids)) != charm


async def test_seeds_decide_what_is_sampled(parts: Parts, simulator_url: str) -> None:
    once = await parts.runner(simulator_url, deterministic=True).run(SLOTS)
    again = await parts.runner(simulator_url, deterministic=True).run(SLOTS)
    assert [e.turns for e in once] == [e.turns for e in again]  # bit for bit, log-probabilities included
    # Another order and batch size samples the same, up to floating-point near ties.
    runner = parts.runner(simulator_url, engine=parts.engine(max_batch=2))
    mixed = sorted(await runner.run(SLOTS[::-1]), key=lambda e: (e.group, e.rollout))
    same = sum(a.turns[0].completion.token_ids == b.turns[0].completion.token_ids for a, b in zip(once, mixed, strict=True))
    assert same >= len(SLOTS) - 1
    other = await parts.runner(simulator_url, deterministic=True, seed=12).run(SLOTS)
    assert sampled(other) != sampled(once)
    assert len(set(sampled(once))) == len(sampled(once))  # rollouts of a group differ


def test_request_seeds_differ_in_every_part() -> None:
    where = [
        ("a", 1, 0, "s", 0, 0),
        ("a", 1, 0, "s", 0, 1),
        ("a", 1, 0, "s", 1, 0),
        ("a", 2, 0, "s", 0, 0),
        ("b", 1, 0, "s", 0, 0),
    ]
    seeds = {request_seed(*w) for w in where}
    assert len(seeds) == len(where) and all(0 <= s < 2**31 for s in seeds)


async def test_sampling_follows_the_distribution(parts: Parts) -> None:
    prompt = tuple(parts.tokenizer.encode("I am", add_special_tokens=False))
    sampling = Sampling(temperature=0.5, top_k=4, max_new_tokens=1)
    engine = parts.engine(max_batch=500)
    drawn = await asyncio.gather(*(engine.generate(prompt, seed=k, sampling=sampling) for k in range(2000)))
    with torch.no_grad():
        logits = parts.model(torch.tensor([prompt])).logits[0, -1] / 0.5
    top = torch.topk(logits, 4)
    expected = dict(zip(top.indices.tolist(), torch.softmax(top.values, -1).tolist(), strict=True))
    counts = {token: sum(d.token_ids[0] == token for d in drawn) / 2000 for token in expected}
    assert sum(counts.values()) == pytest.approx(1)
    for token, probability in expected.items():
        assert counts[token] == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 2000))
    greedy = await engine.generate(prompt, seed=0, sampling=Sampling(temperature=0, max_new_tokens=3))
    assert greedy.token_ids[0] == int(logits.argmax())


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.6), Sampling(top_p=0.999), Sampling(top_k=7, top_p=0.8), Sampling(1.3, top_k=3)]
)
def test_what_top_p_and_top_k_keep_is_what_transformers_keeps(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=generator) * torch.linspace(0.01, 6, 40).unsqueeze(1)
    full = torch.log_softmax(logits / sampling.temperature, -1)
    kept = full
    if sampling.top_k:
        kept = TopKLogitsWarper(sampling.top_k)(None, kept)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        kept = TopPLogitsWarper(sampling.top_p)(None, kept)  # type: ignore[arg-type]
    mass = torch.logsumexp(kept, -1)
    for u in (0.0, 0.3, 0.9999999):
        tokens, logprobs = draw(logits, torch.full((40,), u, dtype=torch.float64), sampling)
        assert torch.isfinite(kept.gather(-1, tokens.unsqueeze(-1))).all()
        torch.testing.assert_close(log_kept(logits, tokens, sampling), mass, atol=1e-5, rtol=0)
        torch.testing.assert_close(logprobs, full.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - mass, atol=1e-5, rtol=0)
    for token in range(0, 3000, 100):
        found = log_kept(logits, torch.full((40,), token), sampling)
        is_kept = kept[:, token].isfinite()
        torch.testing.assert_close(found, torch.where(is_kept, mass, torch.inf), atol=1e-5, rtol=0)


async def test_what_a_slot_holds_is_taken_over_and_changes_nothing(parts: Parts) -> None:
    """Dialogues of several turns, each turn's prompt another's beginning, more of them than slots: as if each stood alone."""
    rng, sampling = random.Random(5), Sampling(max_new_tokens=9)
    forwarded: list[int] = []

    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 200) for _ in range(n))

    batcher = parts.batcher(max_batch=4)
    engine = ContinuousEngine(batcher)
    engine.take_weights(0)
    plain = batcher._forward
    batcher._forward = lambda tokens, *rest: (forwarded.append(tokens.numel()), plain(tokens, *rest))[1]  # type: ignore
    opening = some(60)

    async def dialogue(seed: int, beginning: tuple[int, ...]) -> list[tuple[tuple[int, ...], Completion]]:
        turns, prompt = [], beginning
        for turn in range(4):
            done = await engine.generate(prompt, seed=10 * seed + turn, sampling=sampling)
            turns.append((prompt, done))
            prompt += done.token_ids[seed % 3 :] + some(5)  # what is stripped of a reply is not in what follows
        return turns

    starts = [opening, opening, opening + some(3), some(30), opening[:40] + some(4), some(1), opening]
    dialogues = await asyncio.gather(*(dialogue(k, start) for k, start in enumerate(starts)))
    for k, turns in enumerate(dialogues):
        for turn, (prompt, done) in enumerate(turns):
            engine = parts.engine(max_batch=1)
            alone = await engine.generate(prompt, seed=10 * k + turn, sampling=sampling)
            assert alone.token_ids == done.token_ids and alone.finish_reason == done.finish_reason
            assert alone.logprobs == pytest.approx(done.logprobs, abs=1e-5)
    asked = sum(len(prompt) + len(done.token_ids) for turns in dialogues for prompt, done in turns)
    assert sum(forwarded) < 0.65 * asked  # seven dialogues in four slots: some lose theirs


async def test_a_slot_that_a_failed_step_has_touched_is_not_used_again(parts: Parts) -> None:
    batcher = parts.batcher()
    engine = ContinuousEngine(batcher)
    engine.take_weights(0)
    prompt, sampling = tuple(range(5, 45)), Sampling(max_new_tokens=5)
    plain, calls = batcher._forward, []

    def broken(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return plain(*arguments)

    batcher._forward = broken  # type: ignore[method-assign]
    with pytest.raises(PolicyEngineError, match="transformers failed: RuntimeError: out of memory"):
        await engine.generate(prompt, seed=1, sampling=sampling)
    assert batcher.under_way == 0
    again = await engine.generate(prompt, seed=1, sampling=sampling)
    assert again == await parts.engine().generate(prompt, seed=1, sampling=sampling)
    with pytest.raises(PolicyEngineError, match="generate was called before take_weights"):
        engine.sleep()
        await engine.generate(prompt, seed=1, sampling=sampling)


async def test_the_models_own_generation_config_changes_nothing(parts: Parts) -> None:
    prompt = tuple(parts.tokenizer.encode("I am here and I am", add_special_tokens=False))
    sampling = Sampling(max_new_tokens=8)
    plain = await parts.engine().generate(prompt, seed=1, sampling=sampling)
    own = parts.model.generation_config
    parts.model.generation_config = GenerationConfig(
        suppress_tokens=list(plain.token_ids), no_repeat_ngram_size=1, num_beams=2, repetition_penalty=1.5, min_length=50
    )
    try:
        assert await parts.engine().generate(prompt, seed=1, sampling=sampling) == plain
        assert parts.model.generation_config.num_beams == 2  # and it is put back
    finally:
        parts.model.generation_config = own


async def test_a_failing_simulator_is_a_failed_episode(parts: Parts) -> None:
    # Two turns are answered, then the server is broken for good.
    async with misbehaving(plays, plays, says("oops", 500)) as (url, _):
        episodes = await parts.runner(url).run(SLOTS[:4])
    assert [e.failure.kind if e.failure else None for e in episodes] == ["simulator_transport"] * 4
    assert all(math.isnan(e.outcome) for e in episodes)
    assert sum(len(e.turns) for e in episodes) == 2
    assert "HTTP 500" in str(episodes[0].failure)


async def test_a_simulator_that_makes_up_states_is_a_failed_episode(parts: Parts) -> None:
    async with misbehaving(plays, says(GOOD.replace('"anger":69', '"anger":0'))) as (url, _):
        episodes = await parts.runner(url).run(SLOTS[:4])
    assert [e.failure.kind if e.failure else None for e in episodes] == ["simulator_reply"] * 4
    assert "the response's state is anger 0, trust 41; expected anger " in str(episodes[0].failure)
    async with misbehaving(says("nonsense")) as (url, count):
        episodes = await parts.runner(url).run(SLOTS[:2])
    assert [e.failure.kind for e in episodes if e.failure] == ["simulator_reply"] * 2 and count[0] == 2


async def test_a_failing_engine_is_a_failed_episode(parts: Parts, simulator_url: str) -> None:
    class OutOfMemory(PolicyEngine):
        async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
            raise PolicyEngineError("out of memory")

    episodes = await parts.runner(simulator_url, engine=OutOfMemory()).run(SLOTS[:2])
    assert [str(e.failure.message) for e in episodes if e.failure] == ["turn 1: out of memory"] * 2

    broken = parts.engine()
    broken._batcher._model = None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):  # a defect of the program is not a failed episode
        await asyncio.wait_for(parts.runner(simulator_url, engine=broken).run(SLOTS[:2]), 20)


async def test_one_slow_episode_holds_up_nobody_else(parts: Parts, simulator_url: str) -> None:
    class SlowForOne(PolicyEngine):
        def __init__(self) -> None:
            self.inner = parts.engine()
            self.calls = 0

        async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
            self.calls += 1
            if self.calls == 1:
                await asyncio.sleep(1.5)
            return await self.inner.generate(prompt_ids, seed=seed, sampling=sampling)

    order: list[Episode] = []
    await parts.runner(simulator_url, engine=SlowForOne()).run(SLOTS, order.append)
    assert (order[-1].group, order[-1].rollout) == (0, 0)


async def test_a_deadline_cuts_stragglers_and_says_after_how_many_turns(parts: Parts, simulator_url: str) -> None:
    class SlowFromTheSecondTurn(PolicyEngine):
        def __init__(self) -> None:
            self.inner = parts.engine()
            self.slow = {request_seed(11, *SLOTS[1].seeds, 1)}

        async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
            if seed in self.slow:
                await asyncio.sleep(60)
            return await self.inner.generate(prompt_ids, seed=seed, sampling=sampling)

    heard: list[Episode] = []
    runner = parts.runner(simulator_url, engine=SlowFromTheSecondTurn(), deadline=6.0)
    episodes = await asyncio.wait_for(runner.run(SLOTS, heard.append), 30)
    failed = [e for e in episodes if e.failure]
    assert [(e.group, e.rollout, len(e.turns)) for e in failed] == [(0, 1, 1)] and len(heard) == len(SLOTS)
    assert failed[0].failure == Failure("deadline", "turn 2: the episode was unfinished at the deadline of 6 s")
    summaries = [summarise(e, CreditOptions()) for e in episodes]
    metrics = rollout_metrics(summaries, step_credit(summaries, CreditOptions(), make_centering("rollout")))
    assert metrics["failed/deadline"] == metrics["deadline/after_1_turns"] == 1
    assert "deadline/after_2_turns" not in metrics


async def test_who_gives_up_does_not_wait_for_the_reply_to_end(parts: Parts) -> None:
    batcher, steps = parts.batcher(), []
    engine = ContinuousEngine(batcher)
    engine.take_weights(0)
    plain = batcher.step
    batcher.step = lambda: (steps.append(1), plain())[1]  # type: ignore[method-assign]
    batcher._stop_ids = frozenset()
    task = asyncio.create_task(engine.generate((5, 6, 7), seed=1, sampling=Sampling(max_new_tokens=3000)))
    while len(steps) < 5:
        await asyncio.sleep(0.001)
    assert engine._pump is not None
    engine._pump.cancel()  # as asyncio.run does to what is left
    with pytest.raises(PolicyEngineError, match="CancelledError"):
        await task
    await asyncio.gather(engine._pump, return_exceptions=True)
    assert len(steps) < 1000 and batcher.under_way == 0


async def test_the_cache_keeps_to_sliding_windows() -> None:
    model = model_of(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    engine = ContinuousEngine(TransformersBatcher(model, pad_id=0, stop_ids=[], max_batch=3))
    engine.take_weights(0)
    prompts = [tuple(range(1, 1 + n)) for n in (3, 9, 15)]
    for _ in range(2):  # the second time with what the first has left in the slots
        done = await asyncio.gather(*(engine.generate(p, seed=1, sampling=Sampling(max_new_tokens=12)) for p in prompts))
        for prompt, said in zip(prompts, done, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *said.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1)[range(12), list(said.token_ids)].tolist()
            assert said.logprobs == pytest.approx(expected, abs=1e-5)


async def test_the_engine_samples_in_mixed_precision(parts: Parts) -> None:
    """Under autocast, norms leave keys in float32 and values in bfloat16."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    batcher = TransformersBatcher(parts.model, pad_id=0, stop_ids=[], max_batch=2, autocast=autocast)
    engine = ContinuousEngine(batcher)
    engine.take_weights(0)
    prompt = tuple(range(5, 25))
    done = await engine.generate(prompt, seed=1, sampling=Sampling(max_new_tokens=10))
    assert done.logprobs == pytest.approx(parts.full_logprobs(prompt, done.token_ids), abs=0.1)


async def test_interruption_stops_a_rollout(parts: Parts, simulator_url: str) -> None:
    polled = iter([False] * 8)
    with pytest.raises(RunInterrupted):
        await parts.runner(simulator_url, interrupted=lambda: next(polled, True)).run(SLOTS)


async def test_interruption_stops_a_reply_between_two_tokens(parts: Parts) -> None:
    asked: list[bool] = []

    def interrupted() -> bool:
        asked.append(True)
        return len(asked) > 3

    engine = parts.engine(max_batch=4, interrupted=interrupted)
    with pytest.raises(RunInterrupted, match="in the middle of a reply"):
        await engine.generate((5, 6, 7), seed=1, sampling=Sampling(max_new_tokens=500))
    assert len(asked) < 20


async def test_traces_hold_every_episode(parts: Parts, simulator_url: str, tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    writer = TraceWriter(file)
    episodes = await parts.runner(simulator_url).run(SLOTS, writer)
    async with misbehaving(says("oops", 500)) as (url, _):
        failed = await parts.runner(url).run([Slot(task_of(SCENARIOS[0]), 3, 0, 9)], writer)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(SLOTS) + 1
    by_key = {(line["group"], line["rollout"]): line for line in lines}
    for episode in episodes:
        line = by_key[episode.group, episode.rollout]
        assert line["outcome"] == episode.outcome and line["failure"] is None
        assert [t["reply"] for t in line["turns"]] == [t.reply for t in episode.turns]
        assert [(t["reward"], t["info"]) for t in line["turns"]] == [(t.reward, t.info) for t in episode.turns]
    line = by_key[0, 9]
    assert line["outcome"] is None
    assert line["failure"]["kind"] == "simulator_transport" and failed[0].failure
    # Played again after a resume, the step's file starts anew.
    TraceWriter(file)(episodes[0])
    assert len(file.read_text().splitlines()) == 1
