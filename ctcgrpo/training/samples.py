"""From the episodes of a step to what the trainer trains on.

Credit needs whole groups, and groups may be spread over processes: each process summarises its episodes in a few numbers,
the summaries are gathered, and every process computes the same credit and picks its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ctcgrpo import credit
from ctcgrpo.centering import Centering, make_centering
from ctcgrpo.environments.eibench.scoring import shaped_outcome, turn_form
from ctcgrpo.options import CreditOptions
from ctcgrpo.training.credit_state import state_text
from ctcgrpo.types import Episode, Info, TurnCredit, TurnSample, turn_rewards


@dataclass(frozen=True, slots=True)
class Summary:
    """An episode in numbers; `outcome` is the raw one (NaN for a failed episode), `reward` the shaped one. `final` holds the
    numbers of the last turn's info. `continuations`: for each turn the shaped outcomes of the valid continuations from after it.
    `user`: who played the user where there are several, which the start's info says; else empty."""

    tag: str
    group: int
    rollout: int
    outcome: float
    reward: float
    turn_scores: tuple[float, ...]
    turn_tokens: tuple[int, ...]
    final: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    cut_turns: int = 0
    empty_turns: int = 0
    dropped_exchanges: int = 0
    continuations: tuple[tuple[float, ...], ...] = ()
    failed_continuations: int = 0
    user: str = ""

    @property
    def played_continuations(self) -> int:
        """Failed ones included."""
        return self.failed_continuations + sum(map(len, self.continuations))


def summarise(episode: Episode, options: CreditOptions) -> Summary:
    continued = [turn.continuations for turn in episode.turns]
    return Summary(
        tag=episode.tag,
        group=episode.group,
        rollout=episode.rollout,
        outcome=episode.outcome,
        reward=_shaped(episode, options),
        turn_scores=turn_rewards([turn.reward for turn in episode.turns]),
        final=numbers(episode.final_info),
        failure=episode.failure.kind if episode.failure else None,
        turn_tokens=tuple(len(turn.completion.token_ids) for turn in episode.turns),
        cut_turns=sum("cut" in turn.faults for turn in episode.turns),
        empty_turns=sum("empty_reply" in turn.faults for turn in episode.turns),
        dropped_exchanges=max((turn.dropped_exchanges for turn in episode.turns), default=0),
        continuations=tuple(tuple(_shaped(c, options) for c in of_turn if not c.failure) for of_turn in continued),
        failed_continuations=sum(c.failure is not None for of_turn in continued for c in of_turn),
        user=str(episode.info.get("user", "")),
    )


def _shaped(episode: Episode, options: CreditOptions) -> float:
    """The outcome less the penalties for the form of the reasoning."""
    if not options.reasons:
        return episode.outcome
    return shaped_outcome(
        episode.outcome,
        [turn_form(turn.reasoning, turn.faults) for turn in episode.turns],
        no_reasoning=options.no_reasoning_penalty,
        fault=options.fault_penalty,
    )


def numbers(info: Info) -> dict[str, float]:
    """What of an info is a number."""
    return {name: float(value) for name, value in info.items() if isinstance(value, int | float)}


Key = tuple[int, int]  # (group, rollout): which episode of a step


@dataclass(frozen=True, slots=True)
class StepCredit:
    """The credit of one step: of each turn of the episodes that are trained on, which are all that `turns` holds."""

    turns: Mapping[Key, tuple[TurnCredit, ...]]
    turn_term_std: float
    outcome_term_std: float
    groups_without_signal: float

    @property
    def advantages(self) -> dict[Key, tuple[float, ...]]:
        return {key: tuple(turn.advantage for turn in turns) for key, turns in self.turns.items()}


def step_credit(
    summaries: Sequence[Summary], options: CreditOptions, centering: Centering, *, step: int = 0, seed: int = 0
) -> StepCredit:
    """Credit over all episodes of a step, whichever process played them. `centering` (`make_centering(options.centering)`) is what
    earlier steps left, and learns from this one; `seed` is that of `shuffle_credit`."""
    rewards, groups = [s.reward for s in summaries], [s.group for s in summaries]
    trained = np.flatnonzero(credit.in_loss(rewards, groups)).tolist()
    scores = [np.asarray(s.turn_scores) for s in summaries]
    if options.shuffle_credit == "turn_scores":
        dealt = credit.shuffled([scores[k] for k in trained], [seed, step])
        for k, turns in zip(trained, dealt, strict=True):
            scores[k] = turns
    every = credit.credit_terms(
        rewards,
        groups,
        scores,
        alpha=options.alpha,
        outcome_weight=options.outcome_weight,
        centering=centering,
        credit=options.credit,
        gamma=options.gamma,
        center_weights=[s.turn_tokens for s in summaries] if options.center_weights == "token" else None,
        std_min=options.std_min,
        scale=options.scale_rewards,
        turn_scale=options.turn_scale,
        turn_std_min=options.turn_std_min,
        tags=[s.tag for s in summaries],
        continuations=[s.continuations for s in summaries] if options.credit == credit.VINE else None,
    )
    terms = [every[k] for k in trained]
    advantages = [t.advantage for t in terms]
    if options.shuffle_credit == "advantages":
        advantages = credit.shuffled(advantages, [seed, step])
    return StepCredit(
        turns={
            (summaries[k].group, summaries[k].rollout): tuple(
                TurnCredit(t.outcome, turn, advantage) for turn, advantage in zip(t.turn.tolist(), a.tolist(), strict=True)
            )
            for k, t, a in zip(trained, terms, advantages, strict=True)
        },
        turn_term_std=float(np.concatenate([t.turn for t in terms]).std()) if terms else 0.0,
        outcome_term_std=float(np.std([t.outcome for t in terms])) if terms else 0.0,
        groups_without_signal=credit.groups_without_signal(rewards, groups),
    )


def try_credit(options: CreditOptions) -> None:
    """Compute the credit of a small made-up step, so that what a function of one's own gets wrong shows before a run
    begins. Raises RecipeError, CreditError."""
    scores = ((0.1, -0.05), (0.02,), (-0.1, 0.0, 0.04), (0.03, 0.01))
    outcomes = (0.5, -0.5, 0.1, 0.1)
    summaries = [
        Summary(
            f"group {k // 2}",
            k // 2,
            k % 2,
            outcome,
            outcome,
            of_rollout,
            (10,) * len(of_rollout),
            continuations=((),) * len(of_rollout),
        )
        for k, (outcome, of_rollout) in enumerate(zip(outcomes, scores, strict=True))
    ]
    centering = make_centering(options.centering)
    for step in range(2):  # in the second a centering may remember the first
        step_credit(summaries, options, centering, step=step)
    state_text(options, centering)


def turn_samples(
    episodes: Sequence[Episode], advantages: Mapping[Key, tuple[float, ...]], *, recorded: bool = False
) -> list[TurnSample]:
    """One sample for each turn of each episode that is trained on. `sampled_logprobs` are the engine's; with `recorded` they are
    the old ones too."""
    return [
        TurnSample(
            prompt_ids=np.array(turn.prompt_ids, dtype=np.int32),
            completion_ids=np.array(turn.completion.token_ids, dtype=np.int32),
            advantage=advantage,
            old_logprobs=logprobs if recorded else None,
            sampled_logprobs=logprobs,
        )
        for episode in episodes
        if (key := (episode.group, episode.rollout)) in advantages
        for turn, advantage in zip(episode.turns, advantages[key], strict=True)
        for logprobs in [np.array(turn.completion.logprobs, dtype=np.float32)]
    ]


def episode_weights(
    episodes: Sequence[Episode], samples: Sequence[TurnSample], current: Sequence[npt.NDArray[np.float32]], *, bound: float
) -> list[float]:
    """The importance weight of each sample's episode, in [0, bound]: the probability of all of its replies under the trainer's
    policy over that under the engine's. `episodes`: those that `turn_samples` made `samples` of, in order, without those that it
    left out. `current`: the trainer's log-probabilities of each sample."""
    turns = [len(episode.turns) for episode in episodes]
    logs = [
        float(now.sum() - s.sampled_logprobs.sum())
        for s, now in zip(samples, current, strict=True)
        if s.sampled_logprobs is not None
    ]
    ends = np.cumsum([0, *turns])
    sums = [math.fsum(logs[a:b]) for a, b in pairwise(ends.tolist())]
    return [math.exp(min(total, math.log(bound))) for total, n in zip(sums, turns, strict=True) for _ in range(n)]


def update_of(episode: Episode, updates: int) -> int:
    """Which of the step's updates an episode belongs to: each takes an equal share of every group, whatever the number
    of processes."""
    return (episode.rollout + episode.group) % updates
