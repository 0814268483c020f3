"""Sampling with the trained model itself (rollout.engine=transformers): what it records is what the update computes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import torch

from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.types import Completion
from tests.gpu.policy import LARGE, load
from tests.gpu.registry import Figures, Machine, check

BOUNDS = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.03, 0.3)}
"""Of log-probabilities, in nats: on the mean, and at most."""


def prompts(vocabulary: int, n: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of lengths up to `longest`, the second half with a beginning in common."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocabulary) for _ in range(longest // 2)]
    own = [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest // 2))] for _ in range(n)]
    return [*own[: n // 2], *(shared + ids for ids in own[n // 2 :])]


def sample(engine: PolicyEngine, asked: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
    async def together() -> list[Completion]:
        async with engine:
            return await asyncio.gather(*(engine.generate(p, seed=100 + k, sampling=sampling) for k, p in enumerate(asked)))

    return asyncio.run(together())


@torch.no_grad()
def logits(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """(n, vocabulary), in float32: what predicts each token of a reply, by one plain forward pass."""
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    was, found = model.training, model.eval()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    model.train(was)
    return found


def gaps(model: Any, asked: Sequence[Sequence[int]], done: Sequence[Completion], temperature: float = 1.0) -> torch.Tensor:
    """How far recorded log-probabilities are from the model's, a number a token."""
    found = []
    for prompt, completion in zip(asked, done, strict=True):
        log_p = (logits(model, prompt, completion.token_ids) / temperature).log_softmax(-1).cpu()
        now = log_p[range(len(completion.token_ids)), list(completion.token_ids)]
        found.append((now - torch.tensor(completion.logprobs)).abs())
    return torch.cat(found)


@check("the transformers engine: logprob_gap is bounded", seconds=40, gib=22, on_cpu=True)
def transformers_engine(machine: Machine) -> Figures:
    figures: dict[str, str | int | float] = {}
    for dtype, (mean, most) in BOUNDS.items():
        model = load(machine, LARGE, dtype, layers=None if machine.on_cpu or machine.gib > 40 else 1)
        asked = prompts(model.config.vocab_size, 12, 60 if machine.on_cpu else 600)
        engine = ContinuousEngine(TransformersBatcher(model, pad_id=0, stop_ids=[], max_batch=8))
        engine.take_weights(0)
        done = sample(engine, asked, Sampling(max_new_tokens=8 if machine.on_cpu else 48))
        engine.sleep()
        gap = gaps(model, asked, done)
        name = f"{dtype}".removeprefix("torch.")
        assert float(gap.mean()) <= mean and float(gap.max()) <= most, (
            f"{name}: recorded log-probabilities are {float(gap.mean()):.3g} off on the mean, {float(gap.max()):.3g} at most; "
            f"expected {mean} and {most}"
        )
        figures[name] = f"mean {float(gap.mean()):.2g}, most {float(gap.max()):.2g}"
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        stale = float(gaps(model, asked, done).mean())
        assert stale > 3 * mean, f"{name}: other weights moved log-probabilities by {stale:.3g} nats only"
        engine.close()
    return figures
