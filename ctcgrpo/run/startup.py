"""Start of a command: logs one line before heavy libraries are loaded, and silences their warnings at import."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Final

from ctcgrpo.util.terminal import log_line

_NOT_FOR_USERS: Final = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""By logger, the beginning of a warning that needs no action: no GPU, no optional kernel."""


SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable of torchrun and accelerate's launcher: seconds from their signal to stop until they kill a process;
default 30."""
LAUNCHED = "CTCGRPO_LAUNCHED"
"""Set for processes that `ctcgrpo train` starts through accelerate: they train, and launch nothing."""

_announced = False


def announce_loading(doing: str, libraries: str = "PyTorch and transformers") -> None:
    """Log to standard error what a command does and that its libraries are loading, unless they are loaded already. Call it before
    they are imported. Only the main process logs."""
    global _announced
    _silence()
    if not _announced and LAUNCHED not in os.environ and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        _announced = True
        log_line(f"{doing}: loading {libraries} (5 to 20 seconds) ...", sys.stderr)


@functools.cache
def _silence() -> None:
    # TRL reports usage to its authors by default; this must be the user's choice.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name, beginning in _NOT_FOR_USERS.items():
        logging.getLogger(name).addFilter(_without(beginning))


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(beginning)
