"""Attention in a row of shared prefixes: each token attends to its own sequence, whose prefix may be anywhere in the row.

Three implementations with the same result: sdpa segment by segment (any device), flex_attention (CUDA), and TRL's tree attention
with FlashAttention 3 (Hopper). A row consists of segments; a segment's tokens attend to the path from the first token of their
sequence up to themselves.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ctcgrpo.errors import RecipeError
from ctcgrpo.model.attention import Layout, masked_attention
from ctcgrpo.options import Packing

TreeAttention = Literal["segments", "flex", "flash3"]
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A function of batch, head, query and key positions: whether the query attends to the key."""

_BLOCK = 128  # flex_attention skips empty blocks of this size
_MOST_GRAPHS = 64
_STRIP = 8  # rows of blocks that are evaluated at once: 16 MiB for 16,384 tokens


def row_multiple(how: TreeAttention | None) -> int:
    """A row's length must be a multiple of this. flex_attention compiles one graph for rows of several blocks, and others for rows
    of one block or less: with at least two blocks one graph is enough."""
    return 2 * _BLOCK if how == "flex" else 1


def how_to_attend(packing: Packing, device: torch.device, *, half: bool) -> TreeAttention | None:
    """The implementation for rows of shared prefixes on a device, None for rows without sharing. `auto`: TRL's kernel on Hopper if
    the package `kernels` is installed and compute is in 16 bits (`half`), flex_attention on other CUDA devices, segments
    elsewhere. Raises RecipeError for an unavailable one. The kernel is fetched here, before anything is sampled."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    suits = hopper and half and importlib.util.find_spec("kernels") is not None
    if packing == "flash3" and not suits:
        needs = "a Hopper GPU, 16-bit compute and the package kernels"
        raise RecipeError(f"packing = 'flash3'; expected {needs}; try auto, flex or segments")
    if packing == "flex" and device.type != "cuda":
        raise RecipeError(f"packing = 'flex', which cannot be trained on {device.type}; try auto or segments")
    if packing == "flash3" or (packing == "auto" and suits):
        _fetch_kernel()
        return "flash3"
    if packing == "auto":
        return "flex" if device.type == "cuda" else "segments"
    return None if packing == "none" else packing


def _fetch_kernel() -> None:
    from trl.experimental.async_grpo import packing

    try:
        packing._flash_attn()
    except Exception as error:  # the hub's own kinds are many
        raise RecipeError(
            f"TRL's tree attention cannot load its kernel ({type(error).__name__}: {error}); set packing to 'flex'"
        ) from error


@dataclass(frozen=True, slots=True)
class Segments:
    """A row of T tokens as consecutive segments. `lengths` (S,): their numbers of tokens. `paths` (sum of path lengths,): for each
    segment the row's positions of its sequence, from the first token to the segment's last; `path_lengths` (S,). `ends` (T,): the
    end of each token's descendants, directly after it in the row. Padding, after the last segment, attends only to padding."""

    lengths: tuple[int, ...]
    path_lengths: tuple[int, ...]
    paths: Tensor
    ends: Tensor
    positions: Tensor


def tree_layout(segments: Segments, how: TreeAttention, device: torch.device) -> Layout:
    if how == "segments":
        return SegmentLayout(segments, segments.paths.to(device))
    if how == "flex":
        # On a CPU the compiled version has no backward pass.
        return FlexLayout(segments.ends.to(device), segments.positions.to(device), compiled=device.type != "cpu")
    starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (segments.lengths, segments.path_lengths)]
    longest = max(segments.lengths), max(segments.path_lengths)
    return Flash3Layout(segments.paths.to(device), starts[0].to(device), starts[1].to(device), longest)


class SegmentLayout(Layout):
    def __init__(self, segments: Segments, paths: Tensor) -> None:
        self._segments, self._paths = segments, paths
        self._masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = {}

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        # One gather, with tokens as the first dimension, so that a token's heads are contiguous: a slice for each segment would
        # have a gradient of the row's length each.
        keys, values = (
            x[0].transpose(0, 1).index_select(0, self._paths).split_with_sizes(self._segments.path_lengths) for x in (key, value)
        )
        queries = query.split_with_sizes(self._segments.lengths, dim=2)
        seen = [
            masked_attention(q, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), mask, scale)
            for q, k, v, mask in zip(queries, keys, values, self._masks_of(window, query.dtype), strict=True)
        ]
        return torch.cat(seen, dim=2).transpose(1, 2)

    def _masks_of(self, window: int | None, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """For each segment (n, path) the mask of its n tokens over their path; None where a causal mask is the same. The mask
        depends only on the distance, so all are views of one strip: every layer keeps its masks for the backward pass."""
        if (window, dtype) not in self._masks:
            sizes = list(zip(self._segments.lengths, self._segments.path_lengths, strict=True))
            height, before = max(n for n, _ in sizes), max(path - n for n, path in sizes)
            seen = torch.ones(height, before + height, dtype=torch.bool, device=self._paths.device).tril(before)
            if window is not None:
                seen = seen.triu(before - window + 1)
            strip = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

            def cut(n: int, path: int) -> Tensor | None:
                if n == path and (window is None or path <= window):
                    return None
                return strip[:n, before - (path - n) : before + n]

            self._masks[window, dtype] = [cut(n, path) for n, path in sizes]
        return self._masks[window, dtype]


class FlexLayout(Layout):
    """The row is in depth-first order, so the descendants of a token directly follow it."""

    def __init__(self, ends: Tensor, positions: Tensor, *, compiled: bool) -> None:
        """`ends`, `positions` (T,): as in Segments. Raises ValueError where T is no multiple of `row_multiple`."""
        if len(ends) % row_multiple("flex"):
            raise ValueError(f"a row of {len(ends)} tokens; flex_attention needs a multiple of {row_multiple('flex')}")
        self._ends, self._positions, self._compiled = ends, positions, compiled
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = _block_mask(self._sees(window), len(self._ends), self._ends.device)
        attention: Any = _flex_compiled if self._compiled else flex_attention
        output: Tensor = attention(query, key, value, block_mask=self._masks[window], scale=scale, enable_gqa=True)
        return output.transpose(1, 2)

    def _sees(self, window: int | None) -> Sees:
        ends, positions = self._ends, self._positions

        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (q < ends[kv])

        if window is None:
            return sees
        width = torch.tensor(window, device=ends.device)  # a number would be part of the graph

        def sees_near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (q < ends[kv]) & (positions[q] - positions[kv] < width)

        return sees_near


def _block_mask(sees: Sees, tokens: int, device: torch.device) -> BlockMask:
    """As torch's create_block_mask, without T x T booleans and without compiling a graph."""
    at = torch.arange(tokens, device=device)
    nothing = torch.zeros((), dtype=torch.long, device=device)
    squares = []
    for queries in torch.split(at, _STRIP * _BLOCK):
        seen = sees(nothing, nothing, queries[:, None], at[None, :])
        squares.append(seen.view(-1, _BLOCK, tokens // _BLOCK, _BLOCK).sum((1, 3)))
    pairs = torch.cat(squares)
    whole = pairs == _BLOCK * _BLOCK
    some, lengths = _ordered((pairs > 0) & ~whole), (tokens, tokens)
    return BlockMask.from_kv_blocks(*some, *_ordered(whole), _BLOCK, mask_mod=sees, seq_lengths=lengths)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For blocks (rows, columns): the number chosen in each row (1, 1, rows), and the columns with the chosen ones first
    (1, 1, rows, columns)."""
    columns = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _flex_compiled(query: Tensor, key: Tensor, value: Tensor, **options: object) -> object:
    """flex_attention, with one graph for rows of all lengths (and others without gradients, with a window, or of another type).
    Raises torch's FailOnRecompileLimitHit beyond _MOST_GRAPHS, where Dynamo would fall back to computing all pairs."""
    # Set at every call: the limit is per thread, and with checkpointing layers run again in autograd's threads.
    if dynamo.recompile_limit < _MOST_GRAPHS:
        dynamo.recompile_limit = _MOST_GRAPHS
    return _graph()(query, key, value, **options)


@cache
def _graph() -> Callable[..., object]:
    compiled: Callable[..., object] = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled


@dataclass(frozen=True, slots=True)
class Flash3Layout(Layout):
    paths: Tensor
    starts: Tensor
    path_starts: Tensor
    longest: tuple[int, int]

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        # Imported only when used: it takes seconds and warns that it is experimental.
        from trl.experimental.async_grpo.packing import tree_attention

        output: Tensor = tree_attention(
            module,
            query,
            key,
            value,
            None,
            tree_kv_index=self.paths,
            tree_cu_seqlens_q=self.starts,
            tree_cu_seqlens_k=self.path_starts,
            tree_max_seqlen_q=self.longest[0],
            tree_max_seqlen_k=self.longest[1],
            scaling=scale,
            sliding_window=window,
        )[0]
        return output
