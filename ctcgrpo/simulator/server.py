"""The simulator server: HTTP around a backend. It alone computes the user's new state."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ctcgrpo import __version__
from ctcgrpo.errors import SimulatorReplyError, SimulatorTransportError
from ctcgrpo.records import MAX_DELTA, UserState
from ctcgrpo.simulator.protocol import HEALTH_PATH, TURN_PATH, SimulatorBackend, State, TurnReply, TurnRequest

log = logging.getLogger(__name__)


async def answer(backend: SimulatorBackend, request: TurnRequest) -> TurnReply:
    """One turn: the backend reacts, its deltas are clipped to [-10, 10], the state is clamped to [0, 100]."""
    reaction = await backend.react(request)
    anger_delta, trust_delta = (max(-MAX_DELTA, min(MAX_DELTA, d)) for d in (reaction.anger_delta, reaction.trust_delta))
    after = UserState(request.state.anger, request.state.trust).plus(anger_delta, trust_delta)
    return TurnReply(
        reply=reaction.reply,
        anger_delta=anger_delta,
        trust_delta=trust_delta,
        state=State(anger=after.anger, trust=after.trust),
        goes_on=reaction.goes_on and request.round < request.max_rounds,
        why=reaction.why,
        reflection=reaction.reflection,
        usage=reaction.usage,
    )


def create_app(backend: SimulatorBackend) -> Starlette:
    """POST /v1/turn takes a TurnRequest and answers a TurnReply; GET /health says which backend plays.

    400: the request is not a TurnRequest; 422: the backend cannot play it (both final); 5xx and no answer: try again.
    """

    async def turn(request: Request) -> Response:
        try:
            parsed = TurnRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        try:
            reply = await answer(backend, parsed)
        except SimulatorReplyError as error:
            log.warning("request %s: %s", parsed.request_id, error)
            return JSONResponse({"error": str(error)}, status_code=422)
        except Exception as error:
            log.exception("request %s: the backend failed", parsed.request_id)
            return JSONResponse({"error": f"the backend failed: {type(error).__name__}: {error}"}, status_code=500)
        return Response(reply.model_dump_json(), media_type="application/json")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "backend": backend.name, "version": __version__})

    return Starlette(routes=[Route(TURN_PATH, turn, methods=["POST"]), Route(HEALTH_PATH, health)])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises SimulatorTransportError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise SimulatorTransportError(
            f"simulator.port is {port}: cannot listen on {host}:{port} ({error.strerror}); "
            "choose another port, or 0 for any free one"
        ) from None
    return listener


def _uvicorn(backend: SimulatorBackend) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(create_app(backend), log_level="warning", access_log=False, lifespan="off"))


def serve_forever(backend: SimulatorBackend, host: str, port: int) -> None:
    """Run a server in the foreground until it is told to stop."""
    listener = bind(host, port)
    print(f"simulator {backend.name!r} on http://{host}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    _uvicorn(backend).run(sockets=[listener])


@contextmanager
def embedded(backend: SimulatorBackend, port: int = 0) -> Iterator[str]:
    """A server in a thread of this process, on the loopback interface, for as long as the context lasts; gives its URL."""
    listener = bind("127.0.0.1", port)
    server = _uvicorn(backend)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="simulator", daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise SimulatorTransportError("the embedded simulator server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
