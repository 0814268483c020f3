"""Train language models over several turns with turn-level credit (CTC-GRPO) on TRL.

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctcgrpo.config import CTCGRPOConfig as CTCGRPOConfig
    from ctcgrpo.training.trainer import CTCGRPOTrainer as CTCGRPOTrainer
    from ctcgrpo.types import Environment as Environment
    from ctcgrpo.types import Step as Step

__version__ = "0.1.0"
__all__ = ["CTCGRPOConfig", "CTCGRPOTrainer", "Environment", "Step"]

_HOMES = {
    "CTCGRPOConfig": "ctcgrpo.config",
    "CTCGRPOTrainer": "ctcgrpo.training.trainer",
    "Environment": "ctcgrpo.types",
    "Step": "ctcgrpo.types",
}


def __getattr__(name: str) -> Any:
    """The public names are imported when they are used: TRL takes seconds, and most commands do without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
