"""How the policy is spread over the processes: whole on each (data parallel), by DeepSpeed, or by PyTorch's FSDP2.

The recipe decides (training.sharding), so that the same recipe is the same run whatever launches it. A launcher may say the same in
its own configuration; where the two differ, nothing else would tell, so that is refused here.
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
"""What a DeepSpeed configuration sets to "fp32", and what is summed by it; DeepSpeed's default is the policy's own precision. The
second doubles the traffic of gradients, and costs a float32 copy of a bucket (2 GB for ZeRO-1 and -2)."""

_FSDP2_CONFIG: Mapping[str, Any] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    # Whole weights in checkpoints: they can be gone on from with another number of processes, and read by anybody.
    "state_dict_type": "FULL_STATE_DICT",
}


def deepspeed_stage(sharding: str) -> int:
    """ZeRO's stage in a DeepSpeed configuration; 0 where DeepSpeed is not asked for."""
    return int(_zero(sharding).get("stage", 0))


def offloads(sharding: str) -> bool:
    """Whether the optimizer's state is kept in the host's memory."""
    offload = _zero(sharding).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def _zero(sharding: str) -> dict[str, Any]:
    found: dict[str, Any] = {} if sharding in (NONE, FSDP2) else _deepspeed_config(sharding)["zero_optimization"]
    return found


def splits_weights(sharding: str) -> bool:
    """Whether no process holds the whole policy, so that none can sample from it by itself."""
    return sharding == FSDP2 or deepspeed_stage(sharding) == 3


def sharding_arguments(sharding: str) -> dict[str, Any]:
    """The fields of transformers' TrainingArguments that turn it on."""
    if sharding == NONE:
        return {}
    if sharding == FSDP2:
        return {"fsdp": True, "fsdp_config": dict(_FSDP2_CONFIG)}
    return {"deepspeed": _deepspeed_config(sharding)}


def check_launcher(sharding: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher that was told to shard otherwise than the recipe."""
    launched = NONE
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        launched = "a DeepSpeed configuration of its own"
    elif environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        launched = FSDP2 if environment.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    if launched not in (NONE, sharding):
        raise RecipeError(
            f"the launcher shards with {launched} and the recipe says training.sharding={sharding}; set the recipe's, and launch "
            "plainly (configs/accelerate/one_node.yaml): the recipe is enough"
        )


def _deepspeed_config(path: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except FileNotFoundError:
        known = "none, fsdp2, or a DeepSpeed configuration (configs/deepspeed/zero3.json)"
        raise RecipeError(f"training.sharding is {path!r}, and there is no such file; it is {known}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"training.sharding: {path} is no DeepSpeed configuration with a ZeRO stage ({error})") from None
    if stage not in (1, 2, 3):
        raise RecipeError(f"training.sharding: {path} has zero_optimization.stage {stage!r}; it is 1, 2 or 3")
    for field, where in _FLOAT32.items():
        section, _, name = field.rpartition(".")
        value = (config.get(section) or {} if section else config).get(name)
        if value != "fp32":
            raise RecipeError(
                f"training.sharding: {path} has {field} = {value!r}; expected 'fp32': gradients are summed {where}, and in the "
                "policy's own precision small ones are lost"
            )
    return config
