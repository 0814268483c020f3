"""The client of a foreign simulator server, which may make up states, send anything, and send the client elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from ctcgrpo.errors import CtcGrpoError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import TurnReply
from tests.attacks.suite import Tries, attack
from tests.unit.test_endpoints import says
from tests.unit.test_simulator_prompts import request

_TOKEN = "a-token-of-the-simulator"
GOOD = {"reply": "Hm.", "anger_delta": -2, "trust_delta": 3, "state": {"anger": 68, "trust": 43}, "goes_on": True}


@asynccontextmanager
async def _answering(answer: web.Response) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that gives this answer to everything: its address, and the headers of what it was asked."""
    seen: list[str] = []

    async def handle(asked: web.Request) -> web.Response:
        await asked.read()
        seen.append(str(asked.headers))
        return web.Response(body=answer.body, status=answer.status, headers=answer.headers)

    app = web.Application(client_max_size=10_000_000)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _foreign(answer: web.Response) -> AsyncIterator[SimulatorClient]:
    async with (
        _answering(answer) as (url, _),
        SimulatorClient(url, token=_TOKEN, timeout=3, patience=0.2, backoff=0.05) as client,
    ):
        yield client


async def _turn(answer: web.Response) -> TurnReply | CtcGrpoError:
    async with _foreign(answer) as client:
        try:
            return await client.turn(request("Hello.", state=(70, 40)))
        except CtcGrpoError as error:
            return error


@attack("client", seconds=40)
def states_that_are_made_up(tries: Tries) -> None:
    """States that do not follow from the deltas, out of range, of other types: a failed episode, never a score."""
    rng = tries.rng("states")
    states: list[Any] = [{"anger": a, "trust": t} for a, t in ((0, 100), (68, 42), (70, 40), (-1, 43), (68, 101), (68.5, 43))]
    states += [{"anger": "68x", "trust": 43}, {"anger": None, "trust": 43}, {}, [], "calm", {"anger": 10**400, "trust": 43}]
    states += [{"anger": rng.randrange(69, 101), "trust": rng.randrange(43)} for _ in range(20)]
    for state in states:
        with tries.one(f"state {str(state)[:60]}"):
            found = asyncio.run(_turn(says(json.dumps(GOOD | {"state": state}))))
            assert isinstance(found, SimulatorReplyError), found
    for deltas in ((-30, 3), (-2, 11), (0, 0), (2, -3)):
        with tries.one(f"deltas {deltas}"):
            found = asyncio.run(_turn(says(GOOD | {"anger_delta": deltas[0], "trust_delta": deltas[1]})))
            assert isinstance(found, SimulatorReplyError), found
    with tries.one("a state that does follow"):
        assert isinstance(asyncio.run(_turn(says(GOOD))), TurnReply)


@attack("client", seconds=60)
def responses_of_any_kind(tries: Tries) -> None:
    """Bodies without an end, deep JSON, odd headers, in turns and in health: an error of the simulator, never a traceback."""
    deep = "[" * 100_000
    answers = {
        "deep JSON": says(deep),
        "deep JSON in an object": says('{"status": ' + deep + "]" * 100_000 + "}"),
        "digits": says('{"status": "ok", "backend": ' + "9" * 50_000 + "}"),
        "5 MB": says(b'{"status": "ok", "backend": "' + b"x" * 5_000_000 + b'"}'),
        "bytes": says(bytes(range(256))),
        "an unknown charset": says({}, content_type="application/json; charset=no-such"),
        "a deadline that is text": says({"status": "ok", "backend": "x", "deadline": "soon"}),
        "a deadline that is a list": says({"status": "ok", "backend": "x", "deadline": [1]}),
        "no JSON type": says("{}", content_type="text/html"),
        "a list": says([]),
        "null": says("null"),
        "a retry-after of another script": says({"kind": "unavailable", "error": "x"}, 503, Retry_After="²"),
        "a retry-after of 5,000 digits": says({"kind": "unavailable", "error": "x"}, 503, Retry_After="9" * 5000),
        "a negative retry-after": says({"kind": "unavailable", "error": "x"}, 503, Retry_After="-5"),
        "an unknown kind": says({"kind": "x" * 100_000, "error": "y" * 100_000}, 422),
        "a redirect to itself": says("", 307, Location="/v1/turn"),
        "a redirect to a file": says("", 302, Location="file:///etc/hostname"),
        "status 999": says("", 999),
    }

    async def health(answer: web.Response) -> Any:
        async with _foreign(answer) as client:
            try:
                return await client.health()
            except CtcGrpoError as error:
                return error

    for name, answer in answers.items():
        with tries.one(f"a turn: {name}"):
            found = asyncio.run(_turn(answer))
            assert isinstance(found, SimulatorReplyError | SimulatorTransportError), found
            assert len(str(found)) < 4500, f"a message of {len(str(found))} characters"
        with tries.one(f"health: {name}"):
            said = asyncio.run(health(answer))
            assert isinstance(said, SimulatorTransportError) and len(str(said)) < 4500, str(said)[:200]


@attack("client", seconds=20)
def redirects_with_the_token(tries: Tries) -> None:
    """Redirects to another origin from turns, health and the account: the simulator's token goes nowhere else."""

    async def redirected(status: int, what: str) -> str:
        async with (
            _answering(says({"status": "ok", "backend": "x"})) as (url, seen),
            _foreign(says("", status, Location=url)) as client,
        ):
            try:
                if what == "turn":
                    await client.turn(request("Hello.", state=(70, 40)))
                else:
                    await getattr(client, what)()
            except CtcGrpoError:
                pass
            return str(seen)

    for status in (301, 302, 303, 307, 308):
        for what in ("turn", "health", "account"):
            with tries.one(f"{status}, {what}"):
                assert _TOKEN not in asyncio.run(redirected(status, what)), "the token went elsewhere"
