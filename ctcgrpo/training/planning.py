"""The plan of an update: which rows, and which process runs them. Every process makes the same plan and takes its part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from ctcgrpo.training.packing import Costs, cut, dealt, distinct_tokens, packed_row, prefix_tree, row_costs
from ctcgrpo.training.rows import Row, dummy_row, plain_rows
from ctcgrpo.types import TurnSample


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows`: one process's, the longest first, as many as any process has. The rest is about all processes: `tokens` of all
    samples, `forwarded` of them after sharing, `padding` as a share of what is forwarded, `imbalance`: the work of the
    busiest process over the mean, 1 at best."""

    rows: list[Row]
    tokens: int
    forwarded: int
    padding: float
    imbalance: float


def forward_costs(model: PreTrainedModel, *, gathers: bool = False) -> Costs:
    """The floating-point operations of a forward pass: two a weight and token, four a pair, channel and layer. `gathers`: attention
    gathers keys and values along paths; they take their part of what a layer keeps of a token."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    kept = kept_per_token(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate)
    embedding = config.vocab_size * hidden
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    body = max(0, weights - embedding * (1 if config.tie_word_embeddings else 2))
    return Costs(
        token=2.0 * body,
        pair=4.0 * heads * head_dim * config.num_hidden_layers,
        trained=2.0 * embedding,
        path=2 * kv_heads * head_dim / kept if gathers else 0.0,
    )


def kept_per_token(*, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> int:
    """Numbers that a layer keeps of a token for its backward pass: its input twice (residual, normed), queries, keys, values, the
    attention's output, and the gated MLP's three wide vectors with their product."""
    return 4 * hidden + (2 * heads + 2 * kv_heads) * head_dim + 4 * intermediate


def plan(
    samples: Sequence[TurnSample],
    *,
    packed: bool,
    tokens_per_row: int,
    pad_id: int,
    costs: Costs,
    process: int = 0,
    processes: int = 1,
    multiple: int = 1,
) -> Plan:
    """`samples`: those of all processes, in the same order on each; `multiple`: what the lengths of packed rows are multiples
    of, a row of `tokens_per_row` included."""
    if not samples:
        return Plan([], 0, 0, 0.0, 1.0)
    if packed:
        tree = prefix_tree(samples)
        stretches = cut(tree, tokens_per_row=tokens_per_row, processes=processes, costs=costs)
        work, forwarded = row_costs(tree, stretches, costs), distinct_tokens(tree, stretches)
        taken = dealt(work, processes)
        mine = [packed_row(tree, stretches[k], samples, pad_id=pad_id, multiple=multiple) for k in taken[process]]
        lengths = [distinct_tokens(tree, [stretch]) for stretch in stretches]
        padding = 1 - forwarded / sum(-(-length // multiple) * multiple for length in lengths)
    else:
        rows = plain_rows(samples, tokens_per_row=tokens_per_row, pad_id=pad_id)
        work = np.array([_padded_cost(row, costs) for row in rows])
        taken = dealt(work, processes)
        mine = [rows[k] for k in taken[process]]
        forwarded = sum(row.tokens for row in rows)
        padding = 1 - forwarded / sum(row.input_ids.numel() for row in rows)
    loads = [float(work[list(rows)].sum()) for rows in taken]
    most = max(map(len, taken))
    mine = sorted(mine, key=lambda row: row.input_ids.numel(), reverse=True)
    return Plan(
        rows=[*mine, *[dummy_row(pad_id)] * (most - len(mine))],
        tokens=sum(map(len, samples)),
        forwarded=forwarded,
        padding=padding,
        imbalance=max(loads) / (sum(loads) / len(loads)),
    )


def _padded_cost(row: Row, costs: Costs) -> float:
    sequences, length = row.input_ids.shape
    each = costs.of(np.array([length]), np.array([0]), np.array([0]))[0]
    return float(sequences * each + costs.trained * len(row.at))
