"""LLM endpoints that lie about usage, send bodies without an end, or send the client and its key elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args
from unittest import mock

from aiohttp import web

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.llm_client.reasons import Result
from tests.attacks.suite import Tries, attack
from tests.unit.test_endpoints import Asked, config, done, says, serving, turns

_KEY = "sk-attack-0123456789abcdef"


@contextmanager
def _key() -> Iterator[dict[str, str]]:
    with mock.patch.dict(os.environ, {"ATTACK_KEY": _KEY}):
        yield {"endpoint__key_env": "ATTACK_KEY"}


async def _asked(answer: web.Response, **changes: Any) -> Asked:
    async with serving(answer) as provider:
        return await turns(config(provider.url, max_tokens=77, deadline=1.0, **changes))


@attack("endpoints", seconds=60)
def usage_that_cannot_be_true(tries: Tries) -> None:
    """Tokens that are negative, infinite, of 400 digits, text or lists: booked with the most that a call can cost."""
    rng = tries.rng("usage")
    odd: list[Any] = [
        -5_000_000,
        -1,
        1e30,
        10**400,
        float("inf"),
        float("nan"),
        True,
        "n/a",
        "9" * 30,
        None,
        [],
        {},
        0.5,
        10**9,
    ]
    pairs = [(odd[k % len(odd)], rng.choice([*odd, 50])) for k in range(2 * len(odd))]
    for prompt, completion in pairs:
        with tries.one(f"prompt {str(prompt)[:30]!r}, completion {str(completion)[:30]!r}"):
            asked = asyncio.run(_asked(says(done(usage={"prompt_tokens": prompt, "completion_tokens": completion}))))
            assert asked.results == ["Thanks."], asked.results
            assert 0 < asked.spent["prompt_tokens"] < 50_000, asked.spent
            assert 0 <= asked.spent["completion_tokens"] <= 77, asked.spent
    for usage in ([1], "none", 3, {"prompt_tokens": {"a": 1}}):
        with tries.one(f"usage {usage!r}"):
            asked = asyncio.run(_asked(says(done(usage=usage))))
            assert asked.results == ["Thanks."] and asked.spent["completion_tokens"] == 77, asked


@attack("endpoints", seconds=60)
def bodies_that_break_a_reader(tries: Tries) -> None:
    """Deep JSON, numbers of thousands of digits, many megabytes, wrong encodings: an error of the endpoint, with its reason."""
    deep = "[" * 100_000
    bodies = {
        "deep JSON": says(deep),
        "deep JSON, closed": says(deep + "]" * 100_000),
        "deep in a choice": says('{"choices": ' + deep),
        "digits": says('{"choices": ' + "9" * 50_000 + "}"),
        "9 MB": says(b'{"choices": [' + b" " * 9_000_000 + b"]}"),
        "bytes": says(bytes(range(256)) * 40),
        "an unknown charset": says(done(), content_type="application/json; charset=no-such"),
        "a list": says([]),
        "null": says("null"),
        "choices of strings": says({"choices": ["a", 1, None]}),
        "a message that is a list": says({"choices": [{"index": 0, "message": []}]}),
        "content of numbers": says(done(content=[1, 2])),
        "a lone surrogate": says(b'{"error": {"message": "\\ud800\\u0000"}}', 500),
    }
    for name, answer in bodies.items():
        with tries.one(name):
            (found,) = asyncio.run(_asked(answer)).results
            assert isinstance(found, CtcGrpoError) or found == "Thanks.", found
            assert len(str(found)) < 3000, f"a message of {len(str(found))} characters"


@attack("endpoints", seconds=20)
def redirects_with_the_key(tries: Tries) -> None:
    """Redirects to another origin, by every status: the key, the prompt and the call go nowhere else."""

    async def redirected(status: int, where: str) -> tuple[Asked, int, str]:
        async with serving(says(done())) as elsewhere:
            target = where.format(url=elsewhere.url, port=elsewhere.url.split(":")[2])
            async with serving(says("", status, Location=target)) as provider:
                with _key() as changes:
                    asked = await turns(config(provider.url, deadline=1.0, **changes))
            return asked, len(elsewhere.asked), str(elsewhere.headers)

    for status in (301, 302, 303, 307, 308):
        for where in (
            "{url}/chat/completions",
            "//127.0.0.1:{port}",
            "http://user@127.0.0.1:{port}",
            "HTTP://127.0.0.1:{port}",
        ):
            with tries.one(f"{status} to {where}"):
                asked, calls, headers = asyncio.run(redirected(status, where))
                assert calls == 0, f"{calls} calls went elsewhere"
                assert _KEY not in headers and _KEY not in str(asked.results), "the key was shown"
                assert isinstance(asked.results[0], CtcGrpoError), asked.results


@attack("endpoints", seconds=30)
def keys_quoted_back(tries: Tries) -> None:
    """Endpoints that quote the key in bodies, headers and redirects: no message shows it."""
    forms = {
        "whole": says({"error": {"message": f"Incorrect API key provided: {_KEY}"}}, 401),
        "its ends": says({"error": {"message": f"key {_KEY[:6]}****{_KEY[-4:]} is wrong"}}, 401),
        "in HTML": says(f"<html><title>{_KEY}</title></html>", 502, "text/html"),
        "in a detail": says({"detail": [{"msg": _KEY, "input": {"key": _KEY}}]}, 422),
        "in plain text": says(f"Authorization: Bearer {_KEY}", 400, "text/plain"),
        "in a redirect": says("", 307, Location=f"http://127.0.0.1:9/{_KEY}"),
        "in a 200": says({"error": {"message": _KEY}}),
        "in content": says(done(content=f"my key is {_KEY}")),
    }

    def shown(answer: web.Response) -> str:
        with _key() as changes:
            asked = asyncio.run(_asked(answer, **changes))
        return f"{asked.results} {asked.said} {asked.calls}"

    for name, answer in forms.items():
        with tries.one(name):
            said = shown(answer)
            assert _KEY not in said and _KEY[:6] not in said and _KEY[-8:] not in said, said[:400]


@attack("endpoints", seconds=40)
def kinds_of_errors(tries: Tries) -> None:
    """Errors with statuses, codes and types of any name: what becomes a label of metrics stays one of a closed set."""
    rng = tries.rng("kinds")
    known = {*get_args(Result), "ok", "cancelled"}
    for _ in range(40):
        name = "".join(rng.choices('abc_{}"\n\\ é', k=12))
        status = rng.choice([400, 402, 403, 409, 418, 422, 451, 500, 529, 599, 200])
        with tries.one(f"{status}, {name!r}"):
            asked = asyncio.run(_asked(says({"error": {"message": name, "code": name, "type": name}}, status), patience=0.0))
            assert set(asked.calls) <= known and asked.calls, asked.calls
            assert isinstance(asked.results[0], CtcGrpoError), asked.results
