"""This machine: room for checkpoints, the run's folder, the account of W&B."""

from __future__ import annotations

import netrc
import shutil
from collections.abc import Iterator

from ctcgrpo.preflight.memory import GIB
from ctcgrpo.preflight.subject import Finding, Level, Subject
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.sharding import deepspeed_stage


def disk(s: Subject) -> Iterator[Finding]:
    if s.shape is None:
        return
    recipe = s.recipe
    lora = recipe.policy.lora
    rounded = recipe.policy.dtype == "bfloat16" or (deepspeed_stage(recipe.training.sharding) and recipe.training.bf16)
    size = 2 if rounded else 4
    weights = s.shape.parameters * size if lora is None else s.shape.lora_parameters(lora.rank) * 4
    optimizer = (s.shape.parameters * 12) if lora is None else s.shape.lora_parameters(lora.rank) * 8
    # One more than are kept stands beside them while it is written.
    needed = (recipe.training.keep_checkpoints + 1) * (weights + optimizer) + 2 * weights
    where = next(p for p in [recipe.folder, *recipe.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(where).free
    text = f"{needed / GIB:.1f} GiB for {recipe.training.keep_checkpoints} checkpoints, best and final; {free / GIB:.0f} are free"
    level: Level = "ok" if needed < free else "failed"
    more = "" if needed < free else f" at {where}; lower training.keep_checkpoints, or set run.output_dir"
    yield Finding("disk", level, text + more)


def output(s: Subject) -> Iterator[Finding]:
    folder = RunFolder(s.recipe.folder)
    resumed = folder.open(s.recipe)
    if resumed is None:
        yield Finding("output", "ok", f"{folder.path} is free")
    else:
        extended = folder.extended_from(s.recipe)
        more = f", with training.max_steps {extended} -> {s.recipe.training.max_steps}" if extended else ""
        yield Finding("output", "ok", f"resumes from {resumed}{more}")


def weights_and_biases(s: Subject) -> Iterator[Finding]:
    if s.recipe.run.wandb != "online":
        return
    known = "WANDB_API_KEY" in s.variables
    if not known:
        try:
            known = netrc.netrc().authenticators("api.wandb.ai") is not None
        except (FileNotFoundError, netrc.NetrcParseError):
            known = False
    if known:
        yield Finding("W&B", "ok", "a key is there")
    else:
        yield Finding("W&B", "failed", "run.wandb is 'online' and there is no key: wandb login, or run.wandb=offline")
