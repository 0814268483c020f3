"""What W&B has beyond transformers' integration: runs grouped by configuration, tables of dialogues, sweeps."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo import __version__
from ctcgrpo.errors import RecipeError
from ctcgrpo.rollout.traces import step_name
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import read_traces
from ctcgrpo.util.strict_yaml import load_yaml

PROJECT = "ctcgrpo"
"""The project of W&B, and of other trackers that have projects, where the environment names no other."""
WANDB = "wandb"
"""Its name in run.report_to."""
COLUMNS = (
    "step", "task", "tag", "rollout", "outcome", "turn", "heard", "reasoning", "reply", "reward",
    "outcome term", "turn term", "advantage", "info",
)  # fmt: skip
_STEP = "train/global_step"  # the axis of transformers' integration

_TRAIN = 'exec python -m ctcgrpo train "$0" "run.report_to=[wandb]" "run.name=sweep-$WANDB_RUN_ID" "$@"'
AGENT = ("${env}", "sh", "-c", _TRAIN, "${program}", "${args_no_hyphens}")
"""The command of a sweep's agent: a run in a folder of its own, with the agent's values as overrides."""


@contextlib.contextmanager
def wandb_run(recipe: Recipe) -> Iterator[None]:
    """The W&B run of a recipe, which transformers' integration then uses; a resumed run resumes it. Raises RecipeError where W&B
    is not available."""
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=recipe.run.name,
            group=group_of(recipe),
            id=os.environ.get("WANDB_RUN_ID") or hashlib.sha256(str(recipe.folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(recipe.folder),
            config={"recipe": recipe.model_dump(mode="json"), "version": __version__, "commit": commit()},
        )
    except wandb.errors.Error as error:
        what = f"run.report_to has {WANDB!r}: {error}"
        raise RecipeError(f"{what}; run `wandb login`, or set the environment variable WANDB_MODE=offline") from None
    try:
        yield
    finally:
        run.finish()


def log_dialogues(folder: RunFolder, step: int) -> None:
    """Add a table of dialogues of a step to the run."""
    import wandb

    if (rows := dialogue_rows(folder, step)) and wandb.run is not None:
        wandb.run.log({"dialogues": wandb.Table(columns=list(COLUMNS), data=rows), _STEP: step})


def group_of(recipe: Recipe) -> str:
    """A name that runs share if they differ only in name and seed: the credit's settings, and a digest of the recipe."""
    settings = recipe.model_dump(mode="json", exclude={"run", "hardware"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return f"{recipe.credit.centering}-{recipe.credit.credit}-alpha{recipe.credit.alpha:g}-{digest}"


def commit() -> str | None:
    """The commit of this code's checkout, marked if it has changes; None for an installed package."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def dialogue_rows(folder: RunFolder, step: int) -> list[list[Any]]:
    """One row per turn, of one group per scene, from the traces of one step; empty before the first step."""
    episodes, _ = read_traces(folder.traces_of(step_name(step)))
    by_scene: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for e in episodes:
        by_scene.setdefault(e["tag"], {}).setdefault(e["group"], []).append({**e, "step": step})
    rng = random.Random(step)  # of its own: training's random state must not depend on what is shown
    chosen = [rng.choice(sorted(groups.items()))[1] for _, groups in sorted(by_scene.items())]
    return [row for group in chosen for episode in group for row in _rows(episode)]


def _rows(episode: Mapping[str, Any]) -> Sequence[list[Any]]:
    messages = [episode["opening"], *(turn["message"] for turn in episode["turns"])]
    rows = []
    for k, turn in enumerate(episode["turns"]):
        place = [episode[name] for name in ("step", "task", "tag", "rollout", "outcome")]
        texts = [turn[name] for name in ("reasoning", "reply", "reward")]
        terms = [(turn.get("credit") or {}).get(name) for name in ("outcome", "turn", "advantage")]
        info = ", ".join(f"{name} {value}" for name, value in turn["info"].items())
        rows.append([*place, k + 1, messages[k], *texts, *terms, info])
    return rows


def hand_over(file: Path) -> str:
    """Create the sweep. Returns the command that starts an agent. Raises RecipeError without an account."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise RecipeError("a W&B sweep needs an account: run `wandb login`, set WANDB_API_KEY, or leave --wandb out")
    config = load_yaml(file.read_text(encoding="utf-8"))
    config.setdefault("command", list(AGENT))
    try:
        made = wandb.sweep(config, project=config.get("project", PROJECT), entity=config.get("entity"))
    except wandb.errors.Error as error:
        raise RecipeError(f"{file}: W&B refused the sweep: {error}") from None
    project = "/".join(part for part in (config.get("entity"), config.get("project", PROJECT), made) if part)
    return f"wandb agent {project}"
