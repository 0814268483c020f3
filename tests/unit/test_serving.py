"""The simulator server in production: who may ask, how much, what it says of itself, and what its log holds."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from rich.console import Console

from ctcgrpo.chat.as_policy import chat as play_as_person
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import RecipeError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.simulator.choice import chosen_simulator
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER, bearer_token, check_listening
from ctcgrpo.simulator.logs import json_log
from ctcgrpo.simulator.server import SimulatorServer, running
from tests.conftest import Command
from tests.fake_llm import FakeLlm
from tests.unit.test_llm_user import SCENARIOS, configuration
from tests.unit.test_simulator_prompts import request

BODY = request("I see you are still here.").model_dump_json()


async def get(url: str, path: str, token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url + path) as response:
        return response.status, await response.text()


async def test_a_token_is_asked_for() -> None:
    with running(SimulatorServer(SCRIPTED_USER, token="right")) as url:
        for token in (None, "wrong", "righ", "rightt"):
            async with SimulatorClient(url, token=token) as client:
                with pytest.raises(SimulatorTransportError, match="HTTP 401.*missing or wrong bearer token"):
                    await client.turn(request("Hello."))
        async with SimulatorClient(url, token="right") as client:
            assert (await client.turn(request("Hello."))).reply
        assert [(await get(url, path))[0] for path in ("/health", "/ready", "/metrics", "/v1/account")] == [
            200,
            200,
            401,
            401,
        ]
        assert [(await get(url, path, "right"))[0] for path in ("/metrics", "/v1/account")] == [200, 200]


def test_beyond_loopback_a_token_is_required(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "Localhost", "::1"):
        check_listening(host, None, "X")
    names = ("127.evil.com", "127.0.0.1.nip.io", "127.", "localhost.evil.com", "127.0.0.1 ", "")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "::ffff:10.0.0.1", *names):
        check_listening(host, "token", "X")
        with pytest.raises(RecipeError, match=f"--host {host!r}: X is blank or not set; expected a bearer token .*; set X"):
            check_listening(host, None, "X")
    for blank in (None, "", " ", "\t\n "):
        monkeypatch.delenv("CTCGRPO_SIMULATOR_TOKEN", raising=False)
        if blank is not None:
            monkeypatch.setenv("CTCGRPO_SIMULATOR_TOKEN", blank)
        code, _, err = ctcgrpo("serve", "--host", "0.0.0.0")
        assert code == 2 and "set CTCGRPO_SIMULATOR_TOKEN" in err
    monkeypatch.setenv("CTCGRPO_SIMULATOR_TOKEN", "two\nlines")
    code, _, err = ctcgrpo("serve", "--host", "0.0.0.0")
    assert code == 2 and "the token in CTCGRPO_SIMULATOR_TOKEN holds a control character" in err and "two" not in err


def test_a_token_is_read_without_the_white_space_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, token in ((" t k\n", "t k"), ("töken", "töken"), (" ", None), ("", None)):
        monkeypatch.setenv("X", value)
        assert bearer_token("X") == token
    for value in ("a\x00b", "a\nb", "t\udcffk"):  # the last one is how a byte that is no UTF-8 arrives
        with pytest.raises(RecipeError, match="the token in X ") as refused:
            bearer_token("X", {"X": value})
        assert value not in str(refused.value)


@pytest.mark.parametrize("token", ["right", "schlüssel", "钥匙", "t\udcffk"])
async def test_tokens_are_compared_as_bytes(token: str) -> None:
    right = os.fsencode(token)
    heads = [b"Bearer \xff\xfe", b"Bearer \xc3\xa4", b"Bearer", b"", b"bearer " + right, right, b"Bearer " + right + b"\xff"]
    with running(SimulatorServer(SCRIPTED_USER, token=token)) as url:
        for head, status in [*((head, 401) for head in heads), (b"Bearer " + right, 200)]:
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + head + b"\r\n\r\n")
            said = await reader.read()
            writer.close()
            assert int(said.split()[1]) == status, (head, said)
        if token.isprintable():
            async with SimulatorClient(url, token=token) as client:
                assert (await client.turn(request("Hello."))).reply


async def test_bodies_have_a_limit() -> None:
    config = SCRIPTED_USER.model_copy(update={"server": SCRIPTED_USER.server.model_copy(update={"max_body_mb": 0.02})})

    async def chunks() -> Any:
        for _ in range(40):
            yield b" " * 1000

    with running(SimulatorServer(config)) as url:
        async with SimulatorClient(url) as client:
            assert (await client.turn(request("Hello."))).reply
            with pytest.raises(SimulatorReplyError, match=r"413.*larger than 0.02 MB \(server.max_body_mb\)"):
                await client.turn(request("Hello. " * 5000))
        async with aiohttp.ClientSession() as session:
            async with session.post(url + "/v1/turn", data=chunks()) as response:  # says no length
                assert response.status == 413


async def test_metrics_and_readiness() -> None:
    with FakeLlm().serving() as llm:
        config = configuration(llm, deadline=0.5, endpoint__breaker_failures=1, endpoint__breaker_seconds=60)
        with running(SimulatorServer(config)) as url:
            async with SimulatorClient(url, patience=0) as client:
                await client.turn(request("Hello."))
                await client.turn(request("Hello."))
                assert await get(url, "/ready") == (200, '{"ready":true}')
                llm.down = True
                with pytest.raises(SimulatorTransportError):
                    await client.turn(request("Hello.", seed=8))
            assert await get(url, "/ready") == (503, '{"ready":false}')
            metrics = (await get(url, "/metrics"))[1]
    place = llm.url.split("/")[2]
    for line in (
        'turns_total{result="ok",scene="support"} 2.0',
        'turns_total{result="unavailable",scene="support"} 1.0',
        'answers_total{source="joined"} 1.0',
        f'calls_total{{endpoint="fake-0 at {place}",result="ok"}} 1.0',
        f'calls_total{{endpoint="fake-0 at {place}",result="http_5xx"}} 1.0',
        f'tokens_total{{endpoint="fake-0 at {place}",kind="prompt"}} 1000.0',
        f'money_total{{endpoint="fake-0 at {place}"}} 0.0015',
        "turns_under_way 0.0",
    ):
        assert f"ctcgrpo_simulator_{line}" in metrics, metrics


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_the_log_is_json_without_texts_by_default(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKED_KEY", "marked-key")
    out = io.StringIO()
    turn = request("A line of the user's own.", "An answer to it.", seed=1)
    with FakeLlm(key="marked-key").serving() as llm:
        config = configuration(llm, deadline=1.5, endpoint__key_env="MARKED_KEY")
        with running(SimulatorServer(config, log=json_log(out, level), token="marked-token")) as url:
            async with SimulatorClient(url, token="marked-token", patience=0) as client:
                await client.turn(turn)
                llm.down = True
                with pytest.raises(SimulatorTransportError):
                    await client.turn(turn.model_copy(update={"seed": 2}))
            async with aiohttp.ClientSession() as session:
                await session.post(
                    url + "/v1/turn", data='{"x": "marked-text"}', headers={"Authorization": "Bearer marked-token"}
                )
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    turns = [line for line in lines if line["event"] == "turn"]
    assert turns[0]["scenario"] == turn.scenario.id and turns[0]["round"] == 1 and turns[0]["ms"] > 0
    assert [line["result"] for line in turns] == ["ok", "simulator_transport", "no_request"]
    assert any(line["event"] == "failed" and "HTTP 503" in line["error"] for line in lines)
    assert "marked" not in out.getvalue()
    for text in (turn.scenario.user_persona[:40], "of the user's own", "An answer", "Line 1."):
        assert (text in out.getvalue()) == (level == "debug" and text != turn.scenario.user_persona[:40])


async def test_replicas_stand_in_for_each_other() -> None:
    first, second = SimulatorServer(SCRIPTED_USER), SimulatorServer(SCRIPTED_USER)
    with running(second) as b:
        with running(first) as a:
            async with SimulatorClient([a, b]) as client:
                assert (await client.health())["backend"] == "scripted"
                scenarios = [request("Hello.", scenario=s, seed=k) for k, s in enumerate(SCENARIOS)]
                await asyncio.gather(*(client.turn(turn) for turn in scenarios))
                counts = [counted(s) for s in (first, second)]
                assert sum(counts) == len(scenarios) and min(counts) > 10
        async with SimulatorClient([a, b], backoff=0.01) as client:  # a is gone
            assert (await client.health())["backend"] == "scripted"
            await asyncio.gather(*(client.turn(turn.model_copy(update={"seed": 999})) for turn in scenarios))
            assert counted(second) == counts[1] + len(scenarios)


def counted(server: SimulatorServer) -> int:
    return int(server.metrics.turns.labels("support", "ok")._value.get()) + sum(
        int(server.metrics.turns.labels(scene, "ok")._value.get()) for scene in ("defense", "repair", "charm")
    )


async def test_a_replica_that_has_failed_for_good_is_stood_in_for() -> None:
    with FakeLlm().serving() as up, FakeLlm().serving() as down:
        down.down = True
        with (
            running(SimulatorServer(configuration(up))) as a,
            running(SimulatorServer(configuration(down, deadline=0.5))) as b,
        ):
            turns = [request("Hello.", scenario=s, seed=k) for k, s in enumerate(SCENARIOS[::4])]
            async with SimulatorClient([a, b]) as client:
                replies = await asyncio.gather(*(client.turn(turn) for turn in turns))
            assert all(reply.reply in up.answered for reply in replies) and len(down.requests) > 0
            up.down = True
            async with SimulatorClient([a, b]) as client:
                with pytest.raises(SimulatorTransportError, match="HTTP 502.*no endpoint answered"):
                    await client.turn(request("Hello.", seed=77))


async def test_replicas_have_to_play_the_same_user() -> None:
    with FakeLlm().serving() as llm:
        with running(SimulatorServer(SCRIPTED_USER)) as a, running(SimulatorServer(configuration(llm))) as b:
            async with SimulatorClient([a, b]) as client:
                with pytest.raises(SimulatorTransportError, match="play different users"):
                    await client.health()


# --- commands --------------------------------------------------------------------------------------------------------------


def test_a_person_can_chat(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = iter(["You gave everything for that stall. What did the tea taste of this morning?", "I will stay."])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, ""))
    code, out, err = ctcgrpo("chat", "--scenario", "support-test-01")
    assert code == 0, err
    assert "the lady who brings the tea" in out.replace("\n", " ") and "George Odhiambo" in out
    assert len(re.findall(r"anger \d+ to \d+, trust \d+ to \d+: ", out)) == 2 and re.search(r"outcome [+-]\d\.\d\d", out)
    code, _, err = ctcgrpo("chat", "--scenario", "support-test-1")
    assert code == 3 and "did you mean 'support-test-01'?" in err
    code, _, err = ctcgrpo("chat", "--url", "http://127.0.0.1:1", "--config", str(tmp_path / "x.yaml"))
    assert code == 2 and "both given" in err
    with FakeLlm().serving() as llm:
        file = tmp_path / "simulator.yaml"
        file.write_text(f"backend: llm\nllm:\n  endpoints:\n    - {{url: '{llm.url}', model: m}}\n")
        said = iter(["Hello."])
        code, out, err = ctcgrpo("chat", "--config", str(file))
    assert code == 0 and "Line 1." in out and len(llm.requests) == 1
    said = iter(["Hello."])  # the endpoint has gone
    file.write_text(file.read_text() + "  deadline: 0.5\n")
    code, out, err = ctcgrpo("chat", "--config", str(file))
    assert code == 5 and f"error: simulator {file}: no endpoint answered within 0.5 s" in err and "cannot connect" in err
    assert urlsplit(llm.url).netloc in err and err.count("127.0.0.1:") == 2  # no URL of the server in this process


def test_a_person_sees_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    console = Console(file=io.StringIO(), force_terminal=True)
    real = console.status
    monkeypatch.setattr(console, "status", lambda text, **how: (shown.append(str(text)), real(text, **how))[1])
    with chosen_simulator(None, [], console) as simulator:
        scenario = load_scenarios("english/test")[0]
        asyncio.run(play_as_person(scenario, Briefing(), simulator, console, iter(["Hello.", ""]).__next__))
    assert shown == ["starting the simulator scripted", *["waiting for simulator scripted"] * 2]
