"""Collective actions of several processes, stop signals, and coroutines inside a running event loop."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ctcgrpo.errors import CtcGrpoError

_T = TypeVar("_T")


def on_main(state: PartialState, do: Callable[[], Any]) -> Any:
    """Call `do` on the main process, and return its result, or raise its error, on all."""
    result: list[Any] = [None, None]
    if state.is_main_process:
        try:
            result[0] = do()
        except Exception as error:  # noqa: BLE001 - raised again below, on every process
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a scheduler's stop, a closed login shell, and a scheduler's warning before the stop."""
_ONE_SIGNAL, _ONE_SIGNAL_LAUNCHED = 0.5, 3.0
"""Signals within this many seconds count as one; a launcher forwards a signal that the terminal has sent already."""
STOP_SECONDS = 15  # episodes in progress are cancelled within about this time


@contextlib.contextmanager
def interrupts(log_line: Callable[[str], None], waits_for: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C (SIGTERM, SIGHUP and SIGUSR1 alike) asks the run to stop at the next safe point; a second Ctrl-C, or a second SIGTERM,
    stops it immediately. `log_line` logs what the run waits for, a clause from `waits_for`.

    Yields a function that returns whether this process was asked to stop. Where SIGHUP is ignored (nohup), it stays so.
    """
    first: int | None = None
    when = 0.0
    one = _ONE_SIGNAL_LAUNCHED if "TORCHELASTIC_RUN_ID" in os.environ else _ONE_SIGNAL
    terminals = [fd for fd in (0, 1, 2) if _is_terminal(fd)]

    def ask(signum: int, frame: Any) -> None:
        nonlocal first, when
        if signum == signal.SIGHUP:
            _leave(terminals)
        now = time.monotonic()
        if first is None:
            first, when = signum, now
            with contextlib.suppress(RuntimeError):  # raised where the signal comes in the middle of another line
                log_line(f"stopping: {waits_for()}. Press Ctrl-C again to stop immediately, without saving")
        elif now - when >= one and (signum == signal.SIGINT or signum == first == signal.SIGTERM):
            raise KeyboardInterrupt

    heeded = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in heeded}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _leave(terminals: list[int]) -> None:
    """Redirect output of a closed terminal to /dev/null: writing to it would fail while saving."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in terminals:
        os.dup2(nowhere, fd)
    os.close(nowhere)


def together(do: Callable[[], object]) -> None:
    """Call `do` on every process. If it raises CtcGrpoError on some, all raise, so that none waits for a failed one."""
    problem: CtcGrpoError | None = None
    try:
        do()
    except CtcGrpoError as error:
        problem = error
    raise_on_all(problem)


def raise_on_all(problem: CtcGrpoError | None) -> None:
    """Raise, on every process, the error of the first process that has one; do nothing where none has."""
    if first := next((error for error in gather_object([problem]) if error is not None), None):
        raise first


def run_coroutine(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine; it runs in a new thread where this one has an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: Future[_T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[_T]]] = Future()

    async def main() -> _T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await work

    def run() -> None:
        try:
            result.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            result.set_exception(error)

    threading.Thread(target=run, name="episodes").start()
    try:
        return result.result()
    except KeyboardInterrupt:
        loop, task = started.result()
        loop.call_soon_threadsafe(task.cancel)
        result.exception()  # once its episodes are closed
        raise
