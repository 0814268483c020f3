"""`ctcgrpo audit`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctcgrpo.credit import VINE
from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Credit, Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated
from ctcgrpo.util.terminal import Terminal, say

if TYPE_CHECKING:
    from ctcgrpo.options import CreditOptions

BASELINE = "grpo"
_WHAT = "list of kinds of credit"


def audit(
    source: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (its first policy), or a run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    groups: Annotated[int, typer.Option(min=3, help="Groups of episodes to play, rounded up to whole steps.")] = 64,
    continuations: Annotated[
        int, typer.Option(min=0, help="Continuations from after each turn, for vine and for effects of turns; 0 plays none.")
    ] = 2,
    credits: Annotated[Path | None, typer.Option(help="YAML: kinds of credit by name, each a section `credit`.")] = None,
    which: Annotated[str, typer.Option(help="Of a run: final, best, or a checkpoint's number.")] = "final",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file (a run: RUN/audit.json).")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw the gains, as SVG.")] = None,
) -> None:
    """Compare kinds of credit on the same episodes: bias, noise, and the expected gain of a step.

    Plays groups as the recipe says, without training, and computes each turn's gradient once. ctcgrpo/audit/README.md says what the
    figures are.
    """
    with tempfile.TemporaryDirectory(prefix="ctcgrpo-audit-") as scratch:
        recipe, adapter = _recipe(source, overrides or [], groups, which, Path(scratch))
        compared = compared_credits(recipe, credits, continuations=continuations)
        announce_loading(f"auditing {source}")
        from ctcgrpo.audit.measure import measure, played_steps
        from ctcgrpo.audit.table import credit_table, drawn, effects_table
        from ctcgrpo.run.train import opened

        with opened(recipe) as trainer:
            if adapter is not None:
                trainer.load_weights(adapter)
            steps = played_steps(trainer, recipe.training.max_steps, continuations=continuations, say=say)
            found = measure(trainer, steps, compared, baseline=BASELINE)
            main = trainer.accelerator.is_main_process
    if not main:
        return
    console = Terminal(132)
    console.print(credit_table(found, f"credit audit of {source}"))
    if (effects := effects_table(found)) is not None:
        console.print(effects)
    target = json_file or (source / "audit.json" if source.is_dir() else None)
    if target is not None:
        _write(target, json.dumps({"source": str(source), **found}, indent=1).encode())
    if picture is not None:
        _write(picture, drawn(found))


class Kinds(Section):
    """Kinds of credit to compare, by name."""

    credits: dict[str, Credit]


def compared_credits(recipe: Recipe, file: Path | None, *, continuations: int) -> dict[str, CreditOptions]:
    """The kinds of credit to compare, by name, with GRPO, and with the recipe's own where it is none of them. Raises RecipeError
    for a file that does not hold such, and for `vine` in it without continuations."""
    where = Path("credits.yaml") if file is None else file
    text = (files("ctcgrpo.audit") / "credits.yaml").read_text(encoding="utf-8") if file is None else read_text(where, _WHAT)
    data = parse_mapping(text, where, Kinds, _WHAT)
    if isinstance(sections := data.get("credits"), Mapping):
        data["credits"] = {name: _inheriting(section, recipe.credit) for name, section in sections.items()}
    kinds = {BASELINE: Credit(alpha=0), **validated(data, Kinds, where).credits}
    for name, credit in list(kinds.items()):
        if credit.credit == VINE and not continuations:
            if file is not None:
                raise RecipeError(f"{where}: credits.{name}.credit = {VINE!r} needs --continuations of 1 or more")
            del kinds[name]
    if recipe.credit not in kinds.values() and (recipe.credit.credit != VINE or continuations):
        kinds["recipe"] = recipe.credit
    return {name: recipe.model_copy(update={"credit": credit}).credit_options() for name, credit in kinds.items()}


def _inheriting(section: Any, of: Credit) -> Any:
    """A section with the recipe's weight and scale where it has none."""
    if not isinstance(section, Mapping):
        return section
    scale = {} if "scale" in section else {"scale": of.scale, "std_min": of.std_min}
    return {"alpha": of.alpha, **scale, **section}


def _recipe(source: Path, overrides: Sequence[str], groups: int, which: str, scratch: Path) -> tuple[Recipe, Path | None]:
    """The recipe to play by, with its run folder in `scratch`, and the adapter to load, for a run with LoRA."""
    file, policy = source, None
    if source.is_dir():
        file = require_run(source).recipe_file
        policy = RunFolder(source).policy(which)
    asked = load_recipe(file, overrides)
    alone = [
        f"run.output_dir={scratch}",
        "run.name=audit",
        "run.wandb=disabled",
        "training.sharding=none",
        f"training.max_steps={math.ceil(groups / asked.tasks_per_step)}",
    ]
    if policy is not None and asked.policy.lora is None:
        alone.append(f"policy.model={policy.resolve()}")
    return load_recipe(file, [*overrides, *alone]), None if asked.policy.lora is None else policy


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from None
    say(f"wrote {file}")
