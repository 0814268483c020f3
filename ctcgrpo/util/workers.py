"""Locks on folders, and child processes that end with their parent."""

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
def lock_folder(
    folder: Path,
    *,
    patience: float = 0.0,
    log_line: Callable[[str], None] = lambda text: None,
    advice: str = "choose another folder (of a run: run.output_dir=FOLDER)",
) -> Iterator[None]:
    """Create a folder and lock it against other processes; its file LOCK names the owner. Raises OutputError where another process
    has the lock for more than `patience` seconds (one whose parent was killed may be saving), and, with `advice`, where the
    folder is not writable."""
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
                log_line(f"{folder} is locked by another process ({_owner(file)}); waiting up to {patience:.0f} s")
                stack.enter_context(lock.acquire(timeout=patience, poll_interval=0.2))
            file.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout:
            owner = f"another process ({_owner(file)})"
            raise OutputError(f"{folder} is locked by {owner}; wait for it to end, or stop it") from None
        except OSError as error:
            raise OutputError(f"cannot write to {folder} ({error.strerror}); {advice}") from None
        yield


def _owner(file: Path) -> str:
    """The process that wrote a lock; it may not have written it yet."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:80] or "unknown"
    except OSError:
        return "unknown"


def end_with_parent() -> None:
    """For a child process: handle SIGINT, which a background parent ignores, and receive it when the parent dies. The latter works
    on Linux only; elsewhere the children of a killed parent keep running."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
