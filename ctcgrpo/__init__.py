"""Train language models over several turns with turn-level credit (CTC-GRPO) on TRL.

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctcgrpo.util.lazy import lazy

if TYPE_CHECKING:
    from ctcgrpo.config import CTCGRPOConfig as CTCGRPOConfig
    from ctcgrpo.training.trainer import CTCGRPOTrainer as CTCGRPOTrainer
    from ctcgrpo.types import Environment as Environment
    from ctcgrpo.types import Step as Step

__version__ = "0.1.0"
__all__ = ["CTCGRPOConfig", "CTCGRPOTrainer", "Environment", "Step"]

__getattr__ = lazy(
    __name__,
    {
        "CTCGRPOConfig": "config",
        "CTCGRPOTrainer": "training.trainer",
        "Environment": "types",
        "Step": "types",
    },
)
