"""Shapes of models, published or from a configuration, for estimates of memory."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ctcgrpo.errors import PolicyError
from ctcgrpo.util.strict_yaml import load_yaml

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a dense decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def per_layer(self) -> int:
        """Parameters of a layer's linear maps; norms (a thousandth of them) are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.layers * self.per_layer + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters on all linear maps of all layers."""
        h, q, kv, mlp = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return rank * self.layers * ((h + q) + 2 * (h + kv) + (q + h) + 3 * (h + mlp))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


@cache
def published_shapes() -> dict[str, Shape]:
    loaded = load_yaml((files("ctcgrpo.model") / "models.yaml").read_text(encoding="utf-8"))
    return {name: Shape(**fields) for name, fields in loaded.items()}


def shape_of(config: Any) -> Shape:
    """Raises PolicyError for a model that is not a dense decoder."""
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
        what = f"{config.model_type!r} is not a dense decoder, so its memory cannot be estimated"
        raise PolicyError(f"policy.model: {what} ({error})") from None
