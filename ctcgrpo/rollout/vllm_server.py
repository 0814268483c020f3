"""The policy engine on vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

Plain `vllm serve`, on other GPUs or machines than the update's. Each process keeps to servers of its own where there are enough,
and a group's rollouts are mostly played by one process, so that they find the prefix they share in one cache.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

import aiohttp

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.proxies import open_url, proxy_of, through_proxy
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.vllm_adapter import base_url, completion, room
from ctcgrpo.types import Completion

_ADMIN_SECONDS = 60.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class Weights(Protocol):
    """Hands the trained policy's weights to the servers."""

    def send(self) -> None: ...


class VllmServerEngine(PolicyEngine):
    def __init__(
        self,
        urls: Sequence[str],
        *,
        weights: Weights,
        stop_ids: frozenset[int],
        max_length: int,
        process: int = 0,
        processes: int = 1,
        barrier: Callable[[], None] = lambda: None,
        run: str = "",
        timeout: float = 600.0,
        patience: float = 120.0,
        backoff: float = 1.0,
    ) -> None:
        """`max_length`: tokens of a prompt and its completion; `barrier` waits for all processes; `run` names the weights'
        versions; `timeout` seconds a request; `patience` seconds that a request is repeated for where a server does not answer."""
        self._urls = tuple(map(base_url, urls))
        self._proxies = {url: proxy_of(url) for url in self._urls}
        self._is_main, self._run = process == 0, run
        self._mine = self._urls[process::processes] or (self._urls[process % len(self._urls)],)
        self._weights = weights
        self._stop_ids = sorted(stop_ids)
        self._max_length = max_length
        self._barrier = barrier
        self._timeout, self._patience, self._backoff = timeout, patience, backoff
        self._random = random.Random()  # of its own: training's random state must not depend on retries
        self._session: aiohttp.ClientSession | None = None
        self._models: dict[str, str] = {}
        self._under_way = 0

    def take_weights(self, version: int) -> None:
        if version == self.version:
            return
        if self._under_way:
            raise PolicyEngineError(f"{self._under_way} requests are under way; weights cannot change beneath them")
        self._barrier()  # until no process asks for anything
        self._weights.send()
        if self._is_main:
            for url in self._urls:
                _admin(f"{url}/update_weight_version", {"new_version": self._name(version)})
        self._barrier()  # until all servers have all of it
        self.version = version

    def confirm(self) -> None:
        """A server that was restarted meanwhile would have gone on with the weights of its disk."""
        for url in self._mine:
            found = _admin(f"{url}/weight_info").get("weight_version")
            if found != self._name(self.version):
                raise PolicyEngineError(
                    f"{url} holds weights {found!r}, not {self._name(self.version)!r}: it was restarted, or serves another run; "
                    "this batch of rollouts is not trained on"
                )

    def _name(self, version: int | None) -> str:
        return f"{self._run}/{version}"

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout), connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        if self.version is None:
            raise PolicyEngineError("the engine was asked before it had the policy's weights")
        url = self._mine[seed % len(self._mine)]
        body = {
            "prompt": list(prompt_ids),
            "seed": seed % 2**63,
            "max_tokens": room(prompt_ids, sampling, self._max_length),
            # All of them, always: what is left out the server takes from the model's generation_config.json.
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self._stop_ids,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        self._under_way += 1
        try:
            answer = await self._ask(url, body)
        finally:
            self._under_way -= 1
        try:
            choice = answer["choices"][0]
            ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise PolicyEngineError(f"{url}: no completion with token ids and log-probabilities in its answer") from error
        return completion(ids, logprobs, reason, sampling)

    async def _ask(self, url: str, body: dict[str, Any]) -> Any:
        """Repeats what a restart or a busy server can explain; the same seed gives the same answer."""
        assert self._session is not None, "an engine makes requests within `async with engine`"
        end, tries = time.monotonic() + self._patience, 0
        while True:
            tries += 1
            try:
                model = self._models.get(url) or await self._model(url)
                request = {"model": model, **body}
                async with self._session.post(f"{url}/v1/completions", json=request, proxy=self._proxies[url]) as response:
                    if response.status == 200:
                        return await response.json()
                    problem = f"HTTP {response.status}: {' '.join((await response.text()).split())[:200]}"
                    if response.status not in _RETRIED:
                        raise PolicyEngineError(f"{url} refused a request of {len(body['prompt'])} tokens ({problem})")
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                problem = f"{type(error).__name__} {error}".strip() + through_proxy(url)
            pause = min(30.0, self._backoff * 2 ** min(tries - 1, 8)) * self._random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= end:
                raise PolicyEngineError(f"{url} did not answer in {self._patience:g} s ({tries} tries, last: {problem})")
            await asyncio.sleep(pause)

    async def _model(self, url: str) -> str:
        assert self._session is not None
        async with self._session.get(f"{url}/v1/models", proxy=self._proxies[url]) as response:
            response.raise_for_status()
            served = (await response.json())["data"][0]
        length = served.get("max_model_len")
        if length is not None and length < self._max_length:
            raise PolicyEngineError(
                f"{url} serves {served['id']} with max_model_len {length}, and the recipe needs {self._max_length} "
                "(rollout.max_prompt_tokens + max_new_tokens); start it with --max-model-len"
            )
        self._models[url] = str(served["id"])
        return self._models[url]


def _admin(url: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    """Asks one of vLLM's development endpoints, which are there with VLLM_SERVER_DEV_MODE=1."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with open_url(request, timeout=_ADMIN_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (OSError, ValueError) as error:
        said = ""
        if isinstance(error, urllib.error.HTTPError):
            with suppress(OSError):
                said = f" ({' '.join(error.read(2000).decode(errors='replace').split())[:200]})"
        raise PolicyEngineError(
            f"{url}: {error}{said}{through_proxy(url)}; start the server as launch/serve_policy.sh does (VLLM_SERVER_DEV_MODE=1)"
        ) from None
