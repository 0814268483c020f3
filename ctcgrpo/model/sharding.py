"""Sharding of the policy over processes: none (data parallel), DeepSpeed, or PyTorch's FSDP2.

The recipe sets it (training.sharding), so that a recipe is the same run with any launcher. A launcher's configuration may repeat
it; a contradiction is refused here, since nothing else would report it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.errors import RecipeError

NONE, FSDP2 = "none", "fsdp2"

_FLOAT32 = {
    "data_types.grad_accum_dtype": "over the rows of a step",
    "communication_data_type": "over the processes, where they take twice the bytes",
}
"""Fields of a DeepSpeed configuration that must be "fp32", and the sums that they apply to; DeepSpeed's default is the policy's
precision. The second doubles the traffic of gradients, and takes a float32 copy of a bucket (2 GB for ZeRO-1 and -2)."""

_FSDP2_CONFIG: Mapping[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    # Whole weights in checkpoints, so that a run can resume with another number of processes, and other programs can read them.
    "state_dict_type": "FULL_STATE_DICT",
}


def deepspeed_stage(sharding: str) -> int:
    """ZeRO's stage in a DeepSpeed configuration; 0 without DeepSpeed."""
    return int(_zero(sharding).get("stage", 0))


def offloads(sharding: str) -> bool:
    """Whether the optimizer's state is kept in the host's memory."""
    offload = _zero(sharding).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def _zero(sharding: str) -> dict[str, Any]:
    found: dict[str, Any] = {} if sharding in (NONE, FSDP2) else _deepspeed_config(sharding)["zero_optimization"]
    return found


def splits_weights(sharding: str) -> bool:
    """Whether no process has all weights, so that none can sample on its own."""
    return sharding == FSDP2 or deepspeed_stage(sharding) == 3


def sharding_arguments(sharding: str) -> dict[str, Any]:
    """The fields of transformers' TrainingArguments for this sharding."""
    if sharding == NONE:
        return {}
    if sharding == FSDP2:
        return {"fsdp": True, "fsdp_config": dict(_FSDP2_CONFIG)}
    return {"deepspeed": _deepspeed_config(sharding)}


def check_launcher(sharding: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises RecipeError for a launcher with another sharding than the recipe."""
    launched = NONE
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        launched = "a DeepSpeed configuration of its own"
    elif environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        launched = FSDP2 if environment.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    if launched not in (NONE, sharding):
        raise RecipeError(
            f"training.sharding = {sharding}, but the launcher shards with {launched}; set training.sharding, and launch without "
            "sharding (configs/accelerate/one_node.yaml)"
        )


def _deepspeed_config(path: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except FileNotFoundError:
        expected = "expected none, fsdp2, or a DeepSpeed configuration (configs/deepspeed/zero3.json)"
        raise RecipeError(f"training.sharding = {path!r}: no such file; {expected}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"training.sharding = {path}; expected a DeepSpeed configuration with a ZeRO stage ({error})") from None
    if stage not in (1, 2, 3):
        raise RecipeError(f"training.sharding: {path} has zero_optimization.stage = {stage!r}; expected 1, 2 or 3")
    for field, where in _FLOAT32.items():
        section, _, name = field.rpartition(".")
        value = (config.get(section) or {} if section else config).get(name)
        if value != "fp32":
            raise RecipeError(
                f"training.sharding: {path} has {field} = {value!r}; expected 'fp32': gradients are summed {where}, and in the "
                "policy's own precision small ones are lost"
            )
    return config
