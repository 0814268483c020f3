"""vLLM servers on other GPUs than the update's: the weights that they are sent, bit for bit, and what becomes of a run whose server
dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.policy.loading import load_tokenizer
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.rollout.vllm_weights import ServerWeights
from tests.gpu.colocated import GREEDY, below_best, move, require_greedy
from tests.gpu.engine import prompts, sample
from tests.gpu.policy import LARGE, load, policy_folder
from tests.gpu.registry import Figures, Machine, check
from tests.gpu.running import end_group
from tests.gpu.served import expected_digests

ROOT = Path(__file__).parent.parent.parent
LENGTH = 1024
TRANSFER_SECONDS, START_SECONDS = 60.0, 600.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving(folder: Path, gpus: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A vLLM server as launch/serve_policy.sh starts it; its address, and its process, which leads a group of its own."""
    port = free_port()
    beside = Path(sys.executable).with_name("vllm")
    environment = {**os.environ, "CTCGRPO_VLLM_BIN": str(beside) if beside.exists() else "vllm", "PYTHONPATH": str(ROOT)}
    command = [
        "launch/serve_policy.sh",
        str(folder),
        "--gpus",
        gpus,
        "--port",
        str(port),
        "--",
        "--max-model-len",
        str(LENGTH),
    ]
    command += ["--worker-extension-cls", "tests.gpu.served.Digests", "--gpu-memory-utilization", "0.5"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None, f"launch/serve_policy.sh ended with {server.returncode}"
            assert time.monotonic() < end, f"the vLLM server was not ready within {START_SECONDS:g} s"
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(1)
        yield url, server
    finally:
        end_group(server.pid)


def digests(url: str) -> dict[str, str]:
    """Of the weights that a server's first worker holds."""
    body = json.dumps({"method": "weight_digests"}).encode()
    request = urllib.request.Request(f"{url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        results = json.load(answer)["results"]
    found: Any = results[0]
    return dict(json.loads(found.replace("'", '"')) if isinstance(found, str) else found)


def connected(machine: Machine, url: str, model: Any, **options: Any) -> ServerWeights:
    tokenizer = load_tokenizer(str(policy_folder(machine, LARGE)))
    return ServerWeights(
        lambda: model, Accelerator(), tokenizer, urls=[url], group_port=free_port(), timeout=TRANSFER_SECONDS, **options
    )


@check("a server's weights are the trainer's bit for bit", seconds=150, gpus=2, gib=22, modules=("vllm",))
def bit_for_bit(machine: Machine) -> Figures:
    model = load(machine, LARGE, torch.bfloat16, fused_head=False)
    with serving(policy_folder(machine, LARGE), "1") as (url, _):
        sender, seconds = connected(machine, url, model), []
        for step in range(3):
            move(model, step)
            weights = dict(model.named_parameters())
            served = digests(url)
            assert served != expected_digests(served, weights), "the server had the weights before they were sent"
            started = time.perf_counter()
            sender.send()
            seconds.append(time.perf_counter() - started)
            served = digests(url)
            wrong = [name for name, wanted in expected_digests(served, weights).items() if served[name] != wanted]
            assert not wrong, f"transfer {step + 1}: {len(wrong)} of {len(served)} parameters differ: {', '.join(wrong[:4])}"
    return {"transfers": 3, "parameters": len(served), "seconds a transfer": min(seconds)}


@check(
    "a server that is killed in the middle of a transfer ends it with its name",
    seconds=120,
    gpus=2,
    gib=22,
    modules=("vllm",),
)
def killed(machine: Machine) -> Figures:
    model = load(machine, LARGE, torch.bfloat16, fused_head=False)
    with serving(policy_folder(machine, LARGE), "1") as (url, server):
        sender = connected(machine, url, model, patience=5.0, chunk_bytes=2**28)
        plain, handed = sender._hand_over, []

        def hand_over() -> None:
            if handed:
                end_group(server.pid)
            handed.append(len(sender._chunk))
            plain()

        sender._hand_over = hand_over
        started = time.perf_counter()
        try:
            sender.send()
        except PolicyEngineError as error:
            seconds = time.perf_counter() - started
            assert url in str(error), f"the error does not name the server: {error}"
            assert seconds < 2 * TRANSFER_SECONDS, f"it took {seconds:.0f} s"
            return {"raised after s": seconds, "error": str(error)[:160]}
    raise AssertionError("a transfer to a server that was killed raised nothing")


@check("a tensor-parallel server answers as the trainer's weights do", seconds=180, gpus=4, gib=22, modules=("vllm",))
def tensor_parallel(machine: Machine) -> Figures:
    model = load(machine, LARGE, torch.bfloat16, fused_head=False)
    asked = prompts(model.config.vocab_size, 12, 400)
    with serving(policy_folder(machine, LARGE), "2,3") as (url, _):
        engine = VllmServerEngine([url], weights=connected(machine, url, model), stop_ids=frozenset(), max_length=LENGTH)
        move(model, 0)
        engine.take_weights(0)
        done = sample(engine, asked, GREEDY)
        worst, exact = require_greedy(model, asked, done, "after a transfer to two GPUs")
        move(model, 1)
        stale = float(below_best(model, asked, done).mean())
    return {"best choices": f"{exact:.0%}", "below the best": worst, "of other weights": stale}
