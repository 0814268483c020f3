"""What `ctcgrpo check` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctcgrpo.model.shapes import GIB
from ctcgrpo.preflight.memory import MemoryPlan
from ctcgrpo.preflight.subject import Finding

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def print_findings(found: Sequence[Finding], memory: MemoryPlan | None, console: Console, name: str) -> None:
    table = Table("", "", "", title=Text(f"check of {name}"), show_header=False)
    for finding in found:
        table.add_row(Text(finding.about), Text(finding.level, style=_STYLES[finding.level]), Text(finding.text))
    console.print(table)
    if memory is not None:
        console.print(_memory_table(memory))
    failed = sum(f.level == "failed" for f in found)
    warned = sum(f.level == "warning" for f in found)
    console.print(f"{failed} to mend, {warned} to mind" if failed or warned else "ready to run", highlight=False)


def _memory_table(plan: MemoryPlan) -> Table:
    table = Table("GiB a GPU", "rollout", "update", title="memory by part (computed, not measured)")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, phases in plan.parts.items():
        table.add_row(part, f"{phases['rollout'] / GIB:.1f}", f"{phases['update'] / GIB:.1f}")
    table.add_section()
    table.add_row("in all", f"{plan.total('rollout') / GIB:.1f}", f"{plan.total('update') / GIB:.1f}")
    table.add_row("of the card", f"{plan.card / GIB:.1f}", f"{plan.card / GIB:.1f}")
    return table
