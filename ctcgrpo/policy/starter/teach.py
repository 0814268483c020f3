"""Building the starter: tokenizer, random weights, and some minutes of supervised learning on the corpus."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from ctcgrpo.policy.starter.corpus import Lesson, Situation, load_corpus, long_lessons, short_lessons
from ctcgrpo.policy.starter.wiring import wire
from ctcgrpo.policy.tiny import TURN_END, TURN_START, build_model, build_tokenizer

# How many batches of each kind of lesson, and how many examples in one.
REPEAT, NAMING, SHORT, LONG = 60, 300, 60, 520
VOCABULARY = 6144
REPEAT_BATCH, SHORT_BATCH, LONG_BATCH = 64, 32, 8
LEARNING_RATE, WARMUP = 6e-3, 20
IGNORE = -100
Example = tuple[list[int], list[int]]
"""Token ids, and labels of the same length: IGNORE where nothing is to be learned."""


def build_starter(
    folder: Path, situations: Sequence[Situation], *, seed: int, say: Callable[[str], None] = lambda _: None
) -> None:
    """Write model and tokenizer to `folder`; the same seed gives the same starter on the same machine."""
    model, tokenizer = untaught_starter(situations, seed)
    teach(model, curriculum(tokenizer, situations, seed), steps=REPEAT + NAMING + SHORT + LONG, say=say)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def untaught_starter(situations: Sequence[Situation], seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """The starter before its first lesson."""
    tokenizer = build_tokenizer(_texts(situations), vocab_size=VOCABULARY)
    model = build_model(tokenizer, seed=seed, hidden_size=128, layers=2, heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wire(model)
    return model, tokenizer


def curriculum(tokenizer: PreTrainedTokenizerBase, situations: Sequence[Situation], seed: int) -> Iterator[list[Example]]:
    """Batches of noise that repeats itself, then of single exchanges, then of dialogues in a role.

    In repeated noise every token of the second half is a copy: it teaches the heads that `wire` has prepared to take up
    what was said, word by word, before there is anything else to learn.
    """
    rng = random.Random(f"repeat/{seed}")

    def noise() -> list[Example]:
        length = rng.randint(8, 24)
        return [_repeated([rng.randrange(len(tokenizer)) for _ in range(length)]) for _ in range(REPEAT_BATCH)]

    for _ in range(REPEAT):
        yield noise()
    naming = short_lessons(situations, seed, {"name": 0.3, "engage": 0.7})
    for _ in range(NAMING):
        yield [_encode(tokenizer, lesson) for lesson in islice(naming, SHORT_BATCH)]
    short, long = short_lessons(situations, seed), long_lessons(situations, seed)
    for _ in range(SHORT):
        yield [_encode(tokenizer, lesson) for lesson in islice(short, SHORT_BATCH)]
    for _ in range(LONG):
        yield [_encode(tokenizer, lesson) for lesson in islice(long, LONG_BATCH)]


def _repeated(ids: list[int]) -> Example:
    return ids + ids, [IGNORE] * (len(ids) + 1) + ids[1:]


def teach(
    model: Qwen3ForCausalLM,
    batches: Iterator[list[Example]],
    *,
    steps: int,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Next-token prediction on the replies alone; `steps` batches of dialogues, each seen once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * k / steps)) + 0.02)
    )
    model.train()
    for step, batch in enumerate(islice(batches, steps), 1):
        ids, labels = _batch(batch, pad_id=model.config.pad_token_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        taught = labels[:, 1:] != IGNORE
        loss = cross_entropy(model.lm_head(hidden[taught]), labels[:, 1:][taught])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 6 or 1) == 0:
            say(f"teaching the starter to speak: {step}/{steps}, loss {loss.item():.2f}")
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerBase, lesson: Lesson) -> Example:
    """Ids and labels of a dialogue, laid out as by the chat template."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, learned: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        labels.extend(piece if learned else [IGNORE] * len(piece))

    if lesson.persona:
        add(f"{TURN_START}system\n{lesson.persona}{TURN_END}\n", False)
    for k, (line, reply) in enumerate(lesson.exchanges):
        last = k == len(lesson.exchanges) - 1
        if line:
            add(f"{TURN_START}user\n{line}{TURN_END}\n", False)
        add(f"{TURN_START}assistant\n", False)
        if lesson.last_only and not last:
            add(f"{reply.text}{TURN_END}", False)
        else:
            add(f"{reply.completion}{TURN_END}", True)
        add("\n", False)
    return ids, labels


def _batch(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and labels, padded on the right: what follows a token changes nothing before it."""
    shape = (len(examples), max(len(ids) for ids, _ in examples))
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    for row, (of_row, learned) in enumerate(examples):
        ids[row, : len(of_row)], labels[row, : len(learned)] = torch.tensor(of_row), torch.tensor(learned)
    return ids, labels


def _texts(situations: Sequence[Situation]) -> Iterator[str]:
    corpus = load_corpus()
    for situation in situations:
        yield situation.persona
        yield from situation.lines
    for scene, lines in corpus.lines.items():
        yield from (line.text for line in lines)
        for replies in corpus.replies[scene].values():
            yield from replies
    for _ in range(20):
        yield from (f"the {word}" for word in (*corpus.around, *corpus.nouns))
