"""What a simulator server keeps on disk: answers already paid for, and counters. LMDB: whole after a kill, shared by the
processes of a machine (not over a network file system)."""

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
    "try moving the folder away: its answers are asked for, and paid for, again, and what was spent so far is lost to the account "
    "(lower the budget by it)"
)
_ADVICE = "try making room there, or another folder (store)"
_LEAST_ROOM = 32_768  # bytes free on the disk: with less, making LMDB's lock file ends the process with SIGBUS
_SLOWEST = 5_000_000  # bytes a second at which a store is read
_log = logging.getLogger(__name__)


class Owner:
    """This process among those that share a folder, also across containers of one machine. Each locks a file of its own; the kernel
    releases the lock when the process ends, however it ends. (With filelock's exclusive locks, two processes that look at the same
    moment would each take the other for the owner.) Make one only while no other process makes or removes one in that folder.
    Raises OSError where the file cannot be made."""

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
    """A folder with one LMDB environment. Raises OutputError where it cannot be had, or is damaged; LMDB's own errors never leave
    it."""

    def __init__(self, folder: Path, *, map_size: int = store_check.MAP_SIZE) -> None:
        """`map_size`: the most bytes that its file may grow to."""
        self._folder = folder
        self._owner: Owner | None = None
        with self._errors("use"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            disk = os.statvfs(folder)
            if disk.f_bavail * disk.f_frsize < _LEAST_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if (folder / "data.mdb").exists():
                _check(folder)
            # Without fsync a killed process loses nothing; only a machine that loses power does.
            self._env = lmdb.open(str(folder), map_size=map_size, sync=False, max_dbs=len(store_check.DATABASES))
            self._env.reader_check()  # forgets readers that were killed: they keep pages from being used again
            with self._env.begin(write=True) as transaction:
                self._answers, self._counters = (self._env.open_db(name, txn=transaction) for name in store_check.DATABASES)

    def get(self, key: bytes) -> bytes | None:
        """None for an answer that is not there, or is damaged. Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._answers) as transaction:
            found: bytes | None = transaction.get(key)
        if found is None:
            return None
        value = unseal(key, found)
        if value is None:
            _log.warning("store: an answer in %s is damaged, and is asked for again", self._folder)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Raises OutputError where it cannot be kept, for example on a full disk."""
        with self._errors("write to"), self._env.begin(db=self._answers, write=True) as transaction:
            transaction.put(key, seal(key, value))

    def counters(self) -> dict[str, dict[str, Any]]:
        """JSON objects by name. Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._counters) as transaction:
            return _read_counters(transaction)

    @contextmanager
    def changing_counters(self) -> Iterator[tuple[dict[str, dict[str, Any]], Owner]]:
        """The counters, to be replaced by name, and this process among those that share the store: one transaction over all
        processes, undone by an error. Raises OutputError where they cannot be read or kept."""
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
        """Raises OutputError for what LMDB and the file system raise within."""
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
    """In a process of its own, which damage may end. Raises OutputError for a store that is damaged or cannot be opened."""
    seconds = 60 + (folder / "data.mdb").stat().st_size / _SLOWEST
    command = [sys.executable, "-P", store_check.__file__, str(folder)]
    try:
        checked = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        raise OutputError(f"store: {folder}: data.mdb could not be read within {seconds:.0f} s; {_MOVE_AWAY}") from None
    if checked.returncode == 0:
        return
    said = " ".join(checked.stdout.split())
    if checked.returncode < 0:
        said = said or f"data.mdb is damaged: reading it ended a process with {signal.Signals(-checked.returncode).name}"
    elif checked.returncode != store_check.DAMAGED:
        raise OutputError(f"store: {folder}: cannot be opened: {said or checked.stderr.strip()[-300:]}; {_ADVICE}")
    raise OutputError(f"store: {folder}: {said}; {_MOVE_AWAY}")


def content_key(*parts: str) -> bytes:
    """A key of 32 bytes that depends on every part and on where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
