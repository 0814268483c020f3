"""One process a folder, and processes that end with the one that started them."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ctcgrpo.errors import OutputError


@contextlib.contextmanager
def alone(
    folder: Path,
    *,
    patience: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
    advice: str = "choose another folder (of a run: run.output_dir=FOLDER)",
) -> Iterator[None]:
    """Lock a folder, which is made, against every other process; its file LOCK names the process that has it. Raises OutputError
    where one still has it after `patience` seconds (one whose parent was killed may be saving), and where it cannot be written,
    with `advice`."""
    file = folder / "LOCK"
    lock = FileLock(file)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                if not patience:
                    raise
                say(f"another process ({_owner(file)}) is at work in {folder}; waiting up to {patience:.0f} s for it to end")
                stack.enter_context(lock.acquire(timeout=patience, poll_interval=0.2))
            file.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout:
            who = f"another process ({_owner(file)})"
            raise OutputError(f"{folder}: {who} is at work there; wait for it, or end it") from None
        except OSError as error:
            raise OutputError(f"cannot write to {folder} ({error.strerror}); {advice}") from None
        yield


def _owner(file: Path) -> str:
    """Who wrote a lock; it may not have come to it yet."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:80] or "unknown"
    except OSError:
        return "unknown"


def end_with_parent() -> None:
    """For a child that is a program of its own: heed SIGINT, which a parent in the background was started to ignore,
    and be sent it when the parent dies. The latter on Linux only; elsewhere a killed parent leaves its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
