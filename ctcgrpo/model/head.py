"""Limits TRL's fused head to trained positions, on every device, and sets its chunk size on CPUs.

The head does this itself where Triton runs. Elsewhere it scores every position, to avoid recompilation for each shape; on a CPU
that took most of the update (25 s of a step instead of 6 s). Its chunks of 4,096 tokens also exceed a CPU's caches: 3,200 tokens
with a vocabulary of 6,144 took 0.6 s forward and backward in chunks of 256, 0.85 s in chunks of 1,024, and 1.5 s in chunks of
4,096."""

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

_TOKENS_WITHOUT_GPU = 256


def score_trained_positions_only() -> None:
    """Make TRL's fused head project only positions with a label. The kernel itself checks the device."""

    def compact(device: torch.device) -> bool:
        return True

    if not hasattr(utils, "_use_triton") or not hasattr(chunked_logprob, "TOKEN_CHUNK_SIZE"):
        raise RuntimeError(
            "this version of TRL selects the positions that its fused head scores in another way; see model/head.py"
        )
    utils._use_triton = compact
    if not torch.cuda.is_available():
        chunked_logprob.TOKEN_CHUNK_SIZE = _TOKENS_WITHOUT_GPU
