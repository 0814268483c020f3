"""The client of vLLM servers, against one that misbehaves; a real one is in tests/real_vllm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.rollout import vllm_server
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.types import Completion

SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=8)
Answer = Callable[[dict[str, Any]], web.Response]


class Weights:
    def __init__(self) -> None:
        self.sent = 0

    def send(self) -> None:
        self.sent += 1


def tokens(*ids: int, reason: str = "stop", logprobs: int | None = None) -> Answer:
    said = {"token_logprobs": [-0.5] * (len(ids) if logprobs is None else logprobs)}
    return lambda body: web.json_response({"choices": [{"token_ids": ids, "logprobs": said, "finish_reason": reason}]})


def status(code: int, text: str = "no") -> Answer:
    return lambda body: web.Response(status=code, text=text)


@asynccontextmanager
async def serving(*answers: Answer, length: int = 64, developing: bool = True) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """The k-th request gets the k-th answer, the last one for ever; gives URL and what was asked."""
    asked: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return answers[min(len(asked), len(answers)) - 1](asked[-1])

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "policy", "max_model_len": length}]})

    held = {"weight_version": "default"}

    async def update(request: web.Request) -> web.Response:
        held["weight_version"] = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def reset(request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def info(request: web.Request) -> web.Response:
        return web.json_response(held)

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete), web.get("/v1/models", models)])
    if developing:
        app.add_routes(
            [
                web.post("/update_weight_version", update),
                web.post("/reset_prefix_cache", reset),
                web.get("/weight_info", info),
            ]
        )
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def engine(url: str, **options: Any) -> VllmServerEngine:
    made = VllmServerEngine(
        [url],
        **{"weights": Weights(), "stop_ids": frozenset({7}), "max_length": 64, "patience": 2.0, "backoff": 0.01} | options,
    )
    made.version = 5
    return made


async def ask(made: VllmServerEngine, prompt: list[int] | None = None, seed: int = 2**63 + 9) -> Completion:
    async with made:
        return await made.generate(prompt or [1, 2, 3], seed=seed, sampling=SAMPLING)


async def test_a_request_leaves_nothing_to_the_servers_defaults() -> None:
    async with serving(tokens(4, 5, 7)) as (url, asked):
        done = await ask(engine(url + "/v1/"), list(range(60)))
    assert done == Completion((4, 5, 7), (-0.5,) * 3, "stop")
    (body,) = asked
    assert body["max_tokens"] == 4 and body["seed"] == 9 and body["stop_token_ids"] == [7]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (
        0.6,
        0.95,
        20,
        0,
        1,
    )


@pytest.mark.parametrize("first", [status(500), status(503), status(429), lambda body: web.Response(text="<html>")])
async def test_what_a_restart_explains_is_asked_for_again(first: Answer) -> None:
    async with serving(first, tokens(4, reason="length")) as (url, asked):
        assert (await ask(engine(url))).finish_reason == "length"
    assert len(asked) == 2 and asked[0] == asked[1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (status(400, "too long"), "refused a request of 3 tokens .HTTP 400: too long"),
        (status(500), r"did not answer in 0.2 s \(\d+ tries, last: HTTP 500"),
        (tokens(4, 5, logprobs=1), "2 tokens with 1 log-probabilities"),
        (tokens(4, reason="abort"), "finished the request with 'abort'"),
        (lambda body: web.json_response({"choices": []}), "expected a completion with token ids"),
    ],
)
async def test_what_cannot_be_mended_fails_the_request(answer: Answer, problem: str) -> None:
    async with serving(answer) as (url, _):
        with pytest.raises(PolicyEngineError, match=problem):
            await ask(engine(url, patience=0.2))


async def test_servers_that_are_not_there_or_too_short_say_so() -> None:
    with pytest.raises(PolicyEngineError, match="did not answer in 0.2 s .*Connect"):
        await ask(engine("http://127.0.0.1:9", patience=0.2))
    async with serving(tokens(4), length=32) as (url, _):
        with pytest.raises(PolicyEngineError, match="max_model_len = 32; expected at least 64 .*--max-model-len"):
            await ask(engine(url))
    async with serving(tokens(4)) as (url, _):
        with pytest.raises(PolicyEngineError, match="64 tokens leaves no room"):
            await ask(engine(url), [1] * 64)


async def test_weights_wait_for_requests_and_go_once_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noted(Weights):
        def send(self) -> None:
            order.append("send")

    async with serving(tokens(4)) as (url, _):
        monkeypatch.setattr(vllm_server, "together", lambda do: (order.append("together"), do())[0])
        made = engine(url, weights=Noted(), run="run/0")
        for _ in range(2):
            await asyncio.to_thread(made.take_weights, 6)
        assert order == ["together", "send", "together"] and made.version == 6
        await asyncio.to_thread(made.confirm)
        async with made:
            task = asyncio.create_task(made.generate([1], seed=0, sampling=SAMPLING))
            await asyncio.sleep(0)
            with pytest.raises(PolicyEngineError, match="1 requests are in progress"):
                made.take_weights(7)
            await task
        # Somebody else's weights, or those of its disk after a restart.
        other = engine(url, run="run/1")
        await asyncio.to_thread(other.take_weights, 0)
        with pytest.raises(PolicyEngineError, match="weight_version = 'run/1/0'; expected 'run/0/6'.*is discarded"):
            await asyncio.to_thread(made.confirm)
        second = engine(url, process=1, processes=2, run="run/0")  # the main process names the version for all
        await asyncio.to_thread(second.take_weights, 6)
        with pytest.raises(PolicyEngineError, match="weight_version = 'run/1/0'"):
            await asyncio.to_thread(second.confirm)
    async with serving(tokens(4), developing=False) as (url, _):
        with pytest.raises(PolicyEngineError, match="404.*VLLM_SERVER_DEV_MODE=1"):
            await asyncio.to_thread(engine(url).take_weights, 6)


def test_processes_share_the_servers_out() -> None:
    urls = ["http://a", "http://b", "http://c"]

    def mine(process: int, processes: int) -> tuple[str, ...]:
        options = {"weights": Weights(), "stop_ids": frozenset[int](), "max_length": 8}
        return VllmServerEngine(urls, process=process, processes=processes, **options)._mine

    assert [mine(k, 2) for k in range(2)] == [("http://a", "http://c"), ("http://b",)]
    assert [mine(k, 5) for k in range(5)] == [(u,) for u in ("http://a", "http://b", "http://c", "http://a", "http://b")]
