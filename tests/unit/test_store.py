"""The store and the account in it: shared by processes, killed, damaged, and on a disk without room."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

from ctcgrpo.errors import BudgetSpent, OutputError
from ctcgrpo.llm_client.account import Account, Spent
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator.config import Budget

MOST = Spent(1, 60, 0, 0)
SMALL = 131_072


@contextmanager
def other_process(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """With `account`, limited to 100 tokens, on the store; it is killed at the end."""
    before = (
        "import asyncio\nfrom pathlib import Path\nfrom ctcgrpo.simulator.config import Budget\n"
        "from ctcgrpo.llm_client.account import Account, Spent\nfrom ctcgrpo.llm_client.store import Store\n"
        f"store = Store(Path({str(folder)!r}))\naccount = Account(Budget(tokens=100), store)\n"
        "async def main():\n"
    )
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    command = [sys.executable, "-c", f"{before}{lines}asyncio.run(main())"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDING = """
async with account.booking(Spent(1, 60, 0, 0)) as booking:
    print("booked", flush=True)
    await asyncio.to_thread(input)
    booking.cost = Spent(1, 20, 0, 0)
print("settled", flush=True)
await asyncio.to_thread(input)
"""


async def call(account: Account, cost: int) -> None:
    async with account.booking(MOST) as booking:
        booking.cost = Spent(1, cost, 0, 0)


# --- the account ----------------------------------------------------------------------------------------------------


async def test_bookings_wait_for_each_other(tmp_path: Path) -> None:
    account = Account(Budget(tokens=100), Store(tmp_path))
    order = []

    async def call(name: str, seconds: float) -> None:
        async with account.booking(MOST) as booking:
            order.append(name)
            await asyncio.sleep(seconds)
            booking.cost = Spent(1, 20, 0, 0)

    await asyncio.gather(call("a", 0.05), call("b", 0), call("c", 0))
    assert order == ["a", "b", "c"] and account.spent == Spent(3, 60, 0, 0)
    with pytest.raises(BudgetSpent, match="3 calls took 60 tokens"):
        async with account.booking(MOST):
            pass


async def test_a_call_is_settled_with_the_most_where_nobody_said_what_it_cost(tmp_path: Path) -> None:
    account = Account(Budget(tokens=100), Store(tmp_path))
    with pytest.raises(ZeroDivisionError):
        async with account.booking(MOST):
            raise ZeroDivisionError
    assert account.spent == MOST


async def test_the_wait_for_calls_under_way_has_an_end(tmp_path: Path) -> None:
    account = Account(Budget(tokens=100), Store(tmp_path))
    async with asyncio.timeout(5), account.booking(MOST):
        said = r"has no room for another call now: 0 calls took .*, 1 calls in progress may take 60 .* \(waited 0.1 s"
        with pytest.raises(BudgetSpent, match=said):
            async with account.booking(MOST, 0.1):
                pass
        waiting = asyncio.create_task(call(account, 60))
        await asyncio.sleep(0.05)
        waiting.cancel()
    async with asyncio.timeout(5), account.booking(Spent(1, 40, 0, 0)):  # those who gave up hold nothing
        pass


async def test_bookings_of_another_process_are_waited_for(tmp_path: Path) -> None:
    with other_process(tmp_path, HOLDING) as other:
        assert line_of(other) == "booked"
        account = Account(Budget(tokens=100), Store(tmp_path))
        waiting = asyncio.create_task(call(account, 30))
        await asyncio.sleep(0.2)
        assert not waiting.done() and account.spent == Spent()
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert line_of(other) == "settled"
        async with asyncio.timeout(5):
            await waiting
        assert account.spent == Spent(2, 50, 0, 0)


@pytest.mark.parametrize(("earlier", "settled"), [(0, Spent(2, 30, 0, 0)), (10, Spent(3, 50, 0, 0))])
async def test_bookings_of_a_killed_process_cost_what_a_call_costs_on_average(
    tmp_path: Path, earlier: int, settled: Spent
) -> None:
    store = Store(tmp_path)
    account = Account(Budget(tokens=100), store)
    if earlier:
        await call(account, earlier)
    with other_process(tmp_path, HOLDING) as other:
        assert line_of(other) == "booked"
        waiting = asyncio.create_task(call(account, 30))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        other.kill()
        async with asyncio.timeout(5):
            await waiting
    assert account.spent == settled
    store.close()
    await call(Account(Budget(), Store(tmp_path)), 0)
    assert len(list((tmp_path / "owners").iterdir())) == 1  # what the killed process left is removed


# --- a disk without room --------------------------------------------------------------------------------------------


def fill(store: Store) -> None:
    """Until nothing more can be written: neither answers nor counters."""
    for size in (20_000, 3_000, 300, 10):
        with pytest.raises(OutputError, match=r"cannot write to .*: .*MDB_MAP_FULL.*; try freeing space there"):
            for k in range(1000):
                store.put(random.Random(f"{size}, {k}").randbytes(32), bytes(size))
    with pytest.raises(OutputError, match="MDB_MAP_FULL"):
        for k in range(1000):
            with store.changing_counters() as (counters, _):
                counters[f"other {k}"] = {"n": k}


async def test_a_full_store_pauses_those_who_wait_and_keeps_what_it_has(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", map_size=SMALL)
    account = Account(Budget(tokens=100), store)
    store.put(b"key", b"value")

    async def filling() -> None:
        async with account.booking(MOST) as booking:
            await asyncio.sleep(0.1)
            fill(store)
            booking.cost = Spent(1, 20, 0, 0)

    async with asyncio.timeout(4):
        with store._env.begin():  # as long as somebody reads the old pages, none is used again
            results = await asyncio.gather(filling(), call(account, 1), call(account, 1), return_exceptions=True)
    assert all(isinstance(r, BudgetSpent) and "MDB_MAP_FULL" in str(r) for r in results), results
    assert store.get(b"key") == b"value" and account.spent == Spent()
    store.close()
    roomy = Store(tmp_path / "s")
    assert roomy.get(b"key") == b"value"
    async with asyncio.timeout(4), Account(Budget(tokens=100), roomy).booking(MOST, 3):
        pass


@pytest.mark.parametrize(
    "error",
    [
        lmdb.DiskError("mdb_txn_commit", errno.ENOSPC),
        lmdb.PanicError("mdb_txn_begin"),
        lmdb.ReadersFullError("mdb_txn_begin"),
        lmdb.CorruptedError("mdb_get"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_lmdb_become_the_projects_own_and_bookings_survive_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = Store(tmp_path)
    account = Account(Budget(tokens=100), store)

    class Failing:
        def begin(self, **options: Any) -> Any:
            raise error

    environment = store._env
    booking = account.booking(MOST)
    await booking.__aenter__()
    monkeypatch.setattr(store, "_env", Failing())
    actions: list[Callable[[], Any]] = [lambda: store.get(b"k"), lambda: store.put(b"k", b"v"), lambda: account.summary()]
    for action in actions:
        with pytest.raises(OutputError, match="store: cannot .*; try "):
            action()
    with pytest.raises(BudgetSpent, match="the cost of calls cannot be recorded: store: cannot write to .*; try "):
        await booking.__aexit__(None, None, None)
    with pytest.raises(BudgetSpent, match="cannot be recorded"):
        async with account.booking(MOST):
            pass
    monkeypatch.setattr(store, "_env", environment)
    async with account.booking(Spent(1, 40, 0, 0)) as last:  # the call that could not be settled is settled now
        last.cost = Spent(1, 1, 0, 0)
    assert account.spent == Spent(2, 61, 0, 0)


def test_a_store_is_not_opened_on_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB would end the process with SIGBUS when it first writes to its lock file."""
    monkeypatch.setattr("os.statvfs", lambda folder: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(OutputError, match="store: cannot use .*: .*No space left on device; try freeing space there"):
        Store(tmp_path / "s")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with 300 answers and an account."""
    folder = tmp_path_factory.mktemp("whole")
    store = Store(folder)
    chance = random.Random(0)

    async def spend() -> None:
        account = Account(Budget(tokens=10**9), store)
        for _ in range(300):
            store.put(chance.randbytes(32), chance.randbytes(chance.choice((300, 900, 6000))))
            async with account.booking(MOST):
                pass

    asyncio.run(spend())
    store.close()
    return folder


def damaged(whole: Path, folder: Path, data: bytes) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / "data.mdb").write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        (0, "data.mdb is empty"),
        (4096, "data.mdb is damaged: .*MDB_INVALID"),
        (0.25, "data.mdb is cut off: it has [0-9]+ of [0-9]+ bytes"),
        (0.5, "data.mdb is cut off: it has [0-9]+ of [0-9]+ bytes"),
        (0.9, "data.mdb is cut off: it has [0-9]+ of [0-9]+ bytes"),
    ],
)
def test_a_store_that_is_cut_off_is_refused_by_name(whole: Path, tmp_path: Path, kept: float, problem: str) -> None:
    data = (whole / "data.mdb").read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(data))
    folder = damaged(whole, tmp_path / "s", data[:size])
    with pytest.raises(OutputError, match=f"store: {folder}: {problem}.*; try moving the folder away: .*the account starts at 0"):
        Store(folder)


@pytest.mark.parametrize("what", ["garbage", "zeros"])
def test_a_store_of_garbage_is_refused_by_name(whole: Path, tmp_path: Path, what: str) -> None:
    data = (whole / "data.mdb").read_bytes()
    junk = bytes(len(data)) if what == "zeros" else random.Random(1).randbytes(len(data))
    for start in (0, 8192):
        folder = damaged(whole, tmp_path / "s", data[:start] + junk[start:])
        with pytest.raises(OutputError, match="data.mdb is damaged: .*; try moving the folder away"):
            Store(folder)


def test_a_damaged_account_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    data = (whole / "data.mdb").read_bytes()
    assert b'"calls": 300' in data
    folder = damaged(whole, tmp_path / "s", data.replace(b'"calls": 300', b'"calls": 100'))
    with pytest.raises(OutputError, match="the account of what was spent cannot be read; try moving the folder away"):
        Store(folder)


def test_an_answer_is_never_taken_for_that_of_another_key(tmp_path: Path) -> None:
    first, second = bytes([1]) * 9000, bytes([2]) * 9000
    store = Store(tmp_path)
    store.put(b"a" * 32, first)
    store.put(b"b" * 32, second)
    store.close()
    data = (tmp_path / "data.mdb").read_bytes()
    at = [data.index(value) - 4 for value in (first, second)]  # with the checksums
    parts = [data[start : start + 9004] for start in at]
    mutated = bytearray(data)
    for start, part in zip(at, reversed(parts), strict=True):
        mutated[start : start + 9004] = part
    (tmp_path / "data.mdb").write_bytes(mutated)
    store = Store(tmp_path)
    assert store.get(b"a" * 32) is None and store.get(b"b" * 32) is None


USING = """
import random, sys
from pathlib import Path
from ctcgrpo.errors import OutputError
from ctcgrpo.llm_client.store import Store
for folder in sys.argv[1:]:
    chance, again = random.Random(0), random.Random(1)
    try:
        store = Store(Path(folder))
        for _ in range(300):
            key, value = chance.randbytes(32), chance.randbytes(chance.choice((300, 900, 6000)))
            assert store.get(key) in (value, None)
            store.put(again.randbytes(32), again.randbytes(2000))
            with store.changing_counters() as (counters, _):
                assert counters["account"]["calls"] == 300
        store.close()
        print("used")
    except OutputError as error:
        print("refused", error)
"""


def test_random_damage_never_ends_the_process_or_changes_an_answer(whole: Path, tmp_path: Path) -> None:
    data = (whole / "data.mdb").read_bytes()
    chance = random.Random(2)
    folders = []
    for k in range(24):
        mutated = bytearray(data)
        if k % 3 == 0:  # bits anywhere
            for _ in range(chance.choice((1, 10, 100))):
                mutated[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif k % 3 == 1:  # a page, or more
            length = chance.choice((16, 512, 4096, 16384))
            start = chance.randrange(len(data) - length)
            mutated[start : start + length] = chance.randbytes(length)
        else:  # headers of pages
            for _ in range(chance.choice((1, 5, 50))):
                mutated[chance.randrange(len(data) // 4096) * 4096 + chance.randrange(60)] = chance.randrange(256)
        folders.append(str(damaged(whole, tmp_path / str(k), bytes(mutated))))
    done = subprocess.run([sys.executable, "-c", USING, *folders], capture_output=True, text=True)
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(said) == 24, done
    assert {"used", "refused"} == set(said)
