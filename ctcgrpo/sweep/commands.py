"""`ctcgrpo sweep`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ctcgrpo.errors import RecipeError, RunFailed
from ctcgrpo.sweep.spec import load_sweep
from ctcgrpo.terminal import Terminal


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep in W&B's format (configs/sweeps).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value for every run ...")] = None,
    name: Annotated[str | None, typer.Option(help="The folder under --out; the file's name by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where sweeps are.")] = Path("checkpoints") / "sweeps",
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    devices: Annotated[list[str] | None, typer.Option(help="GPUs of a worker, as 0,1; once for each.")] = None,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Hand the file to W&B instead, and say how agents are started.")
    ] = False,
) -> None:
    """Run a sweep over fields of a recipe; the same command resumes it."""
    spec, recipe = load_sweep(file)
    if wandb:
        if name or overrides or devices:
            raise RecipeError("--wandb hands the file over as it is; put names and values into it")
        from ctcgrpo.tracking import hand_over

        print(hand_over(file))
        return
    try:
        from ctcgrpo.sweep.coordinator import check_devices, run_sweep
        from ctcgrpo.sweep.table import all_equal, printed
    except ImportError as error:
        raise RecipeError(f"sweeping needs the extra sweep: pip install 'ctcgrpo[sweep]' ({error})") from None
    check_devices(workers, devices or [])
    console = Terminal(140)
    folder = out / (name or spec.name or file.stem)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    rows = run_sweep(
        spec,
        recipe,
        folder,
        workers=workers,
        devices=devices or [],
        extra=overrides or [],
        say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    shutil.copyfile(file, folder / "sweep.yaml")
    console.print(printed(rows, f"sweep {folder.name}: held-out score after training"))
    if all_equal(rows):
        console.print("all trials have the same score: there is no best one. Try more steps, or values further apart.")
    elif (folder / "best").exists():
        console.print(f"best checkpoint: {folder / 'best'}", markup=False, highlight=False, soft_wrap=True)
    if all(row["score"] is None for row in rows):
        raise RunFailed(f"no trial of {folder} came to its end; each says why in its folder's log")
