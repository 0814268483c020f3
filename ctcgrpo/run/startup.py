"""What a user sees before heavy libraries are loaded: one line at once, and none of the libraries' own warnings at import."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Final

from ctcgrpo.util.terminal import say

_NOT_FOR_USERS: Final = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
}
"""By logger, how a warning begins that tells a user nothing to act on: no GPU here, no optional kernel, and an output layer that is
tied to the embeddings and so stands in no checkpoint."""


SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable by which torchrun and accelerate's launcher are told how many seconds they wait before they kill what they have told
to stop; 30 without it."""
LAUNCHED = "CTCGRPO_LAUNCHED"
"""Set for the processes that `ctcgrpo train` starts through accelerate: they run, and launch nothing further."""

_announced = False


def announce_loading(doing: str, libraries: str = "PyTorch and transformers") -> None:
    """Say on standard error what a command does and that its libraries are being loaded, unless they are loaded already; call it
    before they are imported. Of several processes the one that was started, or the main one, says it."""
    global _announced
    _silence()
    if not _announced and LAUNCHED not in os.environ and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        _announced = True
        say(f"{doing}: loading {libraries} (5 to 20 seconds) ...", sys.stderr)


@functools.cache
def _silence() -> None:
    # TRL reports usage to its authors by default; a framework should not do so on a user's behalf.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # TRL's defaults name options that transformers is about to rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6.*", category=FutureWarning)
    for name, beginning in _NOT_FOR_USERS.items():
        logging.getLogger(name).addFilter(_without(beginning))


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(beginning)
