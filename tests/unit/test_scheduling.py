"""Episodes that are expected to be long begin first."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.rollout.scheduling import ExpectedLengths
from ctcgrpo.types import Completion, Episode, Failure, Task, Turn


def episode(task: str, tokens: int, step: int = 1, failure: Failure | None = None) -> Episode:
    turn = Turn((1,), Completion((5,) * tokens, (-1.0,) * tokens, "stop"), "", None, (), "", 0.0, True)
    return Episode(task, "t", step, 0, 0, (turn,), 1.0, failure)


def test_the_longest_expected_come_first_and_others_keep_their_order() -> None:
    lengths = ExpectedLengths()
    slots = [Slot(Task(name, {}, "t"), 2, k, 0) for k, name in enumerate("abcda")]
    assert lengths.longest_first(slots) == [0, 1, 2, 3, 4] and lengths.expected("a") == 0
    for task, tokens in (("a", 10), ("a", 20), ("b", 90), ("c", 3)):
        lengths.note(episode(task, tokens))
    assert lengths.expected("a") == 15 and lengths.expected("d") == (10 + 20 + 90 + 3) / 4
    assert lengths.longest_first(slots) == [1, 3, 0, 4, 2]
    lengths.note(episode("b", 1, step=2))  # only the last batch counts, and no failure
    lengths.note(episode("b", 500, step=3, failure=Failure("deadline", "x")))
    assert lengths.expected("b") == 1 and lengths.longest_first(slots)[-1] == 1


def test_it_shortens_a_batch_that_does_not_fit_at_once() -> None:
    """Simulated: 8 places for 64 episodes, lengths log-normal by task, as expected lengths know them from the batch before."""

    def makespan(order: list[int], seconds: list[float]) -> float:
        free = [0.0] * 8
        for k in order:
            free[free.index(min(free))] += seconds[k]
        return max(free)

    ratios = []
    for seed in range(20):
        rng = random.Random(seed)
        lengths, slots = ExpectedLengths(), [Slot(Task(str(k), {}, "t"), 2, k, 0) for k in range(64)]
        means = [rng.lognormvariate(5, 0.8) for _ in slots]
        for k, mean in enumerate(means):
            for _ in range(4):
                lengths.note(episode(str(k), max(1, round(mean * rng.lognormvariate(0, 0.3)))))
        seconds = [mean * rng.lognormvariate(0, 0.3) for mean in means]
        ratios.append(makespan(list(range(64)), seconds) / makespan(lengths.longest_first(slots), seconds))
    assert sum(ratios) / len(ratios) > 1.1


BEGUN: list[str] = []


class Talk(Environment):
    """As many turns as its task says."""

    async def reset(self, task: Any, *, seed: int) -> str:
        BEGUN.append(self.name)
        self.turns, self.last = 0, int(task["turns"])
        await asyncio.sleep(0)
        return "Say it."

    async def step(self, reply: str) -> Step:
        self.turns += 1
        return Step("And?", reward=len(reply) / 50, done=self.turns == self.last)


def test_a_trainer_learns_lengths_from_its_own_batches(tmp_path: Path) -> None:
    def begun(eval_dataset: Any = None, **options: Any) -> list[list[str]]:
        BEGUN.clear()
        made = CTCGRPOTrainer(
            "builtin/tiny",
            args=CTCGRPOConfig(
                str(tmp_path),
                num_generations=2,
                per_device_train_batch_size=6,
                max_turns=3,
                max_completion_length=4,
                num_train_epochs=2,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                shuffle_dataset=False,
                **options,
            ),
            environment=Talk,
            train_dataset=[{"id": f"t{k}", "turns": k} for k in (1, 3, 2)],
            eval_dataset=eval_dataset,
        )
        made.train()
        tasks = [name.split("/")[1] for name in BEGUN]
        return [tasks[:6:2], tasks[6::2]]

    assert begun() == [["t1", "t3", "t2"], ["t3", "t2", "t1"]]
    held_out = [{"id": f"t{k}", "turns": 4 - k} for k in (1, 3, 2)]  # other tasks, with the same ids
    begun(eval_steps=1, eval_strategy="steps", eval_dataset=held_out, num_generations_eval=8)
    assert [name.split("/")[1] for name in BEGUN[-30:-24:2]] == ["t3", "t2", "t1"]
    assert begun(deterministic=True) == [["t1", "t3", "t2"]] * 2
