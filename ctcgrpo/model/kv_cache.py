"""A cache of keys and values of several dialogues, each in a slot, written and read by the model's attention (attention.py)."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

from ctcgrpo.errors import RunInterrupted
from ctcgrpo.model.attention import Layout, masked_attention

_BLOCK = 64  # granularity in tokens of the cache's size and of what attention reads


class KvCache:
    """For each layer tensors (slots, key heads, room, D) of keys and of values, allocated when the layer first writes."""

    def __init__(self) -> None:
        self.slots = self.room = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, tokens: int) -> None:
        """Grow to at least `slots` slots of `tokens` tokens; keeps the contents."""
        if slots <= self.slots and tokens <= self.room:
            return
        if slots > self.slots:
            self.slots = max(slots, min(2 * self.slots, slots + 16))
        if tokens > self.room:
            self.room = -(-tokens // _BLOCK) * _BLOCK
        for index in self._layers:  # one at a time, so that the old tensors are freed
            self._layers[index] = tuple(map(self._grown, self._layers[index]))  # type: ignore[assignment]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.slots, old.shape[1], self.room, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, allocated with the shape and type of its first ones."""
        if index not in self._layers:
            # Zeros: masked positions have weight 0, but 0 * NaN is NaN.
            key, value = (x.new_zeros(self.slots, x.shape[1], self.room, x.shape[3]) for x in (key, value))
            self._layers[index] = key, value
        return self._layers[index]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a slot to another."""
        for x in chain.from_iterable(self._layers.values()):
            x[target, :, :tokens] = x[source, :, :tokens]

    def swap(self, a: int, b: int) -> None:
        for x in chain.from_iterable(self._layers.values()):
            x[[a, b]] = x[[b, a]]


class CacheLayout(Layout):
    """R rows of T new tokens each, written to and reading from the cache.

    `slots`: (R,) the slots of the rows, or a number R for the first R slots, which are read in place. `positions` (R, T): the
    position of each new token in its slot, after all tokens that it attends to. Shorter rows have their padding at the position
    after their last token, which is overwritten before any token attends to it.
    """

    def __init__(
        self,
        cache: KvCache,
        slots: Sequence[int] | int,
        positions: Tensor,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`interrupted` is called in each layer; if it returns True, the forward pass raises RunInterrupted."""
        self._cache = cache
        self._interrupted = interrupted
        device = positions.device
        self._rows = torch.arange(slots, device=device) if isinstance(slots, int) else torch.tensor(slots, device=device)
        self._read: slice | Tensor = slice(0, slots) if isinstance(slots, int) else self._rows
        self._positions = positions
        self._width = min(cache.room, -(-(int(positions.max()) + 1) // _BLOCK) * _BLOCK)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        if self._interrupted():  # a slow machine takes minutes for a forward pass over long prompts
            raise RunInterrupted("interrupted in the middle of a forward pass")
        keys, values = self._cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
        at = (self._rows.unsqueeze(1), slice(None), self._positions)
        keys[at], values[at] = key.transpose(1, 2), value.transpose(1, 2)
        k, v = (x[self._read, :, : self._width] for x in (keys, values))
        mask = self._mask(window, query.dtype)
        rows, heads, new, channels = query.shape
        if new == 1:  # heads that share keys become rows of one product
            grouped = query.reshape(rows, k.shape[1], heads // k.shape[1], channels)
            seen = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
            return seen.reshape(rows, 1, heads, -1)
        return masked_attention(query, k, v, mask, scale).transpose(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(R, 1, T, width): 0 where a token attends to a position, -inf elsewhere."""
        if (window, dtype) not in self._masks:
            there = torch.arange(self._width, device=self._positions.device)
            here = self._positions.unsqueeze(-1)
            seen = there <= here
            if window is not None:
                seen &= there > here - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._masks[window, dtype] = mask.unsqueeze(1)
        return self._masks[window, dtype]
