"""Rows: the input of one forward and backward pass, and which of its tokens are trained.

Whether samples share their prefixes (packing.py) or are padded side by side (`plain_rows`), and how they are split into rows,
changes only speed and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ctcgrpo.model.tree_attention import Segments
from ctcgrpo.types import TurnSample

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Row:
    """B sequences of T tokens, and E trained tokens.

    `input_ids`, `positions` (B, T). `labels` (B, T): the token that each position predicts, -100 for none. `attention_mask` (B, T):
    1 for tokens, 0 for padding; a row with `segments` has no mask, and B = 1. Each trained token is an entry: `at` (E,) is the flat
    position in (B, T) that predicts it; `advantages` (E,); `old_logprobs`, `sampled_logprobs` (E,), or None; `sample` (E,) is the
    index of its sample. The entries of a sample are contiguous and in order. Samples that share a position each have an entry
    there. A dummy row, which gives all processes the same number of rows, has no entries.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    at: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    sampled_logprobs: torch.Tensor | None
    sample: torch.Tensor
    attention_mask: torch.Tensor | None = None
    segments: Segments | None = None

    @property
    def samples(self) -> int:
        """Number of samples with entries in this row."""
        return len(set(self.sample.tolist()))

    @property
    def turn_weights(self) -> torch.Tensor:
        """(E,): 1 / (trained tokens of its sample), so that a sample's entries sum to 1. A row has all tokens of its samples."""
        _, which, counts = torch.unique(self.sample, return_inverse=True, return_counts=True)
        weights: torch.Tensor = 1.0 / counts.to(torch.float32)[which]
        return weights

    def to(self, device: torch.device) -> Row:
        return replace(self, **{name: t.to(device) for name in _TENSORS if (t := getattr(self, name)) is not None})

    @property
    def tokens(self) -> int:
        """Number of positions without padding."""
        if self.segments is not None:
            return sum(self.segments.lengths)
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


_TENSORS = (
    "input_ids", "positions", "labels", "at", "advantages", "old_logprobs", "sampled_logprobs", "sample", "attention_mask",
)  # fmt: skip


def plain_rows(samples: Sequence[TurnSample], *, tokens_per_row: int, pad_id: int) -> list[Row]:
    """Padded rows of at most `tokens_per_row` tokens; a longer sample has a row of its own. Longest first, so that a row that does
    not fit into memory fails early."""
    order = sorted(range(len(samples)), key=lambda k: len(samples[k]), reverse=True)
    rows: list[list[int]] = []
    for k in order:
        if not rows or (len(rows[-1]) + 1) * len(samples[rows[-1][0]]) > tokens_per_row:
            rows.append([])
        rows[-1].append(k)
    return [_padded(samples, row, pad_id) for row in rows]


def _padded(samples: Sequence[TurnSample], chosen: Sequence[int], pad_id: int) -> Row:
    shape = (len(chosen), max(len(samples[k]) for k in chosen))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.long)
    at = []
    for b, k in enumerate(chosen):
        sample = samples[k]
        predicting = slice(len(sample.prompt_ids) - 1, len(sample) - 1)
        input_ids[b, : len(sample)] = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.completion_ids]))
        mask[b, : len(sample)] = 1
        labels[b, predicting] = torch.from_numpy(sample.completion_ids).long()
        at.append(torch.arange(predicting.start, predicting.stop) + b * shape[1])
    positions = torch.arange(shape[1]).expand(shape)
    return Row(input_ids, positions, labels, torch.cat(at), *entries(samples, chosen), attention_mask=mask)


def entries(
    samples: Sequence[TurnSample], chosen: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(advantages, old log-probabilities, sampled log-probabilities, sample) of the trained tokens of the chosen samples,
    concatenated."""
    counts = torch.tensor([len(samples[k].completion_ids) for k in chosen], dtype=torch.long)
    old, sampled = (joined(samples[k] for k in chosen) for joined in (old_logprobs, sampled_logprobs))
    return (
        torch.tensor([samples[k].advantage for k in chosen], dtype=torch.float32).repeat_interleave(counts),
        None if old is None else torch.from_numpy(old),
        None if sampled is None else torch.from_numpy(sampled),
        torch.tensor(chosen, dtype=torch.long).repeat_interleave(counts),
    )


def old_logprobs(samples: Iterable[TurnSample]) -> npt.NDArray[np.float32] | None:
    """Those of all samples, concatenated; None where they have none. Raises ValueError where only some have."""
    return _concatenated([sample.old_logprobs for sample in samples], "old")


def sampled_logprobs(samples: Iterable[TurnSample]) -> npt.NDArray[np.float32] | None:
    """As `old_logprobs`."""
    return _concatenated([sample.sampled_logprobs for sample in samples], "sampled")


def _concatenated(given: Sequence[npt.NDArray[np.float32] | None], what: str) -> npt.NDArray[np.float32] | None:
    present = [logprobs for logprobs in given if logprobs is not None]
    if present and len(present) < len(given):
        raise ValueError(f"some samples have {what} log-probabilities and others do not; expected all or none")
    return np.concatenate(present) if present else None


def dummy_row(pad_id: int) -> Row:
    """A row without trained tokens, for a process that has fewer rows than others. It has one label, since some heads need one."""
    ids, positions, labels = torch.full((1, 2), pad_id), torch.arange(2).unsqueeze(0), torch.tensor([[pad_id, IGNORE]])
    nothing = torch.zeros(0, dtype=torch.long)
    return Row(ids, positions, labels, nothing, torch.zeros(0), None, None, nothing, attention_mask=torch.ones_like(ids))
