"""`ctcgrpo fields` and `ctcgrpo metrics`: plain text, at most 80 columns in a pipe and 100 in a terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated

import typer

from ctcgrpo.reference.fields import FILES, RECIPE, Field, Fields
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
    _print(f"Fields of {_titled(file)}.")
    if file == RECIPE:
        _print("Override one: ctcgrpo train RECIPE training.max_steps=20")
    for found in sections:
        _print_section(found)
    if section is None:
        others = ", ".join(name for name in FILES if name != RECIPE)
        print()
        _print(f"One section: ctcgrpo fields training. Other files: ctcgrpo fields NAME, with NAME one of {others}.")


def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric (clip_share), or a group of them (packing).")] = None,
) -> None:
    """Print what each metric means, its healthy range, and what to try otherwise."""
    groups = selected_metrics(name)
    _print("Metrics of metrics.jsonl and W&B. Healthy ranges are rules of thumb.")
    for group, found in groups.items():
        print()
        _print(group)
        for metric in found:
            print()
            _print(f"{metric.name}: {metric.meaning}", indent=2, hanging=6)
            if metric.healthy != "-":
                _print(f"healthy: {metric.healthy}", indent=6, hanging=8)
                _print(f"otherwise: {metric.otherwise}", indent=6, hanging=8)


def _titled(file: str) -> str:
    return f"a {file} ({FILES[file][1]})" if file != RECIPE else f"a recipe ({FILES[file][1]})"


def _print_section(section: Fields) -> None:
    if section.path:
        note = f" ({section.note})" if section.note else ""
        print()
        _print(f"{section.path}{note}: {section.meaning}")
    for field in section.fields:
        _print_field(field)


def _print_field(field: Field) -> None:
    value = " (required)" if field.default == "required" else f" = {field.default}"
    print()
    _print(f"{field.path}{value}", indent=2, hanging=6)
    _print(field.allowed, indent=6)
    _print(field.meaning, indent=6)


def _print(text: str, *, indent: int = 0, hanging: int | None = None) -> None:
    width = min(_WIDEST, shutil.get_terminal_size((80, 24)).columns)
    later = " " * (indent if hanging is None else hanging)
    print(textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=later, break_on_hyphens=False))
