"""vLLM plays the policy, on the CPU: colocated with training, and as a server. Runs in the environment that
launch/install_vllm_cpu.sh makes; ./launch/test_vllm.sh runs it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("vllm.engine") is None:
    pytest.skip("needs vLLM; ./launch/test_vllm.sh runs this", allow_module_level=True)

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from ctcgrpo.environments.eibench import task_of
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.rollout.sampler import log_kept
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.types import Completion
from tests.conftest import ROOT, Backend
from tests.unit.test_rollout import Parts

LENGTH, NOISE = 1024, 0.15
"""Tokens of prompt and completion; how far bfloat16 may put a log-probability from float32 (0.02 to 0.1 were seen)."""
SAMPLING = Sampling(temperature=1.0, max_new_tokens=24)
TRUNCATED = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy stored in bfloat16, which vLLM can take new weights in."""
    folder = tmp_path_factory.mktemp("base")
    build_tiny(folder, (s.user_persona for s in load_scenarios("english/train")))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


class Moody(Backend):
    """Stays for one to three turns, and takes its time now and then."""

    async def react(self, request: TurnRequest) -> Reaction:
        draw = random.Random(request.seed)
        await asyncio.sleep(draw.choice([0, 0.02, 0.1]))
        change = draw.randint(-9, 9)
        return Reaction(reply="Hm.", anger_delta=-change, trust_delta=change, goes_on=draw.random() < 0.6)


@pytest.fixture(scope="module")
def moody() -> Iterator[str]:
    with running(SimulatorServer(SCRIPTED_USER, backend=Moody())) as url:
        yield url


class Colocated:
    """A policy in float32, and vLLM beside it."""

    def __init__(self, base: Path) -> None:
        self.asked_to_stop = False
        self.parts = Parts(base)
        self.parts.model = self.parts.model.float()
        self.vllm = ColocatedVllm(
            lambda: self.parts.model,
            Accelerator(cpu=True),
            self.parts.tokenizer,
            stop_ids=self.parts.stop_ids,
            max_length=LENGTH,
            max_requests=16,
            gpu_memory=0.5,
            seed=3,
        )
        self.engine = ContinuousEngine(self.vllm, interrupted=lambda: self.asked_to_stop)

    def gap(self, prompt: Sequence[int], done: Completion) -> float:
        """How far recorded log-probabilities are from those of the policy as it is now."""
        now = self.parts.full_logprobs(prompt, done.token_ids)
        return max(abs(a - b) for a, b in zip(done.logprobs, now, strict=True))


@pytest.fixture(scope="module")
def colocated(base: Path) -> Iterator[Colocated]:
    both = Colocated(base)
    yield both
    both.engine.close()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(1)


def prompts(parts: Parts, n: int) -> list[list[int]]:
    said = [f"{s.opening_line} {s.policy_persona}" for s in load_scenarios("english/train")][:n]
    return [parts.tokenizer.encode(text)[: 20 + 7 * k] for k, text in enumerate(said)]


async def sample(engine: PolicyEngine, asked: Sequence[Sequence[int]], sampling: Sampling = SAMPLING) -> list[Any]:
    async with engine:
        return await asyncio.gather(
            *(engine.generate(p, seed=100 + k, sampling=sampling) for k, p in enumerate(asked)), return_exceptions=True
        )


def test_a_server_gives_what_the_colocated_engine_gives(colocated: Colocated, base: Path) -> None:
    """The same seeds in the same batch, against a plain vLLM server with the same settings."""
    asked = prompts(colocated.parts, 12)
    colocated.engine.take_weights(0)
    here = asyncio.run(sample(colocated.engine, asked))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", str(LENGTH), "--max-num-seqs", "16"]
    command += ["--max-num-batched-tokens", "4096", "--logprobs-mode", "processed_logprobs"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=base.parent, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, **quiet)  # type: ignore[call-overload]
    sent = []

    class Nowhere:
        """Weights travel over NCCL, which there is none of here."""

        def send(self) -> None:
            sent.append(True)

    try:
        url = f"http://127.0.0.1:{port}/v1/"
        engine = VllmServerEngine([url], weights=Nowhere(), stop_ids=colocated.parts.stop_ids, max_length=LENGTH, run="run/0")
        with pytest.raises(PolicyEngineError, match="generate was called before take_weights"):
            asyncio.run(engine.generate([1], seed=0, sampling=SAMPLING))
        wait_for(f"{url}models", server)
        engine.take_weights(0)
        engine.take_weights(0)
        there = asyncio.run(sample(engine, asked))
        engine.confirm()
        assert sent == [True] and all(isinstance(done, Completion) for done in there), there
        again = asyncio.run(sample(engine, asked))
        cut = asyncio.run(sample(engine, [asked[0] * 100], Sampling(max_new_tokens=5)))[0]
        truncated = asyncio.run(sample(engine, asked, TRUNCATED))
        narrow = VllmServerEngine([url], weights=Nowhere(), stop_ids=frozenset(), max_length=LENGTH + 1, patience=3)
        narrow.take_weights(0)
        with pytest.raises(PolicyEngineError, match="weight_version = '/0'; expected 'run/0/0'"):
            engine.confirm()
        refused = asyncio.run(sample(narrow, asked[:1]))[0]
    finally:
        server.terminate()
        server.wait(60)
    assert [d.token_ids for d in again] == [d.token_ids for d in there]
    gaps, kept_by_both = [], 0
    for prompt, done in zip(asked, truncated, strict=True):
        logits, ids = colocated.parts.logits(prompt, done.token_ids), torch.tensor(done.token_ids)
        full = torch.log_softmax(logits / TRUNCATED.temperature, -1)[range(len(ids)), ids]
        ours = full - log_kept(logits, ids, TRUNCATED)
        gaps += [abs(a - b) for a, b in zip(ours.tolist(), done.logprobs, strict=True) if a > -math.inf]
        kept_by_both += int(ours.isfinite().sum())
    assert kept_by_both >= 0.97 * sum(len(done.token_ids) for done in truncated)
    assert sum(gaps) / len(gaps) < NOISE / 5 and max(gaps) < 3 * NOISE, (sum(gaps) / len(gaps), max(gaps))
    assert isinstance(cut, PolicyEngineError) and "leaves no room" in str(cut)
    assert isinstance(refused, PolicyEngineError) and f"max_model_len = {LENGTH}" in str(refused)
    same = sum(a.token_ids == b.token_ids for a, b in zip(here, there, strict=True))
    assert same >= 10, f"{same} of 12 completions are the same"  # kernels that round otherwise decide a near tie now and then
    for prompt, a, b in zip(asked, here, there, strict=True):
        assert colocated.gap(prompt, a) < NOISE and colocated.gap(prompt, b) < NOISE


def test_turns_are_batched_as_they_come_and_follow_the_weights(colocated: Colocated, moody: str) -> None:
    scenarios = load_scenarios("english/train")
    slots = [Slot(task_of(s), 1, g, r) for g, s in enumerate(scenarios[:4]) for r in range(4)]
    runner = colocated.parts.runner(moody, sampling=SAMPLING, engine=colocated.engine)

    def play(version: int) -> list[tuple[tuple[int, ...], Completion]]:
        colocated.engine.take_weights(version)
        episodes = asyncio.run(runner.run(slots))
        assert [e.failure for e in episodes] == [None] * 16 and colocated.engine.version == version
        assert len({len(e.turns) for e in episodes}) > 1  # dialogues of several lengths
        return [(t.prompt_ids, t.completion) for e in episodes for t in e.turns]

    first = play(0)
    assert max(colocated.gap(*turn) for turn in first) < NOISE
    optimizer = torch.optim.AdamW(colocated.parts.model.parameters(), lr=3e-2)
    ids = torch.tensor([list(first[0][0])])
    torch.autograd.backward(colocated.parts.model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    assert max(colocated.gap(*turn) for turn in first) > 1
    colocated.engine.sleep()
    asleep = asyncio.run(sample(colocated.engine, [[1]]))[0]
    assert isinstance(asleep, PolicyEngineError) and "generate was called before take_weights" in str(asleep)
    assert max(colocated.gap(*turn) for turn in play(1)) < NOISE


def test_a_short_request_does_not_wait_for_a_long_one(colocated: Colocated) -> None:
    engine, asked = colocated.engine, prompts(colocated.parts, 4)
    engine.take_weights(2)

    async def beside() -> tuple[bool, list[Completion]]:
        async with engine:
            tokens = Sampling(temperature=1.0, max_new_tokens=400)
            long = asyncio.create_task(engine.generate(asked[0], seed=3, sampling=tokens))
            while not colocated.vllm.under_way:
                await asyncio.sleep(0.001)
            mixed = engine.mixed_steps
            short = [await engine.generate(p, seed=k, sampling=SAMPLING) for k, p in enumerate(asked[1:])]
            waited = long.done()
            assert engine.mixed_steps >= mixed + len(short)
            return waited, [await long, *short]

    waited, done = asyncio.run(beside())
    assert not waited and len(done[0].token_ids) > max(len(d.token_ids) for d in done[1:])


def test_weights_do_not_change_beneath_a_request_and_failures_stay_alone(
    colocated: Colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = colocated.engine, prompts(colocated.parts, 4)
    engine.take_weights(2)
    long = Sampling(temperature=1.0, max_new_tokens=400)

    async def refused() -> tuple[Any, Any, Any]:
        async with engine:
            tasks = [asyncio.create_task(engine.generate(p, seed=k, sampling=long)) for k, p in enumerate(asked)]
            while not colocated.vllm.under_way:
                await asyncio.sleep(0.01)
            with pytest.raises(PolicyEngineError, match="weights cannot change before they finish"):
                engine.take_weights(3)
            with pytest.raises(PolicyEngineError, match="weights cannot change before they finish"):
                colocated.vllm.take_weights()
            tasks[0].cancel()
            bad = await asyncio.gather(engine.generate([1] * LENGTH, seed=1, sampling=long), return_exceptions=True)
            unknown = await asyncio.gather(engine.generate([10**7], seed=1, sampling=long), return_exceptions=True)
            return bad[0], unknown[0], await asyncio.gather(*tasks, return_exceptions=True)

    bad, unknown, results = asyncio.run(refused())
    assert isinstance(bad, PolicyEngineError) and "leaves no room" in str(bad)
    assert isinstance(unknown, PolicyEngineError) and "refused" in str(unknown)
    assert isinstance(results[0], asyncio.CancelledError) and all(isinstance(r, Completion) for r in results[1:])
    assert colocated.vllm.under_way == 0

    def broken() -> None:
        raise RuntimeError("CUDA error: device-side assert")

    with monkeypatch.context() as patch:
        patch.setattr(colocated.vllm, "step", broken)
        failed = asyncio.run(sample(engine, asked))
    assert all(isinstance(f, PolicyEngineError) and "device-side assert" in str(f) for f in failed)
    colocated.asked_to_stop = True
    assert all(isinstance(f, RunInterrupted) for f in asyncio.run(sample(engine, asked)))
    colocated.asked_to_stop = False
    assert colocated.vllm.under_way == 0
    assert all(isinstance(d, Completion) for d in asyncio.run(sample(engine, asked)))


@pytest.mark.parametrize(
    ("backend", "processes", "overrides"),
    [
        ("zero3", 2, ["training.sharding=configs/deepspeed/zero3.json"]),
        ("ddp", 2, ["policy.lora={rank: 4, alpha: 64}"]),
        ("ddp", 2, ["rollout.temperature=0.6", "rollout.top_p=0.95", "rollout.top_k=20", "training.importance=token"]),
    ],
)
def test_recipes_train_with_it(
    base: Path, moody: str, tmp_path: Path, backend: str, processes: int, overrides: list[str]
) -> None:
    """Each step's log-probabilities are those of the weights that the step before has left: sharded weights are gathered, an
    adapter is merged, on processes with different numbers of turns."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if backend.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    program = ["-m", "tests.on_gloo", backend] if backend.startswith("zero") else []
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", *program, "recipes/tiny.yaml", f"policy.model={base}"]
    command += ["rollout.engine=vllm_colocated", "rollout.deterministic=false", "training.learning_rate=1e-2"]
    command += ["training.max_steps=3", f"run.output_dir={tmp_path}", f"simulator.url={moody}", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [m["policy_version"] for m in metrics] == [0, 2, 4]
    assert all(m["episodes/valid"] == 16 for m in metrics), metrics
    if "training.importance=token" in overrides:
        assert all(m["importance/gap"] < NOISE / 5 and m["importance/removed"] < 0.03 for m in metrics), metrics
        assert all(abs(m["importance/mean"] - 1) < 0.05 for m in metrics), metrics
    else:
        assert all(m["logprob_gap"] < NOISE for m in metrics), metrics
    turns = []
    for trace in sorted((tmp_path / "tiny" / "traces").glob("step-*.jsonl")):
        turns.append(sum(len(json.loads(line)["turns"]) for line in trace.read_text().splitlines()))
    assert len(turns) == 3 * processes and any(a != b for a, b in zip(turns[::2], turns[1::2], strict=True)), turns
