"""CTC-GRPO on a page: from outcomes and turn scores to one advantage per turn. Pure functions of arrays.

A scenario s has a group of rollouts i = 1..G, each with turns tau = 1..T_i and an outcome R_i:

    A_i       = (R_i - mean_s R) / (max(std_s R, std_min) + 1e-6)             outcome advantage, `scale`
    c_{i,tau} = r_{i,tau}   or   sum_{k >= tau} gamma^{k - tau} r_{i,k}       credit of a turn, `credit`
    A_{i,tau} = A_i + alpha * (c_{i,tau} - b_{i,tau})                         turn advantage, `centering`

r is within +-0.1, so alpha = 15 gives turn terms up to about +-1.5, beside outcome advantages of the order of 1 (alpha is not
rescaled with `scale`; reward-to-go sums up to T turns, so its terms are larger).

A turn that is not scored has for r its share of the next reward of its rollout (`types.turn_rewards`).

A failed rollout has outcome NaN: it enters no mean and no std, and its own advantages are NaN. A group with fewer than
two valid rollouts compares nothing: its one member gets 0 everywhere and is left out of the loss (`in_loss`).

Source: the CTC-GRPO section of arXiv 2606.15532 for `rollout` and `immediate`; the others are the generalisation that this
project sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_F = TypeVar("_F")

_EPS = 1e-6


def outcome_advantages(outcomes: ArrayLike, group_ids: ArrayLike, *, std_min: float = 0.1, scale: str = "group") -> Array:
    """A_i for every rollout.

    outcomes (N,): in [-1, 1], NaN for a failed rollout. group_ids (N,): equal for the rollouts of one scenario.
    Returns (N,): finite for valid rollouts (0 in a group with fewer than two of them), NaN for failed ones. Stds are
    unbiased; `std_min` is their floor, so that near-agreement does not explode.
    """
    scaled = _choose("scale", SCALES, scale)
    R, groups = _checked(outcomes, group_ids)
    advantages = np.where(np.isnan(R), np.nan, 0.0)
    comparable = _comparable_groups(R, groups)
    deviations = [R[members] - R[members].mean() for members in comparable]
    for members, a in zip(comparable, scaled(deviations, std_min), strict=True):
        advantages[members] = a
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
    scene_baseline: Mapping[Any, Sequence[float]] | None = None,
) -> list[Array]:
    """A_{i,tau} for every turn of every rollout.

    outcomes (N,), group_ids (N,) as in `outcome_advantages`; turn_scores: N sequences, the i-th of length T_i >= 0.
    gamma in [0, 1] discounts `reward_to_go`. center_weights: as turn_scores, how much each turn weighs in the means that
    make a baseline, for example its trained tokens; None weighs all alike. scene_baseline: for centering `scene`, the
    baseline of a group's turns by group id, 0 for groups and turns that it lacks (see `SceneBaseline`).
    Returns N arrays, the i-th (T_i,). Raises ValueError for an unknown option, for sequences that do not match, and for a
    valid rollout without turns.
    """
    baseline = _choose("centering", CENTERINGS, centering)
    R, groups = _checked(outcomes, group_ids)
    if len(turn_scores) != len(R):
        raise ValueError(f"{len(R)} outcomes but {len(turn_scores)} sequences of turn scores")
    A = outcome_advantages(R, groups, std_min=std_min, scale=scale)
    c = turn_credits(turn_scores, credit=credit, gamma=gamma)
    w = _weights(center_weights, c)
    advantages = [np.full(len(turns), a) for a, turns in zip(A, c, strict=True)]
    for members in _comparable_groups(R, groups):
        if empty := [i for i in members if not len(c[i])]:
            raise ValueError(f"rollout {empty[0]} has an outcome but no turns")
        known = np.asarray((scene_baseline or {}).get(groups[members[0]].item(), ()), dtype=np.float64)
        group = Group([c[i] for i in members], [w[i] for i in members], known)
        for i, b in zip(members, baseline(group), strict=True):
            advantages[i] = A[i] + alpha * (c[i] - b)
    return advantages


def turn_credits(turn_scores: Sequence[ArrayLike], *, credit: str = "immediate", gamma: float = 1.0) -> list[Array]:
    """c_{i,tau}: N arrays, the i-th (T_i,)."""
    credited = _choose("credit", CREDITS, credit)
    return [credited(np.asarray(scores, dtype=np.float64), gamma) for scores in turn_scores]


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


def shuffled(by_turn: Sequence[Array], seed: int | Sequence[int]) -> list[Array]:
    """A control: the same numbers (turn scores, or advantages) dealt out at random over all turns of all rollouts, so that none
    says anything about the turn that it lands on. N arrays of the same lengths; the same seed deals the same way on every
    process."""
    if not by_turn:
        return []
    dealt = np.random.default_rng(seed).permutation(np.concatenate(list(by_turn)))
    return np.split(dealt, np.cumsum([len(a) for a in by_turn])[:-1])


# --- scale: from R - mean_s R of each group's valid rollouts to their outcome advantages ---------------------------------


def _scale_by_group(deviations: list[Array], std_min: float) -> list[Array]:
    """Divide by the group's own std (GRPO): every group pulls alike, however far apart its outcomes are."""
    return [d / (max(_std(d), std_min) + _EPS) for d in deviations]


def _scale_by_batch(deviations: list[Array], std_min: float) -> list[Array]:
    """Divide by the std over all groups of the step: groups that differ more pull more, without GRPO's difficulty bias."""
    spread = max(_std(np.concatenate(deviations)), std_min) if deviations else std_min
    return [d / (spread + _EPS) for d in deviations]


def _scale_not(deviations: list[Array], std_min: float) -> list[Array]:
    """Leave R - mean_s R as it is (as in Dr. GRPO)."""
    return deviations


# --- credit: from the scores r (T,) of a rollout's turns to their credits c (T,) ----------------------------------------


def _immediate(r: Array, gamma: float) -> Array:
    """c = r: what the turn itself did to the user. Blind to a turn that pays off only later."""
    return r


def _reward_to_go(r: Array, gamma: float) -> Array:
    """c_tau = sum_{k >= tau} gamma^{k - tau} r_k: what came of the turn. Unbiased at gamma = 1, and noisier."""
    c = r.copy()
    for tau in range(len(r) - 2, -1, -1):
        c[tau] += gamma * c[tau + 1]
    return c


# --- centering: from a group's valid rollouts to the baseline of each, a number or (T_i,) --------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """The valid rollouts of one scenario: credits c and center weights w, one (T_i,) each; `known` (T,) is what earlier
    steps say of the scene's turns."""

    c: list[Array]
    w: list[Array]
    known: Array


def _center_rollout(group: Group) -> Sequence[float]:
    """Mean over the rollout's own turns (the paper). Turn terms sum to zero over a rollout (weighted by w): they move
    credit between its turns and leave the outcome term to compare rollouts. A rollout that is good throughout gains
    nothing by it."""
    return [float(np.average(c, weights=w)) for c, w in zip(group.c, group.w, strict=True)]


def _center_group(group: Group) -> Sequence[float]:
    """Mean over all turns of all valid rollouts of the group: a rollout whose turns are better than its siblings' gains on
    every turn. The rollout's own turns are in the mean, which shrinks its terms by about 1 / G."""
    return [float(np.average(np.concatenate(group.c), weights=np.concatenate(group.w)))] * len(group.c)


def _center_group_turn(group: Group) -> Sequence[Array]:
    """Mean over the group's valid rollouts that reached turn tau; alone there, the turn's credit is 0.

    Takes out what a turn's position explains. Biased where the policy influences when the dialogue ends: with as many
    baseline terms as the rollout has turns, each further turn earns minus the mean credit there (verl#7244)."""
    longest = max(map(len, group.c))
    c, w = np.zeros((2, len(group.c), longest))
    for i, (credits, weights) in enumerate(zip(group.c, group.w, strict=True)):
        c[i, : len(credits)], w[i, : len(credits)] = credits, weights
    mean = (c * w).sum(axis=0) / w.sum(axis=0)
    return [mean[: len(credits)] for credits in group.c]


def _center_scene(group: Group) -> Sequence[Array]:
    """Running mean per scene and turn over earlier steps: no rollout is in its own baseline, so none shrinks; it lags
    behind a policy that improves, and shares the bias of `group_turn` in when a dialogue ends."""
    baselines = []
    for credits in group.c:
        b = np.zeros(len(credits))
        b[: len(group.known)] = group.known[: len(credits)]
        baselines.append(b)
    return baselines


def _center_not(group: Group) -> Sequence[float]:
    """No baseline (the paper's ablation): while most turns help, all are pushed up, long dialogues the most."""
    return [0.0] * len(group.c)


SCALES: dict[str, Callable[[list[Array], float], list[Array]]] = {
    "group": _scale_by_group,
    "batch": _scale_by_batch,
    "none": _scale_not,
}
CREDITS: dict[str, Callable[[Array, float], Array]] = {"immediate": _immediate, "reward_to_go": _reward_to_go}
CENTERINGS: dict[str, Callable[[Group], Sequence[float] | Sequence[Array]]] = {
    "rollout": _center_rollout,
    "group": _center_group,
    "group_turn": _center_group_turn,
    "scene": _center_scene,
    "none": _center_not,
}


# --- the scene baseline --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SceneBaseline:
    """Running means of credit per scene and turn: for each scene the weighted sums of credits and the weights, by turn."""

    sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, scene: str) -> tuple[float, ...]:
        """The means of a scene's turns, from the first on; nothing for a scene not seen yet."""
        pairs = zip(self.sums.get(scene, ()), self.weights.get(scene, ()), strict=True)
        return tuple(s / w for s, w in pairs)


def updated_baseline(
    baseline: SceneBaseline,
    scenes: Sequence[str],
    credits: Sequence[ArrayLike],
    center_weights: Sequence[ArrayLike] | None = None,
) -> SceneBaseline:
    """The baseline after a step. scenes (N,) and credits (N sequences) of its valid rollouts, in any order."""
    c = [np.asarray(turns, dtype=np.float64) for turns in credits]
    w = _weights(center_weights, c)
    sums = {scene: list(values) for scene, values in baseline.sums.items()}
    weights = {scene: list(values) for scene, values in baseline.weights.items()}
    for scene in sorted(set(scenes)):
        here = [(a, b) for s, a, b in zip(scenes, c, w, strict=True) if s == scene]
        for tau in range(max((len(a) for a, _ in here), default=0)):
            reached = [(a[tau], b[tau]) for a, b in here if len(a) > tau]
            s, n = (values.setdefault(scene, []) for values in (sums, weights))
            if len(s) <= tau:
                s.append(0.0)
                n.append(0.0)
            # Sorted sums do not depend on the order of the rollouts, so all processes agree to the last bit.
            s[tau] += float(sum(sorted(x * y for x, y in reached)))
            n[tau] += float(sum(sorted(y for _, y in reached)))
    return SceneBaseline({k: tuple(v) for k, v in sums.items()}, {k: tuple(v) for k, v in weights.items()})


# --- small change ----------------------------------------------------------------------------------------------------------


def _choose(what: str, options: Mapping[str, _F], name: str) -> _F:
    if name not in options:
        raise ValueError(f"credit.{what}: {name!r} is unknown; available: {', '.join(options)}")
    return options[name]


def _std(values: Array) -> float:
    return float(values.std(ddof=1))


def _weights(center_weights: Sequence[ArrayLike] | None, c: Sequence[Array]) -> list[Array]:
    if center_weights is None:
        return [np.ones(len(turns)) for turns in c]
    w = [np.asarray(weights, dtype=np.float64) for weights in center_weights]
    if [len(x) for x in w] != [len(x) for x in c]:
        raise ValueError("center_weights must have one weight for every turn score")
    if any((x <= 0).any() for x in w):
        raise ValueError("center_weights must be positive")
    return w


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
