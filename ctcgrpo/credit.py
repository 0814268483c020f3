"""CTC-GRPO on a page: from outcomes and turn scores to one advantage per turn. Functions of arrays; a centering may have a state.

A scenario s has a group of rollouts i = 1..G, each with turns tau = 1..T_i and an outcome R_i:

    A_i       = (R_i - mean_s R) / (max(std_s R, std_min) + 1e-6)             outcome advantage, `scale`
    c_{i,tau} = r_{i,tau}   or   sum_{k >= tau} gamma^{k - tau} r_{i,k}       credit of a turn, `credit`
    A_{i,tau} = w A_i + alpha * (c_{i,tau} - b_{i,tau}) / d                   turn advantage; b: `centering`, d: `turn_scale`

w is `outcome_weight`, 1 unless stated; `smeared` and `vine` are two more c; d = 1 without a `turn_scale`. r is within +-0.1, so
alpha = 15 gives turn terms up to about +-1.5, beside outcome advantages of the order of 1 (alpha is not rescaled with `scale`;
reward-to-go sums up to T turns, so its terms are larger). With `turn_scale: group` turn terms are of the order of alpha whatever
the rewards are: begin with alpha = 1.

`python -m tests.exact_credit` computes the bias and the noise of each choice exactly, on small decision processes.

A turn that is not scored has for r its share of the next reward of its rollout (`types.turn_rewards`).

A failed rollout has outcome NaN: it enters no mean and no std, and its own advantages are NaN. A group with fewer than
two valid rollouts compares nothing: its one member gets 0 everywhere and is left out of the loss (`in_loss`).

A credit, a centering (`centering.py`) or a scale of one's own is a function like those here; a centering with a state is a subclass
of `Centering`. Add it to CREDITS, CENTERINGS or SCALES, or name it where a name is expected, as `my_module:my_function`. It must
give the same result for the same arguments: every process calls it.

Source: the CTC-GRPO section of arXiv 2606.15532 for `rollout` and `immediate`; the others are the generalisation that this
project sweeps.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctcgrpo.centering import Centering, Group, make_centering
from ctcgrpo.credit_calls import Array, called, choose, listed, numbers
from ctcgrpo.types import turn_rewards

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class CreditTerms:
    """What the advantages of a rollout of T turns are the sum of: the outcome term w A_i, NaN for a failed rollout, and the turn
    terms alpha * (c - b) (T,), 0 where nothing is compared."""

    outcome: float
    turn: Array

    @property
    def advantage(self) -> Array:
        """A_{i,tau} (T,)."""
        return self.outcome + self.turn


def outcome_advantages(outcomes: ArrayLike, group_ids: ArrayLike, *, std_min: float = 0.1, scale: str = "group") -> Array:
    """A_i for every rollout.

    outcomes (N,): in [-1, 1], NaN for a failed rollout. group_ids (N,): equal for the rollouts of one scenario.
    Returns (N,): finite for valid rollouts (0 in a group with fewer than two of them), NaN for failed ones. Stds are
    unbiased; `std_min` is their floor, so that near-agreement does not explode.
    """
    R, groups = _checked(outcomes, group_ids)
    advantages = np.where(np.isnan(R), np.nan, 0.0)
    comparable = _comparable_groups(R, groups)
    deviations = [R[members] - R[members].mean() for members in comparable]
    for members, a in zip(comparable, _scaled("scale_rewards", scale, deviations, std_min), strict=True):
        advantages[members] = a
    return advantages


def turn_advantages(outcomes: ArrayLike, group_ids: ArrayLike, turn_scores: Sequence[ArrayLike], **options: Any) -> list[Array]:
    """A_{i,tau} for every turn of every rollout: the sums of `credit_terms`, which has the options. N arrays, the i-th (T_i,)."""
    return [terms.advantage for terms in credit_terms(outcomes, group_ids, turn_scores, **options)]


def credit_terms(
    outcomes: ArrayLike,
    group_ids: ArrayLike,
    turn_scores: Sequence[ArrayLike],
    *,
    alpha: float = 15.0,
    outcome_weight: float = 1.0,
    centering: str | Centering = "rollout",
    credit: str = "immediate",
    gamma: float = 1.0,
    std_min: float = 0.1,
    scale: str = "group",
    turn_scale: str = "none",
    turn_std_min: float = 0.01,
    center_weights: Sequence[ArrayLike] | None = None,
    tags: Sequence[Hashable] | None = None,
    continuations: Sequence[Sequence[ArrayLike]] | None = None,
) -> list[CreditTerms]:
    """Both terms of the turn advantages of each of N rollouts.

    outcomes (N,), group_ids (N,) as in `outcome_advantages`; turn_scores: N sequences, the i-th of length T_i >= 0.
    gamma in [0, 1] discounts `reward_to_go` and `smeared`. turn_scale, turn_std_min: what c - b is divided by, as `scale` and
    `std_min` for outcomes. center_weights: as turn_scores, how much each turn weighs in the means that make a baseline, for
    example its trained tokens; None weighs all alike. A centering that is given as an object (`make_centering`) is used as it is
    and then updated with all valid rollouts. tags (N,): what it may remember groups by, equal within a group; the group ids where
    absent. continuations: for `vine`, as turn_scores, the outcomes of the valid continuations from after each turn, any number.

    Raises ValueError for an unknown option, for sequences that do not match, for `vine` without continuations, and for a valid
    rollout without turns; CreditError where a function of one's own fails or gives another form.
    """
    center = centering if isinstance(centering, Centering) else make_centering(centering)
    R, groups = _checked(outcomes, group_ids)
    if len(turn_scores) != len(R):
        raise ValueError(f"{len(R)} outcomes but {len(turn_scores)} sequences of turn scores")
    A = outcome_advantages(R, groups, std_min=std_min, scale=scale)
    r = [np.asarray(scores, dtype=np.float64) for scores in turn_scores]
    if credit == VINE and (continuations is None or [len(x) for x in continuations] != [len(x) for x in r]):
        raise ValueError(f"credit {VINE!r} needs the outcomes of the continuations from after every turn")
    w = _weights(center_weights, r)
    turn = [np.zeros(len(scores)) for scores in r]
    valid, compared_groups, deviations = [], [], []
    for members in _valid_groups(R, groups):
        compared = len(members) >= 2
        if compared and (empty := [i for i in members if not len(r[i])]):
            raise ValueError(f"rollout {empty[0]} has an outcome but no turns")
        tag = groups[members[0]].item() if tags is None else tags[members[0]]
        if credit == VINE and continuations is not None:
            c = vine_credits(R[members], [continuations[i] for i in members])
        else:
            c = turn_credits([r[i] for i in members], credit=credit, gamma=gamma)
        valid.append(Group(c, [w[i] for i in members], tag))
        if compared:
            compared_groups.append(members)
            deviations.append(np.concatenate([c_i - b for c_i, b in zip(c, center.baselines(valid[-1]), strict=True)]))
    for members, d in zip(compared_groups, _scaled("turn_scale", turn_scale, deviations, turn_std_min), strict=True):
        for i, d_i in zip(members, np.split(d, np.cumsum([len(r[i]) for i in members])[:-1]), strict=True):
            turn[i] = alpha * d_i
    called(center.where, center.update, valid)
    return [CreditTerms(outcome_weight * float(a), terms) for a, terms in zip(A, turn, strict=True)]


def turn_credits(turn_scores: Sequence[ArrayLike], *, credit: str = "immediate", gamma: float = 1.0) -> list[Array]:
    """c_{i,tau}: N arrays, the i-th (T_i,)."""
    credited, where = choose("credit", CREDITS, credit), f"credit = {credit!r}"
    r = [np.asarray(scores, dtype=np.float64) for scores in turn_scores]
    return [numbers(where, called(where, credited, x, gamma), len(x)) if len(x) else x for x in r]


def vine_credits(outcomes: ArrayLike, continuations: Sequence[Sequence[ArrayLike]]) -> list[Array]:
    """c_{i,tau} = V_{i,tau} - V_{i,tau-1}, for the valid rollouts of a group: how a turn changed the outcome to be expected.

    V_{i,0} is the mean outcome of the siblings, V_{i,T} = R_i, and in between V_{i,tau} is the mean outcome of
    `continuations[i][tau - 1]`, episodes that were played on from after turn tau under the same policy. Where none is valid, a turn
    shares the change up to the next V that is known (`types.turn_rewards`). Unbiased, whatever pays off when; k continuations add
    noise that falls with 1 / k. The credits of a rollout sum to R_i - V_{i,0}, the outcome's own advantage, so begin with
    `outcome_weight = 0` and no centering. Source: VinePPO (arXiv 2410.01679).

    Returns N arrays, the i-th (T_i,); a lone rollout has credits of 0."""
    R = np.asarray(outcomes, dtype=np.float64)
    if len(R) < 2:
        return [np.zeros(len(of_turns)) for of_turns in continuations]
    siblings = (R.sum() - R) / (len(R) - 1)
    return [_vine(r, v, of_turns) for r, v, of_turns in zip(R.tolist(), siblings.tolist(), continuations, strict=True)]


def _vine(outcome: float, value: float, continuations: Sequence[ArrayLike]) -> Array:
    changes: list[float | None] = []
    for turn, played in enumerate(continuations, 1):
        found = [outcome] if turn == len(continuations) else np.asarray(played, dtype=np.float64)
        now = float(np.mean(found)) if len(found) else None
        changes.append(None if now is None else now - value)
        value = value if now is None else now
    return np.array(turn_rewards(changes))


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


# --- scale: from R - mean_s R of each group's valid rollouts, or c - b of its turns, to the terms ------------------------


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
    """c = r: what the turn itself changed. Biased where a turn pays off only later: whatever the centering, it can then
    teach the opposite."""
    return r


def _reward_to_go(r: Array, gamma: float) -> Array:
    """c_tau = sum_{k >= tau} gamma^{k - tau} r_k: what came of the turn. Unbiased at gamma = 1, and noisier."""
    c = r.copy()
    for tau in range(len(r) - 2, -1, -1):
        c[tau] += gamma * c[tau + 1]
    return c


def _smeared(r: Array, gamma: float) -> Array:
    """c_tau = sum_{k >= tau} r_k gamma^{k - tau} / sum_{d <= k} gamma^d: each reward is shared out over its own turn and those
    before it, and the credits of a rollout sum to its rewards. gamma = 0 is `immediate`, gamma = 1 shares alike. Biased: a turn
    gets only a share of what it caused, the smaller the later it came. Source: prime-rl#3282."""
    if not len(r):
        return r
    lag = np.subtract.outer(np.arange(len(r)), np.arange(len(r)))  # (k, tau)
    shares = np.where(lag >= 0, np.power(gamma, np.maximum(lag, 0), dtype=np.float64), 0.0)
    shares /= shares.sum(axis=1, keepdims=True)
    return np.asarray(r @ shares, dtype=np.float64)


SCALES: dict[str, Callable[[list[Array], float], list[Array]]] = {
    "group": _scale_by_group,
    "batch": _scale_by_batch,
    "none": _scale_not,
}
CREDITS: dict[str, Callable[[Array, float], Array]] = {
    "immediate": _immediate,
    "reward_to_go": _reward_to_go,
    "smeared": _smeared,
}
VINE = "vine"  # the credit that is made of outcomes of continuations (`vine_credits`), not of turn scores
CREDIT_NAMES = (*CREDITS, VINE)
DISCOUNTED = ("reward_to_go", "smeared")  # the credits that read gamma


# --- helpers -------------------------------------------------------------------------------------------------------------


def _scaled(field: str, name: str, deviations: list[Array], std_min: float) -> list[Array]:
    """The deviations of each group, scaled by the function that the option `field` names; checked."""
    where, scale = f"{field} = {name!r}", choose(field, SCALES, name)
    found = listed(where, called(where, scale, deviations, std_min), len(deviations), "groups")
    return [numbers(where, scaled, len(d)) for scaled, d in zip(found, deviations, strict=True)]


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
    return [members for members in _valid_groups(R, groups) if len(members) >= 2]


def _valid_groups(R: Array, groups: NDArray[Any]) -> list[NDArray[np.intp]]:
    """The same for the groups with at least one."""
    valid = ~np.isnan(R)
    members = [np.flatnonzero((groups == g) & valid) for g in np.unique(groups)]
    return [m for m in members if len(m)]
