"""What a vLLM worker of the checks can be asked beside what vLLM has: --worker-extension-cls tests.gpu.served.Digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's linear maps that hold several of transformers'."""


class Digests:
    """Mixed into vLLM's worker, which has the model."""

    model_runner: Any

    def weight_digests(self) -> dict[str, str]:
        return {name: digest([p]) for name, p in self.model_runner.model.named_parameters()}


def digest(parts: Iterable[torch.Tensor]) -> str:
    """Of the bytes of tensors, one after the other along their first axis."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


def expected_digests(names: Iterable[str], weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What vLLM's parameters of these names are made of, in transformers' weights. Raises KeyError for one that has none there."""
    found = {}
    for name in names:
        fused = next((kind for kind in FUSED if f".{kind}." in name), None)
        parts = [name] if fused is None else [name.replace(fused, part) for part in FUSED[fused]]
        found[name] = digest(weights[part] for part in parts)
    return found
