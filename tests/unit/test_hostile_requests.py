"""Hostile requests, made from the server's own models: never a 500, always JSON with a reason, and the server stays ready."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import ScenarioCard, TurnProblem, TurnReply, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer

SCHEMA = TurnRequest.model_json_schema()
SCRIPTS = [ScenarioCard.of(load_scenarios(f"{pack}/test")[k]).script for pack in ("english", "chinese") for k in (0, 5)]
MANY = settings(max_examples=250, suppress_health_check=list(HealthCheck))

Post = Callable[..., tuple[int, dict[str, Any]]]

texts = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["", " ", "\0", "\u2028", "\x1b[2J", "(" * 500, "I'm " * 100, "a" * 3000, "我" * 500, "}{%{{", "../x"]),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 101, 2**63, 10**400, 1e308, 50.5]),
    st.floats(),
    texts,
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def of_schema(schema: dict[str, Any], name: str = "") -> st.SearchStrategy[Any]:
    """Values that a JSON schema of pydantic's allows."""
    if name == "script":
        return st.sampled_from([*SCRIPTS, {}]) | st.dictionaries(st.sampled_from([*SCRIPTS[0], "x"]), values, max_size=4)
    if name == "language":
        return st.sampled_from(["en", "zh", "en", "zh", "tlh", "../en"])
    if name == "scene":
        return st.sampled_from(["support", "defense", "repair", "charm", "negotiation"])
    if "$ref" in schema:
        return of_schema(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "object":
        required = {key: of_schema(part, key) for key, part in schema["properties"].items() if key in schema["required"]}
        optional = {key: of_schema(part, key) for key, part in schema["properties"].items() if key not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return st.tuples(*map(of_schema, schema["prefixItems"])).map(list)
        most = min(schema.get("maxItems", 6), 6)
        return st.lists(of_schema(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
    if schema["type"] == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum"))
    assert schema["type"] == "string", schema
    return texts.map(lambda text: text[: schema.get("maxLength", len(text))])


requests = of_schema(SCHEMA).map(
    lambda request: {**request, "history": [*request["history"], {"speaker": "policy", "text": "I am listening."}]}
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@st.composite
def nearly(draw: st.DrawFn) -> Any:
    """A request with some of its values deleted, replaced, repeated, nested or joined by others."""
    request = copy.deepcopy(draw(requests))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(request))
        assume(found)
        where, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["delete", "replace", "wrap", "add", "repeat"]))
        if change == "delete":
            del where[key]
        elif change == "replace":
            where[key] = draw(values)
        elif change == "wrap":
            for _ in range(draw(st.sampled_from([1, 60, 300]))):
                where[key] = [where[key]]
        elif isinstance(where, dict):
            where[draw(texts)] = draw(values)
        else:
            where.extend([copy.deepcopy(where[key])] * draw(st.sampled_from([1, 50])))
    return request


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """The bytes of a request, cut, with bytes changed, or no JSON at all."""
    kind = draw(st.sampled_from(["cut", "changed", "bytes", "value", "encoded"]))
    body = json.dumps(draw(requests)).encode()
    if kind == "cut":
        return body[: draw(st.integers(0, len(body) - 1))]
    if kind == "changed":
        changed = bytearray(body)
        for _ in range(draw(st.integers(1, 6))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    if kind == "value":
        return json.dumps(draw(values)).encode()
    if kind == "encoded":
        return body.decode().encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    return draw(st.binary(max_size=300))


@pytest.fixture(scope="module")
def send() -> Iterator[Post]:
    """Sends to a server in this process: gives the status and the JSON of its response."""
    app = SimulatorServer(SCRIPTED_USER).app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=transport, base_url="http://simulator")

        def send(body: bytes, method: str = "POST", path: str = "/v1/turn", **headers: Any) -> tuple[int, dict[str, Any]]:
            async def both() -> tuple[httpx.Response, httpx.Response]:
                return await client.request(method, path, content=body, **headers), await client.get("/ready")

            response, ready = runner.run(both())
            assert ready.status_code == 200 and ready.json() == {"ready": True}
            assert response.headers["content-type"] == "application/json" and len(response.content) < 100_000
            return response.status_code, response.json()

        yield send
        runner.run(client.aclose())


def holds(status: int, said: dict[str, Any], *expected: int) -> None:
    assert status in expected, (status, said)
    if status == 200:
        reply = TurnReply.model_validate(said)
        assert reply.reply or not reply.goes_on
    else:
        problem = TurnProblem.model_validate(said)
        assert problem.kind == "simulator_reply" and 5 < len(problem.error) < 3000


@MANY
@given(requests)
def test_a_valid_request_is_answered_or_cannot_be_played(send: Post, request: Any) -> None:
    holds(*send(json.dumps(request).encode()), 200, 422)


@MANY
@given(nearly())
def test_a_request_that_is_nearly_valid(send: Post, request: Any) -> None:
    holds(*send(json.dumps(request).encode("utf-8", "surrogatepass")), 200, 400, 422)


@MANY
@given(broken())
@example(b"[" * 100_000)
@example(b'{"history": [' + b"{}," * 50_000 + b"{}]}")
@example(b"{" + b",".join(b'"k%d": 1' % k for k in range(50_000)) + b"}")
@example(b'{"' + b"k" * 1_000_000 + b'": 1}')
@example(b"9" * 100_000)
@example(b'"\\ud800"')
def test_bytes_that_are_no_request(send: Post, body: bytes) -> None:
    holds(*send(body), 400, 422, 200)


@MANY
@given(
    st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"]),
    st.text(st.characters(codec="ascii", min_codepoint=33), max_size=40)
    | st.sampled_from(["v1/turn/", "/v1/turn", "v1/turn%00"]),
    st.dictionaries(
        st.sampled_from([b"authorization", b"content-type", b"content-length", b"expect", b"x"]),
        st.binary(max_size=20),
        max_size=3,
    ),
)
def test_paths_methods_and_headers(send: Post, method: str, path: str, headers: dict[bytes, bytes]) -> None:
    headers.pop(b"content-length", None)
    try:
        status, said = send(b"", method, f"/{path}", headers=list(headers.items()))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        assume(False)
    assert status < 500
    assert status == 200 or TurnProblem.model_validate(said).error


def test_the_requests_made_here_reach_every_answer(send: Post) -> None:
    """The strategies are worth something: half of the valid ones are played, most of the others are refused."""
    found: dict[str, list[int]] = {"valid": [], "nearly": []}

    @settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None)
    @given(requests, nearly())
    def collect(valid: Any, almost: Any) -> None:
        found["valid"].append(send(json.dumps(valid).encode())[0])
        found["nearly"].append(send(json.dumps(almost).encode("utf-8", "surrogatepass"))[0])

    collect()
    assert found["valid"].count(200) > 30 and 422 in found["valid"] and set(found["valid"]) == {200, 422}
    assert found["nearly"].count(400) > 30 and {200, 422} & set(found["nearly"])
