"""Which of the processes that share a folder are alive, also across containers of one machine.

Each process locks a file of its own. The kernel releases the lock when the process ends, however it ends. The library filelock
has exclusive locks of this kind only: two processes that look at the same moment would each take the other for the owner.
"""

from __future__ import annotations

import fcntl
import uuid
from pathlib import Path


class Owner:
    """This process. Make one only while no other process makes or removes one in that folder. Raises OSError where the file cannot
    be made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.name = uuid.uuid4().hex
        self._folder = folder
        for file in folder.iterdir():
            if not self.is_alive(file.name):
                file.unlink(missing_ok=True)
        self._file = (folder / self.name).open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_alive(self, name: str) -> bool:
        """Whether the process of that name runs. Raises OSError where that cannot be found out."""
        if name == self.name:
            return True
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def close(self) -> None:
        (self._folder / self.name).unlink(missing_ok=True)
        self._file.close()
