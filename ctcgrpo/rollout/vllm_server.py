"""The policy engine on vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

The servers are plain `vllm serve`, on other GPUs or machines than the update's. Each process uses servers of its own where there
are enough. One process plays most of a group's rollouts, so that they share a prefix cache.
"""

import asyncio
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

import aiohttp

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.vllm_adapter import base_url, completion, room
from ctcgrpo.rollout.weight_check import Score, check_weights
from ctcgrpo.types import Completion
from ctcgrpo.util.processes import together
from ctcgrpo.util.proxies import open_url, proxy_of, through_proxy

_ADMIN_SECONDS = 60.0
_FORGETTING_SECONDS = 30.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class Weights(Protocol):
    """Hands the trained policy's weights to the servers. Raises PolicyEngineError on all processes together."""

    def send(self) -> None: ...


class VllmServerEngine(PolicyEngine):
    has_own_weights = True

    def __init__(
        self,
        urls: Sequence[str],
        *,
        weights: Weights,
        stop_ids: frozenset[int],
        max_length: int,
        process: int = 0,
        processes: int = 1,
        run: str = "",
        timeout: float = 600.0,
        patience: float = 120.0,
        backoff: float = 1.0,
        score: Score | None = None,
        vocabulary: int = 0,
        temperature: float = 1.0,
        check_every: int = 0,
    ) -> None:
        """`max_length`: tokens of a prompt and its completion; `run` names the weights' versions; `timeout` seconds a request;
        `patience` seconds that a request is repeated for where a server does not answer. With `score`, which knows `vocabulary`
        tokens and scores at `temperature`, the servers' log-probabilities are compared with the trainer's after the first
        transfer, and after every `check_every`-th (0: none)."""
        self._urls = tuple(map(base_url, urls))
        self._proxies = {url: proxy_of(url) for url in self._urls}
        self._is_main, self._run = process == 0, run
        self._mine = self._urls[process::processes] or (self._urls[process % len(self._urls)],)
        self._weights = weights
        self._stop_ids = sorted(stop_ids)
        self._max_length = max_length
        self._score, self._vocabulary, self._temperature = score, vocabulary, temperature
        self._check_every, self._transfers, self._checked = check_every, 0, False
        self._timeout, self._patience, self._backoff = timeout, patience, backoff
        self._random = random.Random()  # of its own: training's random state must not depend on retries
        self._session: aiohttp.ClientSession | None = None
        self._models: dict[str, str] = {}
        self._under_way = 0

    def take_weights(self, version: int) -> None:
        if version == self.version:
            return
        together(self._refuse_under_way)  # before any process makes requests
        self.version = None  # a failed transfer leaves no valid version
        self._weights.send()
        together(lambda: self._publish(version))
        self._transfers += 1
        if self._score and (not self._checked or (self._check_every and self._transfers % self._check_every == 0)):
            self._checked |= check_weights(
                self._ask_once,
                self._score,
                self._urls if self._is_main else (),
                vocabulary=self._vocabulary,
                max_length=self._max_length,
                temperature=self._temperature,
            )
        self.version = version

    def _refuse_under_way(self) -> None:
        if self._under_way:
            raise PolicyEngineError(f"{self._under_way} requests are in progress; weights cannot change before they finish")

    def _publish(self, version: int) -> None:
        """Reset the servers' prefix caches, and set the version of the new weights."""
        for url in self._urls if self._is_main else ():
            self._forget(url)
            _admin(f"{url}/update_weight_version", {"new_version": self._name(version)})

    def _forget(self, url: str) -> None:
        """Reset a prefix cache. vLLM refuses while blocks are in use, as those of cancelled requests briefly are. Since 0.26 it
        reports success; earlier versions return an empty response."""
        seconds = min(self._patience, _FORGETTING_SECONDS)
        end = time.monotonic() + seconds
        while _admin(f"{url}/reset_prefix_cache", {}).get("success", True) is False:
            if time.monotonic() >= end:
                raise PolicyEngineError(
                    f"{url}/reset_prefix_cache: success = false for {seconds:g} s: requests still use keys and values of the old "
                    "weights; make sure that no other client uses this server"
                )
            time.sleep(min(self._backoff, seconds / 10))

    def confirm(self) -> None:
        """A restarted server would sample with the weights on its disk."""
        for url in self._mine:
            found = _admin(f"{url}/weight_info").get("weight_version")
            if found != self._name(self.version):
                raise PolicyEngineError(
                    f"{url}: weight_version = {found!r}; expected {self._name(self.version)!r}: it was restarted, or serves "
                    "another run; this batch of rollouts is discarded"
                )

    def _name(self, version: int | None) -> str:
        return f"{self._run}/{version}"

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        if self.version is None:
            raise PolicyEngineError("generate was called before take_weights")
        url = self._mine[seed % len(self._mine)]
        self._under_way += 1
        try:
            answer = await self._ask(url, self._body(prompt_ids, seed, sampling))
        finally:
            self._under_way -= 1
        return _completion(url, answer)

    def _ask_once(self, url: str, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As `generate`, outside an event loop, and past ends of turns."""
        model = _admin(f"{url}/v1/models")["data"][0]["id"]
        body = {"model": model, **self._body(prompt_ids, 0, sampling), "stop_token_ids": [], "ignore_eos": True}
        return _completion(url, _admin(f"{url}/v1/completions", body))

    def _body(self, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        return {
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

    async def _ask(self, url: str, body: dict[str, Any]) -> Any:
        """Retry failures that a restart or a busy server can cause; the same seed gives the same response."""
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
                f"{url}: {served['id']} has max_model_len = {length}; expected at least {self._max_length} "
                "(a prompt and a reply at their limits); start it with --max-model-len"
            )
        self._models[url] = str(served["id"])
        return self._models[url]


def _completion(url: str, answer: Any) -> Completion:
    try:
        choice = answer["choices"][0]
        ids, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError) as error:
        raise PolicyEngineError(f"{url}: invalid response; expected a completion with token ids and log-probabilities") from error
    return completion(ids, logprobs, reason)


def _admin(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request by the main process, between batches of rollouts; most are for vLLM's development endpoints, which are there with
    VLLM_SERVER_DEV_MODE=1. An empty answer is {}."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with open_url(request, timeout=_ADMIN_SECONDS) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
            return answer
    except (OSError, ValueError) as error:
        body_text = ""
        if isinstance(error, urllib.error.HTTPError):
            with suppress(OSError):
                body_text = f" ({' '.join(error.read(2000).decode(errors='replace').split())[:200]})"
        raise PolicyEngineError(
            f"{url}: {error}{body_text}{through_proxy(url)}; start it with launch/serve_policy.sh (VLLM_SERVER_DEV_MODE=1)"
        ) from None
