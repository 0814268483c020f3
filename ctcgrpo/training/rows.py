"""Plain rows: turn samples, one after the other, padded to the longest of their row.

A row is what one forward and backward pass takes. How samples are cut into rows changes nothing but speed and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctcgrpo.records import TurnSample

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Row:
    """B samples padded on the right to T tokens.

    Position t holds what belongs to the token at t, predicted from t - 1: `labels` (B, T) its id or -100 where it is not
    trained, `advantages` (B, T), `old_logprobs` (B, T) or None, `mask` (B, T) True where it is trained. `index` (B,) is
    each sample's position among the samples that the rows were made from; a dummy row, which keeps processes in step and
    enters nothing, has an index of -1 and an empty mask.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    mask: torch.Tensor
    index: tuple[int, ...]

    def to(self, device: torch.device) -> Row:
        moved = {name: t.to(device) for name in _TENSORS if (t := getattr(self, name)) is not None}
        return Row(**{"old_logprobs": None, **moved}, index=self.index)


_TENSORS = ("input_ids", "attention_mask", "labels", "advantages", "old_logprobs", "mask")


def plain_rows(samples: Sequence[TurnSample], *, tokens_per_row: int, pad_id: int) -> list[Row]:
    """Rows of at most `tokens_per_row` padded tokens each (a longer sample makes a row of its own), longest first, so that
    a row that does not fit into memory fails at once."""
    order = sorted(range(len(samples)), key=lambda k: len(samples[k]), reverse=True)
    rows: list[list[int]] = []
    for k in order:
        if not rows or (len(rows[-1]) + 1) * len(samples[rows[-1][0]]) > tokens_per_row:
            rows.append([])
        rows[-1].append(k)
    return [make_row([samples[k] for k in row], index=tuple(row), pad_id=pad_id) for row in rows]


def make_row(samples: Sequence[TurnSample], *, index: tuple[int, ...], pad_id: int) -> Row:
    shape = (len(samples), max(map(len, samples)))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    attention_mask, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    advantages, old = torch.zeros(shape), torch.zeros(shape)
    given = [sample.old_logprobs is not None for sample in samples]
    if any(given) != all(given):
        raise ValueError("either all samples of a row have old log-probabilities or none has")
    for b, sample in enumerate(samples):
        trained = slice(len(sample.prompt_ids), len(sample))
        input_ids[b, : len(sample)] = torch.tensor([*sample.prompt_ids, *sample.completion_ids])
        attention_mask[b, : len(sample)] = 1
        labels[b, trained] = torch.tensor(sample.completion_ids)
        mask[b, trained] = True
        advantages[b, trained] = sample.advantage
        if sample.old_logprobs is not None:
            old[b, trained] = torch.tensor(sample.old_logprobs)
    return Row(input_ids, attention_mask, labels, advantages, old if all(given) else None, mask, index)


def dummy_row(pad_id: int) -> Row:
    """A row that runs through the model and changes nothing; its one label is there because a head may need one."""
    row = make_row([TurnSample((pad_id,), (pad_id,), 0.0)], index=(-1,), pad_id=pad_id)
    return Row(row.input_ids, row.attention_mask, row.labels, row.advantages, None, torch.zeros_like(row.mask), row.index)
