"""Endpoints of an LLM: what is sent, what is read, why a call failed and whether it was paid for, and waiting for one that is
unavailable. A real server over loopback answers each request as it is told."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from ctcgrpo.errors import BudgetSpent, CtcGrpoError, RecipeError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.llm_client import calls as llm_calls
from ctcgrpo.llm_client.endpoint_state import EndpointState
from ctcgrpo.llm_client.endpoints import CallRecord
from ctcgrpo.llm_client.reasons import CallFailed, without_secrets
from ctcgrpo.rollout import vllm_server
from ctcgrpo.simulator import server as simulator_server
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import Endpoint, Llm, SimulatorConfig, load_simulator_config
from ctcgrpo.simulator.llm.backend import LlmBackend
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.util.proxies import proxy_of, settle_environment
from ctcgrpo.util.sections import environment_name
from tests.unit.test_simulator_prompts import ENGLISH, request

GOOD = {"reflection": "Well.", "anger_delta": -3, "trust_delta": 2, "reply": "Thanks.", "continue": "yes", "stop_reason": ""}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def done(content: Any = json.dumps(GOOD), finish: str = "stop", usage: Any = None, **message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50} if usage is None else usage
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": usage}


def says(body: Any, status: int = 200, content_type: str = "application/json", **headers: str) -> web.Response:
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(body=raw, status=status, headers={"Content-Type": content_type, **named})


def error(message: str, status: int, **more: Any) -> web.Response:
    headers = more.pop("headers", {})
    return says({"error": {"message": message, **more}}, status, **headers)


@dataclass
class Provider:
    """`answer` is given the number of the request, from 1, and its body."""

    answer: Callable[[int, dict[str, Any]], web.Response]
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(str(request.rel_url))
        found = self.answer(len(self.asked), self.asked[-1])
        if found.status == 444:  # closes the connection
            assert request.transport is not None
            request.transport.close()
        return found


@asynccontextmanager
async def serving(answer: Callable[[int, dict[str, Any]], web.Response] | web.Response) -> AsyncIterator[Provider]:
    def always(n: int, body: dict[str, Any]) -> web.Response:
        assert isinstance(answer, web.Response)
        return web.Response(body=answer.body, status=answer.status, headers=answer.headers)

    provider = Provider(always if isinstance(answer, web.Response) else answer)
    app = web.Application(client_max_size=10_000_000)
    app.router.add_route("*", "/{path:.*}", provider.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield provider
    finally:
        await runner.cleanup()


@dataclass
class Asked:
    """What came of some turns: a reply's text or the error of each; the calls; what was booked; what was said of outages."""

    results: list[Any]
    calls: list[str]
    spent: dict[str, Any]
    said: list[str]

    @property
    def error(self) -> CtcGrpoError:
        (found,) = self.results
        assert isinstance(found, CtcGrpoError), found
        return found


def config(*urls: str, **changes: Any) -> SimulatorConfig:
    of_endpoint = {k.removeprefix("endpoint__"): changes.pop(k) for k in list(changes) if k.startswith("endpoint__")}
    endpoints = [{"url": url, "model": "m", "timeout": 2.0, "breaker_seconds": 0.2, **of_endpoint} for url in urls]
    return SimulatorConfig.model_validate({"backend": "llm", "llm": {"endpoints": endpoints, "deadline": 2.0, **changes}})


async def turns(settings: SimulatorConfig, *scenes: str) -> Asked:
    """One turn after the other, each of a scenario of its own; in one event loop."""
    calls: list[CallRecord] = []
    said: list[str] = []
    backend = LlmBackend.configured(settings, None, calls.append, said.append)
    results: list[Any] = []
    for scene in scenes or ("support",):
        try:
            results.append((await backend.react(request("Hello.", scenario=ENGLISH[scene]))).reply)
        except CtcGrpoError as error:
            results.append(error)
    spent = dict(backend.llm.spent())
    await backend.close()
    return Asked(results, [call.result for call in calls], spent, said)


# --- one refusal is one request's ----------------------------------------------------------------------------------------------


async def test_a_flagged_input_is_a_refusal_of_that_request_alone() -> None:
    def answer(n: int, body: dict[str, Any]) -> web.Response:
        return error('Your input was flagged for "harassment".', 403) if n % 2 else says(done())

    async with serving(answer) as provider:
        asked = await turns(config(provider.url), *("defense", "support", "defense", "repair") * 2)
    assert [isinstance(r, SimulatorReplyError) for r in asked.results] == [True, False, True, False] * 2
    told = str(asked.results[0])
    assert 'HTTP 403: Your input was flagged for "harassment".' in told and "no key_env is set" in told
    assert asked.calls.count("forbidden") == 4 and asked.spent["calls"] == 4 and not asked.said


async def test_an_endpoint_that_refuses_every_dialogue_cools_down() -> None:
    async with serving(lambda n, body: error("Access denied.", 403) if n <= 3 else says(done())) as provider:
        asked = await turns(config(provider.url, endpoint__breaker_seconds=0.6), "support", "defense", "repair", "charm")
    assert [type(r) for r in asked.results] == [SimulatorReplyError] * 3 + [str]
    assert asked.calls == ["forbidden"] * 3 + ["ok"]


async def test_a_request_that_one_endpoint_refuses_is_put_to_another() -> None:
    refused = 0
    for _ in range(4):  # a scenario's endpoint depends on the ports: in one of 16 cases no scenario belongs to the small one
        async with serving(error("context too long", 400)) as small, serving(says(done())) as large:
            asked = await turns(config(small.url, large.url), "support", "defense", "repair", "charm")
            assert asked.results == ["Thanks."] * 4
            refused += len(small.asked)
    assert refused
    async with serving(error("too long", 400)) as a, serving(error("no such field", 422)) as b:
        told = str((await turns(config(a.url, b.url))).error)
    assert "refused the request: HTTP 400: too long" in told and "refused the request: HTTP 422: no such field" in told


# --- waiting while all are unavailable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_a_turn_waits_beyond_its_deadline_while_all_endpoints_are_unavailable(status: int) -> None:
    def answer(n: int, body: dict[str, Any]) -> web.Response:
        return error("slow down", status, headers={"Retry_After": "2"}) if n == 1 else says(done())

    async with serving(answer) as provider:
        started = time.monotonic()
        asked = await turns(config(provider.url, deadline=0.8, patience=5), "support", "defense")
    assert asked.results == ["Thanks."] * 2 and 2.0 <= time.monotonic() - started < 4
    (said,) = asked.said
    assert "every LLM endpoint is unavailable" in said and f"HTTP {status}: slow down" in said and "next attempt at" in said


async def test_the_reason_of_an_outage_outlives_calls_that_were_under_way() -> None:
    settings = config("http://127.0.0.1:1/v1").llm
    assert settings is not None
    state = EndpointState(settings.endpoints[0], settings)
    state.failed(CallFailed("rate_limited", "slow down", wait=0.1), dialogue="a", probe=False)
    state.succeeded(100)
    assert not state.ready and state.problem == "slow down"
    await asyncio.sleep(0.15)
    state.succeeded(100)
    assert state.ready and not state.problem


async def test_an_open_breaker_is_waited_for_and_a_patience_that_passes_names_the_reason() -> None:
    down = {"now": False}

    def answer(n: int, body: dict[str, Any]) -> web.Response:
        return error("no upstream", 502) if down["now"] else says(done())

    async with serving(answer) as provider:
        settings = config(provider.url, deadline=0.8, patience=3, endpoint__breaker_seconds=1.2, endpoint__breaker_failures=1)
        backend = LlmBackend.configured(settings, None, log_line=lambda text: None)
        assert (await backend.react(request("Hello."))).reply == "Thanks."
        down["now"] = True
        started = time.monotonic()
        with pytest.raises(SimulatorTransportError, match=r"exceeds patience = 3 s: m at .*HTTP 502: no upstream"):
            await backend.react(request("Hello.", seed=4))  # waits 1.2 s; 2.4 s more would be too much
        assert 1.1 < time.monotonic() - started < 2.5
        down["now"] = False
        assert (await backend.react(request("Hello.", seed=5))).reply == "Thanks."
        await backend.close()


async def test_what_waiting_does_not_mend_fails_at_once() -> None:
    started = time.monotonic()
    for answer, result, problem in [
        (
            error("Invalid API key", 401),
            "key_refused",
            "no endpoint is usable: .*HTTP 401: Invalid API key .no key_env is set",
        ),
        (error("model 'm' not found", 404), "not_found", "HTTP 404: model 'm' not found .check the endpoint's url"),
    ]:
        async with serving(answer) as provider:
            asked = await turns(config(provider.url, patience=60, endpoint__breaker_seconds=60))
        assert isinstance(asked.error, SimulatorTransportError) and asked.calls == [result]
        with pytest.raises(CtcGrpoError, match=problem):
            raise asked.error
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "answer",
    [
        error("Check your plan.", 429, type="insufficient_quota", code="insufficient_quota"),
        error("You exceeded your current quota, please check your plan and billing details.", 429),
        error("Insufficient Balance", 402),
        error("Access denied, the account is overdue.", 400, code="Arrearage"),
        error("Insufficient credits. Add more.", 200, code=402),
    ],
    ids=["code", "words", "402", "arrearage", "within 200"],
)
async def test_a_provider_without_quota_pauses_the_run_at_once(answer: web.Response) -> None:
    async with serving(answer) as provider:
        asked = await turns(config(provider.url, patience=60), "support", "defense")
        assert all(isinstance(r, BudgetSpent) for r in asked.results) and len(provider.asked) == 1
    assert "no provider has quota left" in str(asked.results[1]) and asked.spent["calls"] == 0


async def test_a_limit_for_a_minute_is_no_lack_of_quota() -> None:
    said = "You exceeded your current quota, please check your plan and billing details. Please retry in 1s."
    async with serving(lambda n, body: error(said, 429) if n == 1 else says(done())) as provider:
        assert (await turns(config(provider.url))).results == ["Thanks."]


async def test_a_served_turn_waits_and_whoever_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends the client away until then; the turn goes on, and is joined."""
    monkeypatch.setattr(simulator_server, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(simulator_server, "_SHORT_OUTAGE", 0.5)

    def answer(n: int, body: dict[str, Any]) -> web.Response:
        return error("slow down", 429, headers={"Retry_After": "2"}) if n == 1 else says(done())

    said: list[str] = []
    async with serving(answer) as provider:
        with running(SimulatorServer(config(provider.url, deadline=0.8, patience=5))) as url:
            async with SimulatorClient(url, timeout=1.0, patience=0.3, backoff=0.1, log_line=said.append) as hasty:
                with pytest.raises(SimulatorTransportError, match="patience of 0.3 s .*HTTP 429: slow down"):
                    await hasty.turn(request("Hello."))
            assert len(said) == 1 and "every LLM endpoint is unavailable" in said[0]
            async with SimulatorClient(url, timeout=1.0, patience=5, backoff=0.1, log_line=said.append) as patient:
                replies = await asyncio.gather(*(patient.turn(request("Hello.")) for _ in range(4)))
        assert {reply.reply for reply in replies} == {"Thanks."} and len(provider.asked) == 2
    assert len(said) == 2


# --- reasons ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (says({"detail": "json_schema is not supported"}, 400), "HTTP 400: json_schema is not supported"),
        (
            says({"detail": [{"loc": ["body", "seed"], "msg": "not permitted"}]}, 422),
            r"422: body.seed: not permitted .*seed: null",
        ),
        (says("Bad request: no such field", 400, "text/plain"), "HTTP 400: Bad request: no such field"),
        (says("<html><head><title>Too Large</title></head></html>", 413, "text/html"), "HTTP 413: an HTML page: Too Large"),
        (says({"object": "error", "message": "context length is 10"}, 400), "HTTP 400: context length is 10"),
        (says({"error": "model is odd"}, 400), "HTTP 400: model is odd"),
        (says([{"error": {"code": 400, "message": "bad field"}}], 400), "HTTP 400: bad field"),
        (error("Provider returned error", 400, metadata={"raw": "flagged by it"}), "Provider returned error: flagged by it"),
        (error("Use 'max_completion_tokens', not max_tokens.", 400), "set max_completion_tokens in place of max_tokens"),
        (error("temperature must be 1", 400), r"to leave it out: extra_body: {temperature: null}"),
        (says("", 301, Location="/elsewhere"), "HTTP 301: it redirects to /elsewhere"),
        (says({"error": {"message": "flagged", "type": "moderation_error"}}), "within HTTP 200: HTTP 403: flagged"),
        (says(done(None, refusal="I can't do that.")), "refused to answer as the user: I can't do that."),
        (says(done(None, "content_filter")), "content filter"),
        (says(done(None, reasoning_content="So...")), "the text is in reasoning_content; start the server without"),
        (says(done(None, reasoning="So...")), "the text is in reasoning; "),
        (
            says(done(None, "length", reasoning_content="So...")),
            "content is empty: reasoning_content used up the limit on tokens",
        ),
        (says(done(None, "tool_calls", tool_calls=[{"id": "1"}])), "the model called a tool"),
        (says(done("I hear you.")), "no object; the last answer: 'I hear you.'"),
    ],
)
async def test_what_a_provider_says_is_told(answer: web.Response, told: str) -> None:
    async with serving(answer) as provider:
        asked = await turns(config(provider.url, endpoint__seed=True))
    assert isinstance(asked.error, SimulatorReplyError)
    with pytest.raises(CtcGrpoError, match=told):
        raise asked.error


@pytest.mark.parametrize(
    ("answer", "result", "told", "paid"),
    [
        (says("", 444), "disconnected", "closed the connection without an answer", False),
        (says("<html><body>Maintenance</body></html>", 200, "text/html"), "malformed", "an HTML page: Maintenance", False),
        (says({"error": {"message": "upstream is down", "code": 502}}), "http_5xx", "HTTP 502: upstream is down", False),
        (says({"choices": [{"index": 0, "error": {"message": "it broke"}}]}), "http_5xx", "HTTP 502: it broke", False),
        (
            says("<html><h1>Bad gateway</h1></html>", 502, "text/html"),
            "http_5xx",
            "HTTP 502: an HTML page: Bad gateway",
            False,
        ),
        (says({"choices": []}), "malformed", r"expected a chat completion, got choices: \[\]", True),
        (says("upstream timeout"), "malformed", "not JSON: upstream timeout", True),
        (says('data: {"choices": []}\n\ndata: [DONE]', 200, "text/event-stream"), "malformed", "got a stream", True),
        (says("[" * 100_000), "malformed", "not JSON", True),
        (says(json.dumps(done()), Content_Encoding="gzip"), "disconnected", "cannot be decoded", True),
        (says(gzip.compress(b" " * 20_000_000), Content_Encoding="gzip"), "malformed", "larger than 8 MB", True),
    ],
)
async def test_what_is_no_completion_is_tried_again_and_named(answer: web.Response, result: str, told: str, paid: bool) -> None:
    async with serving(answer) as provider:
        asked = await turns(config(provider.url, deadline=2.0))
    assert isinstance(asked.error, SimulatorTransportError) and set(asked.calls) == {result}
    assert (asked.spent["calls"] > 0) == paid
    with pytest.raises(CtcGrpoError, match=told):
        raise asked.error


async def test_a_connection_that_cannot_be_had_is_named() -> None:
    async with serving(says(done())) as provider:
        url = provider.url
    asked = await turns(config(url, deadline=2.0))
    assert set(asked.calls) == {"unreachable"} and asked.spent["calls"] == 0
    assert "cannot connect: " in str(asked.error) and "timeout" not in str(asked.error)


@pytest.mark.parametrize(
    "answer",
    [
        says(done([{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": json.dumps(GOOD)}])),
        says(b"\xef\xbb\xbf" + json.dumps(done()).encode()),
        says(json.dumps(done(), ensure_ascii=False).encode("latin-1"), 200, "application/json; charset=iso-8859-1"),
        says(gzip.compress(json.dumps(done()).encode()), Content_Encoding="gzip"),
        says({**done(), "choices": [{"index": 1, "message": {"content": "x"}}, *done()["choices"]]}),
        says(done(f"<thinking>maybe {GOOD}</thinking>\n{json.dumps(GOOD)}")),
    ],
    ids=["parts", "bom", "latin1", "gzip", "several choices", "thinking tag"],
)
async def test_odd_forms_are_read(answer: web.Response) -> None:
    async with serving(answer) as provider:
        assert (await turns(config(provider.url))).results == ["Thanks."]


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5_000_000, "completion_tokens": -1},
        {"prompt_tokens": 10**30, "completion_tokens": 5},
        {"prompt_tokens": 1000, "completion_tokens": 10**9},
        {"prompt_tokens": float("inf"), "completion_tokens": float("nan")},
        {"prompt_tokens": "1000", "completion_tokens": "n/a"},
        {"prompt_tokens": True, "completion_tokens": None},
        [1],
        "none",
    ],
)
async def test_usage_that_cannot_be_is_booked_with_the_most(usage: Any) -> None:
    async with serving(says(done(usage=usage))) as provider:
        asked = await turns(config(provider.url, max_tokens=77))
    assert asked.results == ["Thanks."]
    assert 3000 < asked.spent["prompt_tokens"] < 50_000 and asked.spent["completion_tokens"] == 77


def test_secrets_are_not_shown_where_a_provider_quotes_them() -> None:
    key = "sk-proj-abcdefghijklmnop1234"
    for said in (f"Incorrect key: {key}", "Incorrect key: sk-proj-********1234.", "Bearer sk-proj-abcd... is wrong"):
        shown = without_secrets(said, [key])
        assert "sk-p" not in shown and "1234" not in shown and "[key]" in shown
    assert without_secrets("ok, take k of them", ["k"]) == "ok, take [key] of them"


async def test_a_key_in_a_models_words_goes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("SOME_KEY", key)
    said = json.dumps(GOOD | {"reply": f"My key is {key}.", "reflection": f"Bearer {key}"})
    for answer in (done(said), done(f"no object, but {key}"), done("", refusal=f"not with {key}")):
        async with serving(says(answer)) as provider:
            asked = await turns(config(provider.url, endpoint__key_env="SOME_KEY"))
        assert key not in str(asked.results) and "[key]" in str(asked.results), asked.results


# --- what is sent -----------------------------------------------------------------------------------------------------------------


async def sent(answer: web.Response | None = None, **changes: Any) -> Provider:
    async with serving(answer or says(done())) as provider:
        suffix = changes.pop("suffix", "")
        assert (await turns(config(provider.url + suffix, **changes))).results == ["Thanks."]
        return provider


async def test_what_is_not_set_is_not_sent() -> None:
    (body,) = (await sent()).asked
    assert body["temperature"] == 0.7 and body["max_tokens"] == 1024 and "seed" not in body
    assert not {"top_p", "max_completion_tokens"} & set(body)
    assert (await sent(endpoint__seed=True)).asked[0]["seed"] == 3
    (body,) = (await sent(temperature=None, top_p=0.9, endpoint__output="text")).asked
    assert body["top_p"] == 0.9 and not {"temperature", "seed", "response_format"} & set(body)
    for changes in (
        {"max_completion_tokens": 512},
        {"endpoint__extra_body": {"max_completion_tokens": 512}},
        {"endpoint__extra_body": {"max_completion_tokens": 512, "max_tokens": None}},
    ):
        (body,) = (await sent(**changes)).asked
        assert body["max_completion_tokens"] == 512 and "max_tokens" not in body
    (body,) = (await sent(endpoint__extra_body={"temperature": None, "seed": None, "thinking": {"budget": None}})).asked
    assert not {"temperature", "seed"} & set(body) and body["thinking"] == {"budget": None}
    with pytest.raises(ValidationError, match="both given"):
        Llm.model_validate({"endpoints": [{"url": "http://a/v1", "model": "m"}], "max_tokens": 5, "max_completion_tokens": 6})


async def test_urls_are_taken_as_documentation_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("", "/", "/chat/completions", "/chat/completions/"):
        assert (await sent(suffix=suffix)).paths == ["/v1/chat/completions"]
    for suffix in ("?api-version=2024-10-21", "/chat/completions?api-version=2024-10-21"):
        assert (await sent(suffix=suffix)).paths == ["/v1/chat/completions?api-version=2024-10-21"]
    monkeypatch.setenv("AZURE_KEY", "azure-secret")
    provider = await sent(endpoint__headers={"api-key": "${AZURE_KEY}", "X-Title": "a run"})
    (headers,) = provider.headers
    assert headers["api-key"] == "azure-secret" and headers["x-title"] == "a run" and "authorization" not in headers
    (headers,) = (await sent(endpoint__key_env="AZURE_KEY")).headers
    assert headers["authorization"] == "Bearer azure-secret"


async def test_redirects_keep_to_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "a-secret-key")
    async with serving(says(done())) as elsewhere:

        def answer(n: int, body: dict[str, Any]) -> web.Response:
            if n == 1:
                return says("", 307, Location="/v2/chat/completions")
            return says(done()) if n == 2 else says("", 307, Location=elsewhere.url)

        async with serving(answer) as provider:
            asked = await turns(config(provider.url, endpoint__key_env="SOME_KEY"), "support", "defense")
        assert not elsewhere.asked
    assert asked.results[0] == "Thanks." and provider.paths[1] == "/v2/chat/completions"
    assert f"HTTP 307: it redirects to {elsewhere.url}; set url to that address" in str(asked.results[1])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("headers: {api-key: abc123}", r"headers: api-key is a secret; expected \${NAME}"),
        ("headers: {x-title: '${not a name}'}", "name an environment variable here"),
        ("headers: {api-key: '${sk-abc}'}", "name an environment variable here"),
        ("headers: {api-key: '${NO_SUCH_KEY}'}", r"the environment variable NO_SUCH_KEY \(headers\) is empty or not set"),
    ],
)
def test_headers_hold_no_secrets(tmp_path: Path, fields: str, problem: str) -> None:
    file = tmp_path / "simulator.yaml"
    file.write_text(f"backend: llm\nllm:\n  endpoints:\n    - url: http://127.0.0.1:1/v1\n      model: m\n      {fields}\n")
    with pytest.raises(RecipeError, match=problem) as raised:
        SimulatorServer(load_simulator_config(file))
    assert "abc" not in str(raised.value)


def test_a_secret_in_a_query_is_refused_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "simulator.yaml"
    file.write_text("backend: llm\nllm: {endpoints: [{url: 'http://a/v1?api_key=marked', model: m}]}\n")
    with pytest.raises(RecipeError, match="the URL contains a secret") as raised:
        load_simulator_config(file)
    assert "marked" not in str(raised.value)


def test_names_of_variables_are_told_from_secrets() -> None:
    for name in ("SKYWORK_API_KEY", "SK", "SK_1", "my_key", "hf_token", "OPENAI_API_KEY", "OpenAIKey", "_X", "sky_key"):
        assert environment_name(name) == name
        assert Endpoint.model_validate({"url": "http://a/v1", "model": "m", "key_env": name}).key_env == name
    for secret in (
        "sk-abc123",
        "sk_live_51Habcdef",
        "hf_abcdEFGHijklMNOPqrstUVWXyz0123456789",
        "gsk_0123456789abcdef0123",
        "AIzaSyAabcdefghij",
        "a9f8e7d6c5b4a39281706f5e",
        "AbCdEfGhIjKlMnOpQrStUvWx",
        "A1B2C3D4E5F6A7B8C9D0E1F2",
        "two words",
        "",
    ):
        with pytest.raises(ValueError, match="never the secret itself") as raised:
            environment_name(secret)
        assert not secret or secret not in str(raised.value)


# --- proxies ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_loopback_goes_round_proxies_and_all_else_through_them(variable: str, no_proxies: pytest.MonkeyPatch) -> None:
    async with serving(says("proxied", 503)) as proxy, serving(says(done())) as provider:
        no_proxies.setenv(variable, proxy.url.removesuffix("/v1"))
        assert (await turns(config(provider.url))).results == ["Thanks."]
        with running(SimulatorServer(config(provider.url))) as url:
            async with SimulatorClient(url) as client:
                assert (await client.turn(request("Hello."))).reply == "Thanks."
        admin = await asyncio.to_thread(vllm_server._admin, provider.url, {"x": "y"})
        assert admin["choices"] and not proxy.asked
        asked = await turns(config("http://llm.invalid/v1", deadline=0.5))
        assert proxy.paths and "through the proxy 127.0.0.1:" in str(asked.error)
        async with SimulatorClient("http://simulator.invalid", patience=0) as client:
            with pytest.raises(SimulatorTransportError, match="through the proxy 127.0.0.1:"):
                await client.turn(request("Hello."))
        assert proxy.paths[-1].endswith("/v1/turn")


def test_the_environment_says_so_to_libraries(no_proxies: pytest.MonkeyPatch) -> None:
    import requests.utils

    def seen(url: str) -> str | None:
        return requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))

    settle_environment()
    assert not requests.utils.get_environ_proxies("http://127.0.0.1/")
    no_proxies.setenv("ALL_PROXY", "http://user:pass@proxy:3128")
    no_proxies.setenv("NO_PROXY", "example.org")
    no_proxies.setenv("no_proxy", "example.org")
    settle_environment("http://127.0.0.9:8000/v1")
    for url in ("http://127.0.0.1:8000/", "http://localhost:1/", "http://127.0.0.9:8000/x", "http://example.org/"):
        assert seen(url) is None and proxy_of(url) is None, url
    for url in ("http://llm.invalid/", "https://llm.invalid/v1"):
        assert seen(url) == proxy_of(url) == "http://user:pass@proxy:3128", url
    no_proxies.setenv("https_proxy", "socks5://127.0.0.1:9")
    assert proxy_of("https://llm.invalid/v1") is None


def test_the_limit_of_a_body_is_what_the_message_says() -> None:
    assert llm_calls.MOST_BYTES == 8_000_000
