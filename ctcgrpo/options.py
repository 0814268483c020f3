"""The options that turn-level credit adds to TRL's GRPOConfig: the one home of their names, defaults, bounds and meanings.

`CTCGRPOConfig` inherits them, and a recipe's sections take default, bounds and description from here (`recipe_field`). Imports
neither PyTorch nor TRL, so that a recipe is read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from operator import ge, gt, le, lt
from typing import Any, Literal

import pydantic

from ctcgrpo.centering import CENTERINGS
from ctcgrpo.credit import CREDITS, SCALES
from ctcgrpo.util.importing import is_reference

Packing = Literal["auto", "segments", "flex", "flash3", "none"]  # how rows of shared prefixes are attended to
LossWeights = Literal["token", "turn"]  # what weighs alike in the loss: every trained token of a step, or every trained turn
OldLogprobs = Literal["recomputed", "recorded"]
SamplingDtype = Literal["policy", "bfloat16"]

_BOUNDS = {"ge": (ge, ">="), "gt": (gt, ">"), "le": (le, "<="), "lt": (lt, "<")}


def _says(help: str, *, choices: Sequence[str] = (), known: Sequence[str] = (), **bounds: float) -> dict[str, Any]:
    """A field's metadata. `choices` are its only values; `known` are those that have a name; bounds as pydantic names them."""
    return {"help": help, "choices": choices, "known": known, "bounds": bounds}


@dataclass
class CreditOptions:
    """How outcome and turn rewards become the advantage of each turn: A = outcome term + alpha * turn term (ctcgrpo/credit.py)."""

    alpha: float = field(default=15.0, metadata=_says("weight of the turn term; 0 is outcome-only GRPO", ge=0))
    centering: str = field(
        default="rollout",
        metadata=_says(
            "the mean that is taken off a turn's credit: over the rollout, the group, the group's turns at that position, "
            "the same two without the rollout itself (loo), earlier steps of the tag at that position, or none",
            known=tuple(CENTERINGS),
        ),
    )
    credit: str = field(
        default="immediate",
        metadata=_says(
            "a turn's credit: its own reward, the discounted sum of its own and all later ones, or its shares of them (smeared)",
            known=tuple(CREDITS),
        ),
    )
    gamma: float = field(
        default=1.0, metadata=_says("reward_to_go, smeared, or a credit of your own: the discount for each turn", ge=0, le=1)
    )
    center_weights: Literal["turn", "token"] = field(
        default="turn",
        metadata=_says("whether turns weigh alike in the means that center, or by their tokens", choices=("turn", "token")),
    )
    scale_rewards: str = field(
        default="group",
        metadata=_says(
            "the standard deviation that outcomes are divided by: of the group, of the batch, or none",
            known=tuple(SCALES),
        ),
    )
    std_min: float = field(default=0.1, metadata=_says("the smallest standard deviation that outcomes are divided by", gt=0))
    turn_scale: str = field(
        default="none",
        metadata=_says(
            "the standard deviation that centered turn credits are divided by: of the group, of the batch, or none; with one, "
            "begin with alpha = 1",
            known=tuple(SCALES),
        ),
    )
    turn_std_min: float = field(
        default=0.01, metadata=_says("the smallest standard deviation that turn credits are divided by", gt=0)
    )
    shuffle_credit: Literal["nothing", "turn_scores", "advantages"] = field(
        default="nothing",
        metadata=_says(
            "a control: what is dealt out at random over the turns of a step",
            choices=("nothing", "turn_scores", "advantages"),
        ),
    )
    reasons: bool = field(
        default=False, metadata=_says("the policy reasons before it replies: the form of its reasoning enters the outcome")
    )
    no_reasoning_penalty: float = field(
        default=0.2,
        metadata=_says("reasoning only: taken off the outcome, times the share of turns without reasoning", ge=0),
    )
    fault_penalty: float = field(
        default=0.05,
        metadata=_says("reasoning only: taken off the outcome once for empty or broken reasoning or an empty reply", ge=0),
    )


@dataclass
class RolloutOptions:
    """How episodes are played and sampled."""

    max_turns: int = field(default=8, metadata=_says("replies of the policy in an episode at most; it may be over earlier", ge=1))
    max_prompt_length: int = field(
        default=8192,
        metadata=_says(
            "tokens of a prompt at most; a longer one drops its oldest exchanges, never the system prompt",
            ge=1,
        ),
    )
    reasoning_context: Literal["strip", "keep"] = field(
        default="strip",
        metadata=_says(
            "whether later prompts leave out earlier reasoning (strip) or hold it (keep)",
            choices=("strip", "keep"),
        ),
    )
    max_batch: int = field(default=64, metadata=_says("requests that the engine generates together", ge=1))
    sampling_dtype: SamplingDtype = field(
        default="policy",
        metadata=_says(
            "transformers: sample with the policy itself, or with a bfloat16 copy of it that is renewed every step: faster "
            "on a CPU with bfloat16 instructions, for 2 bytes a parameter",
            choices=("policy", "bfloat16"),
        ),
    )
    deterministic: bool = field(default=False, metadata=_says("fix the composition of every batch, for bit-identical reruns"))
    deadline: float | None = field(
        default=None,
        metadata=_says(
            "seconds after which a step no longer waits for episodes that still go on: they fail. It cuts long dialogues, "
            "so what is learned from leans to short ones; the log says how many turns they had (deadline/...)",
            gt=0,
        ),
    )
    environment_timeout: float = field(
        default=1800.0,
        metadata=_says("seconds that an environment may take for one reset, step or outcome; then the episode fails", gt=0),
    )
    max_failed: float = field(
        default=0.5, metadata=_says("the share of failed episodes in a step that stops the run", ge=0, le=1)
    )
    vllm_server_urls: list[str] | None = field(
        default=None,
        metadata=_says(
            "vllm_mode server: several servers, each as http://HOST:PORT; else vllm_server_base_url, or host and port"
        ),
    )
    vllm_server_patience: float = field(
        default=120.0, metadata=_says("vllm_mode server: seconds that a request is repeated for", gt=0)
    )
    vllm_server_check_every: int = field(
        default=0,
        metadata=_says(
            "vllm_mode server: compare the servers' log-probabilities with the trainer's after every so many transfers of "
            "weights, besides the first one; 0: after the first one only",
            ge=0,
        ),
    )


@dataclass
class UpdateOptions:
    """The update: loss, packing, old log-probabilities."""

    dual_clip: float | None = field(
        default=None,
        metadata=_says(
            "bounds the loss of a token with a negative advantage A at this many times -A; 3 as published",
            gt=1,
        ),
    )
    loss_weights: LossWeights = field(
        default="token",
        metadata=_says(
            "what weighs alike in the loss: every trained token of a step, or every trained turn",
            choices=("token", "turn"),
        ),
    )
    entropy_coef: float = field(
        default=0.001, metadata=_says("weight of the policy's entropy in the loss; keeps replies varied", ge=0)
    )
    old_logprobs: OldLogprobs = field(
        default="recomputed",
        metadata=_says(
            "recomputed by the trainer, or as recorded by the engine (without top-p and top-k only)",
            choices=("recomputed", "recorded"),
        ),
    )
    tokens_per_row: int = field(
        default=16384,
        metadata=_says("distinct tokens (without packing: padded ones) that one forward and backward pass takes", ge=1),
    )
    packing: Packing = field(
        default="auto",
        metadata=_says(
            "forward what turns and rollouts have in common once, attended to as the device allows (auto), by segments, "
            "flex_attention, or TRL's kernel on Hopper (flash3); none: a sequence a turn, padded",
            choices=("auto", "segments", "flex", "flash3", "none"),
        ),
    )


HOMES = (CreditOptions, RolloutOptions, UpdateOptions)


def recipe_field(name: str) -> Any:
    """A recipe's field for the option `name`: its default, bounds and description."""
    found = _fields()[name]
    known = found.metadata["known"]
    return pydantic.Field(
        found.default,
        description=found.metadata["help"],
        json_schema_extra={"enum": [*known, "my_module:my_function"]} if known else None,
        **found.metadata["bounds"],
    )


def out_of_bounds(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values of options, each as `name = value; expected ...`. Other names are passed over."""
    homes = _fields()
    for name, value in values.items():
        if name not in homes or value is None:
            continue
        told = homes[name].metadata
        if told["choices"] and value not in told["choices"]:
            yield f"{name} = {value!r}; expected one of {', '.join(told['choices'])}"
        if (known := told["known"]) and value not in known and not (isinstance(value, str) and is_reference(value)):
            yield (
                f"{name} = {value!r}; expected one of {', '.join(known)}, or the name of one of your own as "
                "'my_module:my_function' (a run records its settings as text)"
            )
        wrong = [sign for bound, limit in told["bounds"].items() for holds, sign in [_BOUNDS[bound]] if not holds(value, limit)]
        if wrong:
            expected = " and ".join(f"{_BOUNDS[bound][1]} {limit:g}" for bound, limit in told["bounds"].items())
            yield f"{name} = {value!r}; expected a number {expected}"


def _fields() -> dict[str, Field[Any]]:
    return {found.name: found for home in HOMES for found in fields(home)}
