"""Attention in a row of shared prefixes: each token sees its own sequence, wherever in the row its beginning lies.

Three ways with the same result: segment by segment with sdpa (any device), flex_attention (CUDA), and TRL's tree attention
on FlashAttention 3 (Hopper). A row is cut into segments; a segment's tokens see the path from its sequence's first token, in
order, up to themselves.
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
"""Of batch, head, query and key positions: whether the query sees the key."""

_BLOCK = 128  # flex_attention skips what nobody sees in squares of so many tokens
_MOST_GRAPHS = 64
_STRIP = 8  # so many rows of squares are looked at together: 16,384 tokens take 16 MiB


def row_multiple(how: TreeAttention | None) -> int:
    """What a row's length has to be a multiple of. flex_attention has a graph for rows of several squares, one for a single square
    and others for parts of one: with two squares at least, the first does for all."""
    return 2 * _BLOCK if how == "flex" else 1


def how_to_attend(packing: Packing, device: torch.device, *, half: bool) -> TreeAttention | None:
    """How rows of shared prefixes are attended to on a device, None for rows that share nothing. `auto`: TRL's kernel on Hopper
    where the package `kernels` is installed and compute is in 16 bits (`half`), flex_attention on other CUDA, segments
    elsewhere. Raises RecipeError for a way that cannot be had; the kernel is fetched here, before anything is sampled."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    suits = hopper and half and importlib.util.find_spec("kernels") is not None
    if packing == "flash3" and not suits:
        needs = "a Hopper GPU, 16-bit compute and the package kernels"
        raise RecipeError(f"packing is 'flash3', which needs {needs}; use auto, flex or segments")
    if packing == "flex" and device.type != "cuda":
        raise RecipeError(f"packing is 'flex', which cannot be trained on {device.type}; use auto or segments")
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
    """A row of T tokens as segments laid end to end. `lengths` (S,): their tokens; `paths` (sum of path lengths,): for each
    segment in turn the row's positions of its sequence from the first token to the segment's last; `path_lengths` (S,).
    `ends` (T,): the end of what descends from each token, which in the row lies right behind it. Padding, behind the last
    segment, sees padding alone."""

    lengths: tuple[int, ...]
    path_lengths: tuple[int, ...]
    paths: Tensor
    ends: Tensor
    positions: Tensor


def tree_layout(segments: Segments, how: TreeAttention, device: torch.device) -> Layout:
    if how == "segments":
        return SegmentLayout(segments, segments.paths.to(device))
    if how == "flex":
        # On a CPU it cannot be trained once compiled.
        return FlexLayout(segments.ends.to(device), segments.positions.to(device), compiled=device.type != "cpu")
    starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (segments.lengths, segments.path_lengths)]
    longest = max(segments.lengths), max(segments.path_lengths)
    return Flash3Layout(segments.paths.to(device), starts[0].to(device), starts[1].to(device), longest)


class SegmentLayout(Layout):
    def __init__(self, segments: Segments, paths: Tensor) -> None:
        self._segments, self._paths = segments, paths
        self._masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = {}

    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        # Gathered with tokens in front, where a token's heads lie together, and as one operation: a slice a segment would write
        # a gradient as long as the row for each of them.
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
        """For each segment (n, path): its last n tokens see what comes before them; None where plain causality says the same.
        What is seen depends on distance alone, so all are cut from one strip: every layer keeps its masks for the backward pass."""
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
    """The row lies in the order of a walk through the tree, so what descends from a token is the stretch behind it."""

    def __init__(self, ends: Tensor, positions: Tensor, *, compiled: bool) -> None:
        """`ends`, `positions` (T,): as in Segments. Raises ValueError where T is no multiple of `row_multiple`."""
        if len(ends) % row_multiple("flex"):
            raise ValueError(f"a row of {len(ends)} tokens; flex_attention wants a multiple of {row_multiple('flex')}")
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
    """What torch's create_block_mask makes, without T x T booleans and without a graph of its own."""
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
    """Of squares (rows, columns): how many of each row are chosen (1, 1, rows), and their columns, those in front
    (1, 1, rows, columns)."""
    columns = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _flex_compiled(query: Tensor, key: Tensor, value: Tensor, **options: object) -> object:
    """flex_attention as one graph for rows of all lengths (and one each without gradients, with a window, of another type). Raises
    torch's FailOnRecompileLimitHit beyond _MOST_GRAPHS, where Dynamo would fall back to scores of all pairs."""
    # Beside the call: the limit is one of the thread's, and with checkpointing layers run again in autograd's.
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
        # Where it is needed: it is experimental, says so when imported, and takes seconds.
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
