"""`ctcgrpo check`: everything that would fail later, found before any GPU is taken; then the plan of memory, calls, money, hours.

A check is a small function: it takes what was loaded and yields findings. Order matters: a later one may need what an earlier one
has loaded, and says nothing where that is missing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.commands.config.config_args import default_config_file

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.preflight import cost, credit, environment, gpu, launch, machine, policy, prompts, scenarios, simulator
from ctcgrpo.preflight.subject import Check, Finding, Subject
from ctcgrpo.run.recipe import Recipe


def checks_of(recipe: Recipe) -> Sequence[Check]:
    """The checks of a recipe, in order."""
    own = recipe.environment is not None
    played: Sequence[Check] = (scenarios.scenarios, scenarios.validation)
    if own:
        played = (
            environment.environment,
            environment.tasks,
            environment.validation,
            environment.episode,
            environment.replies,
        )
    return (
        *played,
        credit.credit,
        launch.sharding,
        launch.libraries,
        policy.model,
        policy.adapter,
        policy.attention,
        policy.reasoning_tags,
        prompts.context,
        launch.processes,
        policy.precision,
        launch.launcher,
        gpu.memory,
        launch.policy_servers,
        *(() if own else (simulator.simulator,)),
        cost.cost,
        machine.disk,
        machine.stopping,
        machine.threads,
        machine.output,
        machine.weights_and_biases,
    )


def findings(
    recipe: Recipe, variables: Mapping[str, str] = os.environ, accelerate_config: Path = Path(default_config_file)
) -> tuple[list[Finding], Subject]:
    """All findings, and what was loaded on the way. A check that raises one of this project's errors has found what is wrong."""
    found: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(recipe, Path(folder), variables, accelerate_config)
        for check in checks_of(recipe):
            try:
                found += check(subject)
            except CtcGrpoError as error:
                if str(error) not in {f.text for f in found}:  # one mistake may be in the way of several checks
                    found.append(Finding(check.__name__.replace("_", " "), "failed", str(error)))
    return found, subject
