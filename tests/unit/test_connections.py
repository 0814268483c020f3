"""What a connection to the simulator server may take before a token is checked: size, time, number. Raw sockets over loopback."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.connections import MAX_HEAD, allow_open_files, within_open_files
from ctcgrpo.simulator.protocol import Reaction, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer, running
from tests.conftest import Backend
from tests.unit.test_simulator_prompts import request

SECONDS = 0.4
"""server.request_seconds here."""
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/turn HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def served(backend: Any = None, token: str | None = None, **limits: Any) -> Iterator[str]:
    limits = {"request_seconds": SECONDS} | limits
    config = SCRIPTED_USER.model_copy(update={"server": SCRIPTED_USER.server.model_copy(update=limits)})
    with running(SimulatorServer(config, backend=backend, token=token)) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(token="right") as url:
        yield url


def connect(url: str, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", urlsplit(url).port))
    return connection


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            return found
        if not part:
            return found
        found += part


def answered(response: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the body of the last of the responses."""
    last = b"HTTP/1.1" + response.rpartition(b"HTTP/1.1")[2]
    head, _, body = last.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def ready(url: str) -> bool:
    with connect(url) as connection:
        connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return answered(read(connection)) == (200, {"ready": True})


def pours(url: str, start: bytes, part: Callable[[int], bytes], most: int) -> tuple[int, bytes]:
    """Send until the server closes; gives how many bytes it took (with what the sockets' buffers hold) and what it said."""
    with connect(url) as connection:
        connection.sendall(start)
        sent, said = 0, b""
        try:
            while sent < most:
                if select.select([connection], [], [], 0)[0]:
                    new = connection.recv(65536)
                    if not new:
                        return sent, said
                    said += new
                sent += connection.send(part(sent))
        except ConnectionError:
            pass
        return sent, said + read(connection)


@pytest.mark.parametrize(
    ("start", "part"),
    [
        pytest.param(GET, lambda k: b"X%09d: " % k + b"a" * 1000 + b"\r\n", id="headers"),
        pytest.param(GET, lambda k: b"X%d:\r\n" % k * 2000, id="empty headers"),
        pytest.param(GET + b"X: ", lambda k: b"a" * 1000, id="a value"),
        pytest.param(GET + b"X", lambda k: b"a" * 1000, id="a name"),
        pytest.param(GET + b"X:", lambda k: b" " * 1000, id="space"),
        pytest.param(b"GET /", lambda k: b"a" * 1000, id="a path"),
        pytest.param(GET + b"\r\n" + GET + b"X: ", lambda k: b"a" * 1000, id="the second request's head"),
        pytest.param(CHUNKED + b"1\r\nx\r\n0\r\n", lambda k: b"X%09d: " % k + b"a" * 1000 + b"\r\n", id="trailers"),
        pytest.param(CHUNKED + b"1\r\nx\r\n0\r\nX: ", lambda k: b"a" * 1000, id="a trailer"),
        pytest.param(CHUNKED + b"1;x=", lambda k: b"a" * 1000, id="a chunk's extension"),
    ],
)
def test_heads_have_a_limit(url: str, start: bytes, part: Callable[[int], bytes]) -> None:
    sent, said = pours(url, start, part, most=30_000_000)
    status, body = answered(said)
    # To a body's head there is a response already, from the check of the token, unless the limit is reached before it is sent.
    assert sent < 20_000_000 and status in ((401, 431) if start.startswith(CHUNKED) else (431,)) and body["error"]
    assert ready(url)


def test_a_body_that_nobody_reads_has_a_limit(url: str) -> None:
    sent, said = pours(url, CHUNKED, lambda k: b"10000\r\n" + b" " * 65536 + b"\r\n", most=100_000_000)
    assert sent < 60_000_000 and answered(said)[0] == 401


def test_a_head_just_below_the_limit_is_taken(url: str) -> None:
    for size, status in ((MAX_HEAD - 500, 200), (MAX_HEAD + 500, 431)):
        with connect(url) as connection:
            connection.sendall(GET + b"Connection: close\r\nX: " + b"a" * size + b"\r\n\r\n")
            assert answered(read(connection))[0] == status


@pytest.mark.parametrize(
    ("start", "part", "status"),
    [
        pytest.param(b"", b"", 408, id="nothing"),
        pytest.param(b"", b"\r\n", 408, id="empty lines"),
        pytest.param(GET, b"", 408, id="half a head"),
        pytest.param(GET + b"X: ", b"a", 408, id="a slow head"),
        pytest.param(POST + b"Authorization: Bearer right\r\nContent-Length: 1000\r\n\r\n", b" ", 408, id="a slow body"),
        pytest.param(POST + b"Authorization: Bearer right\r\nContent-Length: 1000\r\n\r\n", b"", 408, id="half a body"),
        pytest.param(
            POST + b"Authorization: Bearer right\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 408, id="slow chunks"
        ),
        pytest.param(POST + b"Content-Length: 1000\r\n\r\n", b" ", 401, id="a slow body after its response"),
        pytest.param(GET + b"\r\n", b"\r\n", 200, id="empty lines after a response"),
        pytest.param(GET + b"\r\n" + GET, b"a", 408, id="a slow second head"),
    ],
)
def test_a_request_has_to_arrive_in_time(url: str, start: bytes, part: bytes, status: int) -> None:
    with connect(url) as connection:
        started = time.monotonic()
        connection.sendall(start)
        said = b""
        while time.monotonic() < started + 10 * SECONDS:
            try:
                if select.select([connection], [], [], SECONDS / 10)[0]:
                    new = connection.recv(65536)
                    said += new
                    if not new:
                        break
                connection.sendall(part)
            except ConnectionError:
                break
        assert SECONDS * 0.9 < time.monotonic() - started < 10 * SECONDS
        found, body = answered(said)
        assert found in (status, 408 if start == GET + b"\r\n" else status) and (body.get("error") or found == 200)
    assert ready(url)


class Slow(Backend):
    async def react(self, request: TurnRequest) -> Reaction:
        await asyncio.sleep(3 * SECONDS)
        return Reaction(reply="Hm.", anger_delta=0, trust_delta=0, goes_on=True)


def test_a_turn_may_take_longer_than_its_request() -> None:
    body = request("Hello.").model_dump_json().encode()
    turn = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with served(Slow()) as url:
        with connect(url) as connection:
            connection.sendall(turn[:40])
            time.sleep(SECONDS / 2)
            connection.sendall(turn[40:] + GET)  # and half of the next one's head
            said = b""
            while b"Hm." not in said:
                part = connection.recv(65536)
                assert part, said
                said += part
            connection.sendall(b"Connection: close\r\n\r\n")
            assert answered(read(connection))[1]["status"] == "ok"


def test_the_token_is_checked_before_the_body_arrives(url: str) -> None:
    for expect in (b"", b"Expect: 100-continue\r\n"):
        with connect(url) as connection:
            started = time.monotonic()
            connection.sendall(POST + expect + b"Content-Length: 10000000\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ") and time.monotonic() - started < SECONDS


def comes_back(url: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            if ready(url):
                return
        except (ConnectionError, IndexError, ValueError):
            pass
        assert time.monotonic() < deadline, "the connections are never given up"
        time.sleep(0.05)


def test_connections_have_a_limit() -> None:
    with served(max_connections=10, request_seconds=2.0) as url, ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(10)]
        time.sleep(0.1)
        for data in (b"", GET + b"\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9000000\r\n\r\n" + b" " * 4_000_000):
            with connect(url) as connection:
                connection.sendall(data)
                status, body = answered(read(connection))
                assert status == 503 and "server.max_connections" in body["error"] and "kind" not in body
        # Connections that are open already are answered.
        held[0].sendall(GET + b"\r\n")
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200 ")
        # A client waits for its turn, and gets it once the time of the idle ones is over.
        started = time.monotonic()

        async def turn() -> None:
            async with SimulatorClient(url, backoff=0.05, patience=20) as client:
                assert (await client.turn(request("Hello."))).reply
                assert 'refused_total{status="408"}' in await metrics(client)

        async def metrics(client: SimulatorClient) -> str:
            async with client._open.get(url + "/metrics") as response:
                return await response.text()

        asyncio.run(turn())
        assert 0.5 < time.monotonic() - started < 10


def test_many_connections_at_once_leave_the_server_answering() -> None:
    with served(max_connections=20) as url:
        flood = [connect(url) for _ in range(400)]  # more than get a 503
        try:
            closed = [connection for connection in flood if b"408" not in read(connection)]
            assert len(closed) >= 380
            comes_back(url)
        finally:
            for connection in flood:
                connection.close()


def test_who_does_not_read_is_cut() -> None:
    with served(max_connections=1) as url, connect(url, receive_buffer=4096) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        time.sleep(SECONDS)
        comes_back(url)


def test_open_files_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 4096))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: raised.append(limits))
    assert (within_open_files(4096), within_open_files(100)) == (512, 100)
    for connections in (4096, 1000, 100):
        allow_open_files(connections)
    assert raised == [(4096, 4096), (2000, 4096)]


def test_a_slow_client_does_not_keep_a_server_from_stopping() -> None:
    before = threading.active_count()
    with served(request_seconds=30.0, drain_seconds=1) as url:
        connection = connect(url)
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        time.sleep(0.1)
        started = time.monotonic()
    connection.close()
    assert time.monotonic() - started < 5 and threading.active_count() == before
