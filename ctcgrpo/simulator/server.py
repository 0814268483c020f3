"""The simulator server: HTTP around a TurnService.

    POST /v1/turn      a TurnRequest -> a TurnReply
    GET  /v1/account   what was spent
    GET  /health       who plays the user: backend, models, prompts
    GET  /ready        200 while turns can be answered
    GET  /metrics      for Prometheus

Permanent errors carry a TurnProblem. README.md has the whole contract, connections.py the limits that apply before the token is
checked.
"""

import asyncio
import hmac
import io
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ctcgrpo import __version__
from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.errors import BudgetSpent, OutputError, ScenarioError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.llm_client.endpoints import CallRecord
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator import protocol
from ctcgrpo.simulator.config import SimulatorConfig, check_listening, server_token
from ctcgrpo.simulator.connections import allow_open_files, bounded_http, within_open_files
from ctcgrpo.simulator.logs import Log, json_log
from ctcgrpo.simulator.protocol import UNAVAILABLE, ScenarioCard, SimulatorBackend, TurnProblem, TurnReply, TurnRequest
from ctcgrpo.simulator.service import TurnService, make_backend
from ctcgrpo.util.listening import listen
from ctcgrpo.util.naming import cut

_STATUS = {SimulatorReplyError.kind: 422, SimulatorTransportError.kind: 502, BudgetSpent.kind: 402}
_LOOK_SECONDS = 1.0  # how often a turn in progress checks for an outage
_SHORT_OUTAGE = 5.0  # seconds; a turn waits for the end of a shorter one, and a longer one gets 503
_DRAIN_AFTER_ERROR = 5  # seconds for turns in progress where the caller of `running` ends with an error, except Ctrl-C
_MOST_QUOTED, _LONGEST_REASON = 20, 2000
_NAMESPACE = "ctcgrpo_simulator"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)


class _Refused(HTTPException):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.kind = kind


class ServerMetrics:
    """Each server has its own registry, so that several can run in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, namespace=_NAMESPACE, registry=registry)

        def seconds(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(name, what, labels, namespace=_NAMESPACE, registry=registry, buckets=_SECONDS)

        self.turns = counter("turns", "Turns by scene and result (ok, or the kind of error)", "scene", "result")
        self.refused = counter("refused", "Requests refused before the token was checked, by status", "status")
        self.source = counter("answers", "Answers by source: backend, store, joined", "source")
        self.seconds = seconds("turn_seconds", "From a request to its answer")
        self.under_way = Gauge("turns_under_way", "Turns in progress", namespace=_NAMESPACE, registry=registry)
        self.calls = counter("calls", "Calls to endpoints by result", "endpoint", "result")
        self.call_seconds = seconds("call_seconds", "A call to an endpoint", "endpoint")
        self.tokens = counter("tokens", "Tokens booked", "endpoint", "kind")
        self.money = counter("money", "Money booked, in the budget's currency", "endpoint")

    def on_call(self, record: CallRecord) -> None:
        self.calls.labels(record.endpoint, record.result).inc()
        self.call_seconds.labels(record.endpoint).observe(record.seconds)
        self.tokens.labels(record.endpoint, "prompt").inc(record.spent.prompt_tokens)
        self.tokens.labels(record.endpoint, "completion").inc(record.spent.completion_tokens)
        self.money.labels(record.endpoint).inc(record.spent.money / 1e6)


class SimulatorServer:
    """A server for one configuration: backend (the configured one by default), store, metrics and log. Raises RecipeError for a
    backend that cannot be made, OutputError for a store that cannot be opened."""

    def __init__(
        self,
        config: SimulatorConfig,
        *,
        backend: SimulatorBackend | None = None,
        log: Log | None = None,
        token: str | None = None,
    ) -> None:
        self.config = config
        self.metrics = ServerMetrics()
        self.log = log or json_log(io.StringIO(), "warning")
        # As bytes: an environment variable and a header may contain any bytes.
        self.token, self._authorization = token, None if token is None else b"Bearer " + os.fsencode(token)
        self._store = Store(config.store) if config.store is not None else None
        self.backend = backend or make_backend(
            config, self._store, self.metrics.on_call, log_line=lambda text: self.log.warning(UNAVAILABLE, error=text)
        )
        self.service = TurnService(
            self.backend,
            self._store if config.cache and config.backend != "scripted" else None,
            on_source=lambda source: self.metrics.source.labels(source).inc(),
            on_error=lambda message: self.log.error("store", error=message),
        )

    @property
    def websockets(self) -> Mapping[str, Any]:
        """Options of uvicorn.Config."""
        return {"ws": "none"}

    @property
    def title(self) -> str:
        """What is served, in words."""
        return f"simulator {self.backend.name!r}"

    def check(self, scenarios: Iterable[Scenario]) -> None:
        """Raises ScenarioError for a scenario that the backend cannot play."""
        for scenario in scenarios:
            try:
                self.backend.check(ScenarioCard.of(scenario))
            except SimulatorReplyError as error:
                reason = f"cannot be played by the embedded simulator: {error}"
                raise ScenarioError(f"scenario {scenario.id!r} {reason}") from None

    def app(self) -> Starlette:
        routes = [
            Route(protocol.TURN_PATH, self._turn, methods=["POST"]),
            Route(protocol.ACCOUNT_PATH, self._account),
            Route(protocol.HEALTH_PATH, self._health),
            Route(protocol.READY_PATH, self._ready),
            Route(protocol.METRICS_PATH, self._metrics),
        ]
        handlers = {HTTPException: _refused, Exception: self._defect}
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the backend and the store."""
        await self.backend.close()
        try:
            self.log.info("stopped", **self.backend.spent())
        except OutputError as error:
            self.log.error("stopped", error=str(error))
        if self._store is not None:
            self._store.close()

    async def _turn(self, request: Request) -> Response:
        started = time.perf_counter()
        self._check_token(request)
        with self.metrics.under_way.track_inprogress():
            try:
                turn = TurnRequest.model_validate_json(await self._body(request))
            except ClientDisconnect:
                return Response(status_code=400)
            except ValidationError as error:
                self.metrics.turns.labels("unknown", "no_request").inc()
                self.log.warning("turn", result="no_request")
                few = error.error_count() <= _MOST_QUOTED  # a large body may contain an error every few bytes
                detail = str(error) if few else f"it has {error.error_count()} errors"
                raise _Refused(400, "simulator_reply", f"invalid request; expected a TurnRequest: {detail}") from None
            response, result = await self._answer(turn)
        seconds = time.perf_counter() - started
        self.metrics.seconds.observe(seconds)
        card = turn.scenario
        # Each label makes a permanent time series.
        self.metrics.turns.labels(card.scene if card.scene in SCENES else "other", result).inc()
        turned = {"request": turn.request_id, "scenario": card.id, "scene": card.scene, "round": turn.round}
        self.log.info("turn", **turned, result=result, ms=round(1000 * seconds, 1))
        history = [f"{u.speaker}: {u.text}" for u in turn.history]
        self.log.debug("texts", history=history, answer=bytes(response.body).decode())
        return response

    async def _answer(self, turn: TurnRequest) -> tuple[Response, str]:
        """The response, and the result of the turn for logs and metrics: ok, or the kind of error."""
        try:
            reply = await self._reply(turn)
            return Response(reply.model_dump_json(), media_type="application/json"), "ok"
        except _Refused as error:
            return _problem(error.status_code, error.kind, error.detail, error.headers), error.kind
        except (SimulatorReplyError, SimulatorTransportError, BudgetSpent) as error:
            if not isinstance(error, SimulatorReplyError):  # which may quote the dialogue
                self.log.warning("failed", kind=error.kind, error=str(error))
            return _problem(_STATUS[error.kind], error.kind, str(error)), error.kind
        except Exception as error:  # noqa: BLE001 - a bug of this program is logged, and the server keeps running
            return await self._defect(None, error), "defect"

    async def _defect(self, request: Request | None, error: Exception) -> Response:
        where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-6:]
        self.log.error("defect", error=type(error).__name__, where=where)
        self.log.debug("defect", message=str(error))
        # A retry would fail again, and may cost again.
        return _problem(500, "simulator_reply", f"internal error of the simulator: {type(error).__name__}; see its log")

    async def _reply(self, turn: TurnRequest) -> TurnReply:
        """Raises _Refused in a long LLM outage. The turn itself keeps waiting, and a retry of the request joins it."""
        task = asyncio.ensure_future(self.service.turn(turn))
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=_LOOK_SECONDS)
                if done:
                    return task.result()
                outage = self.backend.outage()
                if outage is not None and outage.seconds > _SHORT_OUTAGE:
                    raise _Refused(503, UNAVAILABLE, str(outage), {"Retry-After": str(math.ceil(outage.seconds))})
        finally:
            task.cancel()

    async def _account(self, request: Request) -> Response:
        self._check_token(request)
        try:
            return JSONResponse(dict(self.backend.spent()))
        except OutputError as error:
            self.log.error("store", error=str(error))
            raise _Refused(500, error.kind, str(error)) from None

    async def _health(self, request: Request) -> Response:
        deadline = self.config.llm.deadline if self.config.llm is not None else None
        return JSONResponse({"status": "ok", "version": __version__, "deadline": deadline, **self.backend.about()})

    async def _ready(self, request: Request) -> Response:
        ready = self.backend.is_ready()
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        self._check_token(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _check_token(self, request: Request) -> None:
        """Raises _Refused without the right token; compares in constant time."""
        given = next((value for name, value in request.scope["headers"] if name == b"authorization"), b"")
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            raise _Refused(401, "simulator_transport", "missing or wrong bearer token; expected that in server.token_env")

    async def _body(self, request: Request) -> bytes:
        most = self.config.server.max_body_mb
        announced, body = int(request.headers.get("content-length") or 0), bytearray()
        if announced <= int(most * 1_000_000):
            async for part in request.stream():
                body += part
                if len(body) > int(most * 1_000_000):
                    break
            else:
                return bytes(body)
        raise _Refused(413, "simulator_reply", f"the request is larger than {most:g} MB (server.max_body_mb)")

    def uvicorn(self) -> uvicorn.Server:
        limits = self.config.server
        allow_open_files(limits.max_connections)
        http = bounded_http(
            limits.request_seconds,
            within_open_files(limits.max_connections),
            lambda status: self.metrics.refused.labels(str(status)).inc(),
        )
        config = uvicorn.Config(
            self.app(),
            log_level="critical",  # ours is the log; its own is text
            access_log=False,
            lifespan="on",
            http=http,
            timeout_graceful_shutdown=limits.drain_seconds,
            **self.websockets,
        )
        return uvicorn.Server(config)


def _problem(status: int, kind: str, error: str, headers: Mapping[str, str] | None = None) -> Response:
    problem = TurnProblem(kind=kind, error=cut(error, _LONGEST_REASON))  # it may quote the request
    return Response(problem.model_dump_json(), status_code=status, headers=headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, _Refused):
        return _problem(error.status_code, error.kind, error.detail, error.headers)
    reason = f"{request.method} {request.url.path[:100]}: {error.detail}"  # no such route
    return _problem(error.status_code, "simulator_reply", reason, error.headers)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free port. Raises SimulatorTransportError where it cannot be opened."""
    try:
        return listen(host, port)
    except OSError as error:
        raise SimulatorTransportError(f"simulator.port = {port}: {error}") from None


def serve_forever(config: SimulatorConfig, host: str, port: int, make: Callable[..., SimulatorServer] = SimulatorServer) -> None:
    """Run a server in the foreground; `make` makes it. After a signal to stop, turns in progress may still end
    (server.drain_seconds)."""
    token = server_token(config.server.token_env)
    check_listening(host, token, config.server.token_env)
    server = make(config, log=json_log(sys.stderr, config.server.log_level), token=token)
    listener = bind(host, port)
    at = f"http://{host}:{listener.getsockname()[1]}"
    print(f"{server.title} listens on {at} (Ctrl-C stops it)", flush=True)
    server.log.info("started", at=at, token=token is not None, **server.backend.about())
    server.uvicorn().run(sockets=[listener])


@contextmanager
def running(server: SimulatorServer, port: int = 0) -> Iterator[str]:
    """Run the server in a thread of this process, on the loopback interface, within the context; gives its URL."""
    listener = bind("127.0.0.1", port)
    inner = server.uvicorn()
    thread = threading.Thread(target=inner.run, kwargs={"sockets": [listener]}, name="simulator", daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not inner.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise SimulatorTransportError("the embedded simulator server did not start within 30 s")
        time.sleep(0.01)
    drain = server.config.server.drain_seconds
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    except BaseException as error:  # nobody waits for the turns in progress; answers that arrive soon are still stored
        drain = 0 if isinstance(error, KeyboardInterrupt) else min(drain, _DRAIN_AFTER_ERROR)
        inner.config.timeout_graceful_shutdown = drain
        raise
    finally:
        inner.should_exit = True
        thread.join(drain + 5)
