"""Bias and noise of every credit, exactly: small decision processes with a tabular softmax policy, enumerated.

    python -m tests.exact_credit [--rollouts 4] [--json FILE]

A process is a tree of histories; in each the policy has some actions, with a reward each, and one may end the dialogue. The
outcome is the sum of the rewards, so the gradient of its expectation is what every credit should point along. A group of G
rollouts gives the estimate

    g = 1/G sum_i sum_tau A_{i,tau} grad log pi(a_{i,tau} | history),

with the advantages of `ctcgrpo.credit.credit_terms`. All groups are enumerated (as multisets of paths, with their probabilities),
so E g and its variance are exact. With J the expected outcome, and a the number for which a * grad J is nearest to E g:

    factor a               1 where nothing is lost; 1 - 1/G where a rollout is in its own mean; the units of a scaled term
    cosine                 of E g and grad J: 1 for an unbiased direction
    bias                   |E g - a grad J| / |a grad J|: 0 for an unbiased direction
    noise                  trace Var(g) / |a grad J|^2: the number of groups for a relative error of 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctcgrpo.centering import CENTERINGS, Centering, SceneBaseline
from ctcgrpo.credit import CREDITS, VINE, CreditTerms, credit_terms, turn_credits

Floats = NDArray[np.float64]
History = tuple[int, ...]
GAMMA = 0.7
"""Of `smeared`; `reward_to_go` is undiscounted."""
CONTINUATIONS = 4
"""Of `vine`."""
_TAG = "scene"


@dataclass(frozen=True)
class Process:
    """`reward` of an action after a history; the dialogue ends after `turns` turns, or with action 0 where `may_end`. The
    policy sees the history, or only the turn's position where `blind`."""

    name: str
    turns: int
    actions: int
    may_end: bool
    reward: Callable[[History, int], float]
    blind: bool = False

    def over(self, path: History) -> bool:
        return len(path) == self.turns or (self.may_end and path[-1:] == (0,))

    def histories(self) -> list[History]:
        """All in which the policy acts."""
        found = [()] if self.turns else []
        for history in found:
            found += [longer for a in range(self.actions) if not self.over(longer := (*history, a))]
        return found

    def states(self) -> dict[History, int]:
        """The row of the policy's table by history."""
        return {h: len(h) if self.blind else k for k, h in enumerate(self.histories())}

    def paths(self) -> list[History]:
        return [(*h, a) for h in self.histories() for a in range(self.actions) if self.over((*h, a))]

    def rewards(self, path: History) -> Floats:
        return np.array([self.reward(path[:tau], path[tau]) for tau in range(len(path))])


def _own(history: History, action: int) -> float:
    """An action has its reward, whatever came before."""
    return 0.01 + 0.03 * action


def _worn(history: History, action: int) -> float:
    """Going on helps at first and hurts in the end; ending (0) leaves things as they are."""
    return 0.0 if action == 0 else (0.05, 0.02, -0.06)[len(history)] * action


def _later(history: History, action: int) -> float:
    """Action 1 costs at once, and pays off in the last turn, for each time that it was taken before."""
    if len(history) < 2:
        return -0.03 * action
    return 0.07 * sum(history) + 0.01 * action


PROCESSES = (
    Process("own", 3, 2, False, _own, blind=True),
    Process("worn", 3, 3, True, _worn),
    Process("later", 3, 2, False, _later),
)
"""own: turns have nothing to do with each other. worn: the policy decides when a dialogue ends. later: a turn pays off later."""


@dataclass(frozen=True)
class Row:
    process: str
    estimator: str
    factor: float
    cosine: float
    bias: float
    noise: float


@dataclass(frozen=True)
class Enumerated:
    """The paths of a process under the policy: probabilities (P,), scores grad log pi of each turn (T_p, D), rewards."""

    process: Process
    probability: Floats
    scores: list[Floats]
    rewards: list[Floats]

    @property
    def outcomes(self) -> Floats:
        return np.array([r.sum() for r in self.rewards])

    def values(self) -> tuple[list[Floats], list[Floats]]:
        """Mean and variance of the outcome after each turn of each path (T_p,)."""
        paths, means, variances = self.process.paths(), [], []
        for path in paths:
            found = []
            for tau in range(1, len(path) + 1):
                p = self.probability * [other[:tau] == path[:tau] for other in paths]
                mean = float(p @ self.outcomes / p.sum())
                found.append((mean, float(p @ (self.outcomes - mean) ** 2 / p.sum())))
            means.append(np.array([mean for mean, _ in found]))
            variances.append(np.array([variance for _, variance in found]))
        return means, variances

    def gradient(self) -> Floats:
        """Of the expected outcome (D,)."""
        return (self.probability * self.outcomes) @ np.array([s.sum(axis=0) for s in self.scores])


def logits(process: Process) -> Floats:
    """Of the policy (states, actions): fixed random numbers."""
    return np.random.default_rng(0).normal(0, 0.7, (max(process.states().values()) + 1, process.actions))


def enumerated(process: Process) -> Enumerated:
    """Under the softmax policy of `logits`."""
    weights = np.exp(logits(process))
    pi, place = weights / weights.sum(axis=1, keepdims=True), process.states()
    probability, scores, rewards = [], [], []
    for path in process.paths():
        at = [place[path[:tau]] for tau in range(len(path))]
        probability.append(math.prod(pi[k, a] for k, a in zip(at, path, strict=True)))
        of_turns = np.zeros((len(path), *pi.shape))
        for tau, (k, a) in enumerate(zip(at, path, strict=True)):
            of_turns[tau, k] = -pi[k]
            of_turns[tau, k, a] += 1
        scores.append(of_turns.reshape(len(path), -1))
        rewards.append(process.rewards(path))
    return Enumerated(process, np.array(probability), scores, rewards)


@dataclass(frozen=True)
class Groups:
    """All multisets of G paths: members (N, G) and their probabilities (N,)."""

    members: NDArray[np.intp]
    probability: Floats


def all_groups(of: Enumerated, rollouts: int) -> Groups:
    members = np.array(list(itertools.combinations_with_replacement(range(len(of.probability)), rollouts)))
    counts = np.array([_orders(group) for group in members])
    return Groups(members, counts * np.prod(of.probability[members], axis=1))


def _orders(group: NDArray[np.intp]) -> float:
    """In how many orders the members of a group can come."""
    repeats = np.unique(group, return_counts=True)[1]
    return math.factorial(len(group)) / math.prod(math.factorial(int(n)) for n in repeats)


def terms_of(of: Enumerated, groups: Groups, *, centering: str | Centering, credit: str, turn_scale: str) -> list[CreditTerms]:
    """The project's own credit of every rollout of every group; alpha = 1, outcomes unscaled."""
    flat = groups.members.reshape(-1)
    ids = np.repeat(np.arange(len(groups.members)), groups.members.shape[1])
    values = of.values()[0]
    return credit_terms(
        of.outcomes[flat],
        ids,
        [of.rewards[p] for p in flat],
        alpha=1.0,
        centering=centering,
        credit=credit,
        gamma=_gamma(credit),
        scale="none",
        turn_scale=turn_scale,
        tags=[_TAG] * len(flat),
        continuations=[[[v] for v in values[p]] for p in flat],
    )


def _gamma(credit: str) -> float:
    return GAMMA if credit == "smeared" else 1.0


def moments(of: Enumerated, groups: Groups, advantages: Sequence[Floats]) -> tuple[Floats, float]:
    """E g (D,) and trace Var(g), for the advantages (T,) of each rollout of each group."""
    flat = groups.members.reshape(-1)
    by_rollout = np.array([A @ of.scores[p] for A, p in zip(advantages, flat, strict=True)])
    g = by_rollout.reshape(*groups.members.shape, -1).mean(axis=1)
    mean = groups.probability @ g
    return mean, float(groups.probability @ (g**2).sum(axis=1) - mean @ mean)


def row(of: Enumerated, name: str, mean: Floats, variance: float) -> Row:
    true = of.gradient()
    length = math.sqrt(true @ true)
    factor = float(mean @ true) / length**2
    pointed = abs(factor) * length
    return Row(
        of.process.name,
        name,
        factor,
        float(mean @ true) / (length * max(math.sqrt(mean @ mean), 1e-300)),
        float(np.linalg.norm(mean - factor * true)) / max(pointed, 1e-300),
        variance / max(pointed, 1e-300) ** 2,
    )


def noise_of_continuations(of: Enumerated, rollouts: int) -> float:
    """What `CONTINUATIONS` sampled outcomes, in place of the exact values that `terms_of` takes, add to trace Var(g). A value
    enters the credits of the turns before and after it with opposite signs."""
    added = 0.0
    for p, scores, variances in zip(of.probability, of.scores, of.values()[1], strict=True):
        apart = ((scores[:-1] - scores[1:]) ** 2).sum(axis=1)
        added += p * float(apart @ variances[:-1]) / CONTINUATIONS
    return added / rollouts


def exact_scene_baseline(of: Enumerated, credit: str) -> SceneBaseline:
    """What `scene` learns from ever more steps under this policy: the mean credit of those that reach a turn."""
    c = turn_credits(of.rewards, credit=credit, gamma=_gamma(credit))
    means = []
    for tau in range(of.process.turns):
        reached = [(p, x[tau]) for p, x in zip(of.probability, c, strict=True) if len(x) > tau]
        means.append(sum(p * x for p, x in reached) / sum(p for p, _ in reached))
    return SceneBaseline({_TAG: means})


def estimators() -> Iterator[tuple[str, str, str]]:
    """(credit, centering, turn_scale) of the table."""
    for credit, centering in itertools.product(CREDITS, CENTERINGS):
        yield credit, centering, "none"
    yield VINE, "none", "none"
    yield "immediate", "group_turn", "group"
    yield "reward_to_go", "group_turn", "group"


def table(rollouts: int = 4, processes: Sequence[Process] = PROCESSES) -> list[Row]:
    """The outcome term by itself, then the turn term of each estimator by itself."""
    rows = []
    for process in processes:
        of = enumerated(process)
        groups = all_groups(of, rollouts)
        terms = terms_of(of, groups, centering="none", credit="immediate", turn_scale="none")
        outcome = [np.full(len(term.turn), term.outcome) for term in terms]
        rows.append(row(of, "outcome (GRPO, unscaled)", *moments(of, groups, outcome)))
        for credit, centering, turn_scale in estimators():
            center = exact_scene_baseline(of, credit) if centering == "scene" else centering
            terms = terms_of(of, groups, centering=center, credit=credit, turn_scale=turn_scale)
            name = f"{credit}, {centering}" + (", scaled" if turn_scale != "none" else "")
            mean, variance = moments(of, groups, [term.turn for term in terms])
            rows.append(row(of, name, mean, variance + (noise_of_continuations(of, rollouts) if credit == VINE else 0.0)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts in a group (G)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = parser.parse_args()
    rows = table(chosen.rollouts)
    print(f"{'process':8}{'estimator':36}{'factor':>8}{'cosine':>8}{'bias':>8}{'noise':>9}")
    for r in rows:
        print(f"{r.process:8}{r.estimator:36}{r.factor:8.3f}{r.cosine:8.3f}{r.bias:8.3f}{r.noise:9.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
