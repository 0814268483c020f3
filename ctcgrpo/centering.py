"""Baselines of turn credits: from a group's valid rollouts to the baseline of each, a number or (T_i,)."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctcgrpo.credit_calls import Array, called, choose, listed, numbers
from ctcgrpo.errors import CreditError


@dataclass(frozen=True, slots=True)
class Group:
    """The valid rollouts of one group: credits c and center weights w, one (T_i,) each. `tag`: key for baselines that keep a
    state; for EIBench the scene."""

    c: list[Array]
    w: list[Array]
    tag: Hashable = ""


Baselines = Sequence[float] | Sequence[Array]


class Centering:
    """A baseline. For one with a state over steps, subclass it and define `update`, `state_dict` and `load_state_dict` together.
    Every process makes one instance per run, without arguments."""

    where = "centering"  # the name in errors

    def __call__(self, group: Group) -> Baselines:
        """The baseline of each rollout of the group, which has two or more."""
        raise NotImplementedError

    def update(self, groups: Sequence[Group]) -> None:
        """Update the state after a step's credit. The result must not depend on the order of groups or rollouts."""

    def state_dict(self) -> Mapping[str, Any] | None:
        """The state for a checkpoint, as JSON-serializable data; None without a state."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`. Raises ValueError for anything else."""
        raise ValueError("there is no state to load")

    def baselines(self, group: Group) -> list[Array]:
        """The result of a call, checked. Raises CreditError."""
        found = listed(self.where, called(self.where, self, group), len(group.c), "rollouts")
        return [numbers(self.where, b, len(c), or_one=True) for b, c in zip(found, group.c, strict=True)]


class _Stateless(Centering):
    """A function as a Centering."""

    def __init__(self, function: Callable[[Group], Baselines]) -> None:
        self._function = function

    def __call__(self, group: Group) -> Baselines:
        return self._function(group)


def make_centering(name: str) -> Centering:
    """The centering of that name, a new object. Raises ValueError for an unknown name, RecipeError for a reference that cannot be
    loaded, CreditError for a class that is no Centering, or only part of one with a state."""
    chosen: Any = choose("centering", CENTERINGS, name)
    where = f"centering = {name!r}"
    if not isinstance(chosen, type):
        made: Centering = _Stateless(chosen)
    elif not issubclass(chosen, Centering):
        raise CreditError(
            f"{where}: {chosen.__name__} is a class; expected a function or a subclass of ctcgrpo.centering.Centering"
        )
    else:
        own = {n: getattr(chosen, n) is not getattr(Centering, n) for n in ("update", "state_dict", "load_state_dict")}
        if any(own.values()) and not all(own.values()):
            lacks = ", ".join(n for n, there in own.items() if not there)
            raise CreditError(f"{where}: {chosen.__name__} has a state but lacks {lacks}; a resumed run would lose it")
        made = called(where, chosen)
    made.where = where
    return made


def _center_rollout(group: Group) -> Sequence[float]:
    """Mean over the rollout's own turns (the paper). Turn terms sum to zero over a rollout (weighted by w): they move
    credit between its turns and leave the outcome term to compare rollouts. A rollout that is good throughout gains
    nothing by it. It scales `immediate` by 1 - 1 / T where turns have nothing to do with each other; where they have, it is biased,
    and with `reward_to_go` it can point away from what pays off: what all turns of a rollout share is taken out."""
    return [float(np.average(c, weights=w)) for c, w in zip(group.c, group.w, strict=True)]


def _center_group(group: Group) -> Sequence[float]:
    """Mean over all turns of all valid rollouts of the group: a rollout whose turns are better than its siblings' gains on
    every turn. The rollout's own turns are in the mean, which shrinks its terms by about 1 / G and biases them a little."""
    return [float(np.average(np.concatenate(group.c), weights=np.concatenate(group.w)))] * len(group.c)


def _center_group_turn(group: Group) -> Sequence[Array]:
    """Mean over the group's valid rollouts that reached turn tau; alone there, the turn's credit is 0.

    Takes out what a turn's position explains. With `reward_to_go` biased by the rollout's own share in the mean alone: a factor
    1 - 1 / G where all dialogues are equally long, and a little more where few reach a turn. The bias of verl#7244, where longer
    dialogues pay for their length, is that of rewards that are centered first and summed afterwards; here they are summed first."""
    c, w = _by_turn(group)
    mean = (c * w).sum(axis=0) / w.sum(axis=0)
    return [mean[: len(credits)] for credits in group.c]


def _center_group_loo(group: Group) -> Sequence[float]:
    """Mean over all turns of the siblings, without the rollout's own (leave-one-out, as RLOO does for outcomes): unbiased with
    `reward_to_go`, where `group` is only nearly so."""
    sums = np.array([np.dot(c, w) for c, w in zip(group.c, group.w, strict=True)])
    weights = np.array([np.sum(w) for w in group.w])
    return list((sums.sum() - sums) / (weights.sum() - weights))


def _center_group_turn_loo(group: Group) -> Sequence[Array]:
    """Mean over the siblings that reached turn tau, without the rollout's own; 0 where none did, so that a rollout that is alone
    there has its whole credit. Unbiased with `reward_to_go`, whoever decides when a dialogue ends."""
    c, w = _by_turn(group)
    siblings = w.sum(axis=0) - w
    with np.errstate(invalid="ignore"):
        mean = np.where(siblings > 0, ((c * w).sum(axis=0) - c * w) / siblings, 0.0)
    return [mean[i, : len(credits)] for i, credits in enumerate(group.c)]


def _by_turn(group: Group) -> tuple[Array, Array]:
    """Credits and weights (G, longest), 0 beyond a rollout's last turn."""
    c, w = np.zeros((2, len(group.c), max(map(len, group.c))))
    for i, (credits, weights) in enumerate(zip(group.c, group.w, strict=True)):
        c[i, : len(credits)], w[i, : len(credits)] = credits, weights
    return c, w


class SceneBaseline(Centering):
    """Running mean per scene (the group's tag) and turn over earlier steps: no rollout is in its own baseline, so with
    `reward_to_go` it is unbiased; it lags behind a policy that improves."""

    def __init__(self, means: Mapping[Any, Sequence[float]] | None = None) -> None:
        """`means`: initial means by tag and turn."""
        self._sums: dict[Any, list[float]] = {tag: list(values) for tag, values in (means or {}).items()}
        self._weights: dict[Any, list[float]] = {tag: [1.0] * len(values) for tag, values in self._sums.items()}

    def of(self, tag: Hashable) -> tuple[float, ...]:
        """The means of a scene's turns, from the first on; nothing for a scene not seen yet."""
        return tuple(s / w for s, w in zip(self._sums.get(tag, ()), self._weights.get(tag, ()), strict=True))

    def __call__(self, group: Group) -> Sequence[Array]:
        means, baselines = self.of(group.tag), []
        for credits in group.c:
            b = np.zeros(len(credits))
            b[: len(means)] = means[: len(credits)]
            baselines.append(b)
        return baselines

    def update(self, groups: Sequence[Group]) -> None:
        rollouts: dict[Any, list[tuple[Array, Array]]] = {}
        for group in groups:
            rollouts.setdefault(group.tag, []).extend(zip(group.c, group.w, strict=True))
        for tag, here in rollouts.items():
            sums, weights = self._sums.setdefault(tag, []), self._weights.setdefault(tag, [])
            for tau in range(max((len(c) for c, _ in here), default=0)):
                reached = [(c[tau], w[tau]) for c, w in here if len(c) > tau]
                if len(sums) <= tau:
                    sums.append(0.0)
                    weights.append(0.0)
                # Sorted sums do not depend on the order of the rollouts, so all processes agree to the last bit.
                sums[tau] += float(sum(sorted(c * w for c, w in reached)))
                weights[tau] += float(sum(sorted(w for _, w in reached)))

    def state_dict(self) -> Mapping[str, Any]:
        return {"sums": self._sums, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sums, weights = (_lists(state, name) for name in ("sums", "weights"))
        if {tag: len(values) for tag, values in sums.items()} != {tag: len(values) for tag, values in weights.items()}:
            raise ValueError("sums and weights differ in length")
        if any(w <= 0 for values in weights.values() for w in values):
            raise ValueError("weights must be positive")
        self._sums, self._weights = sums, weights


def _center_not(group: Group) -> Sequence[float]:
    """No baseline (the paper's ablation): while most turns help, all are pushed up, long dialogues the most."""
    return [0.0] * len(group.c)


CENTERINGS: dict[str, Callable[[Group], Baselines] | type[Centering]] = {
    "rollout": _center_rollout,
    "group": _center_group,
    "group_turn": _center_group_turn,
    "group_loo": _center_group_loo,
    "group_turn_loo": _center_group_turn_loo,
    "scene": SceneBaseline,
    "none": _center_not,
}


def _lists(state: Mapping[str, Any], name: str) -> dict[Any, list[float]]:
    """A field of a state that was saved as JSON: lists of finite numbers by tag. Raises ValueError."""
    found = state.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {type(found).__name__}; expected lists of numbers by tag")
    for tag, values in found.items():
        if not isinstance(values, list) or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ValueError(f"{name}.{tag}: expected a list of finite numbers")
    return {tag: [float(v) for v in values] for tag, values in found.items()}
