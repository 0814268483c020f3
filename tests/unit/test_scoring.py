"""Outcome and turn scores equal values worked out by hand from the formulas, in every branch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctcgrpo.environments.eibench.records import Anchors, UserState
from ctcgrpo.environments.eibench.scoring import outcome_score, shaped_outcome, turn_form, turn_score
from ctcgrpo.policy.reasoning import parse_completion

ANCHORS = Anchors(UserState(70, 30), UserState(20, 80), UserState(90, 10))
# A boundary scene that may cost some anger: the target lies above the initial value.
BOUNDARY = Anchors(UserState(40, 50), UserState(60, 70), UserState(90, 20))


@pytest.mark.parametrize(
    "anger, s_anger",
    [(0, 1), (20, 1), (45, 0.5), (70, 0), (75, -0.25), (80, -0.5), (90, -1), (91, -1), (100, -1)],
)
def test_anger_improves_downwards(anger: int, s_anger: float) -> None:
    # (70 - c) / (70 - 20) above the target, (70 - c) / (90 - 70) above the initial value; trust 30 scores 0.
    assert outcome_score(UserState(anger, 30), ANCHORS) == pytest.approx(0.5 * s_anger)
    assert outcome_score(UserState(anger, 30), ANCHORS, "evaluation") == pytest.approx(0.5 * s_anger)


@pytest.mark.parametrize(
    "trust, s_trust",
    [(100, 1), (80, 1), (55, 0.5), (30, 0), (25, -0.25), (20, -0.5), (10, -1), (9, -1), (0, -1)],
)
def test_trust_improves_upwards(trust: int, s_trust: float) -> None:
    assert outcome_score(UserState(70, trust), ANCHORS) == pytest.approx(0.5 * s_trust)
    assert outcome_score(UserState(70, trust), ANCHORS, "evaluation") == pytest.approx(0.5 * s_trust)


@pytest.mark.parametrize(
    "anger, training, evaluation",
    [
        (30, 1, -1),  # below initial: full score; evaluation runs upwards, 30 < worst 90, so -1
        (40, 1, 0),  # initial; evaluation (40 - 40) / 20
        (50, 0.5, 0.5),  # 1 - 10/20; (50 - 40) / 20
        (60, 0, 1),  # at the target: 1 - 20/20; evaluation reaches the target
        (75, -0.5, 1),  # -(75 - 60) / (90 - 60); evaluation: above the target
        (90, -1, 1),
        (100, -1, 1),
    ],
)
def test_a_target_above_the_initial_anger_is_where_the_variants_differ(anger: int, training: float, evaluation: float) -> None:
    assert outcome_score(UserState(anger, 50), BOUNDARY, "training") == pytest.approx(0.5 * training)
    assert outcome_score(UserState(anger, 50), BOUNDARY, "evaluation") == pytest.approx(0.5 * evaluation)


@pytest.mark.parametrize(
    "state, anchors, training",
    [
        # anger target = initial: 1 at and below it, then -(c - t)/(w - t); trust 50 = initial = target: 1
        (UserState(50, 50), Anchors(UserState(50, 50), UserState(50, 50), UserState(75, 30)), 1.0),
        (UserState(60, 50), Anchors(UserState(50, 50), UserState(50, 50), UserState(75, 30)), 0.5 * -0.4 + 0.5),
        # trust below initial = target: (40 - 50) / (50 - 30)
        (UserState(50, 40), Anchors(UserState(50, 50), UserState(50, 50), UserState(75, 30)), 0.5 - 0.25),
        # worst = initial: the bad side is immediate on both axes
        (UserState(51, 49), Anchors(UserState(50, 50), UserState(20, 80), UserState(50, 50)), -1.0),
        (UserState(50, 50), Anchors(UserState(50, 50), UserState(20, 80), UserState(50, 50)), 0.0),
        # target = worst anger above the initial one: reached at the target, then -1
        (UserState(80, 50), Anchors(UserState(50, 50), UserState(80, 80), UserState(80, 20)), 0.5 * 0.0),
        (UserState(81, 50), Anchors(UserState(50, 50), UserState(80, 80), UserState(80, 20)), 0.5 * -1),
    ],
)
def test_zero_denominators_are_immediate_steps(state: UserState, anchors: Anchors, training: float) -> None:
    assert outcome_score(state, anchors) == pytest.approx(training)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="'published' is unknown"):
        outcome_score(UserState(1, 1), ANCHORS, "published")  # type: ignore[arg-type]


levels = st.integers(0, 100)


@given(levels, levels, st.tuples(levels, levels, levels), st.tuples(levels, levels, levels), st.booleans())
def test_outcomes_stay_in_range(anger: int, trust: int, a: tuple[int, ...], t: tuple[int, ...], evaluation: bool) -> None:
    (a_target, a_initial, a_worst), (t_worst, t_initial, t_target) = sorted(a), sorted(t)
    anchors = Anchors(UserState(a_initial, t_initial), UserState(a_target, t_target), UserState(a_worst, t_worst))
    score = outcome_score(UserState(anger, trust), anchors, "evaluation" if evaluation else "training")
    assert -1 <= score <= 1


@given(levels, levels, levels)
def test_less_anger_and_more_trust_never_score_worse(anger: int, trust: int, step: int) -> None:
    better = UserState(max(0, anger - step), min(100, trust + step))
    assert outcome_score(better, ANCHORS) >= outcome_score(UserState(anger, trust), ANCHORS)


def test_turn_score_is_the_change_that_happened() -> None:
    before = UserState(70, 30)
    assert turn_score(before, before.plus(-6, 4)) == pytest.approx(0.5 * 0.06 + 0.5 * 0.04)
    assert turn_score(before, before.plus(5, -10)) == pytest.approx(-0.075)
    # Clamped at the edges: from (3, 98), -10 and +10 become -3 and +2.
    assert turn_score(UserState(3, 98), UserState(3, 98).plus(-10, 10)) == pytest.approx(0.5 * 0.03 + 0.5 * 0.02)
    # Clipped to ten.
    assert turn_score(before, before.plus(-25, 0)) == pytest.approx(0.05)
    assert turn_score(before, before.plus(-6, 4), (1.0, 0.0)) == pytest.approx(0.06)
    assert turn_score(before, before.plus(-6, 4), (0.3, 0.7)) == pytest.approx(0.3 * 0.06 + 0.7 * 0.04)


def test_shaping_by_hand() -> None:
    fine = (False, False)
    assert shaped_outcome(0.5, [fine, fine]) == 0.5
    assert shaped_outcome(0.5, [(False, True), fine]) == pytest.approx(0.5 - 0.05)
    assert shaped_outcome(0.5, [(True, True), (True, True)]) == pytest.approx(0.5 - 0.2 - 0.05)
    assert shaped_outcome(-0.9, [(True, True)]) == -1.0
    assert math.isnan(shaped_outcome(math.nan, [(True, True)]))


@pytest.mark.parametrize("odd", ["No reasoning.", "<think>  </think>A reply.", "<think>on and on"])
def test_missing_blank_and_unclosed_reasoning_cost_the_same(odd: str) -> None:
    """Three values worked out: R = 0.3, and one of eight turns."""
    parsed = [parse_completion(text, "stop") for text in [odd, *["<think>He is sad.</think>I am here."] * 7]]
    forms = [turn_form(turn.reasoning, turn.faults) for turn in parsed]
    assert shaped_outcome(0.3, forms) == pytest.approx(0.225)


def test_broken_tags_and_empty_replies_cost_once() -> None:
    texts = ["<think>a</think>b</think>c", "<think>He is sad.</think>", "<think>Fine.</think>Yes."]
    forms = [turn_form(turn.reasoning, turn.faults) for turn in (parse_completion(text, "stop") for text in texts)]
    assert shaped_outcome(0.3, forms) == pytest.approx(0.25)
