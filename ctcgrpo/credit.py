"""CTC-GRPO on a page: from outcomes and turn scores to one advantage per turn. Pure functions of arrays.

A scenario s has a group of rollouts i = 1..G, each with turns tau = 1..T_i and an outcome R_i:

    A_i       = (R_i - mean_s R) / (max(std_s R, std_min) + 1e-6)             outcome advantage
    c_{i,tau} = r_{i,tau}                                                     credit of a turn
    A_{i,tau} = A_i + alpha * (c_{i,tau} - b_{i,tau})                         turn advantage

The baseline b says where turn credit is centered:

    rollout   mean of c over the rollout's own turns (the paper): turn terms sum to zero over a rollout, so they move
              credit between its turns and leave the outcome term to compare rollouts
    group     mean of c over all turns of all valid rollouts of the group: a rollout whose turns are better than its
              siblings' gains on every turn

r is within +-0.1, so alpha = 15 gives turn terms up to about +-1.5, beside outcome advantages of the order of 1.

A failed rollout has outcome NaN: it enters no mean and no std, and its own advantages are NaN. A group with fewer than
two valid rollouts compares nothing: its one member gets 0 everywhere and is left out of the loss (`in_loss`).

Source: the CTC-GRPO section of arXiv 2606.15532.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_F = TypeVar("_F")

_EPS = 1e-6


def outcome_advantages(outcomes: ArrayLike, group_ids: ArrayLike, *, std_min: float = 0.1, scale: str = "group") -> Array:
    """A_i for every rollout.

    outcomes (N,): in [-1, 1], NaN for a failed rollout. group_ids (N,): equal for the rollouts of one scenario.
    Returns (N,): finite for valid rollouts (0 in a group with fewer than two of them), NaN for failed ones. The std is
    the unbiased one over the group's valid outcomes; `std_min` is its floor, so that near-agreement does not explode.
    """
    scaled = _choose("scale", SCALES, scale)
    R, groups = _checked(outcomes, group_ids)
    advantages = np.where(np.isnan(R), np.nan, 0.0)
    for members in _comparable_groups(R, groups):
        advantages[members] = scaled(R[members], std_min)
    return advantages


def turn_advantages(
    outcomes: ArrayLike,
    group_ids: ArrayLike,
    turn_scores: Sequence[ArrayLike],
    *,
    alpha: float = 15.0,
    centering: str = "rollout",
    credit: str = "immediate",
    gamma: float = 1.0,
    std_min: float = 0.1,
    scale: str = "group",
    center_weights: Sequence[ArrayLike] | None = None,
    scene_baseline: Mapping[Any, float] | None = None,
) -> list[Array]:
    """A_{i,tau} for every turn of every rollout.

    outcomes (N,), group_ids (N,) as in `outcome_advantages`; turn_scores: N sequences, the i-th of length T_i >= 0.
    Returns N arrays, the i-th (T_i,). Raises ValueError for an unknown or not yet available option, and for a valid
    rollout without turns.
    """
    baseline = _choose("centering", CENTERINGS, centering)
    credited = _choose("credit", CREDITS, credit)
    if gamma != 1.0:
        raise ValueError(f"credit.gamma = {gamma}: discounting applies to credit 'reward_to_go', which is not available")
    if center_weights is not None:
        raise ValueError("credit.center_weights: weighting by 'token' is not available yet; 'turn' weights all turns alike")
    if scene_baseline is not None:
        raise ValueError("credit.scene_baseline: centering 'scene' is not available yet")
    R, groups = _checked(outcomes, group_ids)
    if len(turn_scores) != len(R):
        raise ValueError(f"{len(R)} outcomes but {len(turn_scores)} sequences of turn scores")
    A = outcome_advantages(R, groups, std_min=std_min, scale=scale)
    c = [credited(np.asarray(scores, dtype=np.float64)) for scores in turn_scores]
    advantages = [np.full(len(turns), a) for a, turns in zip(A, c, strict=True)]
    for members in _comparable_groups(R, groups):
        if empty := [i for i in members if not len(c[i])]:
            raise ValueError(f"rollout {empty[0]} has an outcome but no turns")
        for i, b in zip(members, baseline([c[i] for i in members]), strict=True):
            advantages[i] = A[i] + alpha * (c[i] - b)
    return advantages


def in_loss(outcomes: ArrayLike, group_ids: ArrayLike) -> NDArray[np.bool_]:
    """Which rollouts (N,) are trained on: the valid ones of groups with at least two valid ones."""
    R, groups = _checked(outcomes, group_ids)
    mask = np.zeros(len(R), dtype=bool)
    for members in _comparable_groups(R, groups):
        mask[members] = True
    return mask


def groups_without_signal(outcomes: ArrayLike, group_ids: ArrayLike) -> float:
    """The share of groups whose outcomes say nothing: fewer than two valid ones, or all valid ones equal."""
    R, groups = _checked(outcomes, group_ids)
    telling = sum(np.ptp(R[members]) > 0 for members in _comparable_groups(R, groups))
    return float(1 - telling / max(1, len(np.unique(groups))))


# --- scale: how the outcome advantage of a group's valid outcomes R (n,) is scaled --------------------------------------


def _scale_by_group(R: Array, std_min: float) -> Array:
    spread = max(float(R.std(ddof=1)), std_min)
    advantages: Array = (R - R.mean()) / (spread + _EPS)
    return advantages


# --- credit: from the scores r (T,) of a rollout's turns to their credits c (T,) ----------------------------------------


def _immediate(r: Array) -> Array:
    return r


# --- centering: from the credits of a group's valid rollouts to a baseline for each, a number or (T_i,) ----------------


def _center_rollout(c: list[Array]) -> list[float]:
    return [float(turns.mean()) for turns in c]


def _center_group(c: list[Array]) -> list[float]:
    return [float(np.concatenate(c).mean())] * len(c)


# An option that is not built yet is listed with None: it is refused by name, not mistaken for a misspelling.
SCALES: dict[str, Callable[[Array, float], Array] | None] = {"group": _scale_by_group, "batch": None, "none": None}
CREDITS: dict[str, Callable[[Array], Array] | None] = {"immediate": _immediate, "reward_to_go": None}
CENTERINGS: dict[str, Callable[[list[Array]], Sequence[float | Array]] | None] = {
    "rollout": _center_rollout,
    "group": _center_group,
    "group_turn": None,
    "scene": None,
    "none": None,
}


def available(options: Mapping[str, object | None]) -> list[str]:
    """The names in one of the tables above that can be chosen."""
    return [name for name, function in options.items() if function is not None]


def _choose(what: str, options: Mapping[str, _F | None], name: str) -> _F:
    function = options.get(name)
    if function is None:
        state = "is not available yet" if name in options else "is unknown"
        raise ValueError(f"credit.{what}: {name!r} {state}; available: {', '.join(available(options))}")
    return function


def _checked(outcomes: ArrayLike, group_ids: ArrayLike) -> tuple[Array, NDArray[Any]]:
    R, groups = np.asarray(outcomes, dtype=np.float64), np.asarray(group_ids)
    if R.ndim != 1 or R.shape != groups.shape:
        raise ValueError(f"outcomes {R.shape} and group ids {groups.shape} must be two sequences of equal length")
    return R, groups


def _comparable_groups(R: Array, groups: NDArray[Any]) -> list[NDArray[np.intp]]:
    """The indices of each group's valid rollouts, for the groups with at least two of them."""
    valid = ~np.isnan(R)
    members = [np.flatnonzero((groups == g) & valid) for g in np.unique(groups)]
    return [m for m in members if len(m) >= 2]
