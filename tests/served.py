"""A `ctcgrpo` command that serves a page, as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.conftest import ROOT


class Served:
    """Waits for the URL that the command prints, and for the line behind it. `said`: what the process has printed."""

    def __init__(self, *command: str, **variables: str) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        asked = [sys.executable, "-m", "ctcgrpo", *command]
        self.process = subprocess.Popen(asked, env=environment, stdout=self._output, stderr=subprocess.STDOUT)
        while not (match := re.search(r"(http://\S+).*\n.*\n", self.said)):
            assert self.process.poll() is None, f"it ended: {self.said}"
            time.sleep(0.05)
        self.url = match[1]
        self.port = self.url.rpartition(":")[2]

    @property
    def said(self) -> str:
        return os.pread(self._output.fileno(), 100_000, 0).decode()

    def end(self, how: int = signal.SIGINT) -> str:
        """End it by a signal; gives what it printed since it began to serve."""
        self.process.send_signal(how)
        self.process.wait(timeout=30)
        return self.said.partition(self.url)[2]


@contextmanager
def serving() -> Iterator[Callable[..., Served]]:
    """Starts commands, and kills those that still run at the end."""
    started: list[Served] = []

    def start(*command: str, **variables: str) -> Served:
        started.append(Served(*command, **variables))
        return started[-1]

    try:
        yield start
    finally:
        for served in started:
            if served.process.poll() is None:
                served.end(signal.SIGKILL)
