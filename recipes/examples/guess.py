"""An environment of one's own, without a user or a server: guess what two words of an unknown language mean.

    python recipes/examples/guess.py                         # trains from this script, in about a minute on a CPU
    accelerate launch recipes/examples/guess.yaml            # the same, as a recipe

The environment says "dax" and "wug", four words an episode. "dax" asks for a long reply, "wug" for a short one; nobody tells the
policy, which begins with random weights. A turn earns 0.25 where its reply fits, so an episode earns up to 1. What a turn earns is
its own doing, which the turn term of the credit knows (alpha 10); with alpha 0 every turn is credited with the whole episode.
"""

import copy
from itertools import product

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step

TASKS = [{"words": list(words)} for words in product(("dax", "wug"), repeat=4)]
HELD_OUT = (1, 6, 11, 12)  # each word twice at each position


class Guess(Environment):
    async def reset(self, task, *, seed):
        self.words = list(task["words"])
        return self.words[0]

    async def step(self, reply):
        word, is_long = self.words.pop(0), len(reply.strip()) > 3
        fits = is_long == (word == "dax")
        return Step(self.words[0] if self.words else None, reward=0.25 * fits, done=not self.words, info={"fits": float(fits)})

    def branch(self, *, seed):  # only the credit vine and `ctcgrpo audit` ask for it
        return copy.deepcopy(self)


def train_tasks():
    return [task for k, task in enumerate(TASKS) if k not in HELD_OUT]


def held_out_tasks():
    return [TASKS[k] for k in HELD_OUT]


def make_trainer(folder="checkpoints/guess", seed=0, **options):
    args = CTCGRPOConfig(
        folder,
        seed=seed,
        num_generations=8,
        num_generations_eval=32,
        per_device_train_batch_size=64,  # episodes: 8 tasks, each played 8 times
        max_turns=4,
        max_completion_length=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        **{"alpha": 10.0, "entropy_coef": 0.0, "max_steps": 40} | options,
    )
    return CTCGRPOTrainer("builtin/tiny", args, Guess, train_dataset=train_tasks(), eval_dataset=held_out_tasks())


if __name__ == "__main__":
    trainer = make_trainer()
    before = trainer.evaluate()["eval_outcome/all"]
    trainer.train()
    after = trainer.evaluate()["eval_outcome/all"]
    print(f"share of replies that fit, in episodes that were not trained on: {before:.2f} before, {after:.2f} after")
