"""Shared prefixes: every sample once, exactly as it stands alone, in rows that cost about the same."""

from __future__ import annotations

import random
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo import config as dynamo
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ctcgrpo.errors import PolicyError, RecipeError
from ctcgrpo.model import tree_attention
from ctcgrpo.model.attention import use_layouts, with_layout
from ctcgrpo.model.tree_attention import FlexLayout, TreeAttention, how_to_attend, row_multiple, tree_layout
from ctcgrpo.training.packing import Costs, dealt, prefix_tree
from ctcgrpo.training.planning import Plan, forward_costs, plan
from ctcgrpo.types import TurnSample

CPU = torch.device("cpu")


def model_of(**more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=20,
        initializer_range=0.3,
        **more,  # type: ignore[arg-type]
    )
    model: PreTrainedModel = Qwen3ForCausalLM(config).eval()
    use_layouts(model)
    return model


MODELS = {
    "full": model_of(),
    "sliding": model_of(use_sliding_window=True, sliding_window=4, max_window_layers=1),
}


@st.composite
def sample_lists(draw: st.DrawFn) -> list[TurnSample]:
    """Samples that begin alike, end inside each other, go on from each other, or are the same."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    vocabulary = rng.choice([2, 3, 20])

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(rng.randint(least, most)))

    beginnings, samples = [some(1, 8), some(1, 8)], []
    for _ in range(draw(st.integers(1, 14))):
        samples.append(TurnSample(rng.choice(beginnings) + some(0, 3), some(1, 6), rng.gauss(0, 1)))
        if rng.random() < 0.5:
            beginnings.append((*samples[-1].prompt_ids.tolist(), *samples[-1].completion_ids.tolist()))
    return samples + samples[: draw(st.integers(0, 1))]


def planned(
    samples: list[TurnSample],
    *,
    packed: bool = True,
    budget: int = 50,
    processes: int = 1,
    how: TreeAttention = "segments",
) -> list[Plan]:
    options = {"costs": forward_costs(MODELS["full"], gathers=True), "multiple": row_multiple(how)}
    return [
        plan(samples, packed=packed, tokens_per_row=budget, pad_id=0, process=p, processes=processes, **options)  # type: ignore[arg-type]
        for p in range(processes)
    ]


def scored(model: PreTrainedModel, plans: list[Plan], how: TreeAttention = "segments") -> dict[int, torch.Tensor]:
    """By sample, the log-probabilities that the rows give its completion."""
    result: dict[int, torch.Tensor] = {}
    for row in (row for made in plans for row in made.rows if len(row.at)):
        layout = tree_layout(row.segments, how, CPU) if row.segments else None
        output = model(
            input_ids=row.input_ids, position_ids=row.positions, use_cache=False, **with_layout(layout, row.attention_mask)
        )
        log_p = output.logits.log_softmax(-1).flatten(0, 1)[row.at, row.labels.flatten()[row.at]]
        which, counts = row.sample.unique_consecutive(return_counts=True)
        for k, numbers in zip(which.tolist(), log_p.split(counts.tolist()), strict=True):
            assert k not in result
            result[k] = numbers
    return result


@settings(deadline=None, max_examples=60)
@given(sample_lists(), st.integers(8, 80), st.integers(1, 3), st.sampled_from(sorted(MODELS)))
def test_every_sample_is_scored_as_it_is_alone(samples: list[TurnSample], budget: int, processes: int, kind: str) -> None:
    model = MODELS[kind]
    with torch.no_grad():
        alone = scored(model, planned(samples, packed=False, budget=1))
        for how in ("segments", "flex"):
            plans = planned(samples, budget=budget, processes=processes, how=how)  # type: ignore[arg-type]
            shared = scored(model, plans, how)  # type: ignore[arg-type]
            assert shared.keys() == alone.keys() == set(range(len(samples)))
            assert max(float((shared[k] - alone[k]).abs().max()) for k in alone) < 2e-5


@settings(deadline=None)
@given(sample_lists(), st.integers(8, 80), st.integers(1, 4))
def test_rows_keep_to_the_budget_and_processes_take_equally_many(samples: list[TurnSample], budget: int, processes: int) -> None:
    plans = planned(samples, budget=budget, processes=processes)
    assert len({len(made.rows) for made in plans}) == 1 and len({made.forwarded for made in plans}) == 1
    rows = [row for made in plans for row in made.rows if len(row.at)]
    assert sum(row.tokens for row in rows) == plans[0].forwarded
    assert sum(len(row.at) for row in rows) == sum(len(s.completion_ids) for s in samples)
    for row in rows:
        assert row.tokens <= budget or len(row.sample.unique()) == 1
        assert row.segments is not None and sum(row.segments.lengths) == row.tokens
        for k in row.sample.unique().tolist():
            own = row.sample == k
            assert row.labels.flatten()[row.at[own]].tolist() == list(samples[k].completion_ids)
            assert row.advantages[own].unique().tolist() == pytest.approx([samples[k].advantage])


@settings(deadline=None, max_examples=20)
@given(sample_lists(), st.integers(8, 80))
def test_rows_for_flex_attention_are_padded_and_padding_is_in_nobodys_way(samples: list[TurnSample], budget: int) -> None:
    made = planned(samples, budget=budget, how="flex")[0]
    lengths = [row.input_ids.numel() for row in made.rows]
    assert all(n % 256 == 0 for n in lengths)
    assert sum(row.tokens for row in made.rows) == made.forwarded
    assert made.padding == pytest.approx(1 - made.forwarded / sum(lengths))
    for row in made.rows:
        assert row.segments is not None and len(row.segments.ends) == row.positions.numel()
        assert bool((row.segments.ends[: row.tokens] <= row.tokens).all())
        assert bool((row.labels[:, row.tokens :] == -100).all()) and int(row.at.max()) < row.tokens


def test_squares_of_the_mask_are_those_that_torch_finds() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    samples = [s for _ in range(3) for s in dialogue(tuple(range(300)), 6, random.Random(5), 40)]
    row = planned(samples, budget=10**6, how="flex")[0].rows[0]
    assert row.segments is not None and row.tokens > 8 * 128  # more than a strip
    for window in (None, 400):
        layout = FlexLayout(row.segments.ends, row.segments.positions, compiled=False)
        q, k = torch.randn(1, 2, row.input_ids.numel(), 8), torch.randn(1, 1, row.input_ids.numel(), 8)
        layout.attend(torch.nn.Identity(), q, k, k, scale=1.0, window=window)
        ours = layout._masks[window]
        theirs = create_block_mask(ours.mask_mod, None, None, *ours.seq_lengths, device="cpu")
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks) and bool(ours.full_kv_num_blocks.any())


def test_rows_of_fifty_lengths_are_attended_to_by_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces on a CPU as it does on a GPU. What it traced runs as it is: no compiler is needed here."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = torch.compile(tree_attention.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(tree_attention, "_graph", lambda: eager)
    rng = random.Random(1)
    for length in [1500, 1, 2, 100, 128, 129, 256, 257, *(rng.randint(2, 1500) for _ in range(42))]:
        row = planned([TurnSample((1,) * length, (2,), 1.0)], budget=10**6, how="flex")[0].rows[0]
        assert row.segments is not None
        layout = FlexLayout(row.segments.ends, row.segments.positions, compiled=True)
        q, k = (torch.randn(1, row.input_ids.numel(), heads, 8).transpose(1, 2) for heads in (2, 1))
        with torch.no_grad():
            seen = layout.attend(torch.nn.Identity(), q, k, k, scale=0.5, window=None)[0, : length + 1]
            wanted = scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.5, enable_gqa=True)
        torch.testing.assert_close(seen, wanted[0, :, : length + 1].transpose(0, 1), atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        layout.attend(torch.nn.Identity(), q, k, k, scale=0.5, window=5)
    assert counters["stats"]["unique_graphs"] == 2
    # In a thread of its own, as autograd's are, it has the same room.
    found: list[int] = []
    thread = Thread(target=lambda: (tree_attention._flex_compiled(q, q, q), found.append(dynamo.recompile_limit)))
    thread.start()
    thread.join()
    assert found == [64]


def test_too_many_graphs_raise_and_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(tree_attention, "_MOST_GRAPHS", 2)
    eager = torch.compile(tree_attention.flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(tree_attention, "_graph", lambda: eager)

    def attend(tokens: int) -> None:
        ends = torch.full((tokens,), tokens)
        x = torch.randn(1, 1, tokens, 8)
        FlexLayout(ends, torch.arange(tokens), compiled=True).attend(torch.nn.Identity(), x, x, x, scale=1.0, window=None)

    with torch.no_grad(), dynamo.patch(recompile_limit=2):
        attend(256)
        attend(512)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(768)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="a row of 200 tokens; flex_attention needs a multiple of 256"):
        FlexLayout(torch.full((200,), 200), torch.arange(200), compiled=True)


def dialogue(opening: tuple[int, ...], turns: int, rng: random.Random, reasoning: int) -> list[TurnSample]:
    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2000) for _ in range(n))

    samples, context = [], opening
    for _ in range(turns):
        reply = some(60)
        samples.append(TurnSample(context, some(reasoning) + reply, 1.0))
        context += reply + some(35)
    return samples


@pytest.mark.parametrize("reasoning", [0, 150])
def test_what_is_forwarded_is_what_is_distinct(reasoning: int) -> None:
    rng = random.Random(1)
    opening = tuple(range(480))
    samples = [s for _ in range(4) for s in dialogue(opening, 8, rng, reasoning)]
    texts = [(*s.prompt_ids.tolist(), *s.completion_ids.tolist()) for s in samples]
    distinct = len({text[: n + 1] for text in texts for n in range(len(text))})
    made = planned(samples, budget=10**6)[0]
    # A copy of a position for each place where samples part.
    assert distinct <= made.forwarded <= distinct + len(samples)
    assert len(made.rows) == 1 and made.padding == 0


def test_what_a_row_gathers_counts() -> None:
    rng = random.Random(3)
    opening = tuple(range(1000))
    samples = [TurnSample(opening, tuple(rng.randrange(2000) for _ in range(20)), 1.0) for _ in range(200)]
    rows = planned(samples, budget=4000)[0].rows
    assert len(rows) > 2  # by its distinct tokens alone it would be two
    for row in rows:
        assert row.segments is not None
        assert row.tokens + forward_costs(MODELS["full"], gathers=True).path * len(row.segments.paths) <= 4000


def test_trls_kernel_is_told_where_segments_and_paths_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 replaced by attention over each stretch, aligned at its end as the kernel's is."""
    from trl.experimental.async_grpo import packing

    def varlen(q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, q_most: int, k_most: int, **options: Any) -> Any:
        assert options["causal"] and int(q_starts.diff().max()) == q_most and int(k_starts.diff().max()) == k_most
        parts = []
        for a, b, c, d in zip(q_starts[:-1], q_starts[1:], k_starts[:-1], k_starts[1:], strict=True):
            mask = torch.ones(int(b - a), int(d - c), dtype=torch.bool).tril(int(d - c - b + a))
            heads = (x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d]))
            seen = scaled_dot_product_attention(*heads, attn_mask=mask, scale=options["softmax_scale"], enable_gqa=True)
            parts.append(seen[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen))
    samples = [
        TurnSample(tuple(t % 20 for t in s.prompt_ids), tuple(t % 20 for t in s.completion_ids), s.advantage)
        for s in dialogue(tuple(range(10)), 4, random.Random(4), 5)
    ]
    with torch.no_grad():
        segments = scored(MODELS["full"], planned(samples, budget=300), "segments")
        kernel = scored(MODELS["full"], planned(samples, budget=300), "flash3")
    for k in segments:
        torch.testing.assert_close(segments[k], kernel[k], atol=1e-5, rtol=0)


def test_processes_have_equally_much_to_do_however_long_the_dialogues() -> None:
    rng = random.Random(2)
    samples = []
    for _ in range(8):
        opening = tuple(rng.randrange(2000) for _ in range(480))
        samples += [s for turns in (1, 1, 2, 8) for s in dialogue(opening, turns, rng, 50)]
    made = planned(samples, budget=6000, processes=4)[0]
    assert made.imbalance < 1.15
    one = planned(samples, budget=6000)[0]
    assert made.forwarded < 1.25 * one.forwarded  # what cutting repeats


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(1, 6))
def test_rows_are_dealt_out_evenly(work: list[float], processes: int) -> None:
    taken = dealt(np.array(work), processes)
    assert sorted(k for rows in taken for k in rows) == list(range(len(work)))
    assert max(map(len, taken)) == -(-len(work) // processes)


def test_a_tree_says_what_each_sample_adds() -> None:
    tree = prefix_tree([TurnSample((1, 2), (3, 4), 0.0), TurnSample((1, 2, 3), (5,), 0.0), TurnSample((1,), (2,), 0.0)])
    # [1, 2], then [1, 2 | 3, 4] goes on from its end, then [1, 2 | 3, 5] with a copy of the 3 that predicts 5.
    assert tree.order.tolist() == [2, 0, 1] and tree.forks.tolist() == [0, 2, 2]
    assert Costs(pair=1.0, token=0.0).of(np.array([2]), np.array([3]), np.array([0])).tolist() == [2 * 3 + 3]


def test_left_padded_generation_with_layouts_in_force_is_sdpas() -> None:
    model, plain = model_of(), model_of()
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    asked = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    results = [m.generate(ids, attention_mask=mask, **asked) for m in (model, plain)]  # type: ignore[operator]
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))


def test_what_cannot_share_prefixes_is_refused_by_name() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    dropout = GemmaForCausalLM(GemmaConfig(**small, head_dim=8, attention_dropout=0.1))
    with pytest.raises(PolicyError, match="GemmaForCausalLM cannot share prefixes.*attention_dropout is 0.1"):
        use_layouts(dropout)
    capped = GemmaForCausalLM(GemmaConfig(**small, head_dim=8))
    capped.config.attn_logit_softcapping = 50.0
    with pytest.raises(PolicyError, match="soft-capped.*set packing to 'none'"):
        use_layouts(capped)
    recurrent = GemmaForCausalLM(GemmaConfig(**small, head_dim=8))
    recurrent.config.layer_types = ["linear_attention"]
    with pytest.raises(PolicyError, match="layers of type linear_attention"):
        use_layouts(recurrent)
    stretched = Phi3ForCausalLM(Phi3Config(**small, pad_token_id=0))
    stretched.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(PolicyError, match=r"rotary positions \(longrope\) depend on the longest one of a batch"):
        use_layouts(stretched)
    use_layouts(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, attn_pdrop=0.0)))
    with pytest.raises(RecipeError, match="'flex', which cannot be trained on cpu; try auto or segments"):
        how_to_attend("flex", CPU, half=False)
    with pytest.raises(RecipeError, match="expected a Hopper GPU"):
        how_to_attend("flash3", CPU, half=True)
    assert how_to_attend("auto", CPU, half=True) == "segments" and how_to_attend("none", CPU, half=False) is None
