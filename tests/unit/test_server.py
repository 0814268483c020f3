"""The simulator server and its client, over loopback, with servers that misbehave as real ones do."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import SimulatorReplyError, SimulatorTransportError
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, ScenarioCard, State, TurnReply, TurnRequest, Utterance
from ctcgrpo.simulator.server import SimulatorServer, bind, running
from ctcgrpo.simulator.service import answer, turn_reply
from tests.conftest import Backend

SCENARIO = load_scenarios("english/train")[0]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def request(state: UserState = UserState(70, 40), round: int = 1, max_rounds: int = 8) -> TurnRequest:
    return TurnRequest(
        request_id="r",
        scenario=ScenarioCard.of(SCENARIO),
        history=(Utterance(speaker="policy", text="What would you like me to know first?"),),
        state=State(anger=state.anger, trust=state.trust),
        round=round,
        max_rounds=max_rounds,
        seed=1,
    )


STILL = Reaction(reply="Hm.", anger_delta=-1, trust_delta=1, goes_on=True)
GOOD = turn_reply(request(), STILL).model_dump_json()


@asynccontextmanager
async def misbehaving(*answers: Handler) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that gives the answers one after the other, the last for ever; and the number of requests it had."""
    count = [0]

    async def handle(r: web.Request) -> web.StreamResponse:
        count[0] += 1
        return await answers[min(count[0], len(answers)) - 1](r)

    app = web.Application()
    app.router.add_post("/v1/turn", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", count
    finally:
        await runner.cleanup()


def says(text: str, status: int = 200) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status, content_type="application/json")

    return handler


async def plays(r: web.Request) -> web.StreamResponse:
    """A turn that changes little."""
    return web.json_response(json.loads(turn_reply(TurnRequest(**await r.json()), STILL).model_dump_json()))


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def hangs_up(r: web.Request) -> web.StreamResponse:
    assert r.transport is not None
    r.transport.close()
    return web.Response()


async def test_a_turn_over_the_wire(simulator_url: str) -> None:
    async with SimulatorClient(simulator_url) as client:
        assert (await client.health())["backend"] == "scripted"
        reply = await client.turn(request())
        assert reply == await client.turn(request())  # nothing is kept between requests
    assert reply.state == State(anger=70 + reply.anger_delta, trust=40 + reply.trust_delta)
    assert reply.reply and reply.why


async def test_many_at_once(simulator_url: str) -> None:
    async with SimulatorClient(simulator_url) as client:
        replies = await asyncio.gather(*(client.turn(request()) for _ in range(200)))
    assert len({r.model_dump_json() for r in replies}) == 1


class Reacts(Backend):
    def __init__(self, reaction: Reaction) -> None:
        self._reaction = reaction

    async def react(self, request: TurnRequest) -> Reaction:
        return self._reaction


async def test_the_server_alone_computes_the_state() -> None:
    wild = Reacts(Reaction(reply="!", anger_delta=400, trust_delta=-33, goes_on=True))
    reply = await answer(wild, request(UserState(95, 4)))
    assert (reply.anger_delta, reply.trust_delta) == (10, -10)
    assert reply.state == State(anger=100, trust=0)


async def test_the_last_round_ends_the_dialogue() -> None:
    friendly = Reacts(Reaction(reply="ok", anger_delta=0, trust_delta=0, goes_on=True))
    assert (await answer(friendly, request(round=7))).goes_on
    assert not (await answer(friendly, request(round=8))).goes_on


async def test_the_server_refuses_what_is_no_request(simulator_url: str) -> None:
    broken = json.loads(request().model_dump_json())
    broken["state"]["anger"] = 101
    async with aiohttp.ClientSession() as session:
        for body, status in [("{", 400), (json.dumps(broken), 400), ("[]", 400)]:
            async with session.post(simulator_url + "/v1/turn", data=body) as response:
                assert response.status == status
                assert (await response.json())["error"]
    foreign = request().model_copy(update={"scenario": ScenarioCard.of(SCENARIO).model_copy(update={"language": "tlh"})})
    async with SimulatorClient(simulator_url) as client:
        with pytest.raises(SimulatorReplyError, match="422.*language = 'tlh'"):
            await client.turn(foreign)


@pytest.mark.parametrize("first", [says("busy", 429), says("oops", 500), says("", 503), hangs_up, hangs])
async def test_what_a_retry_can_mend_is_retried(first: Handler) -> None:
    async with misbehaving(first, says(GOOD)) as (url, count):
        async with SimulatorClient(url, timeout=1.5, backoff=0.01) as client:
            assert (await client.turn(request())).reply == "Hm."
        assert count[0] == 2


async def test_what_stays_broken_is_a_transport_error() -> None:
    async with misbehaving(says("oops", 500)) as (url, count):
        async with SimulatorClient(url, patience=0.1, backoff=0.01) as client:
            with pytest.raises(
                SimulatorTransportError,
                match=r"no answer within the patience of 0.1 s \(\d+ attempts\); last problem: HTTP 500: oops",
            ):
                await client.turn(request())
        assert count[0] >= 3
    async with SimulatorClient(url, patience=0.05, backoff=0.01) as client:
        with pytest.raises(SimulatorTransportError, match=r"no answer within the patience of 0.05 s .*Connect call failed"):
            await client.turn(request())


@pytest.mark.parametrize("payload", ["", "{}", "not json", GOOD.replace("-1", "-11"), GOOD[:-5]])
async def test_an_answer_that_is_no_reply_is_never_guessed(payload: str) -> None:
    async with misbehaving(says(payload)) as (url, count):
        async with SimulatorClient(url, backoff=0.01) as client:
            with pytest.raises(SimulatorReplyError, match="expected a TurnReply"):
                await client.turn(request())
        assert count[0] == 1


@pytest.mark.parametrize(
    ("before", "deltas", "after", "right"),
    [
        ((70, 40), (-1, 1), (69, 41), True),
        ((95, 4), (10, -10), (100, 0), True),
        ((3, 98), (-10, 10), (0, 100), True),
        ((70, 40), (-1, 1), (0, 100), False),
        ((70, 40), (-1, 1), (69, 40), False),
        ((70, 40), (0, 0), (69, 40), False),
        ((3, 98), (-10, 10), (3, 98), False),
    ],
)
async def test_a_state_has_to_be_the_one_before_plus_the_deltas(
    before: tuple[int, int], deltas: tuple[int, int], after: tuple[int, int], right: bool
) -> None:
    answer = TurnReply(
        reply="Hm.",
        anger_delta=deltas[0],
        trust_delta=deltas[1],
        state=State(anger=after[0], trust=after[1]),
        goes_on=True,
    )
    async with misbehaving(says(answer.model_dump_json())) as (url, count):
        async with SimulatorClient(url, backoff=0.01) as client:
            if right:
                assert await client.turn(request(UserState(*before))) == answer
                return
            expected = UserState(*before).plus(*deltas)
            reason = f"state is anger {after[0]}, trust {after[1]}; expected anger {expected.anger}, trust {expected.trust}: "
            with pytest.raises(SimulatorReplyError, match=reason):
                await client.turn(request(UserState(*before)))
        assert count[0] == 1


async def test_a_response_has_a_largest_size() -> None:
    async with misbehaving(says(GOOD.replace("Hm.", "blah " * 2_000_000))) as (url, _):
        async with SimulatorClient(url) as client:
            with pytest.raises(SimulatorReplyError, match="the response is larger than 4000000 bytes"):
                await client.turn(request())


async def test_no_server_is_said_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with SimulatorClient(url) as client:
        with pytest.raises(SimulatorTransportError, match=r"simulator.url = .* no simulator server answers"):
            await client.health()


@pytest.mark.parametrize("seconds", ["²", "9" * 5000, "-5", "soon", "1e400"])
async def test_a_retry_after_of_any_kind_is_read(seconds: str) -> None:
    async def unavailable(_: web.Request) -> web.StreamResponse:
        problem = {"kind": "unavailable", "error": "all endpoints rest"}
        return web.json_response(problem, status=503, headers={"Retry-After": seconds})

    async with misbehaving(unavailable, says(GOOD)) as (url, count):
        async with SimulatorClient(url, backoff=0.01) as client:
            assert (await client.turn(request())).reply == "Hm."
    assert count[0] == 2


@pytest.mark.parametrize(
    "answer",
    [
        "[]",
        "[" * 100_000,
        '{"status": "ok", "backend": "x", "deadline": "soon"}',
        '{"status": "ok", "backend": "x", "deadline": [1]}',
        '{"status": "ok", "backend": ' + "9" * 5000 + "}",
        '{"status": "ok", "backend": "' + "x" * 5_000_000 + '"}',
    ],
    ids=["a list", "deep", "a deadline of text", "a deadline of a list", "digits", "5 MB"],
)
async def test_what_answers_but_is_no_simulator_is_said_so(answer: str) -> None:
    app = web.Application()
    app.router.add_get("/health", says(answer))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with SimulatorClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
        with pytest.raises(SimulatorTransportError, match="no simulator server answers") as refused:
            await client.health()
        assert len(str(refused.value)) < 1000
    await runner.cleanup()


async def test_a_defect_of_the_backend_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Backend):
        async def react(self, request: TurnRequest) -> Reaction:
            raise KeyError("oops")

    with running(SimulatorServer(SCRIPTED_USER, backend=Broken())) as url:
        async with SimulatorClient(url, patience=0.05, backoff=0.01) as client:
            with pytest.raises(SimulatorReplyError, match="HTTP 500.*internal error of the simulator: KeyError"):
                await client.turn(request())


def test_history_ends_with_the_policy() -> None:
    data = json.loads(request().model_dump_json())
    data["history"].append({"speaker": "user", "text": "And?"})
    with pytest.raises(ValueError, match="expected the policy's reply last"):
        TurnRequest.model_validate(data)


def test_a_port_in_use_is_said_so() -> None:
    taken = bind("127.0.0.1", 0)
    try:
        with pytest.raises(SimulatorTransportError, match=r"simulator.port = \d+: cannot listen .* try another one"):
            with running(SimulatorServer(SCRIPTED_USER), taken.getsockname()[1]):
                pass
    finally:
        taken.close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 300, "1.2.3.4.5"])
def test_a_host_that_is_none_is_said_so(host: str) -> None:
    with pytest.raises(SimulatorTransportError, match="cannot listen on ") as refused:
        bind(host, 0)
    assert len(str(refused.value)) < 500
