"""The options that turn-level credit adds to TRL's GRPOConfig: the one home of their names, defaults, bounds and meanings.

`CTCGRPOConfig` inherits them, and a recipe's sections take default, bounds and description from here (`recipe_field`). Imports
neither PyTorch nor TRL, so that a recipe is read at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from operator import ge, gt, le, lt
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pydantic

from ctcgrpo.centering import CENTERINGS
from ctcgrpo.credit import CREDITS, SCALES
from ctcgrpo.util.importing import is_reference

Packing = Literal["auto", "segments", "flex", "flash3", "none"]  # how rows of shared prefixes are attended to
LossWeights = Literal["token", "turn"]  # what weighs alike in the loss: every trained token of a step, or every trained turn
OldLogprobs = Literal["recomputed", "recorded"]
SamplingDtype = Literal["policy", "bfloat16"]

_BOUNDS = {"ge": (ge, ">="), "gt": (gt, ">"), "le": (le, "<="), "lt": (lt, "<")}


def option(default: Any, help: str, *, known: Sequence[str] = (), **bounds: float) -> Any:
    """A field with its metadata. `known` are values that have a name; bounds as pydantic names them."""
    return field(default=default, metadata={"help": help, "known": known, "bounds": bounds})


@dataclass
class CreditOptions:
    """How outcome and turn rewards become the advantage of each turn: A = outcome term + alpha * turn term (ctcgrpo/credit.py)."""

    alpha: float = option(15.0, "weight of the turn term; 0 is outcome-only GRPO", ge=0)
    centering: str = option(
        "rollout",
        "the mean that is taken off a turn's credit: over the rollout, the group, the group's turns at that position, the "
        "same two without the rollout itself (loo), earlier steps of the tag at that position, or none",
        known=tuple(CENTERINGS),
    )
    credit: str = option(
        "immediate",
        "a turn's credit: its own reward, the discounted sum of its own and all later ones, or its shares of them (smeared)",
        known=tuple(CREDITS),
    )
    gamma: float = option(1.0, "reward_to_go, smeared, or a credit of your own: the discount for each turn", ge=0, le=1)
    center_weights: Literal["turn", "token"] = option(
        "turn",
        "whether turns weigh alike in the means that center, or by their tokens",
    )
    scale_rewards: str = option(
        "group",
        "the standard deviation that outcomes are divided by: of the group, of the batch, or none",
        known=tuple(SCALES),
    )
    std_min: float = option(0.1, "the smallest standard deviation that outcomes are divided by", gt=0)
    turn_scale: str = option(
        "none",
        "the standard deviation that centered turn credits are divided by: of the group, of the batch, or none; with one, "
        "begin with alpha = 1",
        known=tuple(SCALES),
    )
    turn_std_min: float = option(0.01, "the smallest standard deviation that turn credits are divided by", gt=0)
    shuffle_credit: Literal["nothing", "turn_scores", "advantages"] = option(
        "nothing",
        "a control: what is dealt out at random over the turns of a step",
    )
    reasons: bool = option(False, "the policy reasons before it replies: the form of its reasoning enters the outcome")
    no_reasoning_penalty: float = option(
        0.2,
        "reasoning only: taken off the outcome, times the share of turns without reasoning",
        ge=0,
    )
    fault_penalty: float = option(
        0.05,
        "reasoning only: taken off the outcome once for empty or broken reasoning or an empty reply",
        ge=0,
    )


@dataclass
class RolloutOptions:
    """How episodes are played and sampled."""

    max_turns: int = option(8, "replies of the policy in an episode at most; it may be over earlier", ge=1)
    max_prompt_length: int = option(
        8192,
        "tokens of a prompt at most; a longer one drops its oldest exchanges, never the system prompt",
        ge=1,
    )
    reasoning_context: Literal["strip", "keep"] = option(
        "strip",
        "whether later prompts leave out earlier reasoning (strip) or hold it (keep)",
    )
    max_batch: int = option(64, "requests that the engine generates together", ge=1)
    sampling_dtype: SamplingDtype = option(
        "policy",
        "transformers: sample with the policy itself, or with a bfloat16 copy of it that is renewed every step: faster on a "
        "CPU with bfloat16 instructions, for 2 bytes a parameter",
    )
    deterministic: bool = option(False, "fix the composition of every batch, for bit-identical reruns")
    deadline: float | None = option(
        None,
        "seconds after which a step no longer waits for episodes that still go on: they fail. It cuts long dialogues, so "
        "what is learned from leans to short ones; the log says how many turns they had (deadline/...)",
        gt=0,
    )
    environment_timeout: float = option(
        1800.0,
        "seconds that an environment may take for one reset, step or outcome; then the episode fails",
        gt=0,
    )
    max_failed: float = option(0.5, "the share of failed episodes in a step that stops the run", ge=0, le=1)
    vllm_server_urls: list[str] | None = option(
        None,
        "vllm_mode server: several servers, each as http://HOST:PORT; else vllm_server_base_url, or host and port",
    )
    vllm_server_patience: float = option(120.0, "vllm_mode server: seconds that a request is repeated for", gt=0)
    vllm_server_check_every: int = option(
        0,
        "vllm_mode server: compare the servers' log-probabilities with the trainer's after every so many transfers of "
        "weights, besides the first one; 0: after the first one only",
        ge=0,
    )


@dataclass
class UpdateOptions:
    """The update: loss, packing, old log-probabilities."""

    dual_clip: float | None = option(
        None,
        "bounds the loss of a token with a negative advantage A at this many times -A; 3 as published",
        gt=1,
    )
    loss_weights: LossWeights = option(
        "token",
        "what weighs alike in the loss: every trained token of a step, or every trained turn",
    )
    entropy_coef: float = option(0.001, "weight of the policy's entropy in the loss; keeps replies varied", ge=0)
    old_logprobs: OldLogprobs = option(
        "recomputed",
        "recomputed by the trainer, or as recorded by the engine (without top-p and top-k only)",
    )
    tokens_per_row: int = option(
        16384,
        "distinct tokens (without packing: padded ones) that one forward and backward pass takes",
        ge=1,
    )
    packing: Packing = option(
        "auto",
        "forward what turns and rollouts have in common once, attended to as the device allows (auto), by segments, "
        "flex_attention, or TRL's kernel on Hopper (flash3); none: a sequence a turn, padded",
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
    """What is wrong with values of options, each as `name = value; expected ...`. Other names are passed over."""
    homes = _fields()
    for name, value in values.items():
        if name not in homes or value is None:
            continue
        told = homes[name].metadata
        if (choices := _choices(name)) and value not in choices:
            yield f"{name} = {value!r}; expected one of {', '.join(choices)}"
        if (known := told["known"]) and value not in known and not (isinstance(value, str) and is_reference(value)):
            yield (
                f"{name} = {value!r}; expected one of {', '.join(known)}, or the name of one of your own as "
                "'my_module:my_function' (a run records its settings as text)"
            )
        if any(not _BOUNDS[bound][0](value, limit) for bound, limit in told["bounds"].items()):
            expected = " and ".join(f"{_BOUNDS[bound][1]} {limit:g}" for bound, limit in told["bounds"].items())
            yield f"{name} = {value!r}; expected a number {expected}"


def _fields() -> dict[str, Field[Any]]:
    return {found.name: found for home in HOMES for found in fields(home)}


def _choices(name: str) -> tuple[str, ...]:
    """The values of an option that is a Literal; () for another."""
    hints = [hint for home in HOMES for option, hint in get_type_hints(home).items() if option == name]
    return get_args(hints[0]) if get_origin(hints[0]) is Literal else ()
