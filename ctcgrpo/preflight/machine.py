"""This machine: room for checkpoints, the run's folder, the account of W&B."""

from __future__ import annotations

import netrc
import shutil
from collections.abc import Iterator

from ctcgrpo.model.shapes import GIB, Shape
from ctcgrpo.model.sharding import offloads
from ctcgrpo.preflight.subject import Finding, Level, Subject
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.saving import checkpoint_bytes, notice_seconds, save_seconds, too_little_time
from ctcgrpo.run.startup import SHUTDOWN_TIMEOUT


def disk(s: Subject) -> Iterator[Finding]:
    if s.shape is None:
        return
    recipe, size = s.recipe, _checkpoint_bytes(s.recipe, s.shape)
    # One more than are kept stands beside them while it is written; of best and final there are weights alone, at most a third.
    needed = (recipe.training.keep_checkpoints + 1) * size + 2 * size / 3
    where = next(p for p in [recipe.folder, *recipe.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(where).free
    text = f"{needed / GIB:.1f} GiB for {recipe.training.keep_checkpoints} checkpoints, best and final; {free / GIB:.0f} are free"
    level: Level = "ok" if needed < free else "failed"
    more = "" if needed < free else f" at {where}; lower training.keep_checkpoints, or set run.output_dir"
    yield Finding("disk", level, text + more)


def stopping(s: Subject) -> Iterator[Finding]:
    """How long Ctrl-C and a scheduler's end have to wait."""
    if s.shape is None:
        return
    size = _checkpoint_bytes(s.recipe, s.shape)
    if warning := too_little_time(size, s.variables):
        yield Finding("stopping", "warning", warning)
    elif s.recipe.hardware.processes > 1:
        told = f"{SHUTDOWN_TIMEOUT}=3600 for accelerate and torchrun, sbatch --signal=B:TERM@{notice_seconds(size)}"
        yield Finding(
            "stopping", "ok", f"a checkpoint of {size / GIB:.1f} GiB is saved in about {save_seconds(size):.0f} s; {told}"
        )


def threads(s: Subject) -> Iterator[Finding]:
    """Whether an optimizer on the CPU has more than one thread."""
    if offloads(s.recipe.training.sharding) and s.variables.get("OMP_NUM_THREADS", "1") == "1":
        yield Finding(
            "threads",
            "warning",
            f"{s.recipe.training.sharding} updates on the CPU, and launchers give each process one thread; set OMP_NUM_THREADS to "
            "the cores of a machine / its processes",
        )


def _checkpoint_bytes(recipe: Recipe, shape: Shape) -> float:
    lora = recipe.policy.lora
    return checkpoint_bytes(recipe, shape.parameters if lora is None else shape.lora_parameters(lora.rank))


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
