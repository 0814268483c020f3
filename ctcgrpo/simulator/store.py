"""What a simulator server keeps on disk: answers already paid for, and counters. LMDB: whole after a kill, shared by the
processes of a machine (not over a network file system)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lmdb

from ctcgrpo.errors import OutputError

_MAP_SIZE = 1 << 36
"""The most that the file may grow to (64 GiB); it takes what it holds."""


class Store:
    """A folder with one LMDB environment. Raises OutputError where it cannot be had."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Without fsync a killed process loses nothing; only a machine that loses power does.
            self._env = lmdb.open(str(folder), map_size=_MAP_SIZE, sync=False, max_dbs=2)
            self._answers = self._env.open_db(b"answers")
            self._counters = self._env.open_db(b"counters")
        except (lmdb.Error, OSError) as error:
            raise OutputError(f"store: cannot use {folder}: {error}; name another folder") from None

    def get(self, key: bytes) -> bytes | None:
        """Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._answers) as transaction:
            found: bytes | None = transaction.get(key)
        return found

    def put(self, key: bytes, value: bytes) -> None:
        """Raises OutputError where it cannot be kept, for example on a full disk."""
        with self._errors("write to"), self._env.begin(db=self._answers, write=True) as transaction:
            transaction.put(key, value)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise OutputError(f"store: cannot {what} {self._env.path()}: {error}") from None

    def counters(self, name: str) -> dict[str, int]:
        """Raises OutputError for a store that cannot be read."""
        with self._errors("read"), self._env.begin(db=self._counters) as transaction:
            found = transaction.get(name.encode())
        return json.loads(found) if found else {}

    def count(
        self, name: str, more: Mapping[str, int], allowed: Callable[[dict[str, int]], bool] = lambda sums: True
    ) -> bool:
        """Add to counters where `allowed` says so of the sums that come out, in one transaction over all processes; gives what it
        said. Raises OutputError where they cannot be kept."""
        with self._errors("write to"), self._env.begin(db=self._counters, write=True) as transaction:
            found = transaction.get(name.encode())
            before: dict[str, int] = json.loads(found) if found else {}
            sums = {k: before.get(k, 0) + v for k, v in more.items()}
            if not allowed(sums):
                return False
            transaction.put(name.encode(), json.dumps(sums).encode())
            return True

    def close(self) -> None:
        self._env.close()


def content_key(*parts: str) -> bytes:
    """A key of 32 bytes that depends on every part and on where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
