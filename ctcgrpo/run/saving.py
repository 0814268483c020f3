"""Estimates the time to save a checkpoint on a stop signal, and compares it with the launcher's timeout."""

import os
from collections.abc import Mapping

from ctcgrpo.model.sharding import deepspeed_stage
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.startup import SHUTDOWN_TIMEOUT
from ctcgrpo.util.processes import STOP_SECONDS

_DEFAULT_TIMEOUT = 30.0
_BYTES_PER_SECOND = 0.5e9  # assumed write rate of a shared disk, for all processes together
_LAST_UPDATE = 300  # seconds allowed for the update in progress, which is finished first


def checkpoint_bytes(recipe: Recipe, trained: int) -> float:
    """Of one checkpoint of `trained` parameters: weights, and the optimizer's state, float32 masters included."""
    if recipe.policy.lora is not None:
        return trained * 12.0
    rounded = recipe.policy.dtype == "bfloat16" or (deepspeed_stage(recipe.training.sharding) and recipe.training.bf16)
    return trained * (14.0 if rounded else 16.0)


def save_seconds(size: float) -> float:
    return size / _BYTES_PER_SECOND


def notice_seconds(size: float) -> int:
    """Seconds, in whole minutes, that a job needs between signal and end: for the update in progress, and for saving."""
    return 60 * -int(-(_LAST_UPDATE + save_seconds(size)) // 60)


def too_little_time(size: float, environment: Mapping[str, str] = os.environ) -> str | None:
    """The warning for a launcher that would kill this process before it has saved `size` bytes; else None."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    given, needed = float(environment.get(SHUTDOWN_TIMEOUT, _DEFAULT_TIMEOUT)), STOP_SECONDS + save_seconds(size)
    if needed <= given:
        return None
    return (
        f"the launcher kills processes {given:g} s after Ctrl-C or SIGTERM, but saving takes about "
        f"{needed:.0f} s: {size / 2**30:.0f} GiB at {_BYTES_PER_SECOND / 1e9:g} GB/s; launch with {SHUTDOWN_TIMEOUT}=3600 in the "
        "environment, or with `ctcgrpo train`, which sets it"
    )
