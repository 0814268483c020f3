"""Hands the policy's weights to vLLM servers over NCCL: one walk over the parameters for all of them.

TRL's client announces tensors in a POST, and broadcasts them meanwhile with vLLM's packed producer. Four things are left to its
caller (sources of TRL 1.16 and vLLM 0.31):
1. The producer packs on CUDA streams of its own, which wait for none of the caller's: copies have to be complete before it starts.
2. Where the POST fails, the producer waits in NCCL for workers that never come: the communicator has to be aborted.
3. The client repeats a POST that was answered with HTTP 500, 502 or 503: the server would wait for tensors that are sent already.
4. vLLM begins no update while one is open: servers that took their part of a failed transfer have to be told to finish.
"""

import time
import urllib.error
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.rollout.vllm_adapter import as_engine_error, base_url, require, vllm_generation
from ctcgrpo.util.naming import first_line
from ctcgrpo.util.processes import together
from ctcgrpo.util.proxies import open_url, settle_environment, through_proxy

_CHUNK_BYTES = 512 * 2**20  # how much of the policy is gathered before it is sent on to the servers
_NOT_REPEATED = ("start_weight_update", "update_weights", "finish_weight_update")
_DOING = "weight transfer to the vLLM servers"


class ServerWeights:
    """Hands the policy's weights to plain vLLM servers.

    The servers run with --weight-transfer-config '{"backend":"nccl"}' and VLLM_SERVER_DEV_MODE=1. Only the main process talks
    to them; all take part in the walk.
    """

    def __init__(
        self,
        policy: Callable[[], Any],
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        urls: Sequence[str],
        group_port: int,
        timeout: float,
        patience: float = 120.0,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        """Connects to every server; the k-th takes `group_port` + k. `timeout`: seconds for a request; `patience`: seconds that a
        server is waited for which does not answer before a transfer. Raises PolicyEngineError for one that cannot be reached, or
        was started otherwise."""
        self._policy = policy
        self._accelerator = accelerator
        self._urls = tuple(map(base_url, urls))
        self._patience, self._chunk_bytes = patience, chunk_bytes
        settle_environment(*self._urls)  # for TRL's client
        self._generation = vllm_generation(
            policy(),
            accelerator,
            tokenizer,
            mode="server",
            server_base_url=self._urls[0],
            group_port=group_port,
            server_timeout=timeout,
        )
        self._servers: list[_Server] = []
        self._chunk: list[tuple[str, torch.Tensor]] = []
        if accelerator.is_main_process:
            from trl.generation.vllm_client import VLLMClient

            self._servers = [_Server(self._generation.vllm_client, self._urls[0], timeout)]
            for k, url in enumerate(self._urls[1:], 1):
                with as_engine_error(f"server {url}"):
                    client = VLLMClient(base_url=url, group_port=group_port + k, connection_timeout=timeout)
                    client.init_communicator(device=accelerator.device)
                self._servers.append(_Server(client, url, timeout))

    def send(self) -> None:
        """All parameters to all servers. Collective. Raises PolicyEngineError on all processes together."""
        together(self._begin)
        problem = self._walk()
        self._chunk = []
        together(lambda: self._end(problem))

    def _begin(self) -> None:
        for server in self._servers:
            server.wait_until_healthy(self._patience)
        for k, server in enumerate(self._servers):
            try:
                server.begin()
            except PolicyEngineError:
                for begun in self._servers[:k]:
                    begun.finish_after_failure()
                raise

    def _walk(self) -> PolicyEngineError | None:
        """Gathers every parameter in turn, to the end, whatever becomes of those before: other processes gather with this one, and
        an adapter is merged until then. Gives what went wrong."""
        self._generation.model = self._policy()  # FSDP puts another in its place once training begins
        problem: PolicyEngineError | None = None
        for name, tensor in self._generation._iter_named_params():
            if self._servers and problem is None:
                problem = _problem(lambda: self._take(name, tensor))  # noqa: B023 - called at once
        if self._servers and problem is None and self._chunk:
            problem = _problem(self._hand_over)
        return problem

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        self._chunk.append((name, tensor.detach().clone()))  # a gathered one is gone with the next
        if sum(t.numel() * t.element_size() for _, t in self._chunk) >= self._chunk_bytes:
            self._hand_over()

    def _hand_over(self) -> None:
        device = self._accelerator.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        for server in self._servers:
            server.update(self._chunk)
        self._chunk = []

    def _end(self, problem: PolicyEngineError | None) -> None:
        if problem is not None:
            for server in self._servers:
                server.finish_after_failure()
            raise problem
        for server in self._servers:
            server.finish()


class _Server:
    """TRL's client of a server, which neither repeats a part of a transfer nor waits for ever for one."""

    def __init__(self, client: Any, url: str, timeout: float) -> None:
        from requests.adapters import HTTPAdapter

        require(client, "_start_weight_update", "_finish_weight_update", "_updating_weights", "update_named_params")
        require(client, "communicator", "session", "_post")
        require(client.communicator, "destroy")
        self._client, self._url, self._timeout = client, url, timeout
        self._ask = client._post
        client._post = self._post
        for name in _NOT_REPEATED:
            client.session.mount(f"{client.base_url}/{name}", HTTPAdapter())
        self._refused: Exception | None = None
        self._open = False

    def _post(self, url: str, **kwargs: Any) -> Any:
        try:
            return self._ask(url, timeout=self._timeout, **kwargs)
        except Exception as error:
            if url.endswith("/update_weights"):  # asked in a thread of TRL's, while another one waits in NCCL
                self._refused = error
                self._client.communicator.destroy()
            raise

    def wait_until_healthy(self, patience: float) -> None:
        """Raises PolicyEngineError where GET /health has no HTTP 200 within `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                with open_url(f"{self._url}/health", timeout=min(10.0, self._timeout)):
                    return
            except (OSError, urllib.error.HTTPError) as error:
                if time.monotonic() >= end:
                    raise PolicyEngineError(
                        f"{self._url}/health: {error}{through_proxy(self._url)}; expected HTTP 200 within {patience:g} s; weights "
                        "were not sent; restart the server (launch/serve_policy.sh), then run the same command again"
                    ) from None
            time.sleep(min(1.0, patience / 10))

    def begin(self) -> None:
        with self._named():
            self._client._start_weight_update()
        self._client._updating_weights = self._open = True

    def update(self, chunk: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Raises PolicyEngineError where the server does not take all of it; after that the connection is gone."""
        metadata = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in chunk]
        try:
            self._client.update_named_params(metadata, iter(chunk))
        except Exception as error:
            self._open = self._client._updating_weights = False
            cause = self._refused or error
            raise PolicyEngineError(
                f"{_DOING}: {self._url} refused {chunk[0][0]} to {chunk[-1][0]}: {first_line(cause)}; restart this server "
                "(launch/serve_policy.sh), then run the same command again"
            ) from error

    def finish(self) -> None:
        with self._named():
            self._client._finish_weight_update()
        self._client._updating_weights = self._open = False

    def finish_after_failure(self) -> None:
        """Close what this server has open, so that it takes the next run's weights. The failure itself is reported elsewhere."""
        if self._open:
            _problem(self.finish)

    def _named(self) -> Any:
        return as_engine_error(f"{_DOING}: {self._url}")


def _problem(do: Callable[[], None]) -> PolicyEngineError | None:
    """The error of `do`, for callers that must clean up before they raise it."""
    try:
        do()
    except PolicyEngineError as error:
        return error
    except Exception as error:  # noqa: BLE001 - CUDA's, NCCL's and requests' own kinds are many
        return PolicyEngineError(f"{_DOING}: {first_line(error)}")
    return None
