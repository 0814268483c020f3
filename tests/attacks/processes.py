"""Signals, killed ranks and killed coordinators. Each runs processes of its own and ends all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import optuna

from ctcgrpo.experiments.coordinator import run_sweep
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.util.files import is_complete
from ctcgrpo.util.intervals import crossed, interval, share_interval
from tests.attacks.run_files import FAST, TINY, VALIDATED, run
from tests.attacks.suite import Tries, attack
from tests.conftest import ROOT

_STARTS_WITHIN = 120.0
_ENDS_WITHIN = 45.0
"""Seconds after a signal or a kill, on a slow machine."""


@contextlib.contextmanager
def _started(log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ctcgrpo", "train", TINY, *arguments], cwd=ROOT, env=env, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        for pid in [*_below(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20)


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and they."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [*found, *(other for child in found for other in _below(child))]


def _rank_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return entry.removeprefix(b"RANK=").decode()
    return None


def _wait(process: subprocess.Popen[bytes], log: Path, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    while not until():
        assert process.poll() is None, f"it ended: {log.read_text(errors='replace')[-600:]}"
        assert time.monotonic() < deadline, f"it did not begin: {log.read_text(errors='replace')[-600:]}"
        time.sleep(0.05)


@attack("processes", seconds=300)
def signals(tries: Tries) -> None:
    """SIGHUP, SIGUSR1, SIGTERM and SIGINT at a random moment of a run: it saves a whole checkpoint and ends within a bound."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        rng = tries.rng("signals", number.name)
        name, delay = number.name.lower(), rng.uniform(0, 1.5)
        folder, log = RunFolder(tries.folder / name), tries.folder / f"{name}.log"
        steps = [
            *FAST,
            "training.max_steps=500",
            "training.save_every=1000",
            f"run.output_dir={tries.folder}",
            f"run.name={name}",
        ]
        with tries.one(f"{number.name} after {delay:.2f} s"), _started(log, *steps) as process:
            _wait(process, log, lambda folder=folder: folder.metrics_file.exists())  # type: ignore[misc]
            time.sleep(delay)
            process.send_signal(number)
            code = process.wait(_ENDS_WITHIN)
            said = log.read_text(errors="replace")
            assert code == 130 and "Traceback" not in said, f"exit code {code}: {said[-600:]}"
            saved = folder.newest_checkpoint()
            assert saved is not None and str(saved) in said, said[-300:]
            steps_saved = int(saved.name.rpartition("-")[2])
            lines = folder.metrics_file.read_text().splitlines()
            assert steps_saved == json.loads(lines[-1])["step"], "the checkpoint is not of the last step"


@attack("processes", seconds=240)
def killed_ranks(tries: Tries) -> None:
    """One of two processes is killed, in a rollout or an update: the other ends within a bound and the checkpoint stays."""
    for victim in ("1", "0"):
        rng = tries.rng("ranks", victim)
        folder, log = RunFolder(tries.folder / f"rank-{victim}"), tries.folder / f"rank-{victim}.log"
        arguments = ["--processes", "2", "training.max_steps=500", "training.updates_per_step=1", "rollout.max_turns=2"]
        arguments += [f"run.output_dir={tries.folder}", f"run.name={folder.path.name}"]
        with tries.one(f"rank {victim}"), _started(log, *arguments) as process:
            _wait(process, log, lambda folder=folder: folder.newest_checkpoint() is not None)  # type: ignore[misc]
            ranks = {rank: pid for pid in _below(process.pid) if (rank := _rank_of(pid)) is not None}
            assert set(ranks) == {"0", "1"}, ranks
            time.sleep(rng.uniform(0, 1.0))
            os.kill(ranks[victim], signal.SIGKILL)
            code = process.wait(_ENDS_WITHIN)
            alive = [pid for pid in ranks.values() if Path(f"/proc/{pid}/cmdline").exists() and _is_running(pid)]
            assert code != 0, "the launcher says that all is well"
            assert not alive, f"{alive} are still at work"
            saved = folder.newest_checkpoint()
            assert saved is not None and is_complete(saved)
            assert not is_complete(folder.final)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


# --- sweeps ------------------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """As SIGKILL: nothing that a coordinator would still write is written."""


def _sweep_file(folder: Path) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(
        "name: killed\nprogram: recipes/quickstart.yaml\nmethod: grid\nmetric: {name: eval/outcome/all, goal: maximize}\n"
        "parameters:\n  credit.alpha: {values: [0, 10, 20]}\n"
    )
    return file


@attack("processes", seconds=120)
def killed_coordinators(tries: Tries) -> None:
    """A sweep's coordinator is killed at each write to its study, the window in which it asks again for trials included."""
    train = (sys.executable, "-m", "tests.fake_train")
    steps: list[tuple[str, int]] = [(name, nth) for name in ("ask", "tell", "enqueue_trial") for nth in (1, 2)]
    for name, nth in steps:
        for after in (False, True):
            folder = tries.folder / f"{name}-{nth}-{after}"
            with tries.one(f"killed {'after' if after else 'before'} {name} {nth} of a coordinator that resumes"):
                _begun(folder, train)
                with _dies(name, nth, after=after):
                    with contextlib.suppress(_Killed):
                        run_sweep(*load_sweep(_sweep_file(tries.folder)), folder, train=train)
                rows = run_sweep(*load_sweep(_sweep_file(tries.folder)), folder, train=train)
                alphas = sorted(row["params"]["credit.alpha"] for row in rows)
                assert alphas == [0, 10, 20], f"the grid became {alphas}"
                assert all(row["state"] == "done" for row in rows), [row["state"] for row in rows]


def _begun(folder: Path, train: tuple[str, ...]) -> None:
    """A sweep whose coordinator was killed with two trials under way."""
    with _dies("ask", 2, after=True), contextlib.suppress(_Killed):
        run_sweep(*load_sweep(_sweep_file(folder.parent)), folder, workers=2, train=train)


@contextlib.contextmanager
def _dies(method: str, nth: int, *, after: bool) -> Iterator[None]:
    """Within it the coordinator ends for good before, or right after, the nth call of a method of its study."""
    plain, count = getattr(optuna.Study, method), [0]

    def dying(self: optuna.Study, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == nth and not after:
            raise _Killed
        result = plain(self, *arguments, **options)
        if count[0] == nth:
            raise _Killed
        return result

    with mock.patch.object(optuna.Study, method, dying):
        yield


# --- one scenario ------------------------------------------------------------------------------------------------------------


def _strict(file: Path) -> Any:
    def refused(constant: str) -> None:
        raise AssertionError(f"{file.name} holds {constant}")

    return (
        [json.loads(line, parse_constant=refused) for line in file.read_text().splitlines() if line.strip()]
        if (file.suffix == ".jsonl")
        else json.loads(file.read_text(), parse_constant=refused)
    )


@attack("processes", seconds=120)
def one_scenario(tries: Tries) -> None:
    """Bootstrap intervals from one scenario, in a run and in an evaluation: defined or said to be none, and no NaN in JSON."""
    for values in ([0.5], [0.0], [-1.0], [1e-300], [0.25, 0.25]):
        with tries.one(f"interval of {values}"):
            low, high = interval(values)
            assert low <= values[0] <= high
    with tries.one("one run with one scenario"):
        assert crossed([{"a": 0.5}]) == (0.5, 0.5)
    with tries.one("a share of one"):
        low, high = share_interval(1, 1)
        assert 0 < low < high <= 1
    source = sorted((ROOT / "ctcgrpo" / "packs" / "english").rglob("test*"))
    lines = [line for path in source for file in ([path] if path.is_file() else sorted(path.glob("*.jsonl")))
             for line in file.read_text(encoding="utf-8").split("\n") if line]  # fmt: skip
    one = tries.folder / "one.jsonl"
    one.write_text(lines[0] + "\n", encoding="utf-8")
    validated = [*(o for o in VALIDATED if not o.startswith("validation.scenarios")), f"validation.scenarios={one}"]
    folder = tries.folder / "one"
    with tries.one("a run"):
        ran = run("train", TINY, *validated, f"run.output_dir={tries.folder}", "run.name=one", "training.max_steps=1")
        assert ran.code == 0 and not ran.trace, ran.said[-300:] + ran.trace
        for file in (folder / "summary.json", folder / "validation.jsonl", folder / "metrics.jsonl"):
            _strict(file)
    evaluations = folder / "evaluations"
    commands = {
        "show": ["show", str(folder)],
        "report": ["report", str(folder)],
        "evaluate": ["evaluate", str(folder), "--out", str(evaluations)],
        "compare": ["compare", str(evaluations / "eibench-base"), str(evaluations / "eibench-final")],
        "leaderboard": ["leaderboard", str(evaluations)],
    }
    for name, command in commands.items():
        with tries.one(name):
            ran = run(*command)
            assert ran.code == 0 and not ran.trace, ran.said[-300:] + ran.trace
            assert "nan" not in ran.out.lower().replace("english", ""), ran.out[-400:]
    with tries.one("the evaluations' files"):
        for file in [*evaluations.rglob("*.json"), *evaluations.rglob("*.jsonl")]:
            _strict(file)
