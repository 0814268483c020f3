"""The simulated step: cases whose time is known by hand, idle shares, and layouts that must not be slower than others."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from ctcgrpo.run.recipe_file import load_recipe
from tests.benchmarks import step_model as model
from tests.benchmarks.scale import Assumptions, Plan, Row, predictions, stops
from tests.benchmarks.step_model import (
    Batch,
    Draws,
    Engine,
    Inputs,
    LogNormal,
    Prediction,
    Trainer,
    draw,
    rollouts,
    simulate,
    update,
)
from tests.conftest import ROOT

ENGINE = Engine(max_batch=64, fixed=0.01, per_sequence=0.001, prompt_fixed=0.02, prompt_token=1e-4, host=0.003)


def batch(**fields: Any) -> Batch:
    known: dict[str, Any] = {"tasks": 1, "group_size": 1, "turns": 3, "opening": 100, "line": 20}
    return Batch(**known | {"reply": LogNormal(50), "user": LogNormal(0.5)} | fields)


def seconds(b: Batch, engine: Engine = ENGINE, engines: int = 1) -> float:
    return rollouts(b, draw(b, random.Random(0)), engine, engines).seconds


def test_one_episode_takes_the_sum_of_its_parts() -> None:
    prompts = 3 * 0.02 + (100 + 2 * 20) * 1e-4
    assert seconds(batch()) == pytest.approx(3 * 0.003 + prompts + 3 * 50 * 0.011 + 3 * 0.5)


def test_the_parts_of_the_longest_dialogue_sum_to_the_rollouts() -> None:
    b = batch(tasks=3, group_size=4, user=LogNormal(0.5, 0.8), reply=LogNormal(50, 0.5), users_at_once=3)
    played = rollouts(b, draw(b, random.Random(0)), replace(ENGINE, max_batch=4), 2)
    assert sum(played.path.values()) == pytest.approx(played.seconds)
    assert set(played.path) == {model.HOST, model.SLOT, model.REPLY, model.BUSY_USER, model.USER}


def test_a_group_shares_its_opening_and_a_step_serves_all_sequences() -> None:
    b = batch(group_size=4)
    prompts = 0.02 + 100 * 1e-4 + 2 * (0.02 + 4 * 20 * 1e-4)
    assert seconds(b, replace(ENGINE, host=0)) == pytest.approx(prompts + 3 * 50 * (0.01 + 4 * 0.001) + 3 * 0.5)


def test_reasoning_left_out_of_contexts_makes_the_visible_reply_new() -> None:
    assert seconds(batch(visible=10)) - seconds(batch()) == pytest.approx(2 * 10 * 1e-4)


def test_sequences_of_different_length_share_the_engine() -> None:
    """40 steps of two sequences, then 60 of one."""
    b = batch(group_size=2, turns=1)
    played = rollouts(b, Draws([[40], [100]], [[0.0], [0.0]]), Engine(max_batch=2, fixed=0.01, per_sequence=0.001), 1)
    assert played.seconds == pytest.approx(40 * 0.012 + 60 * 0.011)
    assert list(played.busy) == pytest.approx([played.seconds])


def test_a_request_waits_for_the_end_of_the_current_step() -> None:
    """The first runs from 15 ms in steps of 10 ms; the second arrives at 30 ms, and enters at 35 ms."""
    b = batch(group_size=2, turns=1)
    played = rollouts(b, Draws([[10], [10]], [[0.0], [0.0]]), Engine(max_batch=2, fixed=0.01, host=0.015), 1)
    assert played.seconds == pytest.approx(0.035 + 10 * 0.01)


def test_max_batch_1_serializes() -> None:
    b = batch(group_size=5, turns=1, user=LogNormal(0.0))
    one = seconds(replace(b, group_size=1, opening=0), replace(ENGINE, host=0))
    assert seconds(replace(b, opening=0), replace(ENGINE, host=0, max_batch=1)) == pytest.approx(5 * one)


def test_one_user_at_a_time_serializes_the_answers() -> None:
    b = batch(group_size=4, turns=1, users_at_once=1)
    engine = replace(ENGINE, host=0)
    assert seconds(b, engine) - seconds(replace(b, users_at_once=None), engine) == pytest.approx(3 * 0.5)


def test_engines_share_the_episodes() -> None:
    b = batch(tasks=2, group_size=4, turns=1, user=LogNormal(0.0))
    slow = replace(ENGINE, host=0, max_batch=1)
    assert seconds(b, slow, engines=2) == pytest.approx(seconds(replace(b, tasks=1), slow))


def test_an_update_of_one_row_is_its_distinct_tokens() -> None:
    """Two episodes of a group: the opening once, replies and lines of each."""
    b = batch(group_size=2)
    made = update(b, draw(b, random.Random(0)), Trainer(per_token=0.001, fixed=0.5))
    assert made.seconds == pytest.approx(0.5 + 0.001 * (100 + 2 * (3 * 50 + 2 * 20)))
    assert made.busy == pytest.approx(made.seconds)


def test_an_update_takes_no_less_than_its_longest_sample() -> None:
    b = batch(group_size=2)
    made = update(b, draw(b, random.Random(0)), Trainer(per_token=0.001, gpus=64))
    assert made.seconds == pytest.approx(0.001 * (100 + 3 * 50 + 2 * 20))
    assert made.busy < made.seconds / 5


def test_gradients_go_around_the_ring_twice() -> None:
    b = batch()
    free = Trainer(per_token=0.001, gpus=4)
    made = [update(b, draw(b, random.Random(0)), t).seconds for t in (free, replace(free, update_bytes=2 * 8e9, bandwidth=1e9))]
    assert made[1] - made[0] == pytest.approx(2 * 8 * 3 / 4)


def equal_phases(overlap: int, host: float = 0.0) -> Prediction:
    """Without `host`, rollouts and update take the same time."""
    b, engine = batch(tasks=2, group_size=4), replace(ENGINE, host=0.0)
    tokens = update(b, draw(b, random.Random(0)), Trainer(per_token=1.0)).seconds
    trainer = Trainer(per_token=seconds(b, engine) / tokens)
    return simulate(Inputs(batch=b, engine=replace(engine, host=host), trainer=trainer, overlap=overlap), 0)


def test_overlap_halves_a_step_of_equal_phases() -> None:
    before, after = equal_phases(0), equal_phases(1)
    assert after.step == pytest.approx(before.step / 2)
    assert (before.overlapped, after.overlapped) == (0.0, pytest.approx(1.0))
    assert before.trainer_idle == pytest.approx(0.5)
    assert after.trainer_idle == pytest.approx(0.0, abs=1e-9)


def test_an_overlapped_update_waits_for_the_turns_that_its_process_plays() -> None:
    assert equal_phases(1, host=0.1).update - equal_phases(0).update == pytest.approx(8 * 3 * 0.1)


def test_overlap_does_not_hide_the_transfer_of_weights() -> None:
    b = batch(tasks=2, group_size=4)
    trainer = Trainer(per_token=1e-3, transfer=7.0)
    found = [simulate(Inputs(batch=b, engine=ENGINE, trainer=trainer, overlap=k), 0) for k in (0, 1)]
    assert found[0].step == pytest.approx(7 + found[0].rollouts + found[0].update)
    assert found[1].step == pytest.approx(7 + max(found[1].rollouts, found[1].update))


VARIED = batch(tasks=4, group_size=8, user=LogNormal(0.5, 0.8), reply=LogNormal(50, 0.5, 128), users_at_once=8)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("engines", [1, 4])
@pytest.mark.parametrize("per_token", [1e-5, 1e-3])
@pytest.mark.parametrize("gpus", [1, 16])
def test_idle_shares_follow_from_what_is_busy(overlap: int, engines: int, per_token: float, gpus: int) -> None:
    trainer = Trainer(per_token=per_token, gpus=gpus, updates=2, fixed=0.1, transfer=0.2)
    p = simulate(Inputs(batch=VARIED, engine=ENGINE, trainer=trainer, engines=engines, overlap=overlap), 0)
    assert 0 <= p.trainer_idle <= 1
    assert 0 <= p.engine_idle <= 1
    assert 0 <= p.overlapped <= 1
    assert sum(p.parts.values()) == pytest.approx(p.step)
    assert (1 - p.trainer_idle) * p.step <= p.update + 1e-9
    assert (1 - p.engine_idle) * p.step <= p.rollouts + 1e-9


def test_colocated_gpus_work_in_both_phases() -> None:
    inputs = Inputs(batch=VARIED, engine=ENGINE, trainer=Trainer(per_token=1e-3, gpus=4), engines=4)
    apart, together = simulate(inputs, 0), simulate(replace(inputs, colocated=True), 0)
    assert together.trainer_idle == together.engine_idle
    assert 1 - together.trainer_idle == pytest.approx(2 - apart.trainer_idle - apart.engine_idle)


def test_the_same_seed_gives_the_same_prediction() -> None:
    inputs = Inputs(batch=VARIED, engine=ENGINE, trainer=Trainer(per_token=1e-4))
    assert simulate(inputs, 3) == simulate(inputs, 3)
    assert simulate(inputs, 3) != simulate(inputs, 4)


def test_more_nodes_train_as_fast_on_a_batch_that_grows_where_synchronization_is_free() -> None:
    """Without spread in lengths and latencies, in which the longest of more episodes is longer."""

    def step(nodes: int) -> float:
        b = batch(tasks=8 * nodes, group_size=4, user=LogNormal(0.5))
        trainer = Trainer(per_token=1e-3, gpus=2 * nodes, tokens_per_row=512)
        return simulate(Inputs(batch=b, engine=ENGINE, trainer=trainer, engines=2 * nodes), 0, steps=1).step

    steps = [step(2**k) for k in range(5)]
    assert max(steps) <= steps[0] * 1.01


def test_draws_are_log_normal_and_capped() -> None:
    drawn = [LogNormal(10, 0.5, 30).draw(random.Random(k)) for k in range(2000)]
    assert max(drawn) == 30
    assert sorted(drawn)[1000] == pytest.approx(10, rel=0.05)
    assert math.exp(sum(map(math.log, drawn)) / 2000) == pytest.approx(10, rel=0.05)


# --- the program -----------------------------------------------------------------------------------------------------------------


def row(nodes: int, step: float) -> Row:
    parts = {model.USER: 0.7 * step, model.TOKENS: 0.3 * step}
    return Row(nodes, 128, Prediction(step, 0.7 * step, 0.3 * step, 0.7, 0.3, 0.0, parts))


def test_a_layout_stops_where_twice_the_nodes_gain_less_than_a_fifth() -> None:
    said = stops([row(1, 100), row(2, 60), row(4, 55), row(8, 54)])
    assert said.startswith("stops at 2 nodes: 4 gain +9%") and f"{model.USER} 70%" in said
    assert stops([row(1, 100), row(2, 60)]) == "scales to 2 nodes"
    assert stops([row(1, 100), Row(2, 128, problem="memory")]) == "stops at 1 node: memory"
    assert stops([Row(1, 128, problem="memory")]) == "not possible: memory"


def test_a_recipe_gives_a_prediction_for_each_layout() -> None:
    asked = Assumptions(steps=1)
    small = load_recipe(ROOT / "recipes" / "qwen3_8b.yaml", ["scenarios.per_step=4", "rollout.max_turns=2"])
    found = predictions(Plan(small, asked), 1)
    assert all(r.prediction for r in found.values())
    assert found["servers, overlap 1"].rate > found["servers, overlap 0"].rate
    assert "expected a multiple" in predictions(Plan(small, asked), 8)["colocated"].problem
