"""A hosted LLM as tests see it: an OpenAI-compatible endpoint over loopback that plays the user, and misbehaves as real ones do."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.loopback import serving


def answered(body: dict[str, Any], content: Any) -> dict[str, Any]:
    """The body of a completion with this content."""
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


@dataclass
class FakeLlm:
    """`rates` maps faults to probabilities. `answered` holds, by the line that the user says in it, the changes of every answer
    that can be read; `requests` the bodies of all calls."""

    rates: Mapping[str, float] = field(default_factory=dict)
    delay: float = 0.0
    seed: int = 0
    key: str | None = None
    longest_hang: float = 30.0
    retry_after: str = "0.2"
    answered: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    down: bool = False
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._count = self._now = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._answer(request, body)
        finally:
            self._now -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.down:
            return web.json_response({"error": {"message": "down for maintenance"}}, status=503)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {request.headers.get('Authorization', '')}"
            return web.json_response({"error": {"message": said}}, status=401)
        fault = self._fault()
        if fault:
            self.faults[fault] += 1
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": self.retry_after})
        if fault == "500":
            return web.json_response({"error": {"message": "oops"}}, status=500)
        if fault == "hang":
            await asyncio.sleep(self.longest_hang)
        if fault == "drip":  # white space now and then keeps a connection alive
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            for _ in range(round(self.longest_hang / 0.1)):
                await response.write(b" ")
                await asyncio.sleep(0.1)
            await response.write(json.dumps(self.completion(body)).encode())
            return response
        if fault == "refused":
            return web.json_response({"error": {"message": "context too long"}}, status=400)
        if fault == "no_json_body":
            return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
        return web.json_response(self.completion(body, fault))

    def _fault(self) -> str:
        point = self._rng.random()
        for name, rate in self.rates.items():
            point -= rate
            if point < 0:
                return name
        return ""

    def completion(self, body: dict[str, Any], fault: str = "") -> dict[str, Any]:
        self._count += 1
        line = f"Line {self._count}."
        anger, trust = self._rng.randint(-10, 10), self._rng.randint(-10, 10)
        goes_on = self._rng.random() < 0.95
        # Levels well inside the range, where a level cannot be taken for a change.
        level = re.search(r"anger is (\d+) and your trust is (\d+)", body["messages"][-1]["content"])
        shown = (anger, trust)
        if fault == "absolute" and level and all(30 <= int(n) <= 90 for n in level.groups()):
            shown = (int(level[1]) + anger, int(level[2]) + trust)
        answer = {
            "reflection": "1. 2. 3. 4. 5.",
            "anger_delta": shown[0],
            "trust_delta": shown[1],
            "reply": line,
            "continue": "yes" if goes_on else "no",
            "stop_reason": "" if goes_on else "enough",
        }
        text = json.dumps(answer)
        if fault == "malformed":
            text = self._rng.choice(["I am sorry, I cannot play this role.", text.replace(":", " "), "```json\n{}\n```"])
        elif fault == "truncated":
            text = text[: self._rng.randrange(1, text.index('"continue"') + 12)]
        elif fault == "empty":
            text = ""
        else:
            self.answered[line] = (anger, trust, goes_on)
        content: Any = [{"type": "text", "text": text}] if fault == "parts" else text
        return answered(body, content)

    @contextmanager
    def serving(self) -> Iterator[FakeLlm]:
        """In a thread of this process, at `url`."""
        app = web.Application(client_max_size=64_000_000)
        app.router.add_post("/v1/chat/completions", self.handle)
        with serving(app, backlog=2048) as url:
            self.url = f"{url}/v1"
            yield self
