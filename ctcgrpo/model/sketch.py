"""Sketches of per-sample gradients: a few thousand numbers whose inner products are unbiased estimates of the gradients'.

The gradient of a sample in a linear layer is the sum over its tokens of (gradient of the output) x (input). Both are projected onto
k random directions before they are multiplied. A layer has k^2 numbers, no gradient of weights is computed, and weights may be
sharded or adapters. For gradients g, h of one layer and projections P, Q with independent signs / sqrt(k),

    E <P g Q', P h Q'> = <g, h>,

with a standard deviation of at most some sqrt(2 / k) |g| |h| a layer, which falls as the layers sum up. Embeddings, norms and the
head are left out. Source: LoGra (arXiv 2405.13954).
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ctcgrpo.errors import PolicyError

DIRECTIONS = 8
"""k: the number of directions that inputs and gradients of a layer are projected onto."""


class GradientSketch:
    """Within `with`, sketches the gradients of a model's trainable linear layers. The same seed gives the same projections on every
    process. Raises PolicyError for a model without such a layer."""

    def __init__(self, model: nn.Module, *, directions: int = DIRECTIONS, seed: int = 0) -> None:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel | PeftModel) else None
        self._layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad and m is not head]
        if not self._layers:
            raise PolicyError(f"{type(model).__name__} has no trainable linear layer, so its gradients cannot be sketched")
        self._embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._k = directions
        generator = torch.Generator().manual_seed(seed)
        self._projections = [
            tuple(_signs(size, directions, generator) for size in (layer.in_features, layer.out_features))
            for layer in self._layers
        ]
        self._hooks: list[Any] = []
        self._start: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    @property
    def size(self) -> int:
        """D: numbers of a sketch."""
        return len(self._layers) * self._k**2

    def __enter__(self) -> Self:
        self._hooks.append(self._embedding.register_forward_hook(self._begin))
        for place, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_hook(self._forward(place)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._start, self._parts = [], None, {}

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Sketches (B, D) of the gradient of the sum of `values`, split by the B sequences of the forward pass that computed them.
        Gradients of weights are neither computed nor changed."""
        assert self._start is not None, "no forward pass within `with`"
        batch = len(self._start)
        torch.autograd.grad(values.sum(), [self._start], allow_unused=True)
        nothing = torch.zeros(batch, self._k**2, device=values.device)
        found = torch.cat([self._parts.get(place, nothing) for place in range(len(self._layers))], dim=1)
        self._start, self._parts = None, {}
        return found

    def _begin(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Require gradients of the embeddings' output, even if they are frozen, so that the backward pass reaches every layer."""
        if not torch.is_grad_enabled():
            return output
        self._start = output if output.requires_grad else output.requires_grad_()
        return self._start

    def _forward(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            if output.dim() != 3:
                raise PolicyError(
                    f"a {type(module).__name__} gets tokens without a sequence dimension, so gradients cannot be split by sequence"
                )
            inputs, outputs = (p.to(output.device) for p in self._projections[place])
            projected = (args[0].detach() @ inputs.to(args[0].dtype)).float()

            def backward(gradient: torch.Tensor) -> None:
                part = torch.einsum("btk,btl->bkl", projected, (gradient @ outputs.to(gradient.dtype)).float()).flatten(1)
                self._parts[place] = self._parts[place] + part if place in self._parts else part

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return hook


def _signs(size: int, directions: int, generator: torch.Generator) -> torch.Tensor:
    """(size, directions), +-1 / sqrt(directions)."""
    signs: torch.Tensor = (torch.randint(0, 2, (size, directions), generator=generator) * 2 - 1) / directions**0.5
    return signs
