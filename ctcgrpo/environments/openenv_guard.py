"""Limits of an OpenEnv server that OpenEnv's application does not have: a token, pages of other sites, size, idle sessions."""

from __future__ import annotations

import asyncio
import hmac
import os
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN = "/health"
_TOO_BIG, _GOING_AWAY = 1009, 1001  # close codes of WebSocket
_DENIAL = "websocket.http.response"


class Guard:
    """ASGI middleware. Without the `token` (if any) only /health is answered. A request whose Origin is another site is refused: a
    browser opens WebSockets to any host. A body or message beyond `most_bytes` is refused, and ends the session; so does a pause
    of `idle_seconds` between messages."""

    def __init__(self, app: ASGIApp, *, token: str | None, most_bytes: int, idle_seconds: float) -> None:
        self._app = app
        self._authorization = None if token is None else b"Bearer " + os.fsencode(token)
        self._most, self._idle = most_bytes, idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = self._bounded(receive)
        elif scope["type"] == "websocket":
            receive = self._watched(receive, send)
        else:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket" and _DENIAL not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refusal
            await JSONResponse({"detail": reason}, status_code=status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc.encode("latin-1") != headers.get(b"host"):
            return 403, "a page of another site may not use this server"
        asked = self._authorization is not None and scope["path"] != _OPEN
        if asked and not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization or b""):
            return 401, "missing or wrong bearer token"
        return None

    def _bounded(self, receive: Receive) -> Receive:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise HTTPException(413, f"the request is larger than {self._most:,} bytes")
            return message

        return bounded

    def _watched(self, receive: Receive, send: Send) -> Receive:
        async def over(code: int, reason: str) -> Message:
            await send({"type": "websocket.close", "code": code, "reason": reason})
            return {"type": "websocket.disconnect", "code": code}

        async def watched() -> Message:
            try:
                message = await asyncio.wait_for(receive(), self._idle)
            except TimeoutError:
                return await over(_GOING_AWAY, f"no message for {self._idle:g} s")
            if len(message.get("text") or message.get("bytes") or "") > self._most:
                return await over(_TOO_BIG, f"the message is larger than {self._most:,} bytes")
            return message

        return watched
