"""Scoring trained positions only, on every device.

TRL's fused head does so where Triton runs. Elsewhere it scores every position, so that accelerators that compile for each
shape need not recompile; on a CPU that made most of the update (25 s of a quickstart step, where 6 s will do).
"""

from __future__ import annotations

import torch
from trl.trainer import utils


def score_trained_positions_only() -> None:
    """From now on TRL's fused head projects only positions with a label. The kernel behind it looks the device up by itself."""

    def compact(device: torch.device) -> bool:
        return True

    if not hasattr(utils, "_use_triton"):
        raise RuntimeError("this version of TRL chooses what its fused head scores in another way; look at training/head.py")
    utils._use_triton = compact
