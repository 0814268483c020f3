"""Weights on their way to a vLLM server: copies are complete before they are packed. Needs no vLLM: its producer, which packs on a
stream of its own and waits for no other, is stood in for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ctcgrpo.rollout.vllm_weights import ServerWeights
from tests.gpu.registry import Figures, Machine, check

CYCLES = 2_000_000_000
"""What the copy is delayed by: about a second."""
NUMBERS = 64 * 2**20


class Packing:
    """A server's end in this process: packs at once, on a stream of its own, as vllm's packed_nccl_broadcast_producer does."""

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []

    def update(self, chunk: Sequence[tuple[str, torch.Tensor]]) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.packed.append(torch.cat([tensor.view(torch.uint8).flatten() for _, tensor in chunk]).cpu())
        stream.synchronize()


class Unordered(ServerWeights):
    """Without the wait for the copies."""

    def _hand_over(self) -> None:
        for server in self._servers:
            server.update(self._chunk)
        self._chunk = []


def sent(sender: Any, weights: torch.Tensor) -> bool:
    """Whether what arrives is what the parameter held, with its copy delayed on the caller's stream."""
    server = Packing()
    sender._accelerator = SimpleNamespace(device=weights.device, is_main_process=True)
    sender._servers, sender._chunk, sender._chunk_bytes = [server], [], 1
    stale = torch.zeros_like(weights)  # what a copy made too late is read from: the allocator gives this block again
    torch.cuda.synchronize()
    del stale
    torch.cuda._sleep(CYCLES)
    sender._take("lm_head.weight", weights)
    torch.cuda.synchronize()
    return torch.equal(server.packed[0], weights.cpu().view(torch.uint8).flatten())


@check("weights are copied before they are sent (a delayed copy)", seconds=20)
def ordered(machine: Machine) -> Figures:
    weights = torch.arange(NUMBERS, device="cuda", dtype=torch.int32).view(torch.bfloat16)
    assert sent(object.__new__(ServerWeights), weights), "a server would have got weights that were not copied yet"
    assert not sent(object.__new__(Unordered), weights), (
        "without the wait for the copies the right weights arrived too: this check shows nothing here"
    )
    return {"with the wait": "equal", "without": "other weights", "delayed by cycles": CYCLES}
