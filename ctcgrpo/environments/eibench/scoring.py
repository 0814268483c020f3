"""From a user's state to scores: the outcome of a dialogue, the score of a turn, and reward shaping. Pure functions.

An outcome score maps each axis through three anchors, worst -> -1, initial -> 0, target -> +1, linearly in between and flat
beyond, and averages the two axes: R = (S_anger + S_trust) / 2, in [-1, 1] (published figures are 100 R).

Source: EIBench (arXiv 2606.15532). The paper's training code and its evaluation code differ where a scenario's target
anger is not below its initial anger (a boundary that may cost some anger); both are here as variants."""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from ctcgrpo.environments.eibench.records import Anchors, UserState

Variant = Literal["training", "evaluation"]

_EVALUATION_EPS = 1e-6


def outcome_score(state: UserState, anchors: Anchors, variant: Variant = "training") -> float:
    """The outcome R in [-1, 1] of a dialogue that ended in `state`.

    `variant`: "training" lets anger rise up to a target above the initial value and punishes it beyond; "evaluation"
    takes the direction from the anchors alone, so anger far above such a target still scores +1."""
    if variant not in get_args(Variant):
        raise ValueError(f"scoring variant {variant!r} is unknown; it is one of {', '.join(get_args(Variant))}")
    anger_axis, trust_axis = zip(state, *anchors, strict=True)
    if variant == "evaluation":
        return 0.5 * _by_direction(*anger_axis) + 0.5 * _by_direction(*trust_axis)
    return 0.5 * _anger(*anger_axis) + 0.5 * _upwards(*trust_axis)


def _upwards(c: float, i: float, t: float, w: float, eps: float = 0.0) -> float:
    """An axis that improves upwards: final c, initial i, target t, worst w."""
    if c >= t:
        return 1.0
    if c >= i:
        return (c - i) / max(t - i, eps)
    if c >= w:
        return (c - i) / max(i - w, eps)
    return -1.0


def _downwards(c: float, i: float, t: float, w: float, eps: float = 0.0) -> float:
    """An axis that improves downwards."""
    return _upwards(-c, -i, -t, -w, eps)


def _anger(c: float, i: float, t: float, w: float) -> float:
    """Anger while training: downwards, or, for t >= i, full score up to i, falling to 0 at t and to -1 at w."""
    if t < i:
        return _downwards(c, i, t, w)
    if c <= i:
        return 1.0
    if c <= t:
        return 1.0 - (c - i) / (t - i)
    if c <= w:
        return -(c - t) / (w - t)
    return -1.0


def _by_direction(c: float, i: float, t: float, w: float) -> float:
    """Either axis in the evaluation variant: upwards exactly when t >= i; denominators of at least 1e-6."""
    return _upwards(c, i, t, w, _EVALUATION_EPS) if t >= i else _downwards(c, i, t, w, _EVALUATION_EPS)


def turn_score(before: UserState, after: UserState, weights: Sequence[float] = (0.5, 0.5)) -> float:
    """r = w_anger * (-d_anger / 100) + w_trust * (d_trust / 100): the change that really happened, after clamping.

    Within [-0.1, 0.1] for weights that sum to 1."""
    w_anger, w_trust = weights
    return w_anger * (before.anger - after.anger) / 100 + w_trust * (after.trust - before.trust) / 100


def turn_form(reasoning: str | None, faults: Collection[str]) -> tuple[bool, bool]:
    """Of a turn of a policy that reasons: whether its reasoning is missing, blank or never closed; and whether its form is bad at
    all, by that, by broken tags, or by an empty visible reply. `faults` as in `records.Turn`."""
    unreasoned = reasoning is None or not {"empty_reasoning", "unclosed_reasoning"}.isdisjoint(faults)
    return unreasoned, unreasoned or not {"broken_tags", "empty_reply"}.isdisjoint(faults)


def shaped_outcome(
    outcome: float, forms: Sequence[tuple[bool, bool]], *, no_reasoning: float = 0.2, fault: float = 0.05
) -> float:
    """The outcome of a policy that reasons, minus penalties for the form of its turns (`turn_form`), clipped to [-1, 1].

    Minus `no_reasoning` x the share of turns without proper reasoning; minus `fault` once if the form of any turn is bad. For a
    policy that does not reason, do not call this: a constant penalty, distorted by the clip, is no signal. NaN (a failed
    episode) stays NaN. One turn without reasoning in eight costs 0.2 / 8 + 0.05."""
    share = sum(unreasoned for unreasoned, _ in forms) / len(forms) if forms else 0.0
    shaped = outcome - no_reasoning * share - fault * any(bad for _, bad in forms)
    return max(-1.0, min(1.0, shaped)) if shaped == shaped else shaped
