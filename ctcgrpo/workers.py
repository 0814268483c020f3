"""One process a folder, and processes that end with the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ctcgrpo.errors import OutputError


@contextlib.contextmanager
def alone(
    folder: Path,
    *,
    patience: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
    advice: str = "choose another folder (of a run: run.output_dir=FOLDER)",
) -> Iterator[None]:
    """Hold a folder, which is made, against every other process on this machine. Raises OutputError where one still has it after
    `patience` seconds (one whose parent was killed may be saving), and where it cannot be written, with `advice`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "LOCK").open("w")
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); {advice}") from None
    with lock:
        deadline = time.monotonic() + patience
        told = False
        while not _locked(lock):
            if time.monotonic() >= deadline:
                raise OutputError(f"{folder}: another process is at work there")
            if not told:
                say(f"another process is at work in {folder}; waiting for it to end")
                told = True
            time.sleep(0.2)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def end_with_parent() -> None:
    """For a child that is a program of its own: heed SIGINT, which a parent in the background was started to ignore,
    and be sent it when the parent dies. The latter on Linux only; elsewhere a killed parent leaves its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
