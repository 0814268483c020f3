"""`ctcgrpo check`: validates a recipe without a GPU, and estimates memory, simulator calls, cost and hours.

A check is a small function from a `Subject` to findings. Order matters: a later check may need what an earlier one has loaded, and
yields nothing where that is missing."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.commands.config.config_args import default_config_file
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.model.shapes import GIB
from ctcgrpo.preflight import cost, eibench, environment, launch, policy
from ctcgrpo.preflight.memory import PHASES, MemoryPlan
from ctcgrpo.preflight.subject import Check, Finding, Subject, failed
from ctcgrpo.run.recipe import Recipe

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_OWN: Sequence[Check] = (
    environment.environment, environment.tasks, environment.validation, environment.episode, environment.replies,
)  # fmt: skip


def checks_of(recipe: Recipe) -> Sequence[Check]:
    """The checks of a recipe, in order."""
    own = recipe.environment is not None
    return (
        *(_OWN if own else (eibench.scenarios, eibench.validation)),
        policy.credit, launch.sharding, launch.libraries, policy.model, policy.adapter, policy.attention, policy.reasoning_tags,
        policy.context, launch.processes, policy.precision, launch.launcher, cost.memory, launch.policy_servers,
        *(() if own else (eibench.simulator,)),
        cost.cost, launch.disk, launch.stopping, launch.threads, launch.output, launch.trackers,
    )  # fmt: skip


def findings(
    recipe: Recipe,
    variables: Mapping[str, str] = os.environ,
    accelerate_config: Path = Path(default_config_file),
    gpus: int = 0,
) -> tuple[list[Finding], Subject]:
    """All findings, and what the checks loaded. An error of this project that a check raises is a failed finding.

    `gpus`: those of this machine.
    """
    found: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(recipe, Path(folder), variables, accelerate_config, gpus=gpus)
        for check in checks_of(recipe):
            name = check.__name__.replace("_", " ")
            try:
                for finding in check(subject):
                    found.append(replace(finding, about=finding.about or name))
            except CtcGrpoError as error:
                if str(error) not in {f.text for f in found}:  # one error may fail several checks
                    found.append(failed(str(error), name))
    return found, subject


def print_findings(found: Sequence[Finding], memory: MemoryPlan | None, console: Console, name: str) -> None:
    """What `ctcgrpo check` prints."""
    table = Table("", "", "", title=Text(f"check of {name}"), show_header=False)
    for finding in found:
        table.add_row(Text(finding.about), Text(finding.level, style=_STYLES[finding.level]), Text(finding.text))
    console.print(table)
    if memory is not None:
        console.print(_memory_table(memory))
    bad, odd = (sum(f.level == level for f in found) for level in ("failed", "warning"))
    console.print(f"{bad} failed, {odd} warnings" if bad or odd else "ready to run", highlight=False)


def _memory_table(plan: MemoryPlan) -> Table:
    table = Table("GiB per GPU", *PHASES, title="estimated GPU memory by component")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, phases in plan.parts.items():
        table.add_row(part, *(f"{phases[phase] / GIB:.1f}" for phase in PHASES))
    table.add_section()
    table.add_row("total", *(f"{plan.total(phase) / GIB:.1f}" for phase in PHASES))
    table.add_row("GPU capacity", *(f"{plan.card / GIB:.1f}" for _ in PHASES))
    return table
