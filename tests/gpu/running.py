"""Each check in a process of its own: what one leaves behind (CUDA errors, process groups, memory) is not the next one's.

On a CPU the process is a fork of this one, which has imported everything once; CUDA does not survive a fork, so with GPUs it is
a new one. What a check prints goes to a log. Processes that it leaves are ended with it; those in groups of their own it ends
itself, also when it is given up (SIGTERM, then SIGKILL).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.gpu.registry import Check, Figures, Machine, NotRun

_GRACE = 20.0
"""Seconds that a check has to end what it started."""
Outcome = Literal["ok", "FAILED", "not run"]


@dataclass(frozen=True, slots=True)
class Result:
    """`why`: of a check that failed or was not run; `log` holds what it printed."""

    name: str
    outcome: Outcome
    seconds: float
    figures: Figures
    why: str = ""
    log: str = ""


def run_apart(check: Check, machine: Machine, log: Path, *, limit: float | None = None) -> Result:
    """Run a check in a process of its own, for at most `limit` seconds (the check's own by default)."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    started = time.monotonic()
    if machine.on_cpu:
        pid = forked(lambda: run_and_write(check, machine, answer), log)
    else:
        command = [sys.executable, "-m", "tests.gpu", "--run", check.name, "--answer", str(answer)]
        command += ["--scratch", str(machine.scratch)]
        with log.open("wb") as out:
            pid = spawned(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    code, why = None, ""
    try:
        code = wait(pid, limit or check.limit)
        if code is None:
            why = f"no end after {limit or check.limit:g} s; last line: {_last_line(log)}"
            os.kill(pid, signal.SIGTERM)
            wait(pid, _GRACE)
    finally:
        end_group(pid)
    seconds = time.monotonic() - started
    if code is None:
        return Result(check.name, "FAILED", seconds, {}, why, str(log))
    if code or not answer.exists():
        why = f"its process ended with {code}; last line: {_last_line(log)}"
        return Result(check.name, "FAILED", seconds, {}, why, str(log))
    told = json.loads(answer.read_text())
    return Result(check.name, told["outcome"], seconds, told["figures"], told["why"], str(log))


def run_here(check: Check, machine: Machine) -> Result:
    """Run a check in this process; what it raises is its failure."""
    started = time.monotonic()
    outcome: Outcome
    figures: Figures = {}
    try:
        figures, outcome, why = check.run(machine), "ok", ""
    except NotRun as reason:
        outcome, why = "not run", str(reason)
    except Exception as error:  # noqa: BLE001 - a check fails with whatever torch, NCCL or vLLM raise
        traceback.print_exc()
        outcome, why = "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:600]
    return Result(check.name, outcome, time.monotonic() - started, figures, why)


def run_and_write(check: Check, machine: Machine, answer: Path) -> None:
    """Run a check, which may be told to end, and write what came of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    answer.write_text(json.dumps(asdict(run_here(check, machine))))


def forked(do: Callable[[], object], log: Path | None = None) -> int:
    """Do something in a fork of this process, the leader of a session of its own; gives its id. It ends with 0, or with 1 where
    `do` raised. What it prints goes to `log`, or where this process prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            if log is not None:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(out, stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
            do()
            code = 0
        except BaseException:  # noqa: BLE001 - told by the exit code and the log
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def spawned(command: Sequence[str], **options: Any) -> int:
    """Start a program as the leader of a session of its own; gives its id, for `wait` and `end_group`."""
    child = subprocess.Popen(command, start_new_session=True, **options)
    _spawned.append(child)
    return child.pid


_spawned: list[subprocess.Popen[bytes]] = []
"""References to the children: without one, the module `subprocess` waits for a child itself."""


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child (negative for a signal), None where it has not ended after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def end_group(pid: int) -> None:
    """Kill a child that leads a group of processes, and the others of it, where they have not ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip()[:200] if lines else "(nothing printed)"
