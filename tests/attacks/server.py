"""The simulator server, before and after its token is checked: heads, bodies, connections, tokens."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from hypothesis import HealthCheck, given, seed, settings

from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.server import SimulatorServer, running
from tests.attacks.suite import Tries, attack
from tests.unit.test_connections import CHUNKED, GET, POST, SECONDS, answered, connect, pours, read, ready, served
from tests.unit.test_hostile_requests import broken, nearly, requests
from tests.unit.test_simulator_prompts import request

_MOST = 5_000_000
"""Bytes of a head that are sent, unless the server closes before."""
_TAKEN = 4_000_000
"""Bytes that the server may take, with what the buffers of both sockets hold."""


@contextlib.contextmanager
def _serving(token: str | None = "right", **limits: float) -> Iterator[str]:
    with served(token=token, **limits) as url:
        yield url


@attack("server", quick=True)
def oversize_heads(tries: Tries) -> None:
    """Headers, names, values, paths and trailers without an end, from a client without a token."""
    rng = tries.rng("heads")
    with _serving() as url:
        shapes = {
            "headers": (GET, lambda k: b"X%09d: " % k + b"a" * 1000 + b"\r\n"),
            "empty headers": (GET, lambda k: b"X%d:\r\n" % k * 500),
            "a value": (GET + b"X: ", lambda k: b"a" * rng.randrange(500, 5000)),
            "a name": (GET + b"X", lambda k: b"a" * rng.randrange(500, 5000)),
            "a path": (b"GET /", lambda k: b"a" * rng.randrange(500, 5000)),
            "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", lambda k: b"X%09d: " % k + b"a" * 1000 + b"\r\n"),
            "a chunk's extension": (CHUNKED + b"1;x=", lambda k: b"a" * 1000),
        }
        for name, (start, part) in shapes.items():
            with tries.one(name):
                sent, said = pours(url, start, part, most=_MOST)
                status, body = answered(said)
                assert sent < _TAKEN, f"the server took {sent} bytes"
                # To a body's head there may be a response already, from the check of the token.
                assert status in ((401, 431) if start.startswith(CHUNKED) else (431,)) and body["error"], (status, body)
        with tries.one("the server is ready afterwards"):
            assert ready(url)


@attack("server", seconds=20)
def slow_heads(tries: Tries) -> None:
    """A byte now and then of heads and bodies: each connection ends at the bound on a request's time."""
    authorized = POST + b"Authorization: Bearer right\r\nContent-Length: 1000\r\n\r\n"
    with _serving(request_seconds=SECONDS) as url:
        for name, start, part in (
            ("nothing", b"", b""),
            ("empty lines", b"", b"\r\n"),
            ("half a head", GET, b""),
            ("a header", GET + b"X: ", b"a"),
            ("a body with the token", authorized, b" "),
            ("a body without it", POST + b"Content-Length: 1000\r\n\r\n", b" "),
        ):
            with tries.one(name), connect(url) as connection:
                started = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    connection.sendall(start)
                    while time.monotonic() - started < 3 * SECONDS:
                        connection.sendall(part)
                        time.sleep(SECONDS / 8)
                said = read(connection)
                seconds = time.monotonic() - started
                assert answered(said)[0] in (401, 408), said
                assert seconds < 4 * SECONDS, f"closed after {seconds:.1f} s"
        with tries.one("the server is ready afterwards"):
            assert ready(url)


@attack("server", quick=True)
def many_connections(tries: Tries) -> None:
    """More connections than the limit: those beyond it get a 503, and the first are answered."""
    most = 20
    with _serving(max_connections=most, request_seconds=5.0) as url, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connect(url)) for _ in range(most)]
        time.sleep(0.1)
        for k in range(30):
            with tries.one(f"connection {most + k}"), connect(url) as surplus:
                with contextlib.suppress(ConnectionError):
                    surplus.sendall(GET + b"\r\n")
                assert answered(read(surplus))[0] == 503
        with tries.one("the first connection"):
            kept[0].sendall(GET + b"Connection: close\r\n\r\n")
            assert answered(read(kept[0]))[0] == 200


@attack("server", quick=True)
def tokens_of_any_bytes(tries: Tries) -> None:
    """Tokens that are not UTF-8, of control characters, or nearly right: 401, never a 500."""
    rng = tries.rng("tokens")
    with _serving() as url:
        heads = [
            b"",
            b"Bearer",
            b"right",
            b"Bearer \xff\xfe",
            "Bearer rightñ".encode(),
            b"Bearer right\x00",
            b"bearer right",
        ]
        heads += [b"Bearer " + bytes(rng.choices([b for b in range(33, 256) if b != 127], k=12)) for _ in range(40)]
        for head in heads:
            with tries.one(repr(head)), connect(url) as connection:
                connection.sendall(
                    b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + head + b"\r\n\r\n"
                )
                assert answered(read(connection))[0] in (400, 401)
        with tries.one("the right token"), connect(url) as connection:
            right = b"Authorization: Bearer right\r\n"
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + right + b"\r\n")
            assert read(connection).startswith(b"HTTP/1.1 200")


@attack("server", seconds=240)
def hostile_bodies(tries: Tries) -> None:
    """Bodies made from the schema of the server's own models, with values changed, cut or of other bytes, by hypothesis."""
    with running(SimulatorServer(SCRIPTED_USER)) as url:

        def send(body: bytes, *allowed: int) -> None:
            status, said = _post(url, body)
            assert status in allowed, (status, said[:300])
            found = json.loads(said)
            assert isinstance(found, dict) and ("reply" in found if status == 200 else "error" in found), said[:300]

        def fuzz(name: str, strategy: object, encode: object, *allowed: int) -> None:
            bound = settings(
                max_examples=max(20, tries.mutations // 3),
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )

            @seed(tries.seed)
            @bound
            @given(strategy)  # type: ignore[arg-type]
            def one(value: object) -> None:
                tries.count += 1
                send(encode(value), *allowed)  # type: ignore[operator]

            try:
                one()
            except Exception as error:  # noqa: BLE001 - hypothesis raises what the smallest example raised
                tries.failed(name, error)

        def surrogates(value: object) -> bytes:
            return json.dumps(value).encode("utf-8", "surrogatepass")

        fuzz("requests that are valid", requests, surrogates, 200, 422)
        fuzz("requests that are nearly valid", nearly(), surrogates, 200, 400, 422)
        fuzz("bytes", broken(), lambda body: body, 200, 400, 422)
        with tries.one("the server is ready afterwards"):
            assert ready(url)


@attack("server", quick=True)
def label_explosion(tries: Tries) -> None:
    """Names from outside (scenes, ids, kinds of errors, paths) make no new series of metrics."""
    rng = tries.rng("labels")

    def series(url: str) -> int:
        with urllib.request.urlopen(f"{url}/metrics") as response:
            return sum(not line.startswith(b"#") for line in response.read().splitlines())

    with running(SimulatorServer(SCRIPTED_USER)) as url:
        turn = json.loads(request("Hello.").model_dump_json())

        def send(k: int) -> None:
            name = f"{k}-{rng.random()}\n# TYPE x"
            card = turn["scenario"] | {"id": name, "language": rng.choice(["en", name])}
            card |= {"scene": name} if k % 3 == 0 else {}
            _post(url, json.dumps(turn | {"request_id": name, "scenario": card}).encode())
            _post(url, b"{}", path=f"/v1/{k}")

        for k in range(6):
            send(k)
        first = series(url)
        for k in range(6, 60):
            with tries.one(f"request {k}"):
                send(k)
        with tries.one("the number of series"):
            assert series(url) == first, f"{first} series became {series(url)}"


def _post(url: str, body: bytes, path: str = "/v1/turn") -> tuple[int, bytes]:
    sent = urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read()


os.environ.setdefault("no_proxy", "127.0.0.1")
