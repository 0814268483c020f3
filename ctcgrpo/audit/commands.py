"""`ctcgrpo audit`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from ctcgrpo.audit.kinds import BASELINE, kinds, package_sections
from ctcgrpo.audit.record import FILE
from ctcgrpo.credit import VINE
from ctcgrpo.errors import CreditError, OutputError, RecipeError
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Credit, Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.files import write_whole
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated
from ctcgrpo.util.terminal import Terminal, log_line

if TYPE_CHECKING:
    from ctcgrpo.options import CreditOptions

_WHAT = "list of kinds of credit"


def audit(
    source: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (its first policy), or a run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    groups: Annotated[int, typer.Option(min=3, help="Groups of episodes to play, rounded up to whole steps.")] = 64,
    continuations: Annotated[
        int, typer.Option(min=0, help="Continuations from after each turn, for vine and for effects of turns; 0 plays none.")
    ] = 2,
    credits: Annotated[
        Path | None, typer.Option(help="YAML, credits: {NAME: {centering: group, ...}}; default: the package's.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="The kind that gains are relative to.")] = BASELINE,
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("ctcgrpo audit runs in one process; on several, set training.audit_every")
    with tempfile.TemporaryDirectory(prefix="ctcgrpo-audit-") as scratch:
        recipe, adapter = _recipe(source, overrides or [], groups, which, Path(scratch))
        found_kinds = compared(recipe, credits, continuations=continuations)
        if baseline not in found_kinds:
            raise RecipeError(f"--baseline {baseline!r}; {did_you_mean(baseline, found_kinds)}")
        announce_loading(f"auditing {source}")
        from ctcgrpo.audit.measure import measure, played_steps
        from ctcgrpo.audit.table import drawn, tables
        from ctcgrpo.run.train import opened

        with opened(recipe) as trainer:
            if adapter is not None:
                trainer.load_weights(adapter)
            try:
                steps = played_steps(trainer, recipe.training.max_steps, continuations=continuations, log_line=log_line)
            except CreditError as error:  # the environment cannot be branched
                raise CreditError(f"{error}; or pass --continuations 0") from None
            found = measure(trainer, steps, found_kinds, str(source), baseline=baseline)
    for table in tables(found):
        Terminal(132).print(table)
    if (target := json_file or (source / FILE if source.is_dir() else None)) is not None:
        _write(target, found.model_dump_json(indent=1))
    if picture is not None:
        _write(picture, drawn(found))


class Kinds(Section):
    """Kinds of credit to compare, by name."""

    credits: dict[str, Credit] = Field(description="what to compare: sections credit of a recipe, by names of your own")


def compared(recipe: Recipe, file: Path | None, *, continuations: int) -> dict[str, CreditOptions]:
    """What to compare: the kinds of the package, or those of a file, and the recipe's own. Raises RecipeError for a file that does
    not hold such, and for `vine` in it without continuations."""
    sections = package_sections()
    if file is not None:
        text = read_text(file, _WHAT)
        credits = validated(parse_mapping(text, file, Kinds, _WHAT), Kinds, file).credits
        sections = {name: credit.model_dump(exclude_unset=True) for name, credit in credits.items()}
        for name, credit in credits.items():
            if credit.credit == VINE and not continuations:
                raise RecipeError(f"{file}: credits.{name}.credit = {VINE!r} needs --continuations of 1 or more")
    return kinds(sections, recipe.credit_options(), vine=continuations > 0)


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
        "run.report_to=[]",
        "training.sharding=none",
        f"training.max_steps={math.ceil(groups / asked.tasks_per_step)}",
    ]
    if policy is not None and asked.policy.lora is None:
        alone.append(f"policy.model={policy.resolve()}")
    return load_recipe(file, [*overrides, *alone]), None if asked.policy.lora is None else policy


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from None
    log_line(f"wrote {file}")
