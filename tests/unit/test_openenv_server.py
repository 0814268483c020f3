"""Environments of ours over OpenEnv: its client plays the same episodes as a direct call, and nothing that a client sends disturbs
another session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytest.importorskip("openenv", reason="needs the extra openenv")

from openenv.core.generic_client import GenericEnvClient
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ctcgrpo import Environment, Step
from ctcgrpo.environments.eibench import EIBench, scenario_tasks
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.environments.openenv import OpenEnv
from ctcgrpo.environments.openenv_server import openenv_app
from ctcgrpo.errors import EnvironmentFailed
from ctcgrpo.rollout.session import Session
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.openenv import OpenEnvServer
from ctcgrpo.simulator.server import running
from ctcgrpo.util.importing import load_object
from tests.conftest import ROOT, Command
from tests.openenv_serving import eventually, serving

SCENARIOS = load_scenarios("english/train")
BRIEFING = Briefing()
REPLIES = [
    "I am so sorry. Do you want to tell me what happened?",
    "That must have been hard for you, and I hear how much it matters.",
    "Calm down. You are wrong, and I have no time for this.",
    "What would help you most right now?",
]


@contextlib.contextmanager
def eibench(token: str | None = None, max_turns: int = 4, **limits: Any) -> Iterator[str]:
    config = SCRIPTED_USER.model_copy(update={"server": SCRIPTED_USER.server.model_copy(update=limits)})
    with running(OpenEnvServer(config, SCENARIOS, briefing=BRIEFING, max_turns=max_turns, token=token)) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with eibench() as at:
        yield at


@contextlib.asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[GenericEnvClient]:
    async with GenericEnvClient(base_url=url, **options) as made:
        yield made


# --- OpenEnv's own client ----------------------------------------------------------------------------------------------------


async def test_openenvs_client_plays_a_dialogue(url: str) -> None:
    async with client(url) as env:
        seen = await env.reset(id="support-train-01", seed=5)
        scenario = next(s for s in SCENARIOS if s.id == "support-train-01")
        assert seen.observation["message"] == scenario.opening_line and not seen.done and seen.reward is None
        assert [m["role"] for m in seen.observation["messages"]] == ["system", "user"]
        assert seen.metadata == scenario.anchors.initial._asdict()
        total = 0.0
        for k, reply in enumerate(REPLIES, 1):
            seen = await env.step({"message": reply})
            total += seen.reward
            state = await env.state()
            assert state["step_count"] == k and state["task"] == "support-train-01" and state["tag"] == "support"
            assert state["episode_return"] == pytest.approx(total) and state["info"] == {
                name: value for name, value in seen.metadata.items() if name != "outcome"
            }
            if seen.done:
                break
        assert seen.done and -1 <= seen.metadata["outcome"] <= 1 and state["outcome"] == seen.metadata["outcome"]
        with pytest.raises(RuntimeError, match="no episode is in progress; call reset first"):
            await env.step({"message": "More."})
        assert (await env.reset(seed=5)).observation["messages"]  # the session continues


async def test_a_seed_picks_the_scenario(url: str) -> None:
    async with client(url) as env:
        tasks = []
        for reset in ({"seed": 3}, {"seed": 3}, {"seed": 3 + len(SCENARIOS)}, {"index": 3, "split": "train", "seed": 9}, {}):
            await env.reset(**reset)
            tasks.append((await env.state())["task"])
        assert tasks[:4] == [SCENARIOS[3].id] * 4 and tasks[4] in {s.id for s in SCENARIOS}


async def test_the_tasks_are_listed(url: str) -> None:
    async with aiohttp.ClientSession(url) as http:
        async with http.get("/eibench/splits") as response:
            assert await response.json() == [{"name": "train", "type": "train"}]
        async with http.post("/eibench/task_range", json={"split": "train", "start": 1, "stop": 3}) as response:
            listed = (await response.json())["tasks"]
        assert listed == [{"index": k, "id": SCENARIOS[k].id, "tag": SCENARIOS[k].scene} for k in (1, 2)]
        async with http.post("/eibench/num_tasks", json={"split": "train"}) as response:
            assert await response.json() == {"num_tasks": len(SCENARIOS)}
        async with http.post("/eibench/task", json={"split": "train", "index": 9999}) as response:
            assert response.status == 400


# --- the same episode as without a server -----------------------------------------------------------------------------------


async def played(make: Callable[[], Environment], task: Any, seed: int) -> list[Any]:
    """All that an episode says: messages, info, rewards, outcome; by our own runner's session."""
    session = Session(make, "same")
    try:
        told: list[Any] = [list(await session.reset(task, seed=seed)), dict(session.info)]
        for reply in REPLIES:
            answer = await session.step(reply)
            told.append((answer.messages, answer.reward, answer.done, dict(answer.info)))
            if answer.done:
                break
        return [*told, await session.outcome()]
    finally:
        await session.close_or_fail()


@pytest.mark.parametrize("scene", ["support", "defense", "repair", "charm"])
async def test_a_dialogue_is_the_same_as_without_a_server(url: str, scene: str) -> None:
    for task in [task for task in scenario_tasks("english/train") if task.tag == scene][:3]:
        direct = await played(lambda: EIBench(max_turns=4, briefing=BRIEFING), task.data, 7)
        for message in direct[0]:
            message.pop("instructions", None)  # what may hold control tokens is not a client's to know
        served = await played(lambda: OpenEnv(url, outcome="outcome"), {"id": task.id}, 7)
        assert served == direct and len(direct) > 3


def test_training_is_the_same_as_without_a_server(ctcgrpo: Command, tmp_path: Path) -> None:
    """guess.yaml for a step, on the environment itself and on a server that plays it: sampled replies, rewards and weights."""
    examples = ROOT / "recipes" / "examples"
    guess, rows = (load_object(f"guess:{name}", "example", examples) for name in ("Guess", "train_tasks"))
    step = ["training.max_steps=1", "training.save_every=1", "validation=null", "rollout.deterministic=true"]
    step += ["environment.per_step=2", "rollout.group_size=4"]
    (tmp_path / "tasks.jsonl").write_text("".join(f'{{"id": "{k}"}}\n' for k in range(12)))

    def run(name: str, *overrides: str) -> list[Any]:
        given = [*step, f"run.output_dir={tmp_path}", f"run.name={name}", *overrides]
        code, _, err = ctcgrpo("train", str(examples / "guess.yaml"), *given)
        assert code == 0, err
        lines = (tmp_path / name / "traces" / "step-000001.rank-0.jsonl").read_text().splitlines()
        kept = ("task", "rollout", "opening", "outcome", "failure")
        turns = ("reply", "message", "reward", "done", "info", "credit")
        episodes = [json.loads(line) for line in lines]
        return sorted(([e[k] for k in kept], [[t.get(k) for k in turns] for t in e["turns"]]) for e in episodes)

    direct = run("direct")
    with serving(openenv_app(guess, rows(), max_turns=4)) as url:
        served = run(
            "served",
            "environment.factory=ctcgrpo.environments.openenv:OpenEnv",
            f'environment.options={{"url": "{url}", "outcome": "outcome"}}',
            f"environment.tasks={tmp_path}/tasks.jsonl",
        )
    assert len(direct) == 8 and served == direct
    weights = [next((tmp_path / name / "final").rglob("*.safetensors")).read_bytes() for name in ("direct", "served")]
    assert weights[0] == weights[1]


# --- any environment ---------------------------------------------------------------------------------------------------------


class Odd(Environment):
    """Plain methods; a reply says what goes wrong."""

    closed: list[str] = []

    def reset(self, task: Any, *, seed: int) -> Any:
        self.text = task["text"]
        self.info = {"seed": seed}
        return [{"role": "system", "content": "Odd."}, {"role": "user", "content": self.text}, {"role": "user", "content": "Go."}]

    def step(self, reply: str) -> Step:
        if reply == "raise":
            raise KeyError("no such word")
        return Step("On.", reward=float("nan") if reply == "nan" else None if reply == "none" else 0.5)

    async def close(self) -> None:  # type: ignore[override]
        Odd.closed.append(self.text)


ROWS = [{"text": "one"}, {"id": "named", "text": "two", "tag": "x"}]


@pytest.fixture
def odd() -> Iterator[str]:
    Odd.closed = []
    with serving(openenv_app(Odd, ROWS, name="odd", max_turns=3, most_sessions=3)) as url:
        yield url


async def test_any_environment_is_served(odd: str) -> None:
    async with client(odd) as env:
        seen = await env.reset(id="0", seed=4)
        assert seen.observation["message"] == "one\n\nGo." and len(seen.observation["messages"]) == 3
        assert seen.metadata == {"seed": 4}
        rewards = [(await env.step({"message": "a"})).reward, (await env.step({"message": "none"})).reward]
        last = await env.step({"message": "a"})
        assert (rewards, last.reward, last.done, last.metadata) == ([0.5, None], 0.5, True, {"outcome": 1.0})
        assert Odd.closed == ["one"]  # at the end of the episode


@pytest.mark.parametrize(
    ("reply", "reason"), [("raise", "step raised KeyError: 'no such word'"), ("nan", "step returned a reward of nan")]
)
async def test_an_error_of_the_environment_ends_its_episode(odd: str, reply: str, reason: str) -> None:
    async with client(odd) as env:
        await env.reset(id="named")
        with pytest.raises(RuntimeError, match=reason):
            await env.step({"message": reply})
        assert Odd.closed == ["two"]
        with pytest.raises(RuntimeError, match="call reset first"):
            await env.step({"message": "a"})
        await env.reset(id="0")
        assert (await env.step({"message": "a"})).reward == 0.5


async def test_an_episode_is_closed_with_its_connection(odd: str) -> None:
    env = await GenericEnvClient(base_url=odd).connect()
    await env.reset(id="0")
    await env.reset(id="named")
    assert Odd.closed == ["one"]
    await env.close()
    socket = await connect(f"{odd.replace('http', 'ws')}/ws")
    await socket.send('{"type": "reset", "data": {"id": "0"}}')
    await socket.recv()
    socket.transport.abort()  # no goodbye
    await eventually(lambda: Odd.closed == ["one", "two", "one"])
    async with aiohttp.ClientSession(odd) as http, http.post("/reset", json={"id": "0"}) as response:
        assert response.status == 200
    await eventually(lambda: Odd.closed == ["one", "two", "one", "one"])


async def test_a_session_without_messages_is_closed() -> None:
    Odd.closed = []
    with serving(openenv_app(Odd, ROWS, idle_seconds=1.5)) as url:
        async with connect(f"{url.replace('http', 'ws')}/ws") as socket:
            await socket.send('{"type": "reset", "data": {"id": "0"}}')
            await socket.recv()
            with pytest.raises(ConnectionClosed) as raised:
                await asyncio.wait_for(socket.recv(), 20)
            assert raised.value.rcvd is not None and raised.value.rcvd.reason == "no message for 1.5 s"
        await eventually(lambda: Odd.closed == ["one"])


async def test_sessions_beyond_the_limit_are_refused(odd: str) -> None:
    async with client(odd) as a, client(odd) as b, client(odd) as c:
        for env in (a, b, c):
            await env.reset(id="0")
        fourth = GenericEnvClient(base_url=odd)
        with pytest.raises(RuntimeError, match="3/3 sessions active.*CAPACITY_REACHED"):
            await fourth.reset()
        await fourth.close()


# --- what a client may send --------------------------------------------------------------------------------------------------

HOSTILE = {
    "no JSON": ("{", "Invalid JSON"),
    "a list": ("[1]", "object has no attribute"),
    "a number": ("1e999999", "object has no attribute"),
    "a long number": ("1" * 5000, "integer string conversion"),
    "a deep list": ("[" * 100_000, "recursion"),
    "no type": ("{}", "Unknown message type"),
    "another type": ('{"type": "delete"}', "Unknown message type: delete"),
    "more fields": ('{"type": "reset", "data": {}, "more": 1}', "Invalid message"),
    "no reply": ('{"type": "step", "data": {}}', "Invalid message"),
    "a reply that is no text": ('{"type": "step", "data": {"message": {"a": 1}}}', "Invalid message"),
    "another field": ('{"type": "step", "data": {"message": "x", "reward": 5}}', "Invalid message"),
    "a step before reset": ('{"type": "step", "data": {"message": "x"}}', "call reset first"),
    "an unknown id": ('{"type": "reset", "data": {"id": "support-train-1"}}', "no such task; did you mean"),
    "a long id": (json.dumps({"type": "reset", "data": {"id": "x" * 1_000_000}}), "no such task"),
    "an id that is no text": ('{"type": "reset", "data": {"id": ["a"]}}', "no such task; expected a text"),
    "an index": ('{"type": "reset", "data": {"index": -1}}', "expected an integer from 0 to 63"),
    "an index that is none": ('{"type": "reset", "data": {"index": "0"}}', "expected an integer from 0 to 63"),
    "another split": ('{"type": "reset", "data": {"split": "test"}}', "expected 'train'"),
    "a seed": ('{"type": "reset", "data": {"seed": -1}}', "expected an integer of 0 or more"),
    "a seed that is none": ('{"type": "reset", "data": {"seed": true}}', "expected an integer of 0 or more"),
    "an episode's name": ('{"type": "reset", "data": {"episode_id": {"a": 1}}}', "expected a text of at most 255 characters"),
    "a lone surrogate": ('{"type": "reset", "data": {"episode_id": "\\ud800", "id": "x"}}', "no such task"),
    "bytes": (b'{"type": "reset"}', "text"),
    "the tools of MCP": ('{"type": "mcp", "data": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}}', "does not support MCP"),
    "a session of another": ('{"type": "state", "session_id": "x"}', "Invalid message"),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_messages_get_an_error_and_disturb_nobody(url: str, what: str) -> None:
    sent, reason = HOSTILE[what]
    async with client(url) as other, connect(f"{url.replace('http', 'ws')}/ws") as socket:
        await other.reset(id="support-train-01", seed=1)
        await socket.send(sent)
        answer = await asyncio.wait_for(socket.recv(), 10)
        assert re.search(reason, str(answer)), answer[:500]
        assert (await other.step({"message": REPLIES[0]})).reward is not None
        assert (await other.state())["step_count"] == 1


async def test_text_that_is_not_unicode_ends_its_own_session_at_worst(url: str) -> None:
    async with client(url) as other:
        await other.reset(id="support-train-01", seed=1)
        for message in ({"type": "step", "data": {"message": "\ud800"}}, {"type": "reset", "data": {"id": "\ud800"}}):
            async with connect(f"{url.replace('http', 'ws')}/ws") as socket:
                await socket.send('{"type": "reset", "data": {"id": "support-train-01"}}')
                await socket.recv()
                await socket.send(json.dumps(message))
                with contextlib.suppress(ConnectionClosed):
                    assert "error" in json.loads(await asyncio.wait_for(socket.recv(), 20))["type"]
        assert (await other.step({"message": REPLIES[0]})).reward is not None


async def test_a_reply_of_any_text_is_a_turn(url: str) -> None:
    async with client(url) as env:
        for text in ("", "\0", "\ud83d\ude00", "word " * 100_000, "<think>", "{{ 7 * 7 }}"):
            await env.reset(id="support-train-01", seed=1)
            assert (await env.step({"message": text})).reward is not None


async def test_a_message_that_is_too_large_ends_its_own_session_only() -> None:
    with eibench(max_body_mb=0.1) as url:
        async with client(url) as other:
            await other.reset(id="support-train-01", seed=1)
            async with connect(f"{url.replace('http', 'ws')}/ws") as socket:
                with pytest.raises(ConnectionClosed) as raised:
                    await socket.send(json.dumps({"type": "step", "data": {"message": "x" * 200_000}}))
                    await socket.recv()
                assert raised.value.rcvd is not None and raised.value.rcvd.code == 1009
            async with aiohttp.ClientSession(url) as http:
                for path in ("/reset", "/step", "/eibench/tasks"):
                    async with http.post(path, json={"action": {"message": "x" * 200_000}}) as response:
                        assert response.status == 413
            assert (await other.step({"message": REPLIES[0]})).reward is not None


async def test_sessions_are_isolated(url: str) -> None:
    async def dialogue(replies: list[str]) -> list[Any]:
        async with client(url) as env:
            await env.reset(id="defense-train-02", seed=1)
            told = []
            for reply in replies:
                seen = await env.step({"message": reply})
                told.append((seen.observation["message"], seen.reward, seen.metadata))
                await asyncio.sleep(0.01)
            return told

    kind, unkind = REPLIES[:2], [REPLIES[2]] * 2
    alone = [await dialogue(kind), await dialogue(unkind)]
    together = await asyncio.gather(*(dialogue(kind), dialogue(unkind)) * 8)
    assert alone[0] != alone[1] and together == alone * 8


# --- token, pages of other sites, limits of connections ----------------------------------------------------------------------


async def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with eibench(token="right") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            with pytest.raises(ConnectionError, match="HTTP 401"):
                await GenericEnvClient(base_url=url, headers=headers).connect()
        async with client(url, headers={"Authorization": "Bearer right"}) as env:
            assert (await env.reset(seed=1)).observation["messages"]
        async with aiohttp.ClientSession(url) as http:
            for path in ("/reset", "/step", "/mcp", "/eibench/tasks"):
                async with http.post(path, json={}) as response:
                    assert response.status == 401 and await response.json() == {"detail": "missing or wrong bearer token"}
            for path in ("/schema", "/metadata", "/state", "/docs", "/openapi.json", "/eibench/splits"):
                async with http.get(path) as response:
                    assert response.status == 401
            async with http.get("/health") as response:
                assert response.status == 200
        monkeypatch.setenv("CTCGRPO_TEST_TOKEN", "right")
        played = Session(lambda: OpenEnv(url, token_env="CTCGRPO_TEST_TOKEN"), "test")
        assert await played.reset({"id": "support-train-01"}, seed=1)
        await played.close_or_fail()
        without = Session(lambda: OpenEnv(url), "test")
        with pytest.raises(EnvironmentFailed, match="cannot connect: .*HTTP 401.*token_env"):
            await without.reset({}, seed=1)
        await without.close_or_fail()


async def test_a_page_of_another_site_is_refused(url: str) -> None:
    at = f"{url.replace('http', 'ws')}/ws"
    for origin in ("http://example.com", "null"):
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            await connect(at, origin=origin)
    async with connect(at, origin=url) as socket:
        await socket.send('{"type": "state"}')
        assert "step_count" in await socket.recv()


async def test_a_websocket_outlives_the_limit_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    with eibench(request_seconds=1.0) as url:
        async with client(url) as env:
            await env.reset(id="support-train-01", seed=1)
            await asyncio.sleep(1.5)
            assert (await env.step({"message": REPLIES[0]})).reward is not None
    assert not [record for record in caplog.records if record.name == "asyncio"]  # no timer went off


async def test_open_websockets_count_as_connections() -> None:
    with eibench(max_connections=2) as url:
        async with client(url) as a, client(url) as b:
            await a.reset(seed=1)
            await b.reset(seed=1)
            with pytest.raises(ConnectionError, match="HTTP 503"):
                await GenericEnvClient(base_url=url).connect()

        async def accepted() -> None:
            while True:
                with contextlib.suppress(ConnectionError):
                    async with client(url) as env:
                        assert (await env.reset(seed=1)).observation["messages"]
                        return
                await asyncio.sleep(0.1)

        await asyncio.wait_for(accepted(), 20)


def test_serve_refuses_what_cannot_work(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTCGRPO_SIMULATOR_TOKEN", raising=False)
    code, _, err = ctcgrpo("serve", "--openenv", "--host", "0.0.0.0")
    assert code == 2 and "expected a bearer token for an address other than loopback" in err
    code, _, err = ctcgrpo("serve", "--openenv", "--scenarios", "english/trian")
    assert code == 3 and "english/trian" in err
    with pytest.raises(ValueError, match="tasks is empty"):
        openenv_app(Odd, [])
