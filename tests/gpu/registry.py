"""What a check is, what it needs, and the machine that it finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from ctcgrpo.util.importing import installing
from tests.gpu import SUBJECTS

Figures = Mapping[str, str | int | float]
"""What a check measured, by name."""


class NotRun(Exception):
    """Raised by a check that finds that this machine cannot run it; the message says why."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus` of at least `gib` GiB each; `on_cpu`: run small checks on the CPU, whatever else there is. `scratch`: a folder for
    policies and runs, the same for all checks."""

    gpus: int
    gib: float
    on_cpu: bool
    scratch: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.on_cpu else "cuda")


@dataclass(frozen=True, slots=True)
class Check:
    """`seconds`: about how long it takes on one H100; it is given up after ten times as many, and two minutes."""

    name: str
    run: Callable[[Machine], Figures]
    gpus: int
    gib: float
    modules: tuple[str, ...]
    on_cpu: bool
    seconds: int

    @property
    def limit(self) -> int:
        return 10 * self.seconds + 120


CHECKS: dict[str, Check] = {}


def check(
    name: str, *, seconds: int, gpus: int = 1, gib: float = 0, modules: tuple[str, ...] = (), on_cpu: bool = False
) -> Callable[[Callable[[Machine], Figures]], Callable[[Machine], Figures]]:
    """Registers a function as a check. It needs `gpus` GPUs of `gib` GiB and these modules; `on_cpu`: `--cpu` runs it too. It
    raises what it likes for a failure, and NotRun."""

    def register(run: Callable[[Machine], Figures]) -> Callable[[Machine], Figures]:
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, run, gpus, gib, modules, on_cpu, seconds)
        return run

    return register


def all_checks() -> list[Check]:
    """In the order of SUBJECTS, whatever was imported before."""
    modules = [import_module(f"tests.gpu.{subject}").__name__ for subject in SUBJECTS]
    return sorted(CHECKS.values(), key=lambda check: modules.index(check.run.__module__))


def why_not(check: Check, machine: Machine) -> str | None:
    """Why this machine cannot run a check; None where it can."""
    if machine.on_cpu and not check.on_cpu:
        return f"needs {_gpus(check.gpus)}"
    if missing := [name for name in check.modules if importlib.util.find_spec(name) is None]:
        return f"needs {', '.join(missing)}, not installed here ({installing('vllm,deepspeed')})"
    if machine.on_cpu:
        return None
    if check.gpus > machine.gpus:
        return f"needs {_gpus(check.gpus)}; {machine.gpus} found"
    if check.gib > machine.gib:
        return f"needs {check.gib:g} GiB of GPU memory; {machine.gib:.0f} found"
    return None


def _gpus(n: int) -> str:
    return "a GPU" if n == 1 else f"{n} GPUs"
