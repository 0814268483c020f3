"""CTC-GRPO credit: values by hand, and what must hold for any input."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctcgrpo.centering import CENTERINGS, Group, SceneBaseline
from ctcgrpo.credit import (
    credit_terms,
    groups_without_signal,
    in_loss,
    outcome_advantages,
    turn_advantages,
    turn_credits,
)

nan = math.nan


def group(tag: str, credits: list[list[float]], weights: list[list[int]] | None = None) -> Group:
    w = weights or [[1] * len(c) for c in credits]
    return Group([np.array(c) for c in credits], [np.array(x, dtype=float) for x in w], tag)


def test_outcome_advantages_by_hand() -> None:
    # Outcomes 0.2, 0.6, 1.0: mean 0.6, unbiased std 0.4.
    got = outcome_advantages([0.2, 0.6, 1.0], ["s", "s", "s"])
    assert got == pytest.approx([-0.4 / 0.400001, 0.0, 0.4 / 0.400001])


def test_the_floor_of_the_std() -> None:
    # 0.50 and 0.52: std 0.0141, floored to 0.1.
    got = outcome_advantages([0.50, 0.52], [0, 0])
    assert got == pytest.approx([-0.01 / 0.100001, 0.01 / 0.100001])
    assert outcome_advantages([0.50, 0.52], [0, 0], std_min=0.01) == pytest.approx(
        [-0.01 / (0.02 / math.sqrt(2) + 1e-6), 0.01 / (0.02 / math.sqrt(2) + 1e-6)]
    )


def test_groups_do_not_mix_and_failures_enter_nothing() -> None:
    got = outcome_advantages([0.2, nan, 1.0, 0.6, 0.3, 0.3], [0, 0, 0, 0, 1, 1])
    assert np.isnan(got[1])
    assert got[[0, 2, 3]] == pytest.approx(outcome_advantages([0.2, 1.0, 0.6], [0, 0, 0]))
    assert got[4:] == pytest.approx([0, 0])


def test_rollout_centering_by_hand_with_unequal_turn_counts() -> None:
    # Outcomes 0 and 1: mean 0.5, std 0.7071; A = -+0.5 / 0.707108.
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    first, second = turn_advantages([0.0, 1.0], [0, 0], [[0.02, 0.05, -0.01], [0.04]])
    # Rollout 0: mean 0.02, so 15 * (0, 0.03, -0.03); rollout 1 has one turn: no turn term.
    assert first == pytest.approx([-a, -a + 0.45, -a - 0.45])
    assert second == pytest.approx([a])


def test_group_centering_by_hand_with_unequal_turn_counts() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    first, second = turn_advantages([0.0, 1.0], [0, 0], [[0.02, 0.05, -0.01], [0.04]], centering="group")
    # All four turns: mean 0.1 / 4 = 0.025, so 15 * (-0.005, 0.025, -0.035) and 15 * 0.015.
    assert first == pytest.approx([-a - 0.075, -a + 0.375, -a - 0.525])
    assert second == pytest.approx([a + 0.225])


def test_group_centering_leaves_failed_rollouts_out_of_the_mean() -> None:
    advantages = turn_advantages([0.0, nan, 1.0], [0, 0, 0], [[0.02, 0.04], [0.1], [0.03]], centering="group", alpha=10)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert advantages[0] == pytest.approx([-a - 0.1, -a + 0.1])
    assert np.isnan(advantages[1]).all() and advantages[1].shape == (1,)
    assert advantages[2] == pytest.approx([a])


def test_alpha_zero_is_outcome_only() -> None:
    scores = [[0.1, -0.1], [0.05]]
    for turns, outcome in zip(
        turn_advantages([0.1, 0.9], [0, 0], scores, alpha=0), outcome_advantages([0.1, 0.9], [0, 0]), strict=True
    ):
        assert turns == pytest.approx([outcome] * len(turns))


def test_a_lone_valid_rollout_gives_no_update() -> None:
    for centering in CENTERINGS:
        alone, failed = turn_advantages([0.7, nan], [0, 0], [[0.1, -0.1], [0.1]], centering=centering)
        assert alone == pytest.approx([0, 0]) and np.isnan(failed).all()
    assert in_loss([0.7, nan, 0.1, 0.2, 0.5], [0, 0, 1, 1, 2]).tolist() == [False, False, True, True, False]


def test_groups_without_signal() -> None:
    # Group 0 differs, group 1 agrees, group 2 has one valid rollout, group 3 none.
    outcomes, groups = [0.1, 0.2, 0.3, 0.3, 0.5, nan, nan], [0, 0, 1, 1, 2, 2, 3]
    assert groups_without_signal(outcomes, groups) == pytest.approx(3 / 4)


def test_group_turn_centering_by_hand_with_unequal_turn_counts() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    scores = [[0.02, 0.05, -0.01], [0.04], [0.1]]
    first, second, failed = turn_advantages([0.0, 1.0, nan], [0, 0, 0], scores, centering="group_turn")
    # Turn 0: mean (0.02 + 0.04) / 2 = 0.03; turns 1 and 2 were reached by the first alone: credit 0.
    assert first == pytest.approx([-a - 0.15, -a, -a])
    assert second == pytest.approx([a + 0.15])
    assert np.isnan(failed).all()


def test_scene_centering_and_its_running_mean_by_hand() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    outcomes, groups, scores = [0.0, 1.0], ["s", "s"], [[0.02, 0.05, -0.01], [0.04]]
    # At the start the baseline is 0.
    first, second = turn_advantages(outcomes, groups, scores, centering=SceneBaseline())
    assert first == pytest.approx([-a + 0.3, -a + 0.75, -a - 0.15]) and second == pytest.approx([a + 0.6])
    baseline = SceneBaseline()
    baseline.update([group("support", scores)])
    assert baseline.of("support") == pytest.approx([0.03, 0.05, -0.01]) and baseline.of("charm") == ()
    baseline.update([group("charm", [[0.1]]), group("support", [[0.06, -0.01]])])
    # Turn 0: (0.02 + 0.04 + 0.06) / 3; turn 1: (0.05 - 0.01) / 2; turn 2 as before.
    assert baseline.of("support") == pytest.approx([0.04, 0.02, -0.01]) and baseline.of("charm") == pytest.approx([0.1])
    known = {"s": baseline.of("support")[:2]}
    first, second = turn_advantages(outcomes, groups, scores, centering=SceneBaseline(known))
    assert first == pytest.approx([-a - 0.3, -a + 0.45, -a - 0.15]) and second == pytest.approx([a])


def test_no_centering_by_hand() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    first, second = turn_advantages([0.0, 1.0], [0, 0], [[0.02, 0.05], [0.04]], centering="none")
    assert first == pytest.approx([-a + 0.3, -a + 0.75]) and second == pytest.approx([a + 0.6])


def test_reward_to_go_by_hand() -> None:
    assert turn_credits([[0.02, 0.05, -0.01], []], credit="reward_to_go")[0] == pytest.approx([0.06, 0.04, -0.01])
    discounted = turn_credits([[0.02, 0.05, -0.01]], credit="reward_to_go", gamma=0.5)[0]
    assert discounted == pytest.approx([0.02 + 0.025 - 0.0025, 0.05 - 0.005, -0.01])
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    first, _ = turn_advantages([0.0, 1.0], [0, 0], [[0.02, 0.05, -0.01], [0.04]], credit="reward_to_go")
    # Mean of 0.06, 0.04, -0.01 is 0.03.
    assert first == pytest.approx([-a + 0.45, -a + 0.15, -a - 0.6])


def test_leave_one_out_by_hand() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    scores = [[0.02, 0.05, -0.01], [0.04]]
    first, second = turn_advantages([0.0, 1.0], [0, 0], scores, centering="group_loo")
    # The other's mean: 0.04 for the first, (0.02 + 0.05 - 0.01) / 3 = 0.02 for the second.
    assert first == pytest.approx([-a - 0.3, -a + 0.15, -a - 0.75]) and second == pytest.approx([a + 0.3])
    first, second = turn_advantages([0.0, 1.0], [0, 0], scores, centering="group_turn_loo")
    # The first is alone in turns 1 and 2: no baseline.
    assert first == pytest.approx([-a - 0.3, -a + 0.75, -a - 0.15]) and second == pytest.approx([a + 0.3])
    tokens = [[30, 10, 10], [40], [20]]
    first, *_ = turn_advantages([0.0, 1.0, 1.0], [0] * 3, [*scores, [0.1]], centering="group_loo", center_weights=tokens, alpha=1)
    assert np.diff(first) == pytest.approx([0.03, -0.06])
    assert first[0] - turn_advantages([0.0, 1.0, 1.0], [0] * 3, [*scores, [0.1]], alpha=0)[0][0] == pytest.approx(
        0.02 - (40 * 0.04 + 20 * 0.1) / 60
    )


def test_smeared_by_hand() -> None:
    spread = turn_credits([[0.02, 0.06, -0.03], []], credit="smeared", gamma=0.5)
    # r_0 stays; r_1 is shared as 2 : 1 over turns 1 and 0; r_2 as 4 : 2 : 1 over turns 2, 1 and 0.
    assert spread[0] == pytest.approx([0.02 + 0.02 - 0.03 / 7, 0.04 - 0.06 / 7, -0.12 / 7]) and len(spread[1]) == 0
    alike = turn_credits([[0.02, 0.06, -0.03]], credit="smeared", gamma=1.0)[0]
    assert alike == pytest.approx([0.02 + 0.03 - 0.01, 0.03 - 0.01, -0.01])
    assert turn_credits([[0.02, 0.06]], credit="smeared", gamma=0.0)[0] == pytest.approx([0.02, 0.06])


def test_turn_scale_by_hand() -> None:
    scores = [[0.02, 0.06], [0.04]]
    plain = turn_advantages([0.5, 0.5], [0, 0], scores, alpha=1, centering="group")
    assert np.concatenate(plain) == pytest.approx([-0.02, 0.02, 0.0])
    scaled = turn_advantages([0.5, 0.5], [0, 0], scores, alpha=1, centering="group", turn_scale="group")
    std = 0.02  # of -0.02, 0.02, 0 (unbiased)
    assert np.concatenate(scaled) == pytest.approx([-0.02 / (std + 1e-6), 0.02 / (std + 1e-6), 0.0])
    floored = turn_advantages([0.5, 0.5], [0, 0], scores, alpha=1, centering="group", turn_scale="batch", turn_std_min=0.5)
    assert np.concatenate(floored) == pytest.approx([-0.02 / (0.5 + 1e-6), 0.02 / (0.5 + 1e-6), 0.0])


def test_token_weights_by_hand() -> None:
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    scores, tokens = [[0.02, 0.05], [0.04]], [[30, 10], [40]]
    first, second = turn_advantages([0.0, 1.0], [0, 0], scores, center_weights=tokens)
    # (30 * 0.02 + 10 * 0.05) / 40 = 0.0275
    assert first == pytest.approx([-a - 15 * 0.0075, -a + 15 * 0.0225]) and second == pytest.approx([a])
    first, second = turn_advantages([0.0, 1.0], [0, 0], scores, centering="group", center_weights=tokens)
    # (30 * 0.02 + 10 * 0.05 + 40 * 0.04) / 80 = 0.03375
    assert first == pytest.approx([-a - 15 * 0.01375, -a + 15 * 0.01625]) and second == pytest.approx([a + 15 * 0.00625])
    first, second = turn_advantages([0.0, 1.0], [0, 0], scores, centering="group_turn", center_weights=tokens)
    # Turn 0: (30 * 0.02 + 40 * 0.04) / 70
    assert first == pytest.approx([-a + 15 * (0.02 - 2.2 / 70), -a])
    baseline = SceneBaseline()
    baseline.update([group("x", scores, tokens)])
    assert baseline.of("x") == pytest.approx([2.2 / 70, 0.05])


def test_scales_by_hand() -> None:
    outcomes, groups = [0.0, 1.0, 0.4, 0.6], [0, 0, 1, 1]
    assert outcome_advantages(outcomes, groups, scale="none") == pytest.approx([-0.5, 0.5, -0.1, 0.1])
    # Deviations -0.5, 0.5, -0.1, 0.1: unbiased std sqrt(0.52 / 3).
    spread = math.sqrt(0.52 / 3) + 1e-6
    assert outcome_advantages(outcomes, groups, scale="batch") == pytest.approx(np.array([-0.5, 0.5, -0.1, 0.1]) / spread)
    near = outcome_advantages([0.50, 0.52], [0, 0], scale="batch")
    assert near == pytest.approx([-0.01 / 0.100001, 0.01 / 0.100001])
    assert outcome_advantages([nan, 0.3], [0, 0], scale="batch")[1] == 0


def test_the_scene_baseline_does_not_depend_on_order() -> None:
    rng = random.Random(0)
    scenes = [rng.choice(["a", "b"]) for _ in range(50)]
    credits = [[rng.uniform(-0.1, 0.1) for _ in range(rng.randint(1, 8))] for _ in scenes]
    order = list(range(50))
    rng.shuffle(order)
    straight, other = SceneBaseline(), SceneBaseline()
    straight.update([group(scenes[k], [credits[k]]) for k in range(50)])
    other.update([group(scenes[k], [credits[k]]) for k in order])
    assert straight.state_dict() == other.state_dict()


@pytest.mark.parametrize("option", ["centering", "credit", "scale"])
def test_unknown_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}(_rewards)? = 'rolout'; expected one of "):
        turn_advantages([0.1, 0.2], [0, 0], [[0.1], [0.1]], **{option: "rolout"})  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="equal length"):
        outcome_advantages([0.1], [0, 0])
    with pytest.raises(ValueError, match="2 outcomes but 1 sequences"):
        turn_advantages([0.1, 0.2], [0, 0], [[0.1]])
    with pytest.raises(ValueError, match="rollout 1 has an outcome but no turns"):
        turn_advantages([0.1, 0.2], [0, 0], [[0.1], []])
    with pytest.raises(ValueError, match="one weight for every turn"):
        turn_advantages([0.1, 0.2], [0, 0], [[0.1], [0.2]], center_weights=[[1], [1, 2]])
    with pytest.raises(ValueError, match="must be positive"):
        turn_advantages([0.1, 0.2], [0, 0], [[0.1], [0.2]], center_weights=[[1], [0]])
    # A failed rollout may have failed before its first turn.
    assert turn_advantages([0.1, 0.2, nan], [0, 0, 0], [[0.1], [0.2], []])[2].shape == (0,)


scores = st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=8)
rollouts = st.lists(st.tuples(st.one_of(st.just(nan), st.floats(-1, 1)), st.integers(0, 2), scores), min_size=1, max_size=12)
centerings = st.sampled_from(sorted(CENTERINGS))


def unzip(data: list[Any]) -> tuple[list[float], list[int], list[list[float]]]:
    return [d[0] for d in data], [d[1] for d in data], [d[2] for d in data]


@given(rollouts)
def test_turn_terms_sum_to_zero_over_a_rollouts_turns(data: list[Any]) -> None:
    outcomes, groups, turn_scores = unzip(data)
    outcome = outcome_advantages(outcomes, groups)
    for a, turns in zip(outcome, turn_advantages(outcomes, groups, turn_scores), strict=True):
        if not math.isnan(a):
            assert sum(turns - a) == pytest.approx(0, abs=1e-9)


@given(rollouts, centerings)
def test_the_two_terms_add_up(data: list[Any], centering: str) -> None:
    outcomes, groups, turn_scores = unzip(data)
    terms = credit_terms(outcomes, groups, turn_scores, centering=centering)
    np.testing.assert_array_equal([t.outcome for t in terms], outcome_advantages(outcomes, groups))
    for t, whole in zip(terms, turn_advantages(outcomes, groups, turn_scores, centering=centering), strict=True):
        np.testing.assert_array_equal(t.outcome + t.turn, whole)
        assert np.isfinite(t.turn).all() and t.turn.shape == whole.shape


def test_terms_by_hand() -> None:
    first, second, failed, alone = credit_terms([0.0, 1.0, nan, 0.3], [0, 0, 0, 1], [[0.02, 0.04], [0.1], [0.1], [0.1]])
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert (first.outcome, second.outcome) == pytest.approx((-a, a)) and first.turn == pytest.approx([-0.15, 0.15])
    assert math.isnan(failed.outcome) and second.turn == failed.turn == alone.turn == [0.0] and alone.outcome == 0


@given(rollouts)
def test_group_centered_turn_terms_sum_to_zero_over_the_group(data: list[Any]) -> None:
    outcomes, groups, turn_scores = unzip(data)
    outcome = outcome_advantages(outcomes, groups)
    advantages = turn_advantages(outcomes, groups, turn_scores, centering="group")
    for group in set(groups):
        terms = [sum(t - a) for t, a, g in zip(advantages, outcome, groups, strict=True) if g == group and not math.isnan(a)]
        assert sum(terms) == pytest.approx(0, abs=1e-9)


@given(rollouts, centerings, st.randoms())
def test_order_does_not_matter(data: list[Any], centering: str, rng: Any) -> None:
    order = list(range(len(data)))
    rng.shuffle(order)
    straight = turn_advantages(*unzip(data), centering=centering)
    shuffled = turn_advantages(*unzip([data[k] for k in order]), centering=centering)
    for k, turns in zip(order, shuffled, strict=True):
        np.testing.assert_allclose(turns, straight[k], atol=1e-9)


@given(rollouts, centerings, st.integers(0, 2), scores, st.integers(0, 12))
def test_a_failed_episode_changes_nothing_but_its_absence(
    data: list[Any], centering: str, group: int, turn_scores: list[float], where: int
) -> None:
    where = min(where, len(data))
    with_failed = [*data[:where], (nan, group, turn_scores), *data[where:]]
    without = turn_advantages(*unzip(data), centering=centering)
    got = turn_advantages(*unzip(with_failed), centering=centering)
    assert np.isnan(got.pop(where)).all()
    for a, b in zip(got, without, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@given(rollouts, centerings)
def test_valid_rollouts_get_finite_advantages_one_a_turn(data: list[Any], centering: str) -> None:
    outcomes, groups, turn_scores = unzip(data)
    for outcome, scores_, turns in zip(
        outcomes, turn_scores, turn_advantages(outcomes, groups, turn_scores, centering=centering), strict=True
    ):
        assert turns.shape == (len(scores_),)
        assert np.isnan(turns).all() if math.isnan(outcome) else np.isfinite(turns).all()


@given(st.floats(-1, 1), st.integers(2, 8), scores)
def test_equal_outcomes_leave_the_turn_term_alone(outcome: float, size: int, turn_scores: list[float]) -> None:
    advantages = turn_advantages([outcome] * size, [0] * size, [turn_scores] * size)
    expected = 15 * (np.array(turn_scores) - np.mean(turn_scores))
    for turns in advantages:
        assert np.isfinite(turns).all()
        np.testing.assert_allclose(turns, expected, atol=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_outcome_advantages_sum_to_zero_and_keep_order(outcomes: list[float]) -> None:
    assume(max(outcomes) - min(outcomes) > 1e-6)
    advantages = outcome_advantages(outcomes, [0] * len(outcomes))
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    assert advantages[np.argmax(outcomes)] == max(advantages) > min(advantages) == advantages[np.argmin(outcomes)]
