"""EIBench's simulated user with a reward of one's own: long replies cost something.

python recipes/examples/own_reward.py                    # a few steps with a random policy; name a real one behind it
accelerate launch recipes/examples/own_reward.yaml       # the same, as a recipe
"""

import sys
from dataclasses import replace

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer
from ctcgrpo.environments.eibench import EIBench, scenario_tasks


class Brief(EIBench):
    """What a reply does to the user's anger and trust, minus 0.002 for each word beyond 30. The outcome stays EIBench's."""

    async def step(self, reply):
        step = await super().step(reply)
        return replace(step, reward=step.reward - 0.002 * max(0, len(reply.split()) - 30))


def train_tasks():
    return scenario_tasks("english/train")


def held_out_tasks():
    return scenario_tasks("english/test")


if __name__ == "__main__":
    args = CTCGRPOConfig(
        "checkpoints/own_reward",
        num_generations=4,
        per_device_train_batch_size=16,  # episodes: one task of each of the four scenes, each played 4 times
        max_turns=3,
        max_prompt_length=1024,
        max_completion_length=48,
        max_steps=2,
        logging_steps=1,
        bf16=False,
    )
    model = sys.argv[1] if len(sys.argv) > 1 else "builtin/tiny"  # builtin/smollm2, Qwen/Qwen3-0.6B, ...
    CTCGRPOTrainer(model, args, Brief, train_tasks(), held_out_tasks()).train()
