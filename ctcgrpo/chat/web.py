"""A conversation with one or more policies as a small web page.

    GET  /        the page
    POST /start   a new conversation: {"id": ..., "policies": [...], "turns": [...]}
    POST /say     {"id": ..., "line": ...}: the conversation after the replies; 404 for an id that is not known (any more)

Each browser tab has a conversation of its own, kept in this process. One reply is sampled at a time, in the engine's thread.
"""

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jinja2
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ctcgrpo import __version__
from ctcgrpo.chat.conversation import Conversation, awaits_opening, shown
from ctcgrpo.chat.opening import Talk, in_words
from ctcgrpo.chat.speaker import converse
from ctcgrpo.errors import EPISODE_ERRORS
from ctcgrpo.report.page_server import page_response, serve_page

_MOST_CONVERSATIONS = 200
_MOST_BYTES = 100_000  # of a request


class ChatPage:
    """`reasoning`: whether the page shows it."""

    def __init__(self, talk: Talk, *, seed: int, reasoning: bool = False) -> None:
        self._talk = talk
        self._seed = seed
        self._reasoning = reasoning
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._turn = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/", self._page),
            Route("/start", self._start, methods=["POST"]),
            Route("/say", self._log_line, methods=["POST"]),
        ]

    async def _page(self, request: Request) -> Response:
        return page_response(self._render)

    def _render(self, nonce: str) -> str:
        scenario = self._talk.scenario
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("ctcgrpo.chat", ""), autoescape=True, undefined=jinja2.StrictUndefined
        )
        return environment.get_template("page.html.j2").render(
            nonce=nonce,
            version=__version__,
            policies=self._talk.start.policies,
            role=self._talk.start.role[0]["content"] if self._talk.start.role else "",
            scenario=scenario,
            sampling=in_words(self._talk.sampling),
            reasoning=self._reasoning,
        )

    async def _start(self, request: Request) -> Response:
        name, conversation = secrets.token_urlsafe(12), self._talk.start
        if awaits_opening(conversation):
            return await self._converse(name, conversation, "")
        return self._kept(name, conversation)

    async def _log_line(self, request: Request) -> Response:
        try:
            asked = json.loads(await _body(request))
            name, line = asked["id"], asked["line"]
            if not isinstance(name, str) or not isinstance(line, str) or not line.strip():
                raise ValueError("no text")
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": 'expected {"id": ..., "line": ...} with a text'}, 400)
        except ClientDisconnect:
            return Response(status_code=400)
        if name not in self._conversations:
            return JSONResponse({"error": "this conversation is not known any more; start again"}, 404)
        return await self._converse(name, self._conversations[name], line)

    async def _converse(self, name: str, conversation: Conversation, line: str) -> Response:
        async with self._turn:
            try:
                conversation = self._conversations.get(name, conversation)
                return self._kept(name, await converse(conversation, line, self._talk.speakers, self._seed))
            except EPISODE_ERRORS as error:
                return JSONResponse({"error": str(error)}, 422)

    def _kept(self, name: str, conversation: Conversation) -> Response:
        self._conversations[name] = conversation
        self._conversations.move_to_end(name)
        while len(self._conversations) > _MOST_CONVERSATIONS:
            self._conversations.popitem(last=False)
        return JSONResponse({"id": name, **self._visible(conversation)})

    def _visible(self, conversation: Conversation) -> dict[str, Any]:
        found = shown(conversation)
        if not self._reasoning:
            for turn in found["turns"]:
                for reply in turn["replies"]:
                    reply["reasoning"] = None
        return found


async def _body(request: Request) -> bytes:
    """Raises ValueError for a body that is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise ValueError("too large")
    return bytes(body)


def serve_chat(talk: Talk, host: str, port: int, log_line: Callable[[str], None], *, seed: int, reasoning: bool = False) -> None:
    """Serve the page until Ctrl-C. Raises RecipeError for a host or port that cannot be used."""
    page = ChatPage(talk, seed=seed, reasoning=reasoning)
    announced = f"talk with {' and '.join(talk.start.policies)}"
    serve_page(page.routes(), host, port, announce=lambda url: log_line(f"{announced}: {url}\nCtrl-C stops it"))
