"""Handing a sweep to W&B, whose agents then run it on as many machines as there are."""

from __future__ import annotations

import os
from pathlib import Path

from ctcgrpo.errors import RecipeError
from ctcgrpo.strict_yaml import load_yaml

COMMAND = ["${env}", "python", "-m", "ctcgrpo", "train", "${program}", "run.wandb=online", "${args_no_hyphens}"]
"""How an agent starts a run: overrides as recipes take them."""


def hand_over(file: Path) -> str:
    """Create the sweep; gives the command that starts an agent. Raises RecipeError without an account."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise RecipeError(
            "W&B keeps sweeps for an account: `wandb login`, or set WANDB_API_KEY; without one, leave --wandb out"
        )
    config = load_yaml(file.read_text(encoding="utf-8"))
    config.setdefault("command", COMMAND)
    try:
        made = wandb.sweep(config, project=config.get("project", "ctcgrpo"), entity=config.get("entity"))
    except wandb.errors.Error as error:
        raise RecipeError(f"W&B did not take {file}: {error}") from None
    project = "/".join(part for part in (config.get("entity"), config.get("project", "ctcgrpo"), made) if part)
    return f"wandb agent {project}"
