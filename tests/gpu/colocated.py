"""vLLM on the GPU that trains: asleep during the update, awake with the new weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ctcgrpo.policy.loading import load_tokenizer
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm
from ctcgrpo.types import Completion
from tests.gpu.engine import logits, prompts, sample
from tests.gpu.policy import LARGE, load, policy_folder
from tests.gpu.registry import Figures, Machine, check

GREEDY = Sampling(temperature=0.0, max_new_tokens=32)
STEPS = 3
TIE, EXACT = 0.3, 0.8
"""How far below the best logit a greedy choice may be, since bfloat16 decides near ties otherwise, and the share of choices that
must be the best. Other weights choose 3 and more below."""


def below_best(model: Any, asked: Sequence[Sequence[int]], done: Sequence[Completion]) -> torch.Tensor:
    """By token, how far the logit of what was chosen is below the model's best."""
    found = []
    for prompt, completion in zip(asked, done, strict=True):
        scores = logits(model, prompt, completion.token_ids)
        chosen = torch.tensor(completion.token_ids, device=scores.device).unsqueeze(-1)
        found.append((scores.max(-1).values - scores.gather(-1, chosen).squeeze(-1)).cpu())
    return torch.cat(found)


@torch.no_grad()
def move(model: Any, seed: int) -> None:
    """Other weights, as far off as a third of what they are."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3 * float(parameter.std()))


def require_greedy(model: Any, asked: Sequence[Sequence[int]], done: Sequence[Completion], who: str) -> tuple[float, float]:
    """(the farthest below the best, share of best choices); AssertionError beyond TIE and EXACT."""
    below = below_best(model, asked, done)
    worst, exact = float(below.max()), float((below == 0).float().mean())
    assert worst <= TIE and exact >= EXACT, (
        f"{who}: a greedy choice is {worst:.3g} below transformers' best logit, {exact:.0%} are the best; expected at most {TIE} "
        f"and at least {EXACT:.0%}"
    )
    return worst, exact


@check("vLLM beside training: greedy output is transformers' after each of three wakes", seconds=150, gib=22, modules=("vllm",))
def sleep_and_wake(machine: Machine) -> Figures:
    model = load(machine, LARGE, torch.bfloat16, fused_head=False)
    tokenizer = load_tokenizer(str(policy_folder(machine, LARGE)))
    asked = prompts(model.config.vocab_size, 12, 400)
    vllm = ColocatedVllm(
        lambda: model, Accelerator(), tokenizer,
        stop_ids=frozenset(), max_length=1024, max_requests=16, gpu_memory=0.4, seed=3,
    )  # fmt: skip
    engine = ContinuousEngine(vllm)
    figures: dict[str, str | int | float] = {}
    before: list[Completion] = []
    for step in range(STEPS):
        move(model, step)
        if before:
            stale = float(below_best(model, asked, before).mean())
            assert stale > TIE, f"the moved weights would have chosen the same ({stale:.3g} below the best): nothing is shown"
        engine.take_weights(step)
        awake = torch.cuda.mem_get_info()[0]
        before = sample(engine, asked, GREEDY)
        engine.sleep()
        freed = (torch.cuda.mem_get_info()[0] - awake) / 2**30
        assert freed > 1, f"asleep, vLLM gave back {freed:.2f} GiB"
        worst, exact = require_greedy(model, asked, before, f"step {step + 1}")
        figures[f"step {step + 1}"] = f"{exact:.0%} the best, {worst:.2g} below; asleep gives back {freed:.1f} GiB"
    engine.close()
    return figures
