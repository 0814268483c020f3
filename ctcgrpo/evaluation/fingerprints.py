"""What the names in an evaluation stood for when it was played: digests, so that figures of other data, of another policy under
the same path, or of another simulator are not taken for the same."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.scenarios import data_home, load_set
from ctcgrpo.environments.sage_protocol import load_profiles
from ctcgrpo.evaluation.eqbench3_protocol import load_eqbench
from ctcgrpo.evaluation.users import chosen_user
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS, load_instructions
from ctcgrpo.simulator.choice import SCRIPTED, named_simulator
from ctcgrpo.simulator.llm.backend import chosen_prompts

_POLICY_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def fingerprint(bench: str, model: str, task: Mapping[str, Any], scenarios: str) -> dict[str, Any]:
    """`data` of the scenarios, `policy` of a local folder, `simulator` of who plays the user, `instructions` that the policy is
    given; `scenarios` is what stands in for a
    task that names none. Raises ScenarioError, RecipeError and SimulatorTransportError for what is not there."""
    found: dict[str, Any] = {"data": data_digest(bench, task, scenarios)}
    folder = Path(model).expanduser()
    if folder.is_dir():
        found["policy"] = _of_files(f for pattern in _POLICY_FILES for f in folder.glob(pattern))
    if bench == "eibench":
        found["simulator"] = _simulator(task)
        found["instructions"] = _instructions(task)
    return found


def data_digest(bench: str, task: Mapping[str, Any], scenarios: str) -> str:
    given = task.get("data")
    if bench == "sage":
        return _digest(map(repr, load_profiles(Path(given).expanduser() if given else data_home() / "sage")))
    if bench == "eqbench3":
        return _digest([repr(load_eqbench(Path(given).expanduser() if given else data_home() / "eqbench3"))])
    return _digest(map(repr, load_set(task.get("scenarios", scenarios), "test", task.get("invalid", "skip")).scenarios))


def _simulator(task: Mapping[str, Any]) -> Any:
    simulator, official = task.get("simulator"), task.get("official")
    if official is not None:
        return chosen_prompts(Path(official).expanduser()).name
    if simulator is None or simulator == SCRIPTED:
        return chosen_prompts(None).name if simulator is None else SCRIPTED
    choice = named_simulator(simulator)
    if choice.urls:
        return asyncio.run(chosen_user(simulator, None).about())
    return [choice.config.digest, choice.config.backend if choice.llm is None else chosen_prompts(choice.llm.official).name]


def _instructions(task: Mapping[str, Any]) -> str:
    """What the policy is told beside its role, by name and digest."""
    if (official := task.get("official")) is not None:
        return chosen_prompts(Path(official).expanduser()).name
    return load_instructions(task.get("instructions") or DEFAULT_INSTRUCTIONS).name


def _of_files(files: Iterable[Path]) -> str:
    """Names, sizes and times: weights are too large to be read for this."""
    return _digest(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(files))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode("utf-8", "replace")).hexdigest()[:12]
