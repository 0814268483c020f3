"""Weights on their way to vLLM servers: TRL's own client against HTTP servers on loopback, with stand-ins for CUDA and NCCL that
misbehave as the real ones do.

1. A copy on a CUDA stream is there once the stream was waited for, and not before.
2. A broadcast blocks until the server's workers receive it, or the communicator is aborted.
3. What fails in a transfer is raised with its reason after the walk over the parameters has ended, and is not asked for again.
4. A server that samples from other weights stops the run.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.generation import vllm_client, vllm_generation

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.rollout.vllm_weights import ServerWeights
from ctcgrpo.rollout.weight_check import PROMPTS, REPLY_TOKENS, spread_prompts
from ctcgrpo.types import TurnSample

NAMES = ("embed_tokens", "layer.0", "layer.1", "lm_head")


class Stream:
    """Work that the device does some time later: at the latest when somebody waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class OnDevice(torch.Tensor):
    """A tensor whose copies are made on `stream`."""

    stream: Stream

    def detach(self) -> OnDevice:
        return self

    def clone(self, **_: Any) -> torch.Tensor:  # type: ignore[override]
        source, copy = self.as_subclass(torch.Tensor), torch.zeros(self.shape)
        value = source.clone()  # the stream is in order: what comes after the copy does not change it
        self.stream.queue.append(lambda: copy.copy_(value))
        return copy


class Communicator:
    """NCCL between the trainer and one server: a broadcast ends when the workers have it, or when it is aborted."""

    def __init__(self, port: int) -> None:
        self.wire: queue.Queue[torch.Tensor] = queue.Queue()
        self.aborted = threading.Event()
        Server.at[port].communicator = self
        self.group = SimpleNamespace(store=None, socket=None)

    def broadcast(self, tensor: torch.Tensor) -> None:
        if not self.aborted.is_set():
            self.wire.put(tensor)

    def wait(self) -> None:
        while not (self.wire.empty() or self.aborted.is_set()):
            time.sleep(0.005)

    def destroy(self) -> None:
        self.aborted.set()

    def receive(self) -> torch.Tensor:
        return self.wire.get(timeout=10)


def producer(iterator: Iterator[tuple[str, torch.Tensor]], group: Communicator, src: int, post_iter_func: Any) -> None:
    """vLLM's: packs at once, on a stream that waits for no other; here all of a chunk is one package."""
    packed = torch.cat([post_iter_func(item).contiguous().view(torch.uint8).view(-1) for item in iterator])
    group.broadcast(packed)
    group.wait()


class Server:
    """vLLM's HTTP routes for weights. `fail` maps a path to what becomes of its k-th request (0 first): a status, or "silence"."""

    at: dict[int, Server] = {}
    """By the port of the group that weights come by."""

    def __init__(self, group_port: int) -> None:
        Server.at[group_port] = self
        self.communicator: Communicator
        self.weights: dict[str, torch.Tensor] = {}
        self.asked: list[str] = []
        self.open = False
        self.fail: dict[tuple[str, int], int | str] = {}
        self.busy = 0
        """How often the prefix cache will not be reset."""
        self.logprob: Callable[[list[int], int], float] = lambda prompt, k: -1.0
        self.answers_reset = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def _serve(self) -> None:
                path = self.path.partition("?")[0]
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                status, answer = outer.answer(path, body)
                data = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # the client no longer waits
                    self.wfile.write(data)

            do_GET = do_POST = _serve  # noqa: N815 - as http.server calls them

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        fails = self.fail.get((path, self.asked.count(path)))
        self.asked.append(path)
        if fails == "silence":
            time.sleep(3)
            return 200, {}
        if isinstance(fails, int):
            return fails, {"detail": "CUDA out of memory"}
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": "policy"}]}
            case "/server_info":
                return 200, {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}}
            case "/get_world_size":
                return 200, {"world_size": 1}
            case "/start_weight_update":
                if self.open:
                    return 500, {"detail": "start_weight_update called while a weight update is already active"}
                self.open = True
            case "/update_weights":
                info, data, start = body["update_info"], self.communicator.receive(), 0
                for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                    dtype = getattr(torch, kind)
                    end = start + torch.Size(shape).numel() * dtype.itemsize
                    self.weights[name] = data[start:end].clone().view(dtype).view(shape)
                    start = end
            case "/finish_weight_update":
                self.open = False
            case "/reset_prefix_cache":
                self.busy -= 1
                return 200, {"success": self.busy < 0} if self.answers_reset else None
            case "/v1/completions":
                ids, n = body["prompt"], body["max_tokens"]
                said = {"token_logprobs": [self.logprob(ids, k) for k in range(n)]}
                choice = {"token_ids": ids[:1] * n, "logprobs": said, "finish_reason": "length"}
                return 200, {"choices": [choice]}
        return 200, {}

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """TRL's client finds vLLM and CUDA."""
    made = Stream()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: find("json" if name == "vllm" else name, *a))
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda **_: True)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "get_ip", lambda: "127.0.0.1", raising=False)
    monkeypatch.setattr(vllm_client, "open_trainer_endpoint", lambda info: Communicator(info["master_port"]), raising=False)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", producer, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made)
    return made


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made = [Server(6000), Server(6001)]
    yield made
    for server in made:
        server.close()


class Policy:
    """Parameters of 256 bytes each, on a device; `walked` are those that were gathered."""

    def __init__(self, stream: Stream) -> None:
        self.parameters = {name: torch.full((8, 8), float(k + 1)) for k, name in enumerate(NAMES)}
        self.stream = stream
        self.walked: list[str] = []

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.parameters.items():
            self.walked.append(name)
            gathered = value.clone().as_subclass(OnDevice)
            gathered.stream = self.stream
            yield name, SimpleNamespace(data=gathered)


def weights(policy: Policy, servers: list[Server], monkeypatch: pytest.MonkeyPatch, **options: Any) -> ServerWeights:
    monkeypatch.setattr(vllm_generation, "is_peft_model", lambda model: False)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_fix_param_name_to_vllm", lambda self, name, **_: name)
    backend = SimpleNamespace(is_fsdp=False, gather_params=lambda params: _nothing())
    monkeypatch.setattr(vllm_generation, "DistributedBackend", lambda accelerator: backend)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda", 0), is_main_process=True, wait_for_everyone=str)
    return ServerWeights(
        lambda: policy,
        accelerator,
        None,  # type: ignore[arg-type]
        urls=[server.url for server in servers],
        group_port=6000,
        **{"timeout": 1.0, "patience": 0.2, "chunk_bytes": 512} | options,
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_copies_are_complete_before_they_are_sent(stream: Stream, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(stream)
    sender = weights(policy, servers, monkeypatch)
    for shift in (0.0, 0.5):
        for value in policy.parameters.values():
            value += shift
        sender.send()
        for server in servers:
            assert server.weights.keys() == policy.parameters.keys() and not server.open
            for name, value in policy.parameters.items():
                assert torch.equal(server.weights[name], value), name
            assert server.asked.count("/update_weights") == 2 * (1 + (shift > 0))  # two parameters a chunk


@pytest.mark.parametrize("which", [0, 1])
def test_a_transfer_that_fails_ends_with_its_reason(
    which: int, stream: Stream, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(stream)
    sender = weights(policy, servers, monkeypatch)
    servers[which].fail["/update_weights", 1] = 500
    started = time.monotonic()
    with pytest.raises(PolicyEngineError, match=rf"{servers[which].url} refused layer.1 to lm_head: .*CUDA out of mem"):
        sender.send()
    assert time.monotonic() - started < 5
    assert policy.walked == list(NAMES)  # others gather with this process, to the end
    assert servers[which].asked.count("/update_weights") == 2  # the broadcast is over: not asked for again
    assert servers[which].communicator.aborted.is_set()
    other = servers[1 - which]
    assert not other.open and other.asked[-1] == "/finish_weight_update"  # takes the next run's weights


def test_a_server_that_says_nothing_does_not_hold_the_run(
    stream: Stream, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(stream)
    sender = weights(policy, servers, monkeypatch, timeout=0.3)
    servers[0].fail["/update_weights", 0] = "silence"
    with pytest.raises(PolicyEngineError, match="refused embed_tokens to layer.0: .*timed out"):
        sender.send()
    assert policy.walked == list(NAMES) and not servers[1].open


def test_nothing_is_gathered_for_a_server_that_is_not_healthy(
    stream: Stream, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(stream)
    sender = weights(policy, servers, monkeypatch)
    seen = servers[1].asked.count("/health")
    servers[1].fail |= {("/health", seen + k): 503 for k in range(2)}
    sender.send()  # it is healthy again within the patience
    policy.walked.clear()
    servers[1].close()
    with pytest.raises(PolicyEngineError, match=f"{servers[1].url}/health: .*refused.*weights were not sent; restart"):
        sender.send()
    assert policy.walked == [] and not servers[0].open


def test_what_fails_on_the_trainers_side_ends_the_walk_too(
    stream: Stream, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(stream)
    sender = weights(policy, servers, monkeypatch)

    def no_memory(self: OnDevice, **_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(OnDevice, "clone", no_memory)
    with pytest.raises(PolicyEngineError, match="weight transfer to the vLLM servers: CUDA out of memory. Tried .* 2 GiB$"):
        sender.send()
    assert policy.walked == list(NAMES) and not any(server.open for server in servers)


class Sent:
    """Weights that arrive somehow."""

    times = 0

    def send(self) -> None:
        self.times += 1


def engine(server: Server, **options: Any) -> VllmServerEngine:
    defaults = {"weights": Sent(), "stop_ids": frozenset[int](), "max_length": 64, "patience": 5.0, "backoff": 0.01}
    return VllmServerEngine([server.url], **defaults | options)


def test_a_prefix_cache_that_is_in_use_is_asked_for_again(servers: list[Server]) -> None:
    server = servers[0]
    server.busy = 3
    made = engine(server)
    made.take_weights(1)
    assert server.asked.count("/reset_prefix_cache") == 4 and made.version == 1
    assert server.asked.index("/update_weight_version") > server.asked.index("/reset_prefix_cache")
    server.busy = 10**6
    made = engine(server, patience=0.2)
    with pytest.raises(PolicyEngineError, match="success = false for 0.2 s: requests still use keys and values of the old"):
        made.take_weights(2)
    assert made.version is None
    server.answers_reset = False  # vLLM before 0.26
    made.take_weights(2)
    assert made.version == 2


def test_a_server_with_other_weights_stops_the_run(servers: list[Server]) -> None:
    server = servers[0]
    scored: list[list[TurnSample]] = []
    offset = [0.0]

    def score(samples: Any) -> list[tuple[float, ...]]:
        scored.append(list(samples))
        return [tuple(-1.0 - offset[0] for _ in sample.completion_ids) for sample in samples]

    made = engine(server, score=score, vocabulary=1000, temperature=0.5, check_every=3)
    for version in range(1, 7):
        made.take_weights(version)
    assert len(scored) == 3  # after transfers 1, 3 and 6
    assert all(len(samples) == PROMPTS and len(samples[0].completion_ids) == REPLY_TOKENS for samples in scored)
    offset[0] = 0.19  # within 0.1 nats at temperature 1
    made.take_weights(7)
    engine(server, score=score, vocabulary=1000, temperature=0.5).take_weights(1)
    offset[0] = 0.21
    made = engine(server, score=score, vocabulary=1000, temperature=0.5)
    with pytest.raises(PolicyEngineError, match=f"{server.url} samples from other weights than it was sent: .* 0.21 nats"):
        made.take_weights(1)
    assert made.version is None
    server.logprob = lambda prompt, k: float("nan")
    with pytest.raises(PolicyEngineError, match="nan nats"):
        made.take_weights(1)


def test_a_trainer_that_cannot_score_yet_checks_later(servers: list[Server]) -> None:
    answers: list[Any] = [None, [[-1.0] * REPLY_TOKENS] * PROMPTS]
    made = engine(servers[0], score=lambda samples: answers.pop(0), vocabulary=1000)
    for version in range(1, 4):
        made.take_weights(version)
    assert answers == []  # at the second transfer, and no more


@pytest.mark.parametrize(("vocabulary", "max_length"), [(151_936, 9216), (300, 64), (5, 2)])
def test_the_prompts_are_spread_over_the_vocabulary(vocabulary: int, max_length: int) -> None:
    prompts = spread_prompts(vocabulary, max_length)
    tokens = [token for prompt in prompts for token in prompt]
    assert len(set(tokens)) == len(tokens) and min(tokens) >= 0 and max(tokens) < vocabulary
    assert len({len(p) for p in prompts}) == 1 and 1 <= len(prompts[0]) < max_length
    gaps = [b - a for a, b in zip(sorted(tokens), sorted(tokens)[1:], strict=False)]
    assert max(gaps) <= vocabulary // len(tokens) + 1
