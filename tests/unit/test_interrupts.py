"""A run that is asked to stop: what it says, that it ends within a bound however slow policy and user are, and what is saved."""

from __future__ import annotations

import asyncio
import math
import os
import pty
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.rollout.continuous import ContinuousEngine, Finished
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.simulator import server as servers
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, TurnRequest
from ctcgrpo.simulator.scripted.backend import ScriptedBackend, react
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.training.trainer import CTCGRPOTrainer
from ctcgrpo.types import Completion
from ctcgrpo.util import processes
from ctcgrpo.util.files import is_complete
from ctcgrpo.util.processes import interrupts
from tests.conftest import Command
from tests.unit.test_rollout import SLOTS, Parts
from tests.unit.test_run import FAST, TINY

FOREVER = 600.0


class SlowEngine(PolicyEngine):
    async def generate(self, prompt_ids: Any, *, seed: int, sampling: Sampling) -> Completion:
        await asyncio.sleep(FOREVER)
        raise AssertionError


class SlowUser(ScriptedBackend):
    """Answers turns of the first step; all others take forever."""

    async def react(self, request: TurnRequest) -> Reaction:
        if request.request_id.split("/")[0] == "1":
            return react(request)
        await asyncio.sleep(FOREVER)
        raise AssertionError


def server() -> SimulatorServer:
    return SimulatorServer(SCRIPTED_USER, backend=SlowUser())


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_is_terminal", lambda fd: False)
    monkeypatch.setattr(servers, "_DRAIN_AFTER_ERROR", 1)


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return Parts(tiny)


@pytest.fixture
def sent() -> Iterator[Callable[[signal.Signals], None]]:
    """Sends a signal to this process and lets Python handle it; handlers are as before afterwards."""
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}

    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    yield send
    assert {s: signal.getsignal(s) for s in kept} == kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_asks_to_stop_and_says_for_what_it_waits(
    number: signal.Signals, sent: Callable[[signal.Signals], None]
) -> None:
    said: list[str] = []
    with interrupts(said.append, lambda: "waiting for the update of step 3") as asked:
        assert not asked()
        sent(number)
        assert asked() and said == [
            "stopping: waiting for the update of step 3. Press Ctrl-C again to stop immediately, without saving"
        ]
        sent(number)  # a launcher passes on what the terminal has sent already
    assert len(said) == 1


def test_a_second_ctrl_c_stops_at_once(sent: Callable[[signal.Signals], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ONE_SIGNAL", 0.05)
    for first, second, stops in [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGTERM, True),
        (signal.SIGUSR1, signal.SIGINT, True),
        (signal.SIGUSR1, signal.SIGTERM, False),  # a scheduler's notice, and its end: what is being saved is saved
        (signal.SIGTERM, signal.SIGHUP, False),
    ]:
        stopped = False
        with interrupts(lambda _: None, str) as asked:
            sent(first)
            time.sleep(0.06)
            try:
                sent(second)
            except KeyboardInterrupt:
                stopped = True
            assert asked() and stopped == stops, (first, second)


def test_nohup_is_heeded(sent: Callable[[signal.Signals], None]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts(lambda _: None, str) as asked:
            sent(signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_no_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child with a terminal of its own, which is closed: the child goes on writing to it, then to a file."""
    monkeypatch.undo()
    child, terminal = pty.fork()
    if not child:  # nothing but this may run here, whatever happens
        try:
            with interrupts(lambda text: None, lambda: "saving") as asked:
                os.write(1, b"ready")
                for _ in range(1000):
                    if asked():
                        os.write(1, b"still here")
                        (tmp_path / "saved").write_text("all of it")
                        break
                    time.sleep(0.01)
        finally:
            os._exit(0)
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    os.waitpid(child, 0)
    assert (tmp_path / "saved").read_text() == "all of it"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("slow", ["policy", "user"])
async def test_episodes_in_progress_are_given_up(parts: Parts, slow: str, deterministic: bool) -> None:
    expected = f"{len(SLOTS)} policy replies and 0 environment calls" if slow == "policy" else "0 policy replies and 6"
    end = math.inf
    with pytest.raises(RunInterrupted), running(server()) as url:
        engine = SlowEngine() if slow == "policy" else None
        runner = parts.runner(url, engine=engine, deterministic=deterministic, interrupted=lambda: time.monotonic() > end)
        run = asyncio.create_task(runner.run(SLOTS))
        deadline = time.monotonic() + 60  # replies of a real engine come first, on a machine that may be loaded
        while not str(runner.awaited).startswith(expected) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert str(runner.awaited).startswith(expected)
        end = time.monotonic()
        try:
            await run
        finally:
            assert time.monotonic() < end + 3 and str(runner.awaited).startswith("0 policy replies and 0 environment calls")
    assert time.monotonic() < end + 8  # the embedded server does not end its turns first


def test_a_forward_pass_ends_between_two_layers(parts: Parts) -> None:
    layers = parts.model.config.num_hidden_layers
    polled: list[bool] = []

    def interrupted() -> bool:
        polled.append(len(polled) + 1 >= layers)  # in the last layer of the first pass
        return polled[-1]

    batcher = TransformersBatcher(parts.model, pad_id=0, stop_ids=[], max_batch=4, interrupted=interrupted)
    batcher.take_weights()
    batcher.add("a", list(range(5, 105)), 1, Sampling(max_new_tokens=50))
    with pytest.raises(RunInterrupted, match="in the middle of a forward pass"):
        batcher.step()
    assert len(polled) == layers and batcher.under_way == 0
    batcher.sleep()


@pytest.mark.parametrize("slow, number", [("policy", signal.SIGUSR1), ("user", signal.SIGHUP)])
def test_a_slow_run_ends_within_a_bound_and_can_go_on(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, number: signal.Signals
) -> None:
    folder = tmp_path / "tiny"
    ended: list[float] = []

    def second_step() -> bool:
        return (folder / "checkpoint-1" / "COMPLETE").exists()

    def interrupt() -> None:
        while not second_step():
            time.sleep(0.05)
        time.sleep(1.0)
        ended.append(time.monotonic())
        if signal.getsignal(number) != signal.SIG_DFL:  # else the run is over already, and this process would be
            os.kill(os.getpid(), number)

    original = TransformersBatcher.step

    def step(self: TransformersBatcher) -> list[Finished]:
        if slow == "policy" and second_step():
            time.sleep(0.3)  # 24 tokens a reply, 2 turns
        return original(self)

    monkeypatch.setattr(TransformersBatcher, "step", step)
    if slow == "user":
        monkeypatch.setattr(ScriptedBackend, "react", SlowUser.react)
    threading.Thread(target=interrupt, daemon=True).start()
    command = ["train", TINY, *FAST, "training.max_steps=3", f"run.output_dir={tmp_path}", "rollout.deterministic=false"]
    code, out, err = ctcgrpo(*command)
    assert code == 130 and "Traceback" not in err, err
    assert time.monotonic() - ended[0] < 6
    waits = {"policy": "8 policy replies and 0 environment calls", "user": "0 policy replies and 8 environment calls"}[slow]
    assert f"stopping: cancelling {waits} in progress (at most 15 s), then saving" in out
    assert f"Saved {folder / 'checkpoint-1'}; run the same command to resume" in err
    assert is_complete(folder / "checkpoint-1") and not (folder / "checkpoint-2").exists()


def test_weights_that_an_engine_does_not_take_end_the_run_after_saving(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ContinuousEngine.take_weights

    def take_weights(self: ContinuousEngine, version: int) -> None:
        if version:
            raise PolicyEngineError("http://server:8000 did not take lm_head: gone")
        original(self, version)

    monkeypatch.setattr(ContinuousEngine, "take_weights", take_weights)
    longer = ["training.max_steps=3", "training.save_every=50"]
    code, _, err = ctcgrpo("train", TINY, *FAST, *longer, f"run.output_dir={tmp_path}")
    (saved,) = (tmp_path / "tiny").glob("checkpoint-*")
    assert code == 4 and is_complete(saved), err
    assert f"http://server:8000 did not take lm_head: gone. Saved {saved}; run the same command to resume" in err


def test_an_update_in_progress_is_finished_and_saved(ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CTCGRPOTrainer.update_rows

    def update_rows(self: CTCGRPOTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    monkeypatch.setattr(CTCGRPOTrainer, "update_rows", update_rows)
    code, out, err = ctcgrpo("train", TINY, *FAST, "training.max_steps=3", f"run.output_dir={tmp_path}")
    assert code == 130, err
    assert "stopping: waiting for the update of step 2 (the last one took " in out
    assert f"Saved {tmp_path / 'tiny' / 'checkpoint-2'}; run the same command" in err
    assert is_complete(tmp_path / "tiny" / "checkpoint-2") and "step 3/3" not in out


def test_a_run_that_stops_in_its_first_step_has_nothing_to_resume_from(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_weights(self: ContinuousEngine, version: int) -> None:
        raise PolicyEngineError("http://server:8000 is gone")

    monkeypatch.setattr(ContinuousEngine, "take_weights", take_weights)
    code, out, err = ctcgrpo("train", TINY, *FAST, "validation=null", f"run.output_dir={tmp_path}")
    assert code == 4 and "saving a checkpoint" not in out, out
    assert "http://server:8000 is gone. There is no checkpoint yet; run the same command to start again" in err
