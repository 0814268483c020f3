"""Reads every page of a store, in its own process: a damaged LMDB file can crash the process that reads it (SIGBUS, SIGSEGV).

    python store_check.py FOLDER

Prints the damage and exits with 1 for a damaged store, with 2 for one that cannot be opened. A crash by a signal also means damage.
Imports nothing of the project, to start fast.
"""

import os
import resource
import sys
import time
import zlib
from pathlib import Path

import lmdb

DATABASES = (b"answers", b"counters")
MAP_SIZE = 1 << 36  # the most that the file may grow to (64 GiB); it takes what it holds
DAMAGED, UNUSABLE = 1, 2
_NOT_DAMAGE = (lmdb.DiskError, lmdb.LockError, lmdb.MemoryError, lmdb.ReadersFullError, lmdb.ReadonlyError, OSError)


def seal(key: bytes, value: bytes) -> bytes:
    """The value with a checksum of key and value in front."""
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "big") + value


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The value without its checksum; None for a value that is damaged, or belongs to another key."""
    value = sealed[4:]
    return value if seal(key, value) == sealed else None


def find_damage(folder: str) -> str | None:
    """A description of a store's damage, or None. Raises lmdb.Error, also for damage."""
    file = Path(folder) / "data.mdb"
    deadline = time.monotonic() + 1.0
    while not file.stat().st_size:  # another process may be about to write it
        if time.monotonic() > deadline:
            return "data.mdb is empty"
        time.sleep(0.02)
    environment = lmdb.open(folder, map_size=MAP_SIZE, sync=False, max_dbs=len(DATABASES))
    page_size = environment.stat()["psize"]
    needed = (environment.info()["last_pgno"] + 1) * page_size
    if (size := file.stat().st_size) < needed:
        # Free pages may lie behind the end. Reading a used one there crashes this process, so print first.
        print(f"data.mdb is cut off: it has {size} of {needed} bytes", flush=True)
    with environment.begin() as transaction, Path(os.devnull).open("wb") as nowhere:
        environment.copyfd(nowhere.fileno(), compact=True, txn=transaction)  # reads all pages, and counts the free ones
    with environment.begin() as transaction:
        names = tuple(transaction.cursor().iternext(values=False))
    if names not in ((), DATABASES):
        return f"data.mdb is damaged: expected the databases {DATABASES}, got {names}"
    return next(filter(None, (_find_damage_in(environment, name, page_size) for name in names)), None)


def _find_damage_in(environment: lmdb.Environment, name: bytes, page_size: int) -> str | None:
    database = environment.open_db(name, create=False)
    with environment.begin(db=database) as transaction:
        entries, previous = 0, b""
        for key, value in transaction.cursor():
            entries += 1
            if key <= previous:  # also ends the walk over a tree with a cycle
                return f"data.mdb is damaged: {name.decode()} are out of order"
            previous = key
            if name == b"counters" and unseal(key, value) is None:  # a damaged answer is requested again when it is needed
                return "data.mdb is damaged: the account of what was spent cannot be read"
        if entries != transaction.stat(database)["entries"]:
            return f"data.mdb is damaged: {name.decode()} are missing"
    with environment.begin(db=database, write=True) as transaction:  # so large that all free pages are looked up
        transaction.put(b"\0", bytes(1000 * page_size))
        transaction.abort()
    return None


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        problem = find_damage(sys.argv[1])
    except _NOT_DAMAGE as error:
        print(error)
        raise SystemExit(UNUSABLE) from None
    except lmdb.Error as error:
        problem = f"data.mdb is damaged: {error}"
    if problem is not None:
        print(problem)
        raise SystemExit(DAMAGED)
