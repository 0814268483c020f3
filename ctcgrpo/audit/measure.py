"""An audit: episodes as the recipe says, the gradient of every turn once, and from these the gradient of every group under every
kind of credit, since advantages enter it linearly."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object

from ctcgrpo import __version__
from ctcgrpo.audit.kinds import BASELINE, kinds, of_one_step, package_sections
from ctcgrpo.audit.record import Audit, OfTag, StepMoments, estimate, of_credit
from ctcgrpo.audit.statistics import Floats, Turns, agreement, credit_figures, moments, prediction
from ctcgrpo.centering import make_centering
from ctcgrpo.credit import VINE, in_loss, vine_credits
from ctcgrpo.errors import RunFailed
from ctcgrpo.options import CreditOptions
from ctcgrpo.training.samples import Key, StepCredit, Summary, step_credit, summarise, turn_samples
from ctcgrpo.types import Episode
from ctcgrpo.util.terminal import LogLine

if TYPE_CHECKING:
    from ctcgrpo.training.trainer import CTCGRPOTrainer

REFERENCE = "outcome"
"""The name of the unscaled outcome term, whose gradient is that of the expected outcome."""
_FEWEST = 3
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class PlayedStep:
    """A batch of episodes as a step of training plays it: the summaries of all processes, and of this process's trained turns the
    sketches (n, D), in the order of `turns`: (episode, turn from 0)."""

    summaries: Sequence[Summary]
    turns: Sequence[tuple[Key, int]]
    sketches: np.ndarray[Any, np.dtype[np.float32]]


def played_steps(
    trainer: "CTCGRPOTrainer", steps: int, *, continuations: int, log_line: LogLine = lambda _: None
) -> list[PlayedStep]:
    """The first `steps` batches of the trainer's schedule, with the policy that it has now. All processes call it. Raises
    TooManyFailures, RunPaused."""
    trainer.runner.play = replace(trainer.runner.play, continuations=continuations)
    accelerator = trainer.accelerator
    found = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        episodes = trainer.collect(step, trainer.share_of(step))
        seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            turns = sum(len(e.turns) for e in episodes)
            log_line(f"batch {step} of {steps}: episodes took {seconds:.0f} s; computing the gradients of {turns} turns")
        found.append(sketched(trainer, episodes))
        if accelerator.is_main_process:
            scored = [e.outcome for e in episodes if e.failure is None]
            mean = f"mean outcome {np.mean(scored):+.3f}, " if scored else ""
            log_line(f"batch {step} of {steps}: {mean}gradients took {time.perf_counter() - started - seconds:.0f} s")
    return found


def sketched(trainer: "CTCGRPOTrainer", episodes: Sequence[Episode]) -> PlayedStep:
    """This process's episodes of a step, with the sketches of their turns."""
    summaries = gather_object([summarise(e, trainer.args) for e in episodes])
    trainer.refuse_failures(summaries, episodes)
    mask = in_loss([s.reward for s in summaries], [s.group for s in summaries])
    trained = {(s.group, s.rollout) for s, kept in zip(summaries, mask, strict=True) if kept}
    mine = [e for e in episodes if (e.group, e.rollout) in trained]
    ones = {(e.group, e.rollout): (1.0,) * len(e.turns) for e in mine}
    turns = [((e.group, e.rollout), k) for e in mine for k in range(len(e.turns))]
    return PlayedStep(summaries, turns, trainer.sketches(turn_samples(mine, ones)))


def group_gradients(
    trainer: "CTCGRPOTrainer", steps: Sequence[PlayedStep], credits: Mapping[str, CreditOptions]
) -> dict[str, Floats]:
    """By kind of credit (N, D): the sketched gradient of each group of each step. All processes call it, with the same result."""
    found = {}
    for name, options in credits.items():
        given = credits_of(steps, options, seed=trainer.args.seed)
        mine = [_of_groups(step, credit) for step, credit in zip(steps, given, strict=True)]
        every: list[dict[tuple[int, int], Floats]] = gather_object(
            [{(k, group): g for k, groups in enumerate(mine) for group, g in groups.items()}]
        )
        keys = sorted({key for part in every for key in part})
        found[name] = np.array([sum(part[key] for part in every if key in part) for key in keys])
    return found


def credits_of(steps: Sequence[PlayedStep], options: CreditOptions, *, seed: int) -> list[StepCredit]:
    """The credit of each step by itself. A centering with a state has learned from all steps but this one, so that no episode is in
    its own baseline, as in training."""
    found = []
    for k, step in enumerate(steps):
        centering = make_centering(options.centering)
        if centering.state_dict() is not None:
            for other, played in enumerate(steps):
                if other != k:
                    step_credit(played.summaries, options, centering, step=other, seed=seed)
        found.append(step_credit(step.summaries, options, centering, step=k, seed=seed))
    return found


def _of_groups(step: PlayedStep, credit: StepCredit) -> dict[int, Floats]:
    """By group: this process's part of its gradient (D,)."""
    advantages = np.array([credit.turns[key][turn].advantage for key, turn in step.turns])
    groups = np.array([group for (group, _), _ in step.turns])
    return {int(g): advantages[groups == g] @ step.sketches[groups == g].astype(np.float64) for g in np.unique(groups)}


def effects_by_tag(steps: Sequence[PlayedStep]) -> dict[str, list[Turns]]:
    """By tag, for each group: the reward of each turn beside its effect on the outcome, by continuations (`vine_credits`)."""
    found: dict[str, list[Turns]] = {}
    for step in steps:
        mask = in_loss([s.reward for s in step.summaries], [s.group for s in step.summaries])
        by_group: dict[int, list[Summary]] = {}
        for summary, kept in zip(step.summaries, mask, strict=True):
            if kept:
                by_group.setdefault(summary.group, []).append(summary)
        for group in by_group.values():
            known = [s for s in group if all(len(of_turn) > 1 for of_turn in s.continuations[:-1])]
            if len(group) < _FEWEST or not known:
                continue
            of_group = vine_credits([s.reward for s in group], [s.continuations for s in group])
            credits = dict(zip(map(id, group), of_group, strict=True))
            start = float(np.var([s.reward for s in group], ddof=1)) / (len(group) - 1)  # of the siblings' mean
            errors = [np.array([start, *map(_error, s.continuations[:-1])]) for s in known]
            turns = Turns(
                rewards=np.concatenate([s.turn_scores for s in known]),
                effects=np.concatenate([credits[id(s)] for s in known]),
                errors=np.concatenate([e + np.append(e[1:], 0.0) for e in errors]),  # of the value before and the one after
            )
            found.setdefault(group[0].tag, []).append(turns)
    return found


def _error(outcomes: Sequence[float]) -> float:
    """The variance of the mean of two outcomes or more."""
    return float(np.var(outcomes, ddof=1)) / len(outcomes)


def measure(
    trainer: "CTCGRPOTrainer",
    steps: Sequence[PlayedStep],
    found: Mapping[str, CreditOptions],
    source: str,
    *,
    baseline: str = BASELINE,
) -> Audit:
    """The figures of steps that one policy has played. `found`: what to compare, with `baseline`, which gains are relative to. All
    processes call it. Raises RunFailed where groups are too few, or too alike, to be compared."""
    gradients = _with_reference(trainer, steps, found)
    groups = len(gradients[REFERENCE])
    if groups < _FEWEST:
        raise RunFailed(f"{groups} groups with two valid episodes or more; an audit needs at least {_FEWEST}: raise --groups")
    if not np.any(np.abs(gradients[REFERENCE]) > _NOTHING):
        raise RunFailed(f"the outcomes of the {groups} groups do not vary, so nothing can be compared: try more --groups")
    batch, continuations = trainer.tasks_per_step, trainer.runner.play.continuations
    figures = credit_figures(gradients, reference=REFERENCE, baseline=baseline, batch=batch)
    by_tag = effects_by_tag(steps) if continuations > 1 else {}
    valid = [s for step in steps for s in step.summaries if not s.failure]
    return Audit(
        version=__version__,
        source=source,
        groups=groups,
        batch=batch,
        baseline=baseline,
        credits={name: of_credit(of) for name, of in figures.items() if name != REFERENCE},
        episodes=len(valid),
        failed=sum(len(step.summaries) for step in steps) - len(valid),
        turns=sum(len(s.turn_scores) for s in valid),
        continuations=continuations,
        agreement=estimate(agreement(gradients, reference=REFERENCE, batch=batch)),
        tags={tag: OfTag(groups=len(of), correlation=estimate(prediction(of))) for tag, of in by_tag.items()},
    )


def audit_step(trainer: "CTCGRPOTrainer", step: int, episodes: Sequence[Episode]) -> StepMoments | None:
    """The moments of a step of training (from 1), before its update; `episodes` are this process's. None where fewer than two
    groups can be compared. All processes call it."""
    played = sketched(trainer, episodes)
    found = of_one_step(kinds(package_sections(), trainer.args, vine=trainer.args.credit == VINE))
    gradients = _with_reference(trainer, [played], found)
    groups = len(gradients[REFERENCE])
    if groups < 2:
        return None
    m = moments(gradients, reference=REFERENCE)
    of_credits = {
        name: (float(m.square[k, 0]), float(m.spread[k, 0]), float(m.along[k, 0]))
        for k, name in enumerate(gradients)
        if name != REFERENCE
    }
    return StepMoments(step=step, groups=groups, reference=float(m.reference[0]), credits=of_credits)


def _with_reference(
    trainer: "CTCGRPOTrainer", steps: Sequence[PlayedStep], found: Mapping[str, CreditOptions]
) -> dict[str, Floats]:
    outcome_alone = replace(found[BASELINE], alpha=0.0, scale_rewards="none", outcome_weight=1.0)
    return group_gradients(trainer, steps, {REFERENCE: outcome_alone, **found})
