"""What a step's episodes say, as named numbers. Failed episodes are counted, and enter no figure of scores or lengths."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from ctcgrpo.errors import EPISODE_ERRORS, DeadlinePassed
from ctcgrpo.training.samples import StepCredit, Summary


def rollout_metrics(summaries: Sequence[Summary], credit: StepCredit | None) -> dict[str, float]:
    """outcome overall, by tag and by user, the numbers of the last turn's info by tag (final_NAME/TAG); credit; failures by kind;
    lengths. `credit` is None where episodes are not trained on."""
    valid = [s for s in summaries if not s.failure]
    metrics = {
        "outcome/all": _mean(s.outcome for s in valid),
        "reward/all": _mean(s.reward for s in valid),
        "reward/turn": _mean(r for s in valid for r in s.turn_scores),
        "episodes/valid": float(len(valid)),
        "episodes/failed": float(len(summaries) - len(valid)),
        "episodes/turns": _mean(len(s.turn_scores) for s in valid),
        "replies/tokens": _mean(sum(s.turn_tokens) / len(s.turn_scores) for s in valid),
        "replies/cut": _mean(s.cut_turns / len(s.turn_scores) for s in valid),
        "replies/empty": _mean(s.empty_turns / len(s.turn_scores) for s in valid),
        "prompts/dropped_exchanges": float(sum(s.dropped_exchanges for s in summaries)),
    }
    if credit is not None:
        metrics["credit/turn_term_std"] = credit.turn_term_std
        metrics["credit/outcome_term_std"] = credit.outcome_term_std
        metrics["credit/groups_without_signal"] = credit.groups_without_signal
        failed = sum(s.failed_continuations for s in valid)
        if played := sum(s.played_continuations for s in valid):
            metrics |= {"continuations/played": float(played), "continuations/failed": float(failed)}
    for tag in sorted({s.tag for s in valid}):
        here = [s for s in valid if s.tag == tag]
        metrics[f"outcome/{tag}"] = _mean(s.outcome for s in here)
        for name in dict.fromkeys(name for s in here for name in s.final):
            metrics[f"final_{name}/{tag}"] = _mean(s.final[name] for s in here if name in s.final)
    for user in sorted({s.user for s in valid if s.user}):
        of_user = [s.outcome for s in valid if s.user == user]
        metrics |= {f"user/{user}/outcome": _mean(of_user), f"user/{user}/episodes": float(len(of_user))}
    cut = Counter(len(s.turn_scores) for s in summaries if s.failure == DeadlinePassed.kind)
    metrics |= {f"deadline/after_{turns}_turns": float(count) for turns, count in sorted(cut.items())}
    kinds = Counter(s.failure for s in summaries if s.failure)
    return metrics | {f"failed/{error.kind}": float(kinds[error.kind]) for error in EPISODE_ERRORS}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
