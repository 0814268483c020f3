"""Policies of random weights, made on the spot, with a tokenizer that needs no hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.model.attention import use_layouts
from ctcgrpo.model.head import score_trained_positions_only
from ctcgrpo.policy.tiny import build_tokenizer
from ctcgrpo.preflight.memory import Shape
from tests.gpu.registry import Machine


@dataclass(frozen=True, slots=True)
class Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def shape(self) -> Shape:
        return Shape(
            self.hidden,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate,
            self.vocabulary,
            tied=False,
        )


LARGE = Size(4096, 4, 32, 8, 128, 12288, 151_936)
"""Qwen3-8B with 4 of its 36 layers: 2.0 billion parameters."""
MIDDLE = Size(1024, 4, 8, 4, 128, 3072, 151_936)
"""What is trained whole and saved with its optimizer: 0.37 billion parameters, 5 GB a checkpoint."""
SMALL = Size(64, 2, 4, 2, 32, 128, 2048)
"""On a CPU, in place of both."""


def policy_folder(machine: Machine, size: Size, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A policy of this size (SMALL on a CPU), made where it is not there yet."""
    size = SMALL if machine.on_cpu else size
    folder = machine.scratch / f"policy-{size.hidden}-{dtype}".replace("torch.", "")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer = _with_vocabulary(build_tokenizer(s.user_persona for s in load_scenarios("english/train")), size.vocabulary)
        with torch.device(machine.device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_config(size, tokenizer), dtype=dtype)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


def _config(size: Size, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.1 if size is SMALL else 0.02,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _with_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with words of its own for all ids below `size`, which it never makes and can decode."""
    written: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"~{k}": k for k in range(len(tokenizer), size)}
    settings = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "chat_template": tokenizer.chat_template}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)), clean_up_tokenization_spaces=False, **settings
    )


def load(
    machine: Machine,
    size: Size,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
    temperature: float = 1.0,
    fused_head: bool = True,
) -> Any:
    """The policy on the machine's device, as the update has it: layouts in force, TRL's head. `layers`: only the first of them."""
    folder = policy_folder(machine, size)
    config = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **config).to(machine.device)
    if fused_head:
        score_trained_positions_only()
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    use_layouts(model)
    return model.train()
