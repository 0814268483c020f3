"""Scoring trained positions only, on every device, in pieces that suit it.

TRL's fused head does so where Triton runs. Elsewhere it scores every position, so that accelerators that compile for each
shape need not recompile; on a CPU that made most of the update (25 s of a step, where 6 s will do). There its
pieces of 4,096 tokens also fall out of the caches, and each of a dozen passes over one is paid for in page faults: with 256
tokens 3,200 of them and a vocabulary of 6,144 took 0.6 s forward and backward, with 1,024 they took 0.85 s, with 4,096 1.5 s.
"""

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

_TOKENS_WITHOUT_GPU = 256


def score_trained_positions_only() -> None:
    """From now on TRL's fused head projects only positions with a label. The kernel behind it looks the device up by itself."""

    def compact(device: torch.device) -> bool:
        return True

    if not hasattr(utils, "_use_triton") or not hasattr(chunked_logprob, "TOKEN_CHUNK_SIZE"):
        raise RuntimeError("this version of TRL chooses what its fused head scores in another way; look at training/head.py")
    utils._use_triton = compact
    if not torch.cuda.is_available():
        chunked_logprob.TOKEN_CHUNK_SIZE = _TOKENS_WITHOUT_GPU
