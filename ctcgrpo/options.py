"""The options that this project adds to TRL's GRPOConfig: names, defaults, bounds and descriptions, defined only here.

`CTCGRPOConfig` inherits them. A recipe's sections take default, bounds and description from here (`recipe_field`). Imports
neither PyTorch nor TRL, so that recipes are read quickly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from operator import ge, gt, le, lt
from typing import Any, Literal, cast, get_args, get_origin

import pydantic

from ctcgrpo.centering import CENTERINGS
from ctcgrpo.credit import CREDIT_NAMES, SCALES, VINE
from ctcgrpo.util.importing import is_reference
from ctcgrpo.util.naming import nearest

Packing = Literal["auto", "segments", "flex", "flash3", "none"]  # attention kernel for rows with shared prefixes
LossWeights = Literal["token", "turn"]  # the unit of equal weight in the loss: a trained token, or a trained turn
OldLogprobs = Literal["recomputed", "recorded"]
Importance = Literal["none", "token", "turn", "episode"]  # what an importance weight is the ratio of
SamplingDtype = Literal["policy", "bfloat16"]

_BOUNDS = {"ge": (ge, ">="), "gt": (gt, ">"), "le": (le, "<="), "lt": (lt, "<")}


def option(default: Any, help: str, *, known: Sequence[str] = (), **bounds: float) -> Any:
    """A dataclass field with metadata. `known`: built-in values; `bounds`: as pydantic names them (ge, gt, le, lt)."""
    return field(default=default, metadata={"help": help, "known": known, "bounds": bounds})


@dataclass
class CreditOptions:
    """How outcome and turn rewards give the advantage of each turn: A = outcome term + alpha * turn term (ctcgrpo/credit.py)."""

    alpha: float = option(15.0, "weight of the turn term; 0 is outcome-only GRPO", ge=0)
    outcome_weight: float = option(
        1.0, "weight of the outcome term; 0 trains on turn terms alone, as credit vine does best", ge=0
    )
    centering: str = option(
        "rollout",
        "the baseline subtracted from a turn's credit: the mean over the rollout, over the group, over the group's turns at this "
        "position, the last two without the rollout itself (loo), over earlier steps of the tag at this position, or none",
        known=tuple(CENTERINGS),
    )
    credit: str = option(
        "immediate",
        "a turn's credit: its reward, its discounted return (reward_to_go), its share of its own and later rewards (smeared), or "
        "the change in the mean outcome of continuations (vine)",
        known=CREDIT_NAMES,
    )
    continuations: int = option(
        4,
        "with credit vine: how many times an episode is played to its end again from after each of its turns but the last",
        ge=1,
    )
    gamma: float = option(1.0, "discount per turn, for reward_to_go, smeared and custom credits", ge=0, le=1)
    center_weights: Literal["turn", "token"] = option(
        "turn",
        "weights in the baseline's mean: equal for each turn, or by tokens",
    )
    scale_rewards: str = option(
        "group",
        "divides outcome advantages by the standard deviation of the group, of the batch, or not at all (none)",
        known=tuple(SCALES),
    )
    std_min: float = option(0.1, "lower bound of the outcomes' standard deviation", gt=0)
    turn_scale: str = option(
        "none",
        "divides centered turn credits by the standard deviation of the group, of the batch, or not at all (none); with "
        "group or batch, start from alpha = 1",
        known=tuple(SCALES),
    )
    turn_std_min: float = option(0.01, "lower bound of the turn credits' standard deviation", gt=0)
    shuffle_credit: Literal["nothing", "turn_scores", "advantages"] = option(
        "nothing",
        "control experiment: values to permute at random over the turns of a step",
    )
    reasons: bool = option(False, "the policy reasons before it replies; faults in the form of its reasoning lower the outcome")
    no_reasoning_penalty: float = option(
        0.2,
        "with reasons: outcome penalty, times the share of turns without reasoning",
        ge=0,
    )
    fault_penalty: float = option(
        0.05,
        "with reasons: outcome penalty, once an episode, for empty or malformed reasoning or an empty reply",
        ge=0,
    )


@dataclass
class RolloutOptions:
    """How episodes are played and sampled."""

    max_turns: int = option(8, "maximum number of policy replies in an episode", ge=1)
    max_prompt_length: int = option(
        8192,
        "maximum tokens of a prompt; a longer one drops its oldest exchanges, never the system prompt",
        ge=1,
    )
    reasoning_context: Literal["strip", "keep"] = option(
        "strip",
        "whether prompts omit the reasoning of earlier turns (strip) or include it (keep)",
    )
    max_batch: int = option(64, "maximum number of requests in one generation batch", ge=1)
    sampling_dtype: SamplingDtype = option(
        "policy",
        "transformers engine: sample with the policy itself, or with a bfloat16 copy updated every step: faster on a CPU with "
        "bfloat16 instructions, at 2 bytes per parameter",
    )
    deterministic: bool = option(False, "fix the composition of every batch, so that runs repeat bit by bit")
    overlap: int = option(
        0,
        "1: play the next step's episodes while this step's updates run. They are sampled from weights that are one step old. "
        "Needs vLLM servers, or the transformers engine with a bfloat16 copy",
        ge=0,
        le=1,
    )
    deadline: float | None = option(
        None,
        "seconds after which a step's unfinished episodes fail. This removes long dialogues, which biases training towards "
        "short ones; metrics deadline/... count the turns of the failed episodes",
        gt=0,
    )
    environment_timeout: float = option(
        1800.0,
        "timeout in seconds for one reset, step or outcome of an environment; then the episode fails",
        gt=0,
    )
    max_failed: float = option(0.5, "the run stops when more than this share of a step's episodes fail", ge=0, le=1)
    vllm_server_urls: list[str] | None = option(
        None,
        "vllm_mode server: URLs of several servers, http://HOST:PORT; for one, vllm_server_base_url or host and port",
    )
    vllm_server_patience: float = option(120.0, "vllm_mode server: seconds to retry a request", gt=0)
    vllm_server_check_every: int = option(
        0,
        "vllm_mode server: compare the servers' log-probabilities with the trainer's after the first weight transfer, and then "
        "after every N-th; 0: after the first only",
        ge=0,
    )


@dataclass
class UpdateOptions:
    """The update: loss, packing, old log-probabilities."""

    dual_clip: float | None = option(
        None,
        "upper bound of a token's loss for a negative advantage A, in multiples of -A; the paper uses 3",
        gt=1,
    )
    loss_weights: LossWeights = option(
        "token",
        "equal weight in the loss for every trained token, or for every trained turn",
    )
    entropy_coef: float = option(0.001, "weight of the policy's entropy bonus in the loss; keeps replies diverse", ge=0)
    old_logprobs: OldLogprobs = option(
        "recomputed",
        "recomputed by the trainer, or recorded by the engine (only without top-p and top-k)",
    )
    importance: Literal["auto", "none", "token", "turn", "episode"] = option(
        "auto",
        "importance weights: the probability under the trainer's policy over that under the engine's, for each token, turn or "
        "episode, multiplied to its advantage. auto: token with overlap, and with vLLM without top-p and top-k; else none. episode "
        "costs a forward pass over all samples; so does top-p or top-k",
    )
    importance_max: float = option(3.0, "upper bound of an importance weight", ge=1)
    loss_total: float | None = option(
        None,
        "what the loss of an optimizer step is divided by, in place of its number of trained tokens (of turns with loss_weights "
        "turn)",
        gt=0,
    )
    update_parts: int = option(
        1,
        "parts of a step's groups that gradients are computed of while others are still played, each part once its episodes are "
        "over; they add up to one update. At most as many as groups. Needs loss_total, and an engine as overlap does",
        ge=1,
    )
    tokens_per_row: int = option(
        16384,
        "maximum tokens in one forward and backward pass: distinct ones, or padded ones without packing",
        ge=1,
    )
    packing: Packing = option(
        "auto",
        "compute prefixes shared by turns and rollouts once. Attention kernel: auto (by device), segments, flex "
        "(flex_attention), or flash3 (TRL's, on Hopper). none: one padded sequence per turn",
    )
    audit_every: int | None = option(
        None,
        "steps between credit audits on the episodes of training (ctcgrpo/audit/README.md); one costs about two or three updates",
        ge=1,
    )


HOMES = (CreditOptions, RolloutOptions, UpdateOptions)


def recipe_field(name: str) -> Any:
    """A recipe's field for the option `name`: its default, bounds and description."""
    found = _fields()[name]
    known = found.metadata["known"]
    return pydantic.Field(
        found.default,
        description=found.metadata["help"],
        json_schema_extra={"option": name} | ({"enum": [*known, "my_module:my_function"]} if known else {}),
        **found.metadata["bounds"],
    )


def out_of_bounds(values: Mapping[str, Any]) -> Iterator[str]:
    """Errors in option values, each as `name = value; expected ...`. Names that are no options are ignored."""
    homes = _fields()
    for name, value in values.items():
        if name not in homes or value is None:
            continue
        metadata = homes[name].metadata
        kind = homes[name].type
        if get_origin(kind) is Literal and value not in (choices := get_args(kind)):
            yield f"{name} = {value!r}; expected one of {', '.join(choices)}"
        if (known := metadata["known"]) and value not in known and not (isinstance(value, str) and is_reference(value)):
            close = nearest(value, known) if isinstance(value, str) else None
            hint = f"; did you mean {close!r}?" if close else ""
            if callable(value):
                hint = " (settings are recorded as text, so pass a name, not a function)"
            yield (f"{name} = {value!r}; expected one of {', '.join(known)}, or a custom one as 'my_module:my_function'{hint}")
        if any(not _BOUNDS[bound][0](value, limit) for bound, limit in metadata["bounds"].items()):
            expected = " and ".join(f"{_BOUNDS[bound][1]} {limit:g}" for bound, limit in metadata["bounds"].items())
            yield f"{name} = {value!r}; expected a number {expected}"


def importance_level(importance: str, *, old_logprobs: str, overlap: int, vllm: bool, truncates: bool) -> Importance:
    """`importance` with auto resolved. `vllm`: whether vLLM samples; `truncates`: whether with top-p or top-k."""
    if importance != "auto":
        return cast(Importance, importance)
    differs = overlap or (vllm and not truncates)
    return "token" if differs and old_logprobs == "recomputed" else "none"


def conflicts(values: Mapping[str, Any], name: Callable[[str], str] = str) -> Iterator[str]:
    """Options that exclude each other, a message for each. `values`: of the options here, and of GRPOConfig's top_p, top_k and
    num_iterations; `name` gives what a user calls an option."""

    def value(option: str) -> str:
        return f"{name(option)} = {values[option]!r}"

    truncates = f"{name('top_p')} and {name('top_k')}"
    if values["old_logprobs"] == "recorded":
        if values["top_p"] < 1 or values["top_k"]:
            yield (
                f"{value('old_logprobs')} with {truncates}, under which recorded log-probabilities are renormalised over the kept "
                f"mass; expected 'recomputed', or {name('top_p')} = 1 and {name('top_k')} = 0"
            )
        if values["importance"] not in ("auto", "none"):
            yield (
                f"{value('importance')} with {value('old_logprobs')}, whose ratio contains the importance weight already; "
                f"expected {name('old_logprobs')} = 'recomputed', or {name('importance')} = 'none'"
            )
    if values["importance"] == "none" and values["importance_max"] != UpdateOptions.importance_max:
        yield f"{value('importance_max')} has no effect with {value('importance')}; leave it out"
    by_the_clock = {"overlap": bool(values["overlap"]), "deadline": values["deadline"] is not None}
    by_the_clock |= {"update_parts": (parts := values["update_parts"] > 1)}
    for option in (option for option, used in by_the_clock.items() if used and values["deterministic"]):
        yield f"{value(option)} depends on the clock, and {name('deterministic')} needs runs that repeat; leave one out"
    if not parts:
        return
    if values["loss_total"] is None:
        yield (
            f"{value('update_parts')} needs {name('loss_total')}: the number of trained tokens of a step is not known before its "
            f"last part; take the metric trained_tokens of a run without it (trained_turns with {name('loss_weights')} 'turn')"
        )
    whole_step = {
        "num_iterations": values["num_iterations"] > 1,
        "audit_every": values["audit_every"] is not None,
        "credit": values["credit"] == VINE,
        # A function of one's own gets the deviations of all groups too.
        "scale_rewards": values["scale_rewards"] not in ("group", "none"),
        "turn_scale": values["turn_scale"] not in ("group", "none"),
        "shuffle_credit": values["shuffle_credit"] != "nothing",
    }
    for option in (option for option, used in whole_step.items() if used):
        yield f"{value('update_parts')} with {value(option)}, which needs all episodes of a step at once; leave one out"


def _fields() -> dict[str, Field[Any]]:
    return {found.name: found for home in HOMES for found in fields(home)}
