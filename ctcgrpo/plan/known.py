"""Cards and models that a plan can be made for: their data, and a model's shape from its own configuration."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from ctcgrpo.errors import PolicyError
from ctcgrpo.plan.memory import Shape
from ctcgrpo.strict_yaml import load_yaml


@cache
def cards() -> dict[str, float]:
    """GiB by card."""
    loaded: dict[str, float] = load_yaml((files("ctcgrpo.plan") / "cards.yaml").read_text(encoding="utf-8"))
    return loaded


@cache
def published_shapes() -> dict[str, Shape]:
    loaded = load_yaml((files("ctcgrpo.plan") / "models.yaml").read_text(encoding="utf-8"))
    return {name: Shape(**fields) for name, fields in loaded.items()}


def shape_of(config: Any) -> Shape:
    """Raises PolicyError for a model that is no dense decoder, of which the plan would be wrong."""
    try:
        heads = config.num_attention_heads
        return Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )
    except AttributeError as error:
        raise PolicyError(
            f"policy.model: {config.model_type!r} is no dense decoder that can be planned for ({error})"
        ) from None
