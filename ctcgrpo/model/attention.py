"""Attention with a layout, an argument of the forward call that defines which tokens attend to which.

transformers allows a model's attention to be replaced by name. Ours is its sdpa, unless the call has a `layout`: a tree of shared
prefixes in the update, or a cache of running dialogues in generation. The layout is an argument and not part of the model, so that
gradient checkpointing, which calls layers again, uses the one of its inputs.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ctcgrpo.errors import PolicyError

NAME = "ctcgrpo"


class Layout(ABC):
    """B rows of T tokens each, in some arrangement of sequences."""

    @abstractmethod
    def attend(self, module: Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
        """query (B, heads, T, D), key and value (B, key heads, T, D) of layer `module` -> (B, T, heads, D). `window`: the
        number of positions that a token attends to, itself included; None for all earlier ones."""


def with_layout(layout: Layout | None, attention_mask: Tensor | None) -> dict[str, Any]:
    """The arguments of a model's forward call for `layout`, or for a plain mask if there is none."""
    if layout is None:
        return {"attention_mask": attention_mask}
    # transformers builds no mask where it gets one with four dimensions. Our attention does not use it.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "layout": layout}


def use_layouts(model: PreTrainedModel | PeftModel) -> None:
    """Enable layouts for `model`, or for the base model of its adapter. Raises PolicyError as `refuse_layouts`."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    refuse_layouts(model)
    model.set_attn_implementation(NAME)


def refuse_layouts(model: PreTrainedModel) -> None:
    """Raises PolicyError for a model with layers that are not causal attention (recurrent ones), or with features that our
    attention does not compute (sinks, soft caps)."""
    if problem := _problem(model):
        raise PolicyError(
            f"{type(model).__name__} cannot share prefixes or reuse its cache: {problem}; "
            "set packing to 'none' and let vLLM sample (use_vllm; in a recipe rollout.engine)"
        )


def _problem(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return "its layers do not take their attention from transformers' interface"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "it takes no position ids"
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None) or getattr(config, "alibi", False):
        return "its positions are not rotary"
    if stretched := _rope_types(config) & {"dynamic", "longrope"}:
        return f"its rotary positions ({', '.join(stretched)}) depend on the longest one of a batch"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention scores are soft-capped (attn_logit_softcapping)"
    if any("sinks" in name for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}"
    return None


def _rope_types(config: Any) -> set[str]:
    """The types of rotary positions of all layers: the parameters are one mapping, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(p for p in parameters.values() if isinstance(p, Mapping))]
    return {str(p["rope_type"]) for p in each if "rope_type" in p}


def _attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
        return plain
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast norms leave queries and keys in float32, and sdpa would round them: here layouts keep and gather them.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return layout.attend(module, query, key, value, scale=scale, window=sliding_window), None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """sdpa over (B, heads, T, D) and (B, key heads, T', D); without a mask it is causal, and T = T'."""
    if mask is not None and query.device.type == "cuda":  # heads that share keys, with a mask, have no fused kernel there
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
