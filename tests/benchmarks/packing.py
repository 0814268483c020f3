"""Shared prefixes against one sequence a turn: forward and backward, and peak memory.

    python -m tests.benchmarks.packing [--reasoning 0 150 400] [--times 5] [--threads 2] [--groups 1]
    python -m tests.benchmarks.packing --width 1024 --layers 28 --groups 4 --packing flex     (on a GPU: bfloat16; segments, flash3)

A batch of a published shape: dialogues of 8 turns, prompt about 480 tokens, replies about 60, user lines about 35, with so many
reasoning tokens a turn, which later turns do not see; 8 rollouts a group. The policy has 4 layers of width 256 and a vocabulary of
2,048. Both sides use sdpa, the same threads and token budget, no checkpointing, and score trained positions only; the plain side
has no padding, and its rows are sorted by length.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from ctcgrpo.model.attention import Layout, use_layouts, with_layout
from ctcgrpo.model.head import score_trained_positions_only
from ctcgrpo.model.tree_attention import Packing, how_to_attend, row_multiple, tree_layout
from ctcgrpo.training.planning import forward_costs, plan
from ctcgrpo.training.rows import Row, plain_rows
from ctcgrpo.types import TurnSample
from tests.benchmarks.timing import alternate, ratio

VOCABULARY = 2048


def dialogues(
    *, groups: int = 1, rollouts: int = 8, turns: int = 8, reply: int = 60, reasoning: int = 0, seed: int = 0
) -> list[TurnSample]:
    """The turn samples of some groups; a turn's reasoning stands before its reply and is not seen later."""
    rng = random.Random(seed)

    def words(about: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(round(rng.gauss(about, about / 6))))

    samples = []
    for _ in range(groups):
        opening = words(480)
        for _ in range(rollouts):
            context = opening
            for _ in range(turns):
                answer = words(reply)
                samples.append(TurnSample(context, words(reasoning) + answer, rng.gauss(0, 1)))
                context += answer + words(35)
    return samples


def policy(device: torch.device, layers: int = 4, width: int = 256) -> Qwen3ForCausalLM:
    model = random_qwen3(layers, width).to(device)
    score_trained_positions_only()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    use_layouts(model)
    return model


def random_qwen3(layers: int = 4, width: int = 256) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    heads = width // 128  # the head size of every Qwen3
    config = Qwen3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=128,
        intermediate_size=3 * width,
        vocab_size=VOCABULARY,
    )
    return Qwen3ForCausalLM(config)


class Unshared(Layout):
    """Sequences end to end, each seeing itself: padding-free attention without a prefix tree."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        parts = (x.split(self._lengths, dim=2) for x in (query, key, value))
        seen = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(seen, dim=2).transpose(1, 2)


def unpadded(row: Row) -> tuple[Row, Layout]:
    """A plain row without its padding."""
    assert row.attention_mask is not None
    real = row.attention_mask.bool()
    place = torch.cumsum(real.flatten(), 0) - 1
    flat = {n: getattr(row, n)[real].unsqueeze(0) for n in ("input_ids", "positions", "labels")}
    return replace(row, **flat, at=place[row.at], attention_mask=None), Unshared(real.sum(1).tolist())


def work(
    model: Any,
    samples: Sequence[TurnSample],
    *,
    packed: bool,
    tokens_per_row: int,
    device: torch.device,
    packing: Packing = "auto",
) -> tuple[Callable[[], None], int]:
    """Forward and backward over all rows of one side, and the tokens it forwards."""
    how = how_to_attend(packing, device, half=model.dtype == torch.bfloat16)
    assert how is not None
    if packed:
        costs = forward_costs(model, gathers=how != "flex")
        made = plan(samples, packed=True, tokens_per_row=tokens_per_row, pad_id=0, costs=costs, multiple=row_multiple(how)).rows
        rows = [(r.to(device), tree_layout(r.segments, how, device)) for r in made if r.segments]
    else:
        made = plain_rows(samples, tokens_per_row=tokens_per_row, pad_id=0)
        rows = [(r.to(device), layout) for r, layout in map(unpadded, made)]

    def run() -> None:
        for row, layout in rows:
            out = model(
                input_ids=row.input_ids,
                position_ids=row.positions,
                shift_labels=row.labels,
                fused_lm_head=True,
                **with_layout(layout, None),
            )
            scores, entropy = (x.flatten()[row.at] for x in (out.log_probs, out.entropy))
            (-(scores * row.advantages) - 0.001 * entropy).sum().backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, sum(row.tokens for row, _ in rows)


def peak(packed: bool, reasoning: int, groups: int, tokens_per_row: int, threads: int) -> int:
    """MiB that a process of its own takes for one side, beyond what it has once model and rows are there."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    run, _ = work(
        policy(device),
        dialogues(groups=groups, reasoning=reasoning),
        packed=packed,
        tokens_per_row=tokens_per_row,
        device=device,
    )
    return most_resident(run)


def most_resident(run: Callable[[], object]) -> int:
    """MiB that a call takes at its most, beyond what the process had before."""
    before = most = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    over.set()
    watcher.join()
    return (most - before) // 2**20


def resident() -> int:
    """Bytes that this process holds now; Linux alone says."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reasoning", type=int, nargs="+", default=[0, 150, 400])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--tokens-per-row", type=int, default=8192)
    parser.add_argument("--packing", choices=["auto", "segments", "flex", "flash3"], default="auto")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = policy(device, asked.layers, asked.width)
    if device.type == "cuda":
        model = model.bfloat16()
    for reasoning in asked.reasoning:
        samples = dialogues(groups=asked.groups, reasoning=reasoning)
        sides, tokens = {}, {}
        for name in ("packed", "plain"):
            sides[name], tokens[name] = work(
                model,
                samples,
                packed=name == "packed",
                tokens_per_row=asked.tokens_per_row,
                device=device,
                packing=asked.packing,
            )
        seconds = alternate(sides, asked.times)
        print(
            f"{reasoning} reasoning tokens a turn: {ratio(seconds['packed'], seconds['plain'])}; tokens {tokens['plain']:,} -> "
            f"{tokens['packed']:,} ({tokens['plain'] / tokens['packed']:.2f} x)",
            flush=True,
        )
        if device.type == "cuda":
            rate = tokens["plain"] / statistics.median(seconds["packed"])
            print(f"    {rate:,.0f} tokens of samples a second, packed; {torch.cuda.get_device_name()}", flush=True)
            continue  # memory is measured on a CPU
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # what is freed goes back to the system, and is not counted twice
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as alone:
            rest = (reasoning, asked.groups, asked.tokens_per_row, asked.threads)
            mib = {packed: alone.apply(peak, (packed, *rest)) for packed in (True, False)}
        print(f"    peak memory: {mib[True]} MiB packed, {mib[False]} MiB plain", flush=True)


if __name__ == "__main__":
    main()
