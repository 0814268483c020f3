"""The store on disk: answers already paid for, and counters. LMDB keeps it consistent after a kill, and lets the processes of one
machine share it (not over a network file system)."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from ctcgrpo.errors import OutputError
from ctcgrpo.llm_client import store_check
from ctcgrpo.llm_client.store_check import seal, unseal

_MOVE_AWAY = (
    "try moving the folder away: its answers are then requested and paid for again, and the account starts at 0 (lower the budget "
    "by what was spent)"
)
_ADVICE = "try freeing space there, or another folder (store)"
_LEAST_ROOM = 32_768  # free bytes on the disk; with less, creating LMDB's lock file ends the process with SIGBUS
_SLOWEST = 5_000_000  # bytes a second; the time limit of the check assumes at least this
_log = logging.getLogger(__name__)


class Owner:
    """Identifies this process among those that share a folder, also across containers of one machine. Each process locks its own
    file, and the kernel releases the lock when the process ends in any way. (With filelock's exclusive locks, two processes that
    check at the same moment would each take the other for the owner.) Create one only while no other process creates or removes one
    in that folder. Raises OSError where the file cannot be created."""

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
        """Whether the process of that name runs. Raises OSError where its file cannot be read."""
        try:
            with (self._folder / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        (self._folder / self.name).unlink(missing_ok=True)
        self._file.close()


class Store:
    """A folder with one LMDB environment. Raises OutputError, and never LMDB's own errors, where it cannot be opened or is
    damaged."""

    def __init__(self, folder: Path, *, map_size: int = store_check.MAP_SIZE) -> None:
        """`map_size`: the maximum size of its file in bytes."""
        self._folder = folder
        self._owner: Owner | None = None
        with self._errors("use"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            disk = os.statvfs(folder)
            if disk.f_bavail * disk.f_frsize < _LEAST_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if (folder / "data.mdb").exists():
                _check(folder)
            # Without fsync, only a power failure loses data, not a killed process.
            self._env = lmdb.open(str(folder), map_size=map_size, sync=False, max_dbs=len(store_check.DATABASES))
            self._env.reader_check()  # removes killed readers, which prevent the reuse of pages
            with self._env.begin(write=True) as transaction:
                self._answers, self._counters = (self._env.open_db(name, txn=transaction) for name in store_check.DATABASES)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where it is missing or damaged. Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._answers) as transaction:
            found: bytes | None = transaction.get(key)
        if found is None:
            return None
        value = unseal(key, found)
        if value is None:
            _log.warning("store: a damaged answer in %s is requested again", self._folder)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value. Raises OutputError where this fails, for example on a full disk."""
        with self._errors("write to"), self._env.begin(db=self._answers, write=True) as transaction:
            transaction.put(key, seal(key, value))

    def counters(self) -> dict[str, dict[str, Any]]:
        """The counters: JSON objects by name. Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._counters) as transaction:
            return _read_counters(transaction)

    @contextmanager
    def changing_counters(self) -> Iterator[tuple[dict[str, dict[str, Any]], Owner]]:
        """The counters, to be changed by name, and this process's Owner: one transaction over all processes, rolled back by an
        error. Raises OutputError where they cannot be read or written."""
        with self._errors("write to"), self._env.begin(db=self._counters, write=True) as transaction:
            if self._owner is None:  # within the transaction: one process at a time
                self._owner = Owner(self._folder / "owners")
            counters = _read_counters(transaction)
            before = dict(counters)
            yield counters, self._owner
            for name, value in counters.items():
                if value != before.get(name):
                    transaction.put(name.encode(), seal(name.encode(), json.dumps(value).encode()))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns errors of LMDB and the file system into OutputError."""
        try:
            yield
        except OutputError:
            raise
        except (lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
            raise OutputError(f"store: cannot {what} {self._folder}: data.mdb is damaged: {error}; {_MOVE_AWAY}") from None
        except (lmdb.Error, OSError) as error:
            raise OutputError(f"store: cannot {what} {self._folder}: {error}; {_ADVICE}") from None

    def close(self) -> None:
        self._env.close()
        if self._owner is not None:
            self._owner.close()
            self._owner = None


def _read_counters(transaction: lmdb.Transaction) -> dict[str, dict[str, Any]]:
    counters = {}
    for key, sealed in ((bytes(key), bytes(value)) for key, value in transaction.cursor()):
        value = unseal(key, sealed)
        if value is None:
            raise OutputError(f"store: data.mdb is damaged: {key.decode(errors='replace')} cannot be read; {_MOVE_AWAY}")
        counters[key.decode()] = json.loads(value)
    return counters


def _check(folder: Path) -> None:
    """Check the store in another process, which damage may crash. Raises OutputError for a damaged store, and for one that cannot
    be opened."""
    seconds = 60 + (folder / "data.mdb").stat().st_size / _SLOWEST
    command = [sys.executable, "-P", store_check.__file__, str(folder)]
    try:
        checked = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        raise OutputError(f"store: {folder}: data.mdb could not be read within {seconds:.0f} s; {_MOVE_AWAY}") from None
    if checked.returncode == 0:
        return
    problem = " ".join(checked.stdout.split())
    if checked.returncode < 0:
        problem = problem or f"data.mdb is damaged: reading it crashed a process with {signal.Signals(-checked.returncode).name}"
    elif checked.returncode != store_check.DAMAGED:
        raise OutputError(f"store: {folder}: cannot be opened: {problem or checked.stderr.strip()[-300:]}; {_ADVICE}")
    raise OutputError(f"store: {folder}: {problem}; {_MOVE_AWAY}")


def content_key(*parts: str) -> bytes:
    """A key of 32 bytes that depends on every part and its length."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
