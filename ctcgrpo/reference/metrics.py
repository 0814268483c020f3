"""The metrics of a run: what each means, its healthy range, and what to try otherwise. The one place where that is written.

Ranges are rules of thumb, not limits.
Names are those of metrics.jsonl (a line a step) and of W&B. {scene}, {kind}, {turns} and {number} stand for a scene, a kind of
failure, a number of turns and a number in an environment's info. A test compares this table with the metrics of a real run and with
the names in the code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctcgrpo.environments.eibench.records import SCENE_NAME
from ctcgrpo.errors import EPISODE_ERRORS, RecipeError
from ctcgrpo.util.naming import did_you_mean


@dataclass(frozen=True, slots=True)
class Metric:
    """`healthy`: values of a run that learns. `otherwise`: what to look at or change when they are not."""

    name: str
    meaning: str
    healthy: str
    otherwise: str


GROUPS: Mapping[str, Sequence[Metric]] = {
    "Scores of the training episodes": (
        Metric(
            "outcome/all",
            "mean outcome of the step's valid episodes, -1 to 1 (scoring.variant)",
            "rises over tens of steps; jumps from step to step, since every step plays other scenarios",
            "if flat, look at credit/groups_without_signal and grad_norm; raise training.learning_rate or rollout.group_size. "
            "Judge a run by validation, not by one step",
        ),
        Metric(
            "outcome/{scene}",
            "the same for the episodes of one scene",
            "every scene rises in the end",
            "if one scene falls while others rise, read its dialogues (ctcgrpo report); set scoring.turn_weights for it",
        ),
        Metric(
            "reward/all",
            "mean outcome after the penalties for form (policy.reasons); without reasoning the same as outcome/all",
            "close to outcome/all",
            "if far below, replies lack reasoning or break its tags; check the chat template and raise rollout.max_new_tokens",
        ),
        Metric(
            "reward/turn",
            "mean reward of a turn; for EIBench the weighted change of the user's state, in [-0.1, 0.1]",
            "rises with outcome/all",
            "if it stays at 0, no reply changes the user: read the dialogues (ctcgrpo report)",
        ),
        Metric(
            "final_{number}/{scene}",
            "mean at the end of a number that the environment tells; for EIBench the user's anger and trust, 0 to 100",
            "final_anger falls, or stays near the scenarios' target; final_trust rises",
            "if final_anger is 100 in most episodes, the policy is too weak for these scenarios; start from a better model. If "
            "trust falls with anger, the policy calms without helping; weigh trust more (scoring.turn_weights)",
        ),
    ),
    "Credit": (
        Metric(
            "credit/turn_term_std",
            "standard deviation of the turn term of the advantages (alpha * centered turn credit)",
            "0.3 to 1.5, of the order of credit/outcome_term_std; 0 with credit.alpha 0",
            "if much larger, lower credit.alpha; if near 0, the user reacts alike to every reply: read the dialogues",
        ),
        Metric(
            "credit/outcome_term_std",
            "standard deviation of the outcome term of the advantages",
            "0.5 to 1 with credit.scale group",
            "if near 0, the episodes of a group end alike; raise rollout.temperature or rollout.group_size",
        ),
        Metric(
            "credit/groups_without_signal",
            "share of groups whose episodes all have the same outcome, so that the outcome says nothing, 0 to 1",
            "below 0.5",
            "if near 1, raise rollout.group_size or rollout.temperature, or choose scenarios that are neither hopeless nor solved",
        ),
    ),
    "Episodes": (
        Metric(
            "episodes/valid",
            "episodes of the step that count",
            "scenarios.per_step * rollout.group_size",
            "see failed/{kind}",
        ),
        Metric(
            "episodes/failed",
            "episodes that failed; they enter no mean and no loss",
            "0, or a few",
            "see failed/{kind}; a share above rollout.max_failed stops the run",
        ),
        Metric(
            "failed/{kind}",
            "failed episodes by kind: policy_engine, simulator_transport (no server answered), simulator_reply (no usable answer), "
            "deadline",
            "0",
            "the log and traces/*.jsonl name each reason; simulator_transport: check the server and simulator.patience; "
            "simulator_reply: check the simulator's model; deadline: raise rollout.deadline",
        ),
        Metric(
            "deadline/after_{turns}_turns",
            "episodes that rollout.deadline cut, by the turns they had; only logged where there are any",
            "absent",
            "if many are cut late, long dialogues are lost, which biases training; raise rollout.deadline",
        ),
        Metric(
            "episodes/turns",
            "mean turns of an episode",
            "above 1 and at most rollout.max_turns",
            "if near 1, users leave after the first reply; read the dialogues",
        ),
        Metric(
            "replies/tokens",
            "mean tokens of a reply, reasoning included",
            "well below rollout.max_new_tokens, without a steady rise",
            "if it rises to the limit, see replies/cut; if it falls to a few tokens, raise training.entropy_bonus",
        ),
        Metric(
            "replies/cut",
            "share of replies that ran into rollout.max_new_tokens, 0 to 1",
            "below 0.05 (1 for an untrained model that never ends a reply)",
            "raise rollout.max_new_tokens; read some replies in traces/",
        ),
        Metric(
            "replies/empty",
            "share of replies without any visible text, 0 to 1",
            "near 0",
            "if it rises, lower training.learning_rate; with policy.reasons, raise rollout.max_new_tokens",
        ),
        Metric(
            "prompts/dropped_exchanges",
            "oldest exchanges that prompts dropped to fit into rollout.max_prompt_tokens, summed over episodes",
            "0",
            "raise rollout.max_prompt_tokens; with reasoning set policy.reasoning_context=strip",
        ),
    ),
    "Update": (
        Metric(
            "loss",
            "the loss of the optimizer steps, averaged by transformers",
            "small, of either sign; it need not fall",
            "judge a run by outcomes, not by this; if NaN, lower training.learning_rate, check the model's weights",
        ),
        Metric(
            "policy_loss",
            "the same loss as the trainer computes it: sums over trained tokens divided by their number",
            "equal to loss",
            "if they differ, report a bug",
        ),
        Metric(
            "grad_norm",
            "norm of the gradient before clipping to training.max_grad_norm",
            "steady; mostly below training.max_grad_norm",
            "if far above for many steps, lower training.learning_rate or credit.alpha; if exactly 0, no group has signal",
        ),
        Metric(
            "learning_rate",
            "learning rate of the step's last update",
            "follows training.warmup and training.schedule",
            "check training.learning_rate, warmup, schedule",
        ),
        Metric(
            "clip_share",
            "share of trained tokens that the clip keeps from passing on a gradient, 0 to 1",
            "0 with one update a step, else below 0.1",
            "if above 0.2, lower training.learning_rate or training.updates_per_step",
        ),
        Metric(
            "ratio",
            "mean ratio of new to old token probabilities",
            "1 with one update a step, else 0.95 to 1.05",
            "lower training.learning_rate or training.updates_per_step",
        ),
        Metric(
            "entropy",
            "mean entropy of the policy at trained tokens, in nats",
            "falls slowly; stays above about 0.1",
            "if near 0, raise training.entropy_bonus or rollout.temperature; if it rises steadily, lower the bonus",
        ),
        Metric(
            "kl",
            "mean KL estimate to the policy before training, in nats a token; only with training.kl above 0",
            "below about 0.1, rising slowly",
            "if it rises fast, raise training.kl or lower training.learning_rate",
        ),
        Metric(
            "trained_tokens",
            "tokens of one optimizer step that carry a loss, over all processes",
            "steady, about valid episodes * turns * reply tokens / updates",
            "if it drops, look for failed episodes and groups left with fewer than two valid episodes",
        ),
    ),
    "Checks of what is trained": (
        Metric(
            "logprob_gap",
            "largest difference between log-probabilities that the engine recorded and the trainer's, in nats",
            "below 1e-3 in float32; below 0.2 in bfloat16",
            "if larger, the engine samples from other weights or another template; compare dtype, quantization and stop tokens",
        ),
        Metric(
            "packing/logprob_gap",
            "mean difference between log-probabilities with shared prefixes and without, in nats; first batch only",
            "below 1e-5 in float32, below 0.01 in bfloat16; above 0.02 the run stops",
            "set training.packing=none, or another way of attending",
        ),
        Metric(
            "policy_version",
            "optimizer steps before this batch of rollouts was sampled",
            "grows by training.updates_per_step with each step",
            "if it stays, the engine does not take the new weights",
        ),
    ),
    "Packing and memory": (
        Metric(
            "packing/tokens",
            "tokens of the samples of an update, counted a sequence a turn",
            "-",
            "-",
        ),
        Metric(
            "packing/forwarded",
            "tokens that are forwarded after prefixes are shared",
            "2 to 10 times fewer than packing/tokens",
            "if about as many, training.packing is none, or turns share little (policy.reasoning_context, persona length)",
        ),
        Metric(
            "packing/padding",
            "share of forwarded positions that are padding, 0 to 1",
            "0 with packing; below 0.3 without",
            "turn packing on (training.packing=auto)",
        ),
        Metric(
            "packing/imbalance",
            "work of the busiest process over the mean, 1 at best",
            "below 1.1",
            "lower training.tokens_per_row, so that rows can be dealt out more evenly",
        ),
        Metric(
            "memory/peak_gib",
            "largest GPU memory of the main process in the update, in GiB, without that of a vLLM asleep beside it; CUDA only",
            "some GiB below the card's memory",
            "if near it, lower training.tokens_per_row, or set training.gradient_checkpointing=true",
        ),
    ),
    "Speed": (
        Metric(
            "seconds/rollout",
            "seconds in which the step's episodes were played",
            "most of a step with a hosted simulator",
            "see seconds/simulator_per_episode; more replicas or concurrency for the simulator, vLLM for the policy",
        ),
        Metric(
            "seconds/simulator_per_episode",
            "mean seconds that an episode waited for the simulator",
            "turns * seconds of an answer",
            "if more, the endpoint queues: raise llm.endpoints.concurrency, add endpoints or simulator.url replicas",
        ),
        Metric(
            "seconds/recompute",
            "seconds for recomputing log-probabilities; in the first step, and with several updates a step",
            "below seconds/update",
            "training.old_logprobs=recorded saves it (without top-p and top-k only)",
        ),
        Metric(
            "seconds/update",
            "mean seconds of an optimizer step",
            "below seconds/rollout",
            "more GPUs, training.packing, a larger training.tokens_per_row",
        ),
        Metric(
            "tokens_per_second",
            "tokens that the policy sampled over the seconds of the rollouts, all processes together",
            "steady",
            "if it falls, look for longer waits for the simulator and longer replies",
        ),
    ),
    "Position": (
        Metric("step", "the step, from 1", "-", "-"),
        Metric("epoch", "share of the planned steps that is done, 0 to 1 (transformers)", "-", "-"),
    ),
    "Validation, on W&B (with a validation section; in full in validation.jsonl and summary.json)": (
        Metric(
            "validation/overall",
            "mean outcome over the held-out scenarios, each played with the same seeds every time",
            "rises; summary.json has the interval of its change",
            "if flat while outcome/all rises, the policy fits its training scenarios; use more of them",
        ),
        Metric(
            "validation/{scene}",
            "the same for one scene",
            "rises",
            "few scenarios a scene make this noisy; raise validation.samples",
        ),
        Metric(
            "validation/failed",
            "failed episodes of a validation",
            "0",
            "see failed/{kind}; before and after then differ in what they average over",
        ),
        Metric("dialogues", "table of one group of each scene, turn by turn with its credit", "-", "-"),
    ),
}
_STANDS_FOR = {
    "scene": SCENE_NAME.strip("^$"),
    "kind": "|".join(error.kind for error in EPISODE_ERRORS),
    "turns": r"\d+",
    "number": r"\w+",
}


def all_metrics() -> list[Metric]:
    return [metric for group in GROUPS.values() for metric in group]


def entry_of(name: str) -> Metric | None:
    """The entry for a logged name (outcome/charm) or for a name of the table itself (outcome/{scene}); None without one."""
    every = all_metrics()
    exact = next((metric for metric in every if name == metric.name), None)
    return exact or next((metric for metric in every if _pattern(metric.name).fullmatch(name)), None)


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile("".join(f"(?:{_STANDS_FOR[p]})" if k % 2 else re.escape(p) for k, p in enumerate(parts)))


def select(name: str | None) -> dict[str, list[Metric]]:
    """The groups and metrics that a name means: None for all, a metric, or what stands before its slash ("packing"). Raises
    RecipeError for a name that there is not."""
    if name is None:
        return {group: list(metrics) for group, metrics in GROUPS.items()}
    one = entry_of(name)
    found = {
        group: [metric for metric in metrics if metric is one or metric.name.startswith(f"{name}/")]
        for group, metrics in GROUPS.items()
    }
    if not any(found.values()):
        names = {metric.name for metric in all_metrics()}
        raise RecipeError(
            f"no metric is called {name!r}; {did_you_mean(name, names | {n.partition('/')[0] for n in names if '/' in n})}"
        )
    return {group: metrics for group, metrics in found.items() if metrics}
