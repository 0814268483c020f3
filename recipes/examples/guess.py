"""An environment of one's own, without a user or a server: guess a letter, told each time whether it comes earlier or later.

    python recipes/examples/guess.py                         # trains from this script
    accelerate launch recipes/examples/guess.yaml            # the same, as a recipe

A turn earns by how much closer its guess is than the one before, so an episode earns the closeness of its last guess.
"""

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Guess(Environment):
    """The first letter of a reply is the guess."""

    async def reset(self, task, *, seed):
        self.letter, self.closeness = LETTERS.index(task["letter"]), 0.0
        return "Which letter?"

    async def step(self, reply):
        guess = LETTERS.find(reply[:1].lower())
        if guess < 0:
            return Step("a letter, please", reward=0.0)
        before, self.closeness = self.closeness, 1 - abs(guess - self.letter) / len(LETTERS)
        hint = "earlier" if guess > self.letter else "later" if guess < self.letter else None
        return Step(hint, reward=self.closeness - before, done=hint is None)


def tasks():
    return [{"letter": letter} for letter in LETTERS]


if __name__ == "__main__":
    trainer = CTCGRPOTrainer(
        model="builtin/tiny",
        args=CTCGRPOConfig(
            "checkpoints/guess",
            alpha=3.0,
            num_generations=8,
            per_device_train_batch_size=64,
            max_turns=4,
            max_completion_length=1,
            max_steps=60,
            learning_rate=3e-3,
            bf16=False,
            save_strategy="no",
        ),
        environment=Guess,
        train_dataset=tasks(),
        eval_dataset=tasks(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print("closeness of the best guess before and after:", before["eval_outcome/all"], after["eval_outcome/all"])
