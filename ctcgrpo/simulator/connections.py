"""Limits on a server's connections, which apply before a token is checked.

uvicorn does not limit the size of a request's head or the time that it takes to arrive. Its `limit_concurrency` refuses requests
on connections that are already open. `BoundedHttp` is uvicorn's protocol with these limits:

    the head of a request, or the trailers of its body, larger than MAX_HEAD     431, the connection closes
    a request that is not complete after `request_seconds`                       408, the connection closes
    a response that is not read within `request_seconds`                         the connection closes
    a connection beyond `max_connections`                                        503, the connection closes

The application limits the size of a body while it reads it. A connection that becomes a WebSocket keeps its place among
`max_connections`; uvicorn's protocol for WebSockets limits its messages.
"""

import asyncio
import contextlib
import json
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 32_768  # bytes of the request line and the headers together
_SURPLUS = 256
"""Connections beyond the limit that may send their request before they get a 503; further ones get it and are closed at once."""
_SURPLUS_SECONDS = 1.0
_LINGER_SECONDS = 1.0  # how long a refused client's data is read and dropped, so that it receives the refusal
_MOST_DROPPED = 32_000_000  # bytes of it at most, and of a body whose response has been sent already
_REASONS = {
    400: "this is not an HTTP request",
    408: "the request did not arrive in time (server.request_seconds); send it again",
    431: f"the request's head is larger than {MAX_HEAD} bytes",
    503: "too many connections (server.max_connections); try again later",
}


class BoundedHttp(HttpToolsProtocol):
    """One connection; `bounded_http` makes the class with its limits."""

    request_seconds: float
    max_connections: int
    on_refusal: Callable[[int], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: asyncio.TimerHandle | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._in_head, self._complete = True, False  # of the request that arrives
        self._fields = self._unparsed = 0  # bytes of its headers; bytes since its head or body last advanced
        self._dropped = 0  # bytes that came after the response
        self._advanced = self._surplus = self._refused = self._upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        surplus = len(self.connections) - self.max_connections
        if surplus > _SURPLUS:
            self._refused = True
            self.on_refusal(503)
            transport.write(_response(503))
            self._close()
        else:
            self._surplus = surplus > 0
            seconds = _SURPLUS_SECONDS if self._surplus else self.request_seconds
            self._arriving = self.loop.call_later(seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
        self._cancel_timers()
        super().handle_websocket_upgrade()

    def _cancel_timers(self) -> None:
        for timer in (self._arriving, self._leaving):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused or (self.cycle is not None and self.cycle.response_complete and not self._complete):
            self._dropped += len(data)
            if self._dropped > _MOST_DROPPED:
                self.transport.abort()
                return
        if self._refused:
            return
        if self._surplus:
            self._refuse(503)
            return
        self._advanced = False
        super().data_received(data)
        if self._upgraded:  # another protocol reads what follows
            return
        self._unparsed = 0 if self._advanced else self._unparsed + len(data)
        if self._unparsed > MAX_HEAD:
            self._refuse(431)
        elif self._complete and not self.cycle.response_complete:  # the server's turn
            if self._arriving is not None:
                self._arriving.cancel()
                self._arriving = None
        elif self._arriving is None and not self._refused:
            self._arriving = self.loop.call_later(self.request_seconds, self._late)

    def on_message_begin(self) -> None:
        self._in_head, self._complete, self._fields = True, False, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._in_head:  # else it is a trailer, which nothing here reads
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._fields += size
        if self._fields > MAX_HEAD:
            # httptools ends its parsing with an HttpParserError, and uvicorn calls send_400_response.
            raise ValueError("the head is too large")

    def on_headers_complete(self) -> None:
        self._in_head, self._advanced = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._complete = self._advanced = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(431 if self._fields > MAX_HEAD else 400)

    def _late(self) -> None:
        self._arriving = None
        if self._surplus:
            self._refuse(503)
        elif self._earlier_is_open():
            self._arriving = self.loop.call_later(self.request_seconds, self._late)
        else:
            self._refuse(408)

    def _earlier_is_open(self) -> bool:
        """Whether an earlier request on this connection still waits for its response."""
        return bool(self.pipeline) or (self._in_head and self.cycle is not None and not self.cycle.response_complete)

    def _refuse(self, status: int) -> None:
        """Close the connection, with a response where the client can match it to its request."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.on_refusal(status)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self._earlier_is_open() or (not self._in_head and self.cycle.response_started):
            self._close()
            return
        # Closing at once would reset the connection under a client that still sends, and the response would be lost.
        self.transport.write(_response(status))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._leaving = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait_for_reader()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._leaving is not None and not self.transport.is_closing():
            self._leaving.cancel()
            self._leaving = None

    def _close(self) -> None:
        self.transport.close()
        self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        if self._leaving is None:
            self._leaving = self.loop.call_later(self.request_seconds, self.transport.abort)


def bounded_http(request_seconds: float, max_connections: int, on_refusal: Callable[[int], None]) -> type[BoundedHttp]:
    """The protocol for `uvicorn.Config(http=...)`. `on_refusal` gets the status of each refusal."""
    limits = {"request_seconds": request_seconds, "max_connections": max_connections, "on_refusal": staticmethod(on_refusal)}
    return type("BoundedHttp", (BoundedHttp,), limits)


def allow_open_files(connections: int) -> None:
    """Raise this process's limit of open files, as far as allowed, so that `within_open_files` permits `connections`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections if hard == resource.RLIM_INFINITY else min(2 * connections, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS allows fewer than it says; `within_open_files` sees what was got.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def within_open_files(connections: int) -> int:
    """`connections`, or half of the files that this process may open where that is less. The other half is for the LLM endpoints,
    the store and, in a training run, the other end of each connection."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else min(connections, max(1, soft // 2))


def _response(status: int) -> bytes:
    problem = {"error": _REASONS[status]}
    if status not in (408, 503):  # where sending it again may help
        problem["kind"] = "simulator_reply"
    body = json.dumps(problem).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
