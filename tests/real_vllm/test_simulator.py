"""A real LLM on a real vLLM server plays the user, started as launch/serve_simulator.sh starts it on GPUs: answers held to the JSON
schema, states that the server computed, a clean end. Needs launch/install_vllm_cpu.sh; ./launch/test_vllm.sh runs it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import SimulatorReplyError, SimulatorTransportError
from ctcgrpo.policy.model_wheel import fetch_model
from ctcgrpo.policy.smollm2 import SMOLLM2
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import ScenarioCard, State, TurnReply, TurnRequest, Utterance
from tests.conftest import ROOT

FOLDER = os.environ.get("CTCGRPO_VLLM")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="needs vLLM; ./launch/test_vllm.sh runs this")

# `vllm serve MODEL ...`, which the CPU package has under another name.
WRAPPER = """#!/usr/bin/env bash
set -eu
shift
exec "{python}" -m vllm.entrypoints.openai.api_server --model "$@"
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def dtype() -> str:
    """bfloat16 where the processor computes in it; where it does not, an answer in it takes minutes."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def test_a_real_llm_plays_the_user(tmp_path: Path) -> None:
    assert FOLDER is not None
    model = str(fetch_model(SMOLLM2, print))
    vllm = tmp_path / "vllm"
    vllm.write_text(WRAPPER.format(python=f"{FOLDER}/venv/bin/python"))
    vllm.chmod(0o755)
    port, vllm_port = free_port(), free_port()
    environment = os.environ | {
        "CTCGRPO_VLLM_BIN": str(vllm),
        "CTCGRPO_VENV": os.environ["CTCGRPO_VENV"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }
    command = [
        "launch/serve_simulator.sh",
        model,
        "--gpus",
        "0",
        "--port",
        str(port),
        "--vllm-port",
        str(vllm_port),
    ]
    command += ["--", "--dtype", dtype(), "--enforce-eager", "--max-model-len", "6144"]
    # With a seed, chunked prefill ends the engine on a CPU.
    command += ["--max-num-batched-tokens", "8192"]
    log = tmp_path / "servers.log"
    with log.open("w") as out:
        servers = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(servers, log, f"http://127.0.0.1:{port}")
        health, turns = asyncio.run(play(f"http://127.0.0.1:{port}"))
    except BaseException:
        print(log.read_text()[-6000:])
        raise
    finally:
        servers.send_signal(signal.SIGTERM)
        servers.wait(120)
    assert health["backend"] == "llm" and health["models"] == [model] and health["prompts"].startswith("ctcgrpo/")
    # A model of 135 million parameters judges badly, but in the form that was asked for.
    assert len(turns) == 4
    for before, reply in turns:
        assert reply.reply and reply.reflection and reply.usage.prompt_tokens > 1000 and 1 <= reply.usage.calls <= 3
        after = before.plus(reply.anger_delta, reply.trust_delta)
        assert reply.state == State(anger=after.anger, trust=after.trust)
    assert servers.returncode == 130
    for number in (port, vllm_port):
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", number)) != 0


def wait_until_ready(servers: subprocess.Popen[bytes], log: Path, url: str) -> None:
    deadline = time.monotonic() + 400
    while not re.search(r"^simulator 'llm' listens on ", log.read_text(), re.MULTILINE):
        assert servers.poll() is None and time.monotonic() < deadline, "the servers did not start"
        time.sleep(1)


async def until_answered(client: SimulatorClient, request: TurnRequest) -> TurnReply:
    """So small a model now and then says its instructions aloud, twice, which is a failed turn: then another sample. Nor has it a
    minute and a half for an answer where others use the same cores."""
    for seed in range(8):
        try:
            return await client.turn(request.model_copy(update={"seed": 100 * seed}))
        except SimulatorReplyError as error:
            assert "leak: reply" in str(error), error  # nothing else is wrong with an answer that is held to a schema
        except SimulatorTransportError as error:
            assert "no answer within" in str(error), error
    raise AssertionError("eight samples gave the instructions away, or took too long")


async def play(url: str) -> tuple[dict[str, object], list[tuple[UserState, TurnReply]]]:
    turns = []
    async with SimulatorClient(url, timeout=400, patience=5) as client:
        health = await client.health()
        for scenario in [s for s in load_scenarios("english/test", "test") if s.scene in ("support", "repair")][:2]:
            state = scenario.anchors.initial
            history = [Utterance(speaker="user", text=scenario.opening_line)]
            for round, said in enumerate(["I am here. What happened first?", "And then you were alone with it?"], 1):
                history.append(Utterance(speaker="policy", text=said))
                request = TurnRequest(
                    request_id=f"{scenario.id}/{round}",
                    scenario=ScenarioCard.of(scenario),
                    history=tuple(history),
                    state=State(anger=state.anger, trust=state.trust),
                    round=round,
                    max_rounds=8,
                    seed=0,
                )
                reply = await until_answered(client, request)
                turns.append((state, reply))
                state = UserState(reply.state.anger, reply.state.trust)
                history.append(Utterance(speaker="user", text=reply.reply, reflection=reply.reflection))
    return health, turns
