"""From the episodes of a step to what the trainer trains on.

Credit needs whole groups, and groups may be spread over processes: each process summarises its episodes in a few numbers,
the summaries are gathered, and every process computes the same credit and picks its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctcgrpo import credit
from ctcgrpo.recipe import Recipe
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


@dataclass(frozen=True, slots=True)
class CreditOptions:
    """The options of `credit.turn_advantages`, and the shaping of outcomes that comes before it."""

    alpha: float = 15.0
    centering: str = "rollout"
    credit: str = "immediate"
    gamma: float = 1.0
    center_weights: Literal["turn", "token"] = "turn"
    scale: str = "group"
    std_min: float = 0.1
    shuffle: Literal["nothing", "turn_scores", "advantages"] = "nothing"
    """A control: what is dealt out at random over the turns of a step, by `shuffle_seed` and the step."""
    shuffle_seed: int = 0
    shaping: tuple[float, float] | None = None
    """(penalty for no reasoning, penalty for a fault), or None for a policy that does not reason."""


def credit_options(recipe: Recipe) -> CreditOptions:
    """What a recipe says of credit and scoring."""
    credit, scoring = recipe.credit, recipe.scoring
    return CreditOptions(
        alpha=credit.alpha,
        centering=credit.centering,
        credit=credit.credit,
        gamma=credit.gamma,
        center_weights=credit.center_weights,
        scale=credit.scale,
        std_min=credit.std_min,
        shuffle=credit.shuffle,
        shuffle_seed=recipe.run.seed,
        shaping=(scoring.no_reasoning_penalty, scoring.fault_penalty) if recipe.policy.reasons else None,
    )


def summarise(episode: Episode, options: CreditOptions) -> Summary:
    reward = episode.outcome
    if options.shaping is not None:
        no_reasoning, fault = options.shaping
        reward = shaped_outcome(
            episode.outcome,
            [turn_form(turn.reasoning, turn.faults) for turn in episode.turns],
            no_reasoning=no_reasoning,
            fault=fault,
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
    summaries: Sequence[Summary], options: CreditOptions, baseline: credit.SceneBaseline, *, step: int = 0
) -> StepCredit:
    """Credit over all episodes of a step, whichever process played them; `baseline` is what earlier steps left."""
    rewards, groups = [s.reward for s in summaries], [s.group for s in summaries]
    trained = credit.in_loss(rewards, groups)
    scores = [np.asarray(s.turn_scores) for s in summaries]
    if options.shuffle == "turn_scores":
        dealt = iter(
            credit.shuffled([r for r, use in zip(scores, trained, strict=True) if use], [options.shuffle_seed, step])
        )
        scores = [next(dealt) if use else r for r, use in zip(scores, trained, strict=True)]
    weights = [s.turn_tokens for s in summaries] if options.center_weights == "token" else None
    outcome = credit.outcome_advantages(rewards, groups, std_min=options.std_min, scale=options.scale)
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
        scale=options.scale,
    )
    credits = credit.turn_credits(scores, credit=options.credit, gamma=options.gamma)
    valid = [k for k, s in enumerate(summaries) if not s.failure]
    turn_terms = [t - a for t, a, use in zip(turns, outcome, trained, strict=True) if use]
    advantages = [t for t, use in zip(turns, trained, strict=True) if use]
    if options.shuffle == "advantages":
        advantages = credit.shuffled(advantages, [options.shuffle_seed, step])
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
