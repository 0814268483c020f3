"""The simulator as a process of its own, and runs that depend on it: killed and restarted, told to stop, its LLM down, its budget
spent; and no secret in anything that a run leaves behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctcgrpo.simulator.client import SimulatorClient
from tests.conftest import ROOT, Command
from tests.fake_llm import FakeLlm
from tests.unit.test_simulator_prompts import request

TINY = str(ROOT / "recipes" / "tiny.yaml")
QUICK = ["rollout.max_turns=2", "rollout.group_size=2", "rollout.max_new_tokens=8", "rollout.deterministic=false"]


def configured(file: Path, llm: FakeLlm, **changes: Any) -> Path:
    endpoint = {"url": llm.url, "model": "m", "timeout": 5, "breaker_seconds": 0.2} | changes.pop("endpoint", {})
    settings = {"backend": "llm", "llm": {"deadline": changes.pop("deadline", 20), "endpoints": [endpoint]}} | changes
    file.write_text(yaml.safe_dump(settings))
    return file


class Server:
    """`ctcgrpo serve` on a port that stays the same."""

    def __init__(self, config: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "ctcgrpo", "serve", str(config), "--port", str(self.port)]

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "simulator 'llm' listens on http://127.0.0.1" in line, line + (
            self.process.stderr.read() if self.process.stderr else ""
        )
        return self.process


@contextmanager
def serving(config: Path) -> Iterator[Server]:
    server = Server(config)
    server.start()
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_killed_server_loses_no_episode(ctcgrpo: Command, tmp_path: Path) -> None:
    with (
        FakeLlm(delay=0.5).serving() as llm,
        serving(configured(tmp_path / "s.yaml", llm, store=str(tmp_path / "store"))) as server,
    ):
        killed: list[int] = []

        def kill_in_the_middle() -> None:
            while len(llm.requests) < 4:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            killed.append(len(llm.requests))
            time.sleep(1)
            server.start()

        thread = threading.Thread(target=kill_in_the_middle)
        thread.start()
        code, _, err = ctcgrpo(
            "train", TINY, *QUICK, "training.max_steps=1", f"run.output_dir={tmp_path}", f"simulator.url={server.url}"
        )
        thread.join()
        assert code == 0, err
    assert killed and 4 <= killed[0] < 16
    (metrics,) = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert metrics["episodes/failed"] == 0 and metrics["episodes/valid"] == 8
    # Calls under way when it died were made again; what had been answered was not.
    assert len(llm.requests) <= 16 + 8


def test_told_to_stop_it_ends_the_turns_under_way_first(tmp_path: Path) -> None:
    with FakeLlm(delay=1.5).serving() as llm, serving(configured(tmp_path / "s.yaml", llm)) as server:

        async def ask() -> list[Any]:
            async with SimulatorClient(server.url, patience=0) as client:
                turns = [asyncio.create_task(client.turn(request("Hello.", seed=k))) for k in range(8)]
                while len(llm.requests) < 8:
                    await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
                return list(await asyncio.gather(*turns))

        replies = asyncio.run(ask())
        _, err = server.process.communicate(timeout=20)
    assert len({r.reply for r in replies}) == 8 and server.process.returncode in (0, -signal.SIGTERM)
    events = [json.loads(line) for line in err.splitlines()]
    assert [e["event"] for e in events] == ["started", *["turn"] * 8, "stopped"] and events[-1]["calls"] == 8


def test_an_endpoint_that_is_down_stops_the_run_and_it_resumes(ctcgrpo: Command, tmp_path: Path) -> None:
    with FakeLlm().serving() as llm:
        config = configured(tmp_path / "s.yaml", llm, deadline=1)
        command = ["train", TINY, *QUICK, f"run.output_dir={tmp_path}", f"simulator.config={config}", "run.name=down"]
        command += ["validation.scenarios=english/test", "validation.every=5"]
        llm.down = True
        code, _, err = ctcgrpo(*command)
        assert code == 7 and "episodes failed" in err and "There is no checkpoint yet; run the same command to start again" in err
        traces = list((tmp_path / "down" / "traces").glob("validation-*.jsonl"))
        failures = [json.loads(line)["failure"] for file in traces for line in file.read_text().splitlines()]
        assert len(failures) == 16 and all(f["kind"] == "simulator_transport" and "HTTP 503" in f["message"] for f in failures)
        llm.down = False
        code, _, err = ctcgrpo(*command)
        assert code == 0, err
        (tmp_path / "down" / "final" / "COMPLETE").unlink()
        configured(tmp_path / "s.yaml", llm, deadline=1, endpoint={"model": "another"})
        code, out, err = ctcgrpo(*command)
        assert (
            code == 6
            and "resumes from" not in out
            and "simulator changed since the run began (models: ['m'] -> ['another']" in err
            and " of options, sampling, max_tokens, and of each endpoint url, model, " in err
        )
    simulator = json.loads((tmp_path / "down" / "summary.json").read_text())["simulator"]
    assert simulator["models"] == ["m"] and simulator["prompts"].startswith("ctcgrpo/")
    assert simulator["spent"]["calls"] == len(simulator_calls(tmp_path / "down"))


def simulator_calls(folder: Path) -> list[dict[str, Any]]:
    """Of the last life of the run: its embedded server's log since the last restart."""
    lines = [json.loads(line) for line in (folder / "simulator.jsonl").read_text().splitlines()]
    starts = [k for k, line in enumerate(lines) if line["event"] == "stopped"]
    return [line for line in lines[starts[0] + 1 :] if line["event"] == "turn"]


def test_a_spent_budget_pauses_the_run_and_no_secret_is_left_behind(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARKED_KEY", "marked-secret-key")
    monkeypatch.setenv("CTCGRPO_SIMULATOR_TOKEN", "marked-secret-token")
    with FakeLlm(key="marked-secret-key", rates={"malformed": 0.2}).serving() as llm:

        def config(tokens: int) -> Path:
            return configured(
                tmp_path / "s.yaml",
                llm,
                endpoint={"key_env": "MARKED_KEY"},
                store=str(tmp_path / "store"),
                budget={"tokens": tokens},
            )

        command = ["train", TINY, *QUICK, "run.output_dir=runs", f"simulator.config={config(40_000)}"]
        code, out, err = ctcgrpo(*command)
        said = [out, err]
        assert code == 8 and "budget of 40000 tokens is spent" in err and "run the same command to resume" in err
        config(1_000_000)
        first = len(llm.requests)
        code, out, err = ctcgrpo(*command)
        said += [out, err]
        assert code == 0, err
        monkeypatch.setenv("MARKED_KEY", "marked-secret-wrong")
        code, out, err = ctcgrpo(*command, "run.name=refused", "run.seed=9")
        said += [out, err]
        assert code == 7 and "HTTP 401: " in err and "(key_env: MARKED_KEY)" in err
    assert first > 10
    metrics = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    assert not any("marked-secret" in text for text in said)
    searched = 0
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        searched += 1
        assert b"marked-secret" not in file.read_bytes(), file
    assert searched > 30 and (tmp_path / "store" / "data.mdb").exists()


@pytest.mark.parametrize("kill", [False, True])
async def test_two_servers_on_one_store_spend_its_budget_together(tmp_path: Path, kill: bool) -> None:
    """Neither takes what the other has booked for money that is spent, also when one of them is killed."""
    budget = 220_000
    with FakeLlm(delay=0.1).serving() as llm:
        config = configured(tmp_path / "s.yaml", llm, store=str(tmp_path / "store"), budget={"tokens": budget})

        async def turns(server: Server, first: int) -> Counter[str]:
            async with SimulatorClient(server.url, timeout=60, patience=0.5) as client:
                asked = (client.turn(request("Hello.", seed=first + k)) for k in range(250))
                return Counter(type(r).__name__ for r in await asyncio.gather(*asked, return_exceptions=True))

        with serving(config) as one, serving(config) as other:
            for stream in (one.process.stdout, one.process.stderr, other.process.stdout, other.process.stderr):
                assert stream is not None  # a full pipe would block the server
                threading.Thread(target=stream.read, daemon=True).start()
            playing = [asyncio.create_task(turns(one, 0)), asyncio.create_task(turns(other, 1000))]
            if kill:
                while len(llm.requests) < 60:
                    await asyncio.sleep(0.01)
                other.process.kill()
            results = await asyncio.gather(*playing)
    assert 0.9 * budget <= 1100 * len(llm.requests) <= budget + 1100, results  # what an answer of the fake costs
    assert set(results[0]) == {"TurnReply", "BudgetSpent"} and results[0]["TurnReply"] >= 50, results
    if not kill:
        assert set(results[1]) == {"TurnReply", "BudgetSpent"} and results[1]["TurnReply"] >= 50, results
