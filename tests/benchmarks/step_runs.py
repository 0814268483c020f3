"""Real runs of the trainer on this machine beside the predictions of step_model.py (`python -m tests.benchmarks.scale --validate`).

The policy is builtin/tiny; the update is real. Two kinds of runs: an engine of stated speed with users of log-normal latency, which
take no processor time; and the transformers engine on the CPU. What the model needs (seconds of an update a token, of a turn in the
process, of a decoding step, of a prompt) is calibrated on other runs than those that are predicted. A prediction uses the latencies
and reply lengths that the run had, so that the difference is the model's, and none of luck.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from transformers import PrinterCallback

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Step
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.training.trainer import RolloutHooks
from ctcgrpo.types import Episode
from tests.benchmarks.overlap import SECONDS, SPREAD, Clock, Paced, Slow
from tests.benchmarks.step_model import Batch, Draws, Engine, Inputs, LogNormal, Prediction, Trainer, predict, rollouts, update

TASKS, TURNS = 4, 3
ROWS = [{"id": f"t{k}", "words": f"{k} is what I say. " + "Say something that nobody has said before. " * 20} for k in range(8)]
WITHIN = 0.15


@dataclass(frozen=True)
class Case:
    """`reply`: seconds of a paced engine's reply; None: the transformers engine."""

    name: str
    group_size: int
    overlap: int = 0
    median: float = 0.0
    reply: float | None = 0.0
    max_batch: int = 64
    tokens: int = 64
    steps: int = 7

    @property
    def turns(self) -> int:
        return TASKS * self.group_size * TURNS


class Timed(Slow):
    """Its latencies are noted by the episode's name."""

    latencies: dict[str, list[float]] = defaultdict(list)

    async def step(self, reply: str) -> Step:
        self.turns += 1
        seconds = SECONDS["median"] * math.exp(self.random.gauss(0.0, SPREAD))
        Timed.latencies[self.name].append(seconds)
        await asyncio.sleep(seconds)
        return Step("And then?", reward=len(reply) / 100, done=self.turns == TURNS)


class Noted(RolloutHooks):
    def __init__(self) -> None:
        self.episodes: dict[int, list[Episode]] = defaultdict(list)

    def episode(self, episode: Episode) -> None:
        super().episode(episode)
        self.episodes[episode.step].append(episode)


@dataclass(frozen=True)
class Measured:
    """Means over the steps but the first, in seconds; `share`: as the metric overlap/share; `draws`: of all steps."""

    step: float
    rollouts: float
    share: float
    batch: Batch
    draws: list[Draws]


def run(case: Case) -> Measured:
    """The case's run, whose first step is not timed."""
    SECONDS.update(median=case.median, reply=case.reply or 0.0)
    Timed.latencies.clear()
    real = case.reply is None
    with tempfile.TemporaryDirectory() as folder:
        config = CTCGRPOConfig(
            folder,
            overlap=case.overlap,
            importance="none",
            sampling_dtype="policy" if real else "bfloat16",
            num_generations=case.group_size,
            per_device_train_batch_size=TASKS * case.group_size,
            max_turns=TURNS,
            max_completion_length=case.tokens,
            max_batch=case.max_batch,
            max_steps=case.steps,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock, noted = Clock(), Noted()
        made = CTCGRPOTrainer("builtin/tiny", args=config, environment=Timed, train_dataset=ROWS, callbacks=[clock], hooks=noted)
        if not real:
            made.engine.close()
            made.engine = made.runner.engine = Paced()
        made.remove_callback(PrinterCallback)
        made.train()
        logged = [entry for entry in made.state.log_history if "seconds/update" in entry][1:]
        return Measured(
            step=(clock.ends[-1] - clock.ends[0]) / (case.steps - 1),
            rollouts=statistics.fmean(entry["seconds/rollout"] for entry in logged),
            share=statistics.fmean(entry.get("overlap/share", 0.0) for entry in logged),
            batch=_batch(case, noted.episodes[1]),
            draws=[_draws(noted.episodes[step + 1]) for step in range(case.steps)],
        )


def _batch(case: Case, episodes: list[Episode]) -> Batch:
    """Lengths as the episodes had them."""
    first, second = episodes[0].turns[:2]
    opening = len(first.prompt_ids)
    line = len(second.prompt_ids) - opening - len(first.completion.token_ids)
    user, reply = LogNormal(case.median, SPREAD), LogNormal(case.tokens)
    return Batch(tasks=TASKS, group_size=case.group_size, turns=TURNS, opening=opening, line=line, reply=reply, user=user)


def _draws(episodes: list[Episode]) -> Draws:
    ordered = sorted(episodes, key=lambda e: (e.group, e.rollout))
    replies = [[len(turn.completion.token_ids) for turn in e.turns] for e in ordered]
    return Draws(replies, [Timed.latencies[e.name] for e in ordered])


# --- calibration ---------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What runs that are not predicted say of this machine. Seconds of a turn in the process; of an update, fixed and a token; of a
    decoding step, fixed and a sequence; of the admission of prompts, fixed and a token."""

    host: float
    fixed: float
    per_token: float
    step: float = 0.0
    sequence: float = 0.0
    prompts: float = 0.0
    prompt_token: float = 0.0

    def mean(self, other: Machine) -> Machine:
        return Machine(*(statistics.fmean(both) for both in zip(self, other, strict=True)))

    def __str__(self) -> str:
        trainer = (
            f"{self.host * 1e3:.2f} ms a turn in the process; update {self.fixed:.3f} s + {self.per_token * 1e6:.1f} us a token"
        )
        if not self.step:
            return trainer
        prompts = f"prompts {self.prompts * 1e3:.2f} ms + {self.prompt_token * 1e6:.1f} us a token"
        return f"{trainer}; decoding step {self.step * 1e3:.2f} ms + {self.sequence * 1e3:.3f} ms a sequence, {prompts}"

    def inputs(self, case: Case, batch: Batch) -> Inputs:
        trainer = Trainer(per_token=self.per_token, fixed=self.fixed)
        if case.reply is None:
            engine = Engine(case.max_batch, *self[3:], host=self.host)
        else:
            engine = Engine(batch.episodes, case.reply / case.tokens, host=self.host)
        return Inputs(batch=batch, engine=engine, trainer=trainer, colocated=case.reply is None, overlap=case.overlap)


def calibrated(*, engine: bool) -> Machine:
    """Takes some ten seconds, and as much again with the transformers engine."""
    runs = [(case, run(case)) for case in (Case("small groups", 4, steps=5), Case("large groups", 16, steps=5))]
    unit = Trainer(per_token=1.0)
    tokens = [statistics.fmean(update(m.batch, d, unit).seconds for d in m.draws[1:]) for _, m in runs]
    (fixed, per_token), _ = nnls(np.array([[1.0, n] for n in tokens]), np.array([m.step - m.rollouts for _, m in runs]))
    host = statistics.fmean(m.rollouts / case.turns for case, m in runs)
    return Machine(host, float(fixed), float(per_token), *(engine_speed() if engine else ()))


def engine_speed() -> list[float]:
    """The last four of `Machine`, from the transformers engine by itself: 24 replies of several lengths. Without users the model's
    time is linear in them."""
    with tempfile.TemporaryDirectory() as folder:
        config = CTCGRPOConfig(
            folder, per_device_train_batch_size=2, num_generations=2, bf16=False, report_to="none", max_steps=1
        )
        model = CTCGRPOTrainer("builtin/tiny", args=config, environment=Slow, train_dataset=ROWS).model
    rng, requests = random.Random(0), 24
    known, seconds = [], []
    for k, (max_batch, opening) in enumerate([(2, 240), *product((2, 8, 24), (40, 240)), *product((2, 8, 24), (40, 240))]):
        engine = ContinuousEngine(TransformersBatcher(model, pad_id=0, stop_ids=[-1], max_batch=max_batch))
        lengths = [rng.randrange(8, 48) for _ in range(requests)]
        prompts = [[rng.randrange(100, 2000) for _ in range(opening)] for _ in lengths]
        engine.take_weights(0)
        started = time.perf_counter()
        asyncio.run(_replies(engine, prompts, lengths))
        if k:  # the first is not counted
            seconds.append(time.perf_counter() - started)
            known.append(_counts(max_batch, opening, lengths))
        engine.close()
    found: list[float] = nnls(np.array(known), np.array(seconds))[0].tolist()
    return found


async def _replies(engine: ContinuousEngine, prompts: list[list[int]], lengths: list[int]) -> None:
    asked = enumerate(zip(prompts, lengths, strict=True))
    await asyncio.gather(*(engine.generate(ids, seed=k, sampling=Sampling(max_new_tokens=n)) for k, (ids, n) in asked))


def _counts(max_batch: int, opening: int, lengths: list[int]) -> list[float]:
    """Steps, sequences summed over steps, admissions, and tokens of prompts, as the model has them."""
    zero = LogNormal(0.0)
    batch = Batch(tasks=len(lengths), group_size=1, turns=1, opening=opening, line=0, reply=zero, user=zero)
    draws = Draws([[n] for n in lengths], [[0.0] for _ in lengths])
    units = np.eye(4)
    units[:, 0] = 1.0  # a step takes a second in all of them: it cannot take none
    steps, *more = [rollouts(batch, draws, Engine(max_batch, *unit), 1).seconds for unit in units.tolist()]
    return [steps, *(seconds - steps for seconds in more)]


# --- predictions -----------------------------------------------------------------------------------------------------------------


def same_draws(inputs: Inputs, draws: list[Draws]) -> Prediction:
    """Of the steps that were timed: all but the first."""
    draws = draws[1 - inputs.overlap :]
    played = [rollouts(inputs.batch, each, inputs.engine, inputs.engines) for each in draws]
    return predict(inputs, played, [update(inputs.batch, each, inputs.trainer) for each in draws])


def cases() -> Iterator[Sequence[Case]]:
    """Those that follow one calibration."""
    for groups, median in product((6, 12), (0.03, 0.15)):
        names = (f"paced, groups of {groups}, median latency {median} s, overlap {overlap}" for overlap in (0, 1))
        yield [Case(name, groups, overlap, median, reply=0.08) for overlap, name in enumerate(names)]
    yield [
        Case(f"transformers engine, max_batch {max_batch}", 8, median=0.05, reply=None, max_batch=max_batch, tokens=32)
        for max_batch in (4, 16)
    ]


def validate(console: Console) -> None:
    """Each few runs stand between two calibrations, whose mean is used, so that a change of the machine's load hits both."""
    torch.set_num_threads(1)
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    busy = "; other processes distort what follows" if load > 0.25 * processors else ""
    console.print(f"load average {load:.1f} on {processors} processors{busy}", highlight=False)
    table = Table("run", "s a step", "predicted", "ratio", "rollouts, s", "predicted", "overlapped", "predicted")
    ratios = []
    for some in cases():
        engine = some[0].reply is None
        before = calibrated(engine=engine)
        measured = [run(case) for case in some]
        machine = before.mean(calibrated(engine=engine))
        console.print(f"calibrated: {machine}", highlight=False)
        for case, m in zip(some, measured, strict=True):
            p = same_draws(machine.inputs(case, m.batch), m.draws)
            ratios.append(p.step / m.step)
            figures = f"{m.step:.3f}", f"{p.step:.3f}", f"{ratios[-1]:.2f}", f"{m.rollouts:.3f}", f"{p.rollouts:.3f}"
            table.add_row(case.name, *figures, f"{m.share:.0%}", f"{p.overlapped:.0%}")
    console.print(table)
    good = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    console.print(f"{good} of {len(ratios)} within {WITHIN:.0%}; ratios {min(ratios):.2f} to {max(ratios):.2f}", highlight=False)
