"""Whether the run fits the GPU that its recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from ctcgrpo.errors import RecipeError
from ctcgrpo.model.shapes import GIB
from ctcgrpo.model.sharding import FSDP2, deepspeed_stage, offloads
from ctcgrpo.preflight.memory import PHASES, Load, memory_plan
from ctcgrpo.preflight.subject import Finding, Subject, failed, ok, warning
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.strict_yaml import load_yaml

_FULL_AT_WAKE = 0.9
"""The share of a card beyond which a colocated vLLM may find no room to wake, for fragmentation."""


@cache
def cards() -> dict[str, float]:
    """GiB by card."""
    loaded: dict[str, float] = load_yaml((files("ctcgrpo.preflight") / "cards.yaml").read_text(encoding="utf-8"))
    return loaded


def memory(s: Subject) -> Iterator[Finding]:
    gpu = s.recipe.hardware.gpu
    if s.shape is None or gpu is None:
        return
    known = cards()
    if gpu not in known:
        raise RecipeError(f"hardware.gpu is {gpu!r}; {did_you_mean(gpu, known)}")
    load = load_of(s.recipe)
    s.memory = plan = memory_plan(s.shape, load, known[gpu] * GIB)
    worst = max(PHASES, key=plan.total)
    text = f"{plan.total(worst) / GIB:.1f} of {gpu}'s {plan.card / GIB:.1f} GiB, most in the {worst}"
    if not plan.fits:
        what = "rollout.vllm.gpu_memory" if worst == "rollout" else "training.tokens_per_row"
        yield failed(f"{text}; lower {what}, shard more (training.sharding), use more GPUs, or policy.lora")
        return
    if plan.kv_tokens is None:
        yield ok(text)
        return
    if plan.total("rollout") > _FULL_AT_WAKE * plan.card:
        share = f"{plan.total('rollout') / plan.card:.0%} in rollouts; vLLM wakes into what the update has left in pieces"
        yield warning(f"{text}, {share}; lower rollout.vllm.gpu_memory to stay below {_FULL_AT_WAKE:.0%}")
    else:
        yield ok(text)
    wanted = f"{load.rollouts} rollouts of full length want {plan.kv_wanted:,}"
    room = f"vLLM has room for keys and values of {plan.kv_tokens:,} tokens, and {wanted}"
    if plan.kv_tokens < s.longest:
        yield failed(f"{room}: not even one fits; raise rollout.vllm.gpu_memory")
    elif plan.kv_tokens < plan.kv_wanted:
        yield warning(f"{room}: some will wait for others")
    else:
        yield ok(room)


def load_of(recipe: Recipe) -> Load:
    rollout, training, policy = recipe.rollout, recipe.training, recipe.policy
    stage = deepspeed_stage(training.sharding)
    here = recipe.tasks_per_step * rollout.group_size // recipe.hardware.processes
    return Load(
        processes=recipe.hardware.processes,
        sharding="fsdp2" if training.sharding == FSDP2 else ("none", "zero1", "zero2", "zero3")[stage],
        offload=offloads(training.sharding),
        weight_bytes=4 if policy.dtype == "float32" else 2,
        quantized=policy.quantization != "none",
        bf16=training.bf16,
        lora_rank=policy.lora.rank if policy.lora else None,
        reference=training.kl > 0,
        checkpointing=training.gradient_checkpointing,
        tokens_per_row=training.tokens_per_row,
        longest=rollout.max_prompt_tokens + rollout.max_new_tokens,
        rollouts=min(rollout.max_batch, max(1, here)),
        gpu_memory=rollout.vllm.gpu_memory if rollout.engine == "vllm_colocated" else 0.0,
        samples_here=rollout.engine == "transformers",
    )
