"""Several processes acting as one, and signals that ask them to stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main(state: PartialState, do: Callable[[], Any]) -> Any:
    """Do something on the main process and give its result, or its error, to all."""
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


_ONE_SIGNAL = 3.0
"""Seconds within which two signals are one."""


@contextlib.contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and a scheduler's TERM) asks the run to stop at the next safe point; a second one stops it at once.

    Gives a function that tells whether this process was asked.
    """
    asked, when = False, 0.0

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked, when
        now = time.monotonic()
        if asked and now - when < _ONE_SIGNAL:  # a launcher and a terminal, or a scheduler, send it twice
            return
        if asked:
            raise KeyboardInterrupt
        asked, when = True, now
        say("stopping at the next safe point and saving; once more stops at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
