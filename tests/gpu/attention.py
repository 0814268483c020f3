"""Rows of shared prefixes by flex_attention and by segments, against a sequence a turn: log-probabilities, gradients, graphs,
seconds, peak memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ctcgrpo.model.attention import with_layout
from ctcgrpo.model.tree_attention import TreeAttention, row_multiple, tree_layout
from ctcgrpo.training.packing import distinct_tokens, prefix_tree
from ctcgrpo.training.planning import forward_costs, plan
from ctcgrpo.training.rows import Row
from ctcgrpo.types import TurnSample
from tests.gpu.policy import LARGE, load
from tests.gpu.registry import Figures, Machine, check

LENGTHS, LENGTHS_ON_CPU = (16_384, 3_001, 129, 128, 100, 2), (700, 129, 128, 100, 2)
BRANCHES = 6
BOUNDS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.02, 0.1)}
"""Log-probabilities on the mean, in nats, and gradients of the layers' attention, relative. A wrong mask is 0.1 and more off."""
GRAPHS = 2


def samples_of(length: int, vocabulary: int, seed: int = 0) -> list[TurnSample]:
    """Turn samples of `length` distinct tokens, copies where they part included: six dialogues of two turns that begin alike, or,
    below 64 tokens, a lone one."""
    rng = random.Random(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(n))

    if length < 64:
        return [TurnSample(some(length - 1), some(1), 1.0)]
    opening = some(length // 4)
    each = (length - len(opening)) // BRANCHES
    firsts = [(some(each * 2 // 5), some(each // 5)) for _ in range(BRANCHES)]
    seconds = [some(each - each * 2 // 5 - each // 5) for _ in range(BRANCHES)]

    def made() -> list[TurnSample]:
        samples = []
        for (first, user), second in zip(firsts, seconds, strict=True):
            samples.append(TurnSample(opening, first, rng.gauss(0, 1)))
            samples.append(TurnSample(opening + first + user, second, rng.gauss(0, 1)))
        return samples

    def distinct() -> int:
        samples = made()
        return distinct_tokens(prefix_tree(samples), [range(len(samples))])

    off = length - distinct()
    seconds[-1] = seconds[-1] + some(off) if off > 0 else seconds[-1][: len(seconds[-1]) + off]
    assert distinct() == length
    return made()


def rows_of(model: Any, samples: Sequence[TurnSample], how: TreeAttention | None) -> list[Row]:
    """One row of shared prefixes, or, with None, rows of a sequence a turn that are no longer together."""
    return plan(
        samples,
        packed=how is not None,
        tokens_per_row=10**9 if how else max(map(len, samples)),
        pad_id=0,
        costs=forward_costs(model, gathers=how == "segments"),
        multiple=row_multiple(how),
    ).rows


def run_rows(
    model: Any, rows: Sequence[Row], how: TreeAttention | None, *, backward: bool = True, shift: int = 0
) -> dict[int, torch.Tensor]:
    """Forward, and backward into the parameters' gradients; gives log-probabilities by sample. `shift` puts half of the positions
    of each row so far off."""
    scored: dict[int, torch.Tensor] = {}
    for row in (row.to(model.device) for row in rows):
        positions = row.positions.clone()
        positions[:, positions.shape[1] // 2 :] += shift
        layout = tree_layout(row.segments, how, model.device) if row.segments is not None and how else None
        out = model(
            input_ids=row.input_ids,
            position_ids=positions,
            shift_labels=row.labels,
            fused_lm_head=True,
            **with_layout(layout, row.attention_mask),
        )
        scores, entropy = (x.flatten()[row.at] for x in (out.log_probs, out.entropy))
        if backward:
            (-(scores * row.advantages).sum() - 0.001 * entropy.sum()).backward()
        which, counts = row.sample.unique_consecutive(return_counts=True)
        scored |= dict(zip(which.tolist(), scores.detach().float().split(counts.tolist()), strict=True))
    return scored


@dataclass(frozen=True, slots=True)
class Side:
    """One way of attending: `gradients` of the layers' attention (empty without a backward pass), `peak` bytes beyond what the
    policy takes."""

    logprobs: torch.Tensor
    gradients: torch.Tensor
    seconds: float
    peak: int


def side(model: Any, samples: Sequence[TurnSample], how: TreeAttention | None, *, shift: int = 0) -> Side:
    """Run twice: the first time may compile."""
    backward = not (how == "flex" and model.device.type == "cpu")  # flex_attention has no backward pass there
    rows, cuda = rows_of(model, samples, how), model.device.type == "cuda"
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        before, started = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        with torch.set_grad_enabled(backward):
            scored = run_rows(model, rows, how, backward=backward, shift=shift)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    grads = [p.grad.float().flatten() for n, p in model.named_parameters() if "self_attn" in n and p.grad is not None]
    return Side(torch.cat([scored[k] for k in range(len(samples))]), torch.cat(grads) if grads else torch.zeros(0), seconds, peak)


def off(plain: Side, other: Side) -> tuple[float, float]:
    """How far log-probabilities are apart on the mean, and gradients relative to the plain ones (0 where there are none)."""
    apart = float((plain.logprobs - other.logprobs).abs().mean())
    if not len(other.gradients):
        return apart, 0.0
    return apart, float((plain.gradients - other.gradients).norm() / plain.gradients.norm().clamp_min(1e-20))


def compare(machine: Machine, dtype: torch.dtype) -> Figures:
    layers = None if machine.on_cpu or machine.gib > 60 else 1
    model = load(machine, LARGE, dtype, layers=layers)
    lengths, figures = LENGTHS_ON_CPU if machine.on_cpu else LENGTHS, {}
    graphs = torch._dynamo.utils.counters["stats"]
    before, worst = graphs["unique_graphs"], (0.0, 0.0)
    for length in lengths:
        samples = samples_of(length, model.config.vocab_size)
        plain = side(model, samples, None)
        text = f"plain {_cost(plain)}"
        for how in ("segments", "flex"):
            other = side(model, samples, how)
            apart, gradient = off(plain, other)
            assert apart <= BOUNDS[dtype][0] and gradient <= BOUNDS[dtype][1], (
                f"{how}, {length} tokens: log-probabilities {apart:.3g} nats off, gradients {gradient:.3g}; "
                f"expected at most {BOUNDS[dtype]}"
            )
            worst = max(worst[0], apart), max(worst[1], gradient)
            text += f", {how} {_cost(other)}"
            if length == lengths[0] and not machine.on_cpu:
                operations = _operations(model, length) / other.seconds / 1e12
                text += f" ({length / other.seconds:,.0f} tokens/s, {operations:.0f} TFLOP/s)"
        if length in (lengths[0], lengths[1]):
            figures[f"{length:,} tokens:"] = text
    made = graphs["unique_graphs"] - before
    assert made <= GRAPHS, f"{made} graphs for {len(lengths)} lengths; expected at most {GRAPHS}"
    wrong = off(side(model, samples_of(129, model.config.vocab_size), None), _wrong(model))
    assert wrong[0] > BOUNDS[dtype][0], f"positions that are off by 40 moved log-probabilities by {wrong[0]:.3g} nats only"
    return {"log-probabilities": worst[0], "gradients": worst[1], "graphs": made, "a wrong row": wrong[0], **figures}


def _wrong(model: Any) -> Side:
    """A mistake, to see that the comparison notices."""
    samples = [replace(s) for s in samples_of(129, model.config.vocab_size)]
    return side(model, samples, "segments", shift=40)


def _cost(of: Side) -> str:
    return f"{of.seconds:.3f} s" + (f" {of.peak / 2**30:.1f} GiB" if of.peak else "")


def _operations(model: Any, tokens: int) -> float:
    """Floating-point operations of a row's linear maps, forward and backward, without the head."""
    body = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    return 6.0 * body * tokens


@check("attention: flex, segments and plain agree in bfloat16", seconds=90, gib=22, on_cpu=True)
def bfloat16(machine: Machine) -> Figures:
    return compare(machine, torch.bfloat16)


@check("attention: flex, segments and plain agree in float32", seconds=90, gib=22, on_cpu=True)
def float32(machine: Machine) -> Figures:
    return compare(machine, torch.float32)
