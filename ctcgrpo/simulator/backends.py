"""Simulator backends by name, and of one's own by `module:Class`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctcgrpo.errors import CtcGrpoError, RecipeError
from ctcgrpo.llm_client.endpoints import CallRecord
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator.config import BACKENDS, SimulatorConfig
from ctcgrpo.simulator.protocol import SimulatorBackend
from ctcgrpo.util.importing import blame, load_object


def make_backend(
    config: SimulatorConfig, store: Store | None, on_call: Callable[[CallRecord], None], say: Callable[[str], None]
) -> SimulatorBackend:
    """The backend that a configuration describes; see SimulatorBackend.configured. Raises RecipeError for a class that cannot be
    loaded, is no backend, or cannot be made."""
    where = f"backend = {config.backend!r}"
    found: Any = load_object(BACKENDS.get(config.backend, config.backend), "backend", config.folder)
    if not (isinstance(found, type) and issubclass(found, SimulatorBackend)):
        raise RecipeError(f"{where}; expected a subclass of ctcgrpo.simulator.protocol.SimulatorBackend")
    if not hasattr(found, "name"):
        raise RecipeError(f"{where}: {found.__name__} has no `name`, which health answers and summaries give")
    try:
        return found.configured(config, store, on_call, say)
    except CtcGrpoError:
        raise
    except Exception as error:  # whatever a class of one's own does, abstract methods and wrong options included
        if config.backend in BACKENDS:
            raise
        raise RecipeError(f"{where}: cannot be made with options {dict(config.options)}: {blame(error)}") from error
