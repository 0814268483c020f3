"""From the episodes of a step to what the trainer trains on.

Credit needs whole groups, and groups may be spread over processes: each process summarises its episodes in a few numbers,
the summaries are gathered, and every process computes the same credit and picks its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctcgrpo import credit
from ctcgrpo.options import CreditOptions
from ctcgrpo.scoring import shaped_outcome, turn_form
from ctcgrpo.types import Episode, Info, TurnSample, turn_rewards


@dataclass(frozen=True, slots=True)
class Summary:
    """An episode in numbers; `outcome` is the raw one (NaN for a failed episode), `reward` the shaped one. `final` holds the
    numbers of the last turn's info."""

    tag: str
    group: int
    rollout: int
    outcome: float
    reward: float
    turn_scores: tuple[float, ...]
    final: Mapping[str, float]
    failure: str | None
    turn_tokens: tuple[int, ...]
    cut_turns: int
    empty_turns: int
    dropped_exchanges: int


def summarise(episode: Episode, options: CreditOptions) -> Summary:
    reward = episode.outcome
    if options.reasons:
        reward = shaped_outcome(
            episode.outcome,
            [turn_form(turn.reasoning, turn.faults) for turn in episode.turns],
            no_reasoning=options.no_reasoning_penalty,
            fault=options.fault_penalty,
        )
    return Summary(
        tag=episode.tag,
        group=episode.group,
        rollout=episode.rollout,
        outcome=episode.outcome,
        reward=reward,
        turn_scores=turn_rewards([turn.reward for turn in episode.turns]),
        final=numbers(episode.final_info),
        failure=episode.failure.kind if episode.failure else None,
        turn_tokens=tuple(len(turn.completion.token_ids) for turn in episode.turns),
        cut_turns=sum("cut" in turn.faults for turn in episode.turns),
        empty_turns=sum("empty_reply" in turn.faults for turn in episode.turns),
        dropped_exchanges=max((turn.dropped_exchanges for turn in episode.turns), default=0),
    )


def numbers(info: Info) -> dict[str, float]:
    """What of an info is a number."""
    return {name: float(value) for name, value in info.items() if isinstance(value, int | float)}


Key = tuple[int, int]
"""(group, rollout): which episode of a step."""


@dataclass(frozen=True, slots=True)
class StepCredit:
    """The credit of one step. `advantages` holds only the episodes that are trained on; `baseline` is the scene baseline
    for the next step."""

    baseline: credit.SceneBaseline
    advantages: Mapping[Key, tuple[float, ...]]
    turn_term_std: float
    outcome_term_std: float
    groups_without_signal: float


def step_credit(
    summaries: Sequence[Summary], options: CreditOptions, baseline: credit.SceneBaseline, *, step: int = 0, seed: int = 0
) -> StepCredit:
    """Credit over all episodes of a step, whichever process played them; `baseline` is what earlier steps left;
    `seed` is that of `shuffle_credit`."""
    rewards, groups = [s.reward for s in summaries], [s.group for s in summaries]
    trained = credit.in_loss(rewards, groups)
    scores = [np.asarray(s.turn_scores) for s in summaries]
    if options.shuffle_credit == "turn_scores":
        dealt = iter(credit.shuffled([r for r, use in zip(scores, trained, strict=True) if use], [seed, step]))
        scores = [next(dealt) if use else r for r, use in zip(scores, trained, strict=True)]
    weights = [s.turn_tokens for s in summaries] if options.center_weights == "token" else None
    outcome = credit.outcome_advantages(rewards, groups, std_min=options.std_min, scale=options.scale_rewards)
    turns = credit.turn_advantages(
        rewards,
        groups,
        scores,
        alpha=options.alpha,
        centering=options.centering,
        credit=options.credit,
        gamma=options.gamma,
        center_weights=weights,
        scene_baseline={s.group: baseline.of(s.tag) for s in summaries},
        std_min=options.std_min,
        scale=options.scale_rewards,
    )
    credits = credit.turn_credits(scores, credit=options.credit, gamma=options.gamma)
    valid = [k for k, s in enumerate(summaries) if not s.failure]
    turn_terms = [t - a for t, a, use in zip(turns, outcome, trained, strict=True) if use]
    advantages = [t for t, use in zip(turns, trained, strict=True) if use]
    if options.shuffle_credit == "advantages":
        advantages = credit.shuffled(advantages, [seed, step])
    return StepCredit(
        baseline=credit.updated_baseline(
            baseline,
            [summaries[k].tag for k in valid],
            [credits[k] for k in valid],
            None if weights is None else [weights[k] for k in valid],
        ),
        advantages={
            (s.group, s.rollout): tuple(a.tolist())
            for s, a in zip((s for s, use in zip(summaries, trained, strict=True) if use), advantages, strict=True)
        },
        turn_term_std=float(np.concatenate(turn_terms).std()) if turn_terms else 0.0,
        outcome_term_std=float(outcome[trained].std()) if trained.any() else 0.0,
        groups_without_signal=credit.groups_without_signal(rewards, groups),
    )


def turn_samples(
    episodes: Sequence[Episode], advantages: Mapping[Key, tuple[float, ...]], *, recorded: bool = False
) -> list[TurnSample]:
    """One sample for each turn of each episode that is trained on; `recorded` takes the engine's log-probabilities as
    the old ones."""
    return [
        TurnSample(
            prompt_ids=turn.prompt_ids,
            completion_ids=turn.completion.token_ids,
            advantage=advantage,
            old_logprobs=turn.completion.logprobs if recorded else None,
        )
        for episode in episodes
        if (key := (episode.group, episode.rollout)) in advantages
        for turn, advantage in zip(episode.turns, advantages[key], strict=True)
    ]


def update_of(episode: Episode, updates: int) -> int:
    """Which of the step's updates an episode belongs to: each takes an equal share of every group, whatever the number
    of processes."""
    return (episode.rollout + episode.group) % updates
