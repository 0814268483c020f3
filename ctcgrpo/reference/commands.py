"""`ctcgrpo fields` and `ctcgrpo metrics`: plain text, at most 80 columns in a pipe and 100 in a terminal."""

import shutil
import textwrap
from typing import Annotated

import typer

from ctcgrpo.reference.fields import FILES, RECIPE
from ctcgrpo.reference.fields import select as selected_fields
from ctcgrpo.reference.metrics import select as selected_metrics

_WIDEST = 100


def fields(
    section: Annotated[
        str | None,
        typer.Argument(help=f"A section (training), a field (training.clip), or a kind of file: {', '.join(FILES)}."),
    ] = None,
) -> None:
    """Print what the fields of a recipe mean, with types, ranges and defaults."""
    file, sections = selected_fields(section)
    _print(f"Fields of a {file} ({FILES[file][1]}).")
    if file == RECIPE:
        _print("Override one: ctcgrpo train RECIPE training.max_steps=20")
    for found in sections:
        if found.path:
            note = f" ({found.note})" if found.note else ""
            _print(f"\n{found.path}{note}: {found.meaning}")
        for field in found.fields:
            value = " (required)" if field.default == "required" else f" = {field.default}"
            _print(f"\n{field.path}{value}", indent=2, hanging=6)
            _print(field.allowed, indent=6)
            _print(field.meaning, indent=6)
            if field.option:
                _print(f"in Python: CTCGRPOConfig({field.option}=...)", indent=6)
    if section is None:
        others = ", ".join(name for name in FILES if name != RECIPE)
        _print(f"\nOne section: ctcgrpo fields training. Other files: ctcgrpo fields NAME, with NAME one of {others}.")


def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric (clip_share), or a group of them (packing).")] = None,
) -> None:
    """Print what each metric means, its healthy range, and what to try otherwise."""
    groups = selected_metrics(name)
    _print("Metrics of metrics.jsonl and W&B. Healthy ranges are rules of thumb.")
    for group, found in groups.items():
        _print(f"\n{group}")
        for metric in found:
            _print(f"\n{metric.name}: {metric.meaning}", indent=2, hanging=6)
            if metric.healthy:
                _print(f"healthy: {metric.healthy}", indent=6, hanging=8)
                _print(f"otherwise: {metric.otherwise}", indent=6, hanging=8)


def _print(text: str, *, indent: int = 0, hanging: int | None = None) -> None:
    """Print a paragraph, behind an empty line where it begins with a line end."""
    width = min(_WIDEST, shutil.get_terminal_size((80, 24)).columns)
    later = " " * (indent if hanging is None else hanging)
    gap = "\n" if text.startswith("\n") else ""
    print(gap + textwrap.fill(text.strip(), width, initial_indent=" " * indent, subsequent_indent=later, break_on_hyphens=False))
