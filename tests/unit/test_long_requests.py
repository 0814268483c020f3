"""Long texts and long dialogues: the scripted user's time grows with their length and no faster, they do not hold up anybody
else at the server, and what is too long is refused."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import aiohttp
import pytest

from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import MOST_CHARACTERS, MOST_LINES, ScenarioCard, State, TurnRequest, Utterance, turn_request
from ctcgrpo.simulator.scripted.backend import react

CARD = ScenarioCard.of(load_scenarios("english/test", "test")[0])


def said(*replies: str) -> list[Utterance]:
    return [Utterance(speaker="policy", text=reply) for reply in replies]


def request(history: Sequence[Utterance]) -> TurnRequest:
    state = State(anger=50, trust=50)
    return TurnRequest(request_id="r", scenario=CARD, history=tuple(history), state=state, round=1, max_rounds=8, seed=1)


def slow_request(lines: int) -> TurnRequest:
    """Every line is of other words, which no cache has met."""
    rng = random.Random(time.time_ns())
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(30 * lines)]
    return request(said(*(" ".join(words[30 * k : 30 * k + 30]) for k in range(lines))))


@pytest.mark.parametrize(
    "history",
    [
        said(*[""] * 2000),
        said("I'm " * 16000),
        said("But I " * 16000),
        said("a! " * 30000),
        said("你好吗我" * 20000),
        said("*" * 64000),
        said("I think of you. " * 6000),
        said("I'm " * 250_000),
    ],
    ids=[
        "2,000 empty replies",
        "I'm",
        "But I",
        "many sentences",
        "Chinese",
        "stars",
        "one sentence",
        "a million characters",
    ],
)
def test_the_time_of_a_reaction_grows_no_faster_than_the_text(history: list[Utterance]) -> None:
    """Each took between 5 s and minutes where sentences, words or replies were compared in pairs."""
    started = time.perf_counter()
    assert react(request(history)).why
    assert time.perf_counter() - started < 3


def test_what_was_said_long_ago_is_forgotten() -> None:
    """And what was said lately is not."""
    once = "The blue ladder stands by the door of the shed."
    others = [f"Number {k} is a day like any other for me." for k in range(120)]
    assert "has said that before" in react(request(said(*others, once, *others[:20], once))).why
    assert "has said that before" not in react(request(said(once, *others, once))).why


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (said(*["a"] * (MOST_LINES + 1)), "history has 2,001 lines; expected at most 2,000"),
        (said("a" * MOST_CHARACTERS), r"history and scenario have 1,20\d,\d\d\d characters; expected at most 1,200,000"),
    ],
)
async def test_what_is_too_long_is_refused(history: list[Utterance], message: str, simulator_url: str) -> None:
    with pytest.raises(SimulatorReplyError, match=message):  # an episode that fails, not a run
        turn_request(CARD, history, UserState(50, 50), request_id="r", max_rounds=8, seed=1)
    body = json.loads(request(said("Hello.")).model_dump_json()) | {"history": [u.model_dump() for u in history]}
    async with aiohttp.ClientSession() as session, session.post(f"{simulator_url}/v1/turn", json=body) as response:
        assert response.status == 400
        problem = await response.json()
    with pytest.raises(SimulatorReplyError, match=message):
        raise SimulatorReplyError(problem["error"])


async def test_a_long_reaction_holds_nobody_up(simulator_url: str) -> None:
    longest = 0.0
    async with aiohttp.ClientSession() as session:
        turn = asyncio.create_task(session.post(f"{simulator_url}/v1/turn", data=slow_request(700).model_dump_json()))
        await asyncio.sleep(0.3)
        asked = 0
        while not turn.done():
            started = time.perf_counter()
            async with session.get(f"{simulator_url}/ready") as response:
                assert response.status == 200
            longest = max(longest, time.perf_counter() - started)
            asked += 1
            await asyncio.sleep(0.05)
        assert (await turn).status == 200
    assert asked >= 5 and longest < 0.5, (asked, longest)


async def test_a_signal_to_stop_is_heard_during_a_long_reaction() -> None:
    command = [sys.executable, "-m", "ctcgrpo", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" on ")[1].split()[0]
        async with aiohttp.ClientSession() as session:
            turn = asyncio.create_task(session.post(f"{url}/v1/turn", data=slow_request(1000).model_dump_json()))
            await asyncio.sleep(0.5)
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            with pytest.raises(aiohttp.ClientConnectorError):  # no new turns, while the one under way is still judged
                await session.get(f"{url}/ready")
            assert not turn.done()
            assert (await turn).status == 200
        assert server.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.communicate()
