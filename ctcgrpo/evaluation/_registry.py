"""What Inspect AI finds by name (the entry point `inspect_ai` in pyproject.toml): tasks and models."""

from inspect_ai.model import ModelAPI, modelapi

from ctcgrpo.evaluation.eibench import eibench
from ctcgrpo.evaluation.eqbench3 import eqbench3
from ctcgrpo.evaluation.sage import sage

__all__ = ["eibench", "eqbench3", "local_policy", "sage"]


@modelapi(name="ctcgrpo")
def local_policy() -> type[ModelAPI]:
    from ctcgrpo.evaluation.local_policy import LocalPolicy

    return LocalPolicy
