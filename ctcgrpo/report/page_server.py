"""Serves a small page to a person: on loopback, or beyond it with a token.

The token is in CTCGRPO_PAGE_TOKEN. A browser asks for it as a password (HTTP Basic, any user name); other clients may send it as a
bearer token. Without a token only requests for a loopback host are answered, and only requests of the page itself may change
anything: another site that a browser has open can neither read nor send.
"""

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ctcgrpo.errors import RecipeError
from ctcgrpo.simulator.config import check_listening, server_token
from ctcgrpo.simulator.connections import bounded_http
from ctcgrpo.util.listening import listen, url_of
from ctcgrpo.util.proxies import is_loopback

TOKEN_ENV = "CTCGRPO_PAGE_TOKEN"
_REQUEST_SECONDS, _MOST_CONNECTIONS = 30.0, 200
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_response(render: Callable[[str], str]) -> Response:
    """A page under a strict content policy. `render` gets the nonce that its script and style carry."""
    nonce = secrets.token_urlsafe(16)
    return HTMLResponse(render(nonce), headers={"Content-Security-Policy": _POLICY.format(nonce=nonce), **_HEADERS})


class Guard:
    """Answers requests that carry the token; without a token those for a loopback host. Requests that change something must come
    from the page itself."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else os.fsencode(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._token is not None and not hmac.compare_digest(_password(headers.get("authorization", "")), self._token):
            challenge = {"WWW-Authenticate": 'Basic realm="ctcgrpo", charset="UTF-8"'}
            return PlainTextResponse(f"expected the token in {TOKEN_ENV} as password", 401, {**challenge, **_HEADERS})
        if self._token is None and not is_loopback(_name(host)):
            return PlainTextResponse(f"Host: expected localhost; set {TOKEN_ENV} to use another name", 403, _HEADERS)
        if scope["method"] not in ("GET", "HEAD") and urlsplit(headers.get("origin", "")).netloc != host:
            return PlainTextResponse("Origin: expected this page", 403, _HEADERS)
        return None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _password(authorization: str) -> bytes:
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    try:
        decoded = base64.b64decode(value, validate=True) if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return b""
    return decoded.partition(b":")[2]


def serve_page(routes: Sequence[BaseRoute], host: str, port: int, *, announce: Callable[[str], None]) -> None:
    """Serve in the foreground until Ctrl-C or SIGTERM; `announce` gets the URL. Raises RecipeError for a host beyond loopback
    without a token, and for a port that is taken."""
    token = server_token(TOKEN_ENV)
    check_listening(host, token, TOKEN_ENV)
    try:
        listener = listen(host, port)
    except OSError as error:
        raise RecipeError(f"--port {port}: {error}") from None
    announce(url_of(host, listener) + (f" (password: the token in {TOKEN_ENV})" if token else ""))
    config = uvicorn.Config(
        Guard(Starlette(routes=routes), token),
        log_level="error",
        access_log=False,
        lifespan="off",
        http=bounded_http(_REQUEST_SECONDS, _MOST_CONNECTIONS, lambda status: None),
        ws="none",
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again once it has stopped
        return
