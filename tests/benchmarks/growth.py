"""How the cost of a step grows: groups, turns and reply length doubled, one at a time.

    python -m tests.benchmarks.growth [--times 3] [--threads 2]

The policy of the packing benchmark samples 8 rollouts a group with the transformers engine (no simulator: the user answers at
once), and is updated on dialogues of the same shape. The update is linear in distinct tokens but for attention, which grows with
how far back a token sees; sampling takes a step a token for all dialogues together, each step linear in what is under way.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3ForCausalLM

from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from tests.benchmarks.packing import VOCABULARY, dialogues, policy, work
from tests.benchmarks.timing import alternate, ratio

SHAPES = {
    "4 groups, 4 turns, replies of 40": (4, 4, 40),
    "8 groups": (8, 4, 40),
    "8 turns": (4, 8, 40),
    "replies of 80": (4, 4, 80),
}


def rollouts(model: Qwen3ForCausalLM, groups: int, turns: int, reply: int) -> Callable[[], None]:
    engine = ContinuousEngine(TransformersBatcher(model, pad_id=0, stop_ids=[-1], max_batch=128))
    rng = random.Random(0)

    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(n))

    async def dialogue(prompt: tuple[int, ...], seed: int) -> None:
        for turn in range(turns):
            sampling = Sampling(max_new_tokens=reply)
            done = await engine.generate(prompt, seed=100 * seed + turn, sampling=sampling)
            prompt += done.token_ids + some(35)

    async def all_of_them() -> None:
        openings = [some(480) for _ in range(groups)]
        await asyncio.gather(*(dialogue(openings[k // 8], k) for k in range(8 * groups)))

    def run() -> None:
        engine.take_weights(0)
        asyncio.run(all_of_them())
        engine.sleep()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device("cpu")
    model = policy(device)
    table = Table("shape", "distinct tokens", "update", "rollouts")
    seconds: dict[str, dict[str, list[float]]] = {}
    tokens = {}
    for kind in ("update", "rollouts"):
        sides = {}
        for name, (groups, turns, reply) in SHAPES.items():
            if kind == "update":
                samples = dialogues(groups=groups, turns=turns, reply=reply)
                sides[name], tokens[name] = work(model, samples, packed=True, tokens_per_row=8192, device=device)
            else:
                sides[name] = rollouts(model, groups, turns, reply)
        seconds[kind] = alternate(sides, asked.times)
    first = next(iter(SHAPES))
    for name in SHAPES:
        cells = [str(ratio(seconds[kind][first], seconds[kind][name])) for kind in seconds]
        table.add_row(name, f"{tokens[name]:,} ({tokens[name] / tokens[first]:.2f} x)", *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
