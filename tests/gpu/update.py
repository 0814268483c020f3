"""The update on one device: TRL's head, checkpointing, sameness of configurations, and a LoRA update's memory."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.model.tree_attention import how_to_attend
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.preflight.memory import GIB, Load, memory_plan
from ctcgrpo.training.rows import Row, dummy_row, plain_rows
from ctcgrpo.types import TurnSample
from tests import sameness
from tests.gpu.attention import rows_of, run_rows, samples_of
from tests.gpu.policy import LARGE, SMALL, load, policy_folder
from tests.gpu.registry import Figures, Machine, check
from tests.gpu.training import trainer_on

TEMPERATURE = 0.8
HEAD_BOUNDS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.1)}
"""Log-probabilities and entropies at most, in nats; gradients, relative."""
TRAINED, TRAINED_ON_CPU = (1, 2, 257, 4097), (1, 2, 257)
LORA_TOKENS = 16_384
MEMORY_BOUND = 0.15


def _by_head(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(
        input_ids=row.input_ids,
        position_ids=row.positions,
        shift_labels=row.labels,
        fused_lm_head=True,
        attention_mask=row.attention_mask,
    )
    return out.log_probs.flatten()[row.at], out.entropy.flatten()[row.at]


def _by_logits(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(input_ids=row.input_ids, position_ids=row.positions, attention_mask=row.attention_mask)
    log_p = (out.logits.flatten(0, 1)[row.at].float() / TEMPERATURE).log_softmax(-1)
    chosen = log_p.gather(-1, row.labels.flatten()[row.at].unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def _gradients(model: Any, logprobs: torch.Tensor, entropy: torch.Tensor, *, entropy_weight: float) -> list[torch.Tensor]:
    """Of the output layer, the last norm, and a weight below them."""
    wanted = [model.lm_head.weight, model.model.norm.weight, model.model.layers[0].mlp.down_proj.weight]
    advantages = torch.linspace(-1, 1.5, len(logprobs), device=logprobs.device)
    loss = -(logprobs * advantages).sum() - entropy_weight * entropy.sum()
    return [g.float() for g in torch.autograd.grad(loss, wanted)]


@check("TRL's head against full logits", seconds=40, gib=22, on_cpu=True)
def head(machine: Machine) -> Figures:
    worst = {}
    for dtype, bounds in HEAD_BOUNDS.items():
        model = load(machine, LARGE, dtype, layers=1, temperature=TEMPERATURE)
        rng = random.Random(0)
        scores, gradients = 0.0, 0.0
        for trained in TRAINED_ON_CPU if machine.on_cpu else TRAINED:
            ids = [rng.randrange(model.config.vocab_size) for _ in range(trained + 3)]
            sample = TurnSample(ids[:3], ids[3:], 1.0)
            row = plain_rows([sample], tokens_per_row=1, pad_id=0)[0].to(machine.device)
            for weight in (0.0, 1.0):  # the entropy's gradient among others, where it counts for as much
                found = []
                for way in (_by_head, _by_logits):
                    logprobs, entropy = way(model, row)
                    values = torch.cat([logprobs, entropy]).detach().float()
                    found.append((values, _gradients(model, logprobs, entropy, entropy_weight=weight)))
                (a, grads_a), (b, grads_b) = found
                scores = max(scores, float((a - b).abs().max()))
                apart = [(x - y).norm() / y.norm().clamp_min(1e-20) for x, y in zip(grads_a, grads_b, strict=True)]
                gradients = max(gradients, *map(float, apart))
        assert scores <= bounds[0] and gradients <= bounds[1], (
            f"{dtype}: {scores:.3g} nats, gradients {gradients:.3g}; expected at most {bounds}"
        )
        idle = dummy_row(0).to(machine.device)  # what keeps processes in step: no entry, and no NaN
        model.zero_grad(set_to_none=True)
        (sum(x.sum() for x in _by_head(model, idle)) * 1.0).backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        worst |= {f"{dtype}".removeprefix("torch."): f"{scores:.2g} nats, gradients {gradients:.2g}"}
    return worst


@check("checkpointing changes no gradient, and saves memory", seconds=30, gib=22, on_cpu=True)
def checkpointing(machine: Machine) -> Figures:
    model = load(machine, LARGE, torch.bfloat16, layers=None if machine.on_cpu or machine.gib > 60 else 1)
    how = how_to_attend("segments" if machine.on_cpu else "flex", machine.device, half=True)
    samples = samples_of(300 if machine.on_cpu else 8192, model.config.vocab_size)
    rows, found = rows_of(model, samples, how), {}
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            if not machine.on_cpu:
                torch.cuda.reset_peak_memory_stats()
            run_rows(model, rows, how)
        peak = 0 if machine.on_cpu else torch.cuda.max_memory_allocated()
        grads = [p.grad.float().flatten() for n, p in model.named_parameters() if ".layers." in n]
        found[on] = torch.cat(grads).cpu(), peak
    apart = float((found[True][0] - found[False][0]).norm() / found[False][0].norm())
    assert apart <= 1e-2, f"gradients with checkpointing are {apart:.3g} off; expected at most 0.01"
    if machine.on_cpu:
        return {"gradients": apart}
    off, on = found[False][1] / GIB, found[True][1] / GIB
    assert on < off, f"{on:.1f} GiB with checkpointing, {off:.1f} without"
    return {"gradients": apart, "peak GiB off": off, "peak GiB on": on}


@check("tests.sameness: plain rows, segments and the device's own way", seconds=60, on_cpu=True)
def same(machine: Machine) -> Figures:
    base = machine.scratch / "tiny"
    if not base.exists():
        build_tiny(base, (s.user_persona for s in load_scenarios("english/train")))
    plain = sameness.run(str(base), tokens_per_row=10_000, packing="none")
    figures: dict[str, str | int | float] = {}
    bounds = {
        "gradients": 1e-4,
        "norm": 1e-4,
        "weights": 1e-2,
    }  # ten times the CPU's: kernels sum in another order each time
    for packing in ("segments", "auto") if not machine.on_cpu else ("segments",):
        d = sameness.difference(plain, sameness.run(str(base), tokens_per_row=300, packing=packing))  # type: ignore[arg-type]
        assert all(d[name] <= bound for name, bound in bounds.items()), f"{packing}: {d}; expected at most {bounds}"
        figures[packing] = f"gradients {d['gradients']:.2g}, weights {d['weights']:.2g}"
    wrong = sameness.difference(plain, sameness.run(str(base), tokens_per_row=10_000, packing="none", shift=True))
    assert wrong["gradients"] > 10 * bounds["gradients"], f"a shifted position was not noticed: {wrong}"
    return figures | {"a shifted position": wrong["gradients"]}


@check("a LoRA update takes the memory that `ctcgrpo check` computes", seconds=60, gib=22, on_cpu=True)
def lora(machine: Machine) -> Figures:
    tokens, rank = (500 if machine.on_cpu else LORA_TOKENS), 32
    size = SMALL if machine.on_cpu else LARGE
    samples = samples_of(tokens, size.vocabulary)
    adapter = LoraConfig(r=rank, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_on(
        samples, policy_folder(machine, LARGE), machine.scratch / "lora", peft_config=adapter, bf16=True, max_steps=2,
        gradient_checkpointing=True, tokens_per_row=tokens, learning_rate=1e-4, model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    peaks: list[float] = []
    plain = trainer.update

    def update(*arguments: Any) -> Any:
        if not machine.on_cpu:
            torch.cuda.reset_peak_memory_stats()
        loss = plain(*arguments)
        peaks.append(0.0 if machine.on_cpu else torch.cuda.max_memory_allocated())
        return loss

    trainer.update = update  # type: ignore[method-assign]
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == len(peaks) == 2 and all(0 < norm < float("inf") for norm in norms), norms
    seconds = [entry["seconds/update"] for entry in trainer.state.log_history if "seconds/update" in entry]
    figures: dict[str, str | int | float] = {"tokens": tokens, "seconds": seconds[-1]}
    computed = memory_plan(size.shape, _lora_load(tokens, max(map(len, samples)), rank), machine.gib * GIB)
    allocated = computed.total("update") - computed.parts["CUDA and NCCL"]["update"]  # which the allocator does not count
    figures["computed GiB"] = allocated / GIB
    if machine.on_cpu:
        return figures
    apart = peaks[1] / allocated - 1
    assert abs(apart) <= MEMORY_BOUND, (
        f"the update's peak is {peaks[1] / GIB:.2f} GiB, and ctcgrpo/preflight/memory.py computes "
        f"{allocated / GIB:.2f} ({apart:+.0%}); "
        f"expected within {MEMORY_BOUND:.0%}"
    )
    return figures | {"peak GiB": peaks[1] / GIB, "off by": f"{apart:+.1%}"}


def _lora_load(tokens: int, longest: int, rank: int) -> Load:
    return Load(
        processes=1, sharding="none", offload=False, weight_bytes=2, quantized=False, bf16=True, lora_rank=rank, reference=False,
        checkpointing=True, tokens_per_row=tokens, longest=longest, rollouts=1, gpu_memory=0.0, samples_here=False,
    )  # fmt: skip
