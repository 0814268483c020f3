"""Which modules an adapter may change."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, PretrainedConfig

from ctcgrpo.errors import PolicyError


def refuse_tied_targets(config: PretrainedConfig, adapter: LoraConfig) -> None:
    """Raises PolicyError where an adapter would change one of two modules that share a weight (a head tied to the embedding): once
    merged, it would change the other as well, which makes another policy."""
    if not config.get_text_config().tie_word_embeddings:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shared = model.get_input_embeddings().weight
    tied = [name for name, module in model.named_modules() if getattr(module, "weight", None) is shared]
    hit = [name for name in tied if len(tied) > 1 and check_target_module_exists(adapter, name)]
    if hit:
        raise PolicyError(
            f"policy.lora.target_modules = {adapter.target_modules!r} takes in {hit[0]}, which this model ties to "
            f"{next(name for name in tied if name != hit[0])}: a merged adapter would change both; leave it out (all-linear does)"
        )
