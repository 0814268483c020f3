"""Steps with overlapping rollouts and updates, against steps without, with users of log-normal latency.

    python -m tests.benchmarks.overlap [--times 3] [--steps 8]

Both run in one process, in alternation, on the same tasks. Times are from the end of the first step to the end of the last one. The
update is real. The engine and the user have stated speeds and take no processor time, as on other machines: a reply takes at most
0.16 s, and a user answers after a log-normal time (99th percentile 6.7 times the median). Three cases: rollouts that take as long
as the update, half as long, and no time at all, where overlap can gain nothing and must not lose.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.types import Completion

SPREAD = math.log(10 / 1.5) / 2.326
EPISODES, TURNS, WORDS = 32, 3, 1000
TASKS = [{"id": f"t{k}", "words": "Say something that nobody has said before. " * 20} for k in range(16)]
SECONDS = {"median": 0.0, "reply": 0.0}


class Slow(Environment):
    async def reset(self, task: Any, *, seed: int) -> str:
        self.turns, self.random = 0, random.Random(seed)
        return str(task["words"])

    async def step(self, reply: str) -> Step:
        self.turns += 1
        await asyncio.sleep(SECONDS["median"] * math.exp(self.random.gauss(0.0, SPREAD)))
        return Step("And then?", reward=len(reply) / 100, done=self.turns == TURNS)


class Paced(PolicyEngine):
    """Random replies at a stated speed."""

    has_own_weights = True

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        rng, n = random.Random(seed), sampling.max_new_tokens
        await asyncio.sleep(SECONDS["reply"])
        return Completion(tuple(rng.randrange(WORDS) for _ in range(n)), (0.0,) * n, "length")


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def run(steps: int, overlap: int) -> tuple[float, dict[str, float]]:
    """Seconds a step, and means of what the trainer logged, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        config = CTCGRPOConfig(
            folder,
            overlap=overlap,
            importance="none",
            sampling_dtype="bfloat16",
            packing="none",
            num_generations=8,
            per_device_train_batch_size=EPISODES,
            max_turns=TURNS,
            max_completion_length=8,
            max_steps=steps,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        made = CTCGRPOTrainer("builtin/tiny", args=config, environment=Slow, train_dataset=TASKS, callbacks=[clock])
        made.remove_callback(PrinterCallback)
        made.engine.close()
        made.engine = made.runner.engine = Paced()
        made.train()
        entries = [entry for entry in made.state.log_history if "seconds/update" in entry][1:]
        names = ("seconds/update", "seconds/rollout", "overlap/trainer_waited", "overlap/engine_waited", "overlap/share")
        means = {name: statistics.fmean(e[name] for e in entries if name in e) for name in names if name in entries[0]}
        return (clock.ends[-1] - clock.ends[0]) / (steps - 1), means


def longest() -> float:
    """The expected time that the longest of a step's episodes waits for its user, in median latencies."""
    rng = random.Random(0)
    draws = (max(sum(math.exp(rng.gauss(0.0, SPREAD)) for _ in range(TURNS)) for _ in range(EPISODES)) for _ in range(200))
    return statistics.fmean(draws)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ctcgrpo").setLevel(logging.ERROR)  # the paced engine's log-probabilities are made up
    _, alone = run(4, 0)
    print(f"without latency: rollouts {alone['seconds/rollout']:.2f} s, update {alone['seconds/update']:.2f} s a step")
    for name, share in (("rollouts as long as the update", 1.0), ("half as long", 0.5), ("no latency", 0.0)):
        left = max(0.0, share * alone["seconds/update"] - alone["seconds/rollout"])
        SECONDS["reply"] = min(0.16, left / 2 / TURNS)
        SECONDS["median"] = (left - TURNS * SECONDS["reply"]) / longest()
        pairs = [(run(asked.steps, 0), run(asked.steps, 1)) for _ in range(asked.times)]
        ratios = [before / after for (before, _), (after, _) in pairs]
        spread = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name} (median latency {SECONDS['median'] * 1000:.0f} ms): steps an hour {spread}")
        for label, found in (("overlap=0", pairs[-1][0]), ("overlap=1", pairs[-1][1])):
            print(f"  {label}: {found[0]:.2f} s a step; " + ", ".join(f"{k} {v:.2f}" for k, v in found[1].items()))


if __name__ == "__main__":
    main()
