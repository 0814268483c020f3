"""A discrete-event model of a training step: engines, users, trainer. Pure; uses no clock, no GPU and no network.

    simulate(Inputs(batch=..., engine=..., trainer=..., overlap=1), seed=0).step

Rollouts are simulated event by event: an episode waits for its turn in the process that plays it, for a slot of an engine, for its
reply, for a free user, and for that user's answer. The update is arithmetic on the tokens that the episodes have. All times are in
seconds, all lengths in tokens.

What it leaves out: attention's growth with the length of a context (a mean length is in the inputs), the latency of collectives,
failures, early ends of dialogues, validations and checkpoints.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from statistics import fmean
from typing import NamedTuple

HOST = "the process that plays the episodes"
SLOT = "waiting for a slot of an engine"
REPLY = "decoding of the longest dialogue"
BUSY_USER = "waiting for a free user"
USER = "user latency of the longest dialogue"
TOKENS = "tokens of the update"
REPEATED = "batch too small for the trainer's GPUs"
"""Prefixes that several rows repeat, and GPUs that have less to do than the one with the longest sample."""
SYNC = "gradient synchronization"
FIXED = "fixed part of the update"
TRANSFER = "transfer of weights"
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp of a normal variable of standard deviation `spread`, times `median`, and at most `cap`."""

    median: float
    spread: float = 0.0
    cap: float = math.inf

    def draw(self, rng: random.Random) -> float:
        return min(self.cap, self.median * math.exp(rng.gauss(0.0, self.spread)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The episodes of a step. `opening`: tokens of the first prompt, which a group shares; `line`: tokens of a user's answer;
    `visible`: tokens that a later prompt has of a reply, where reasoning is left out of contexts (None: the whole reply)."""

    tasks: int
    group_size: int
    turns: int
    opening: int
    line: int
    reply: LogNormal
    user: LogNormal
    visible: int | None = None
    users_at_once: int | None = None

    @property
    def episodes(self) -> int:
        return self.tasks * self.group_size


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine. A decoding step takes `fixed + per_sequence * n`, with `fixed` above 0, and gives each of n sequences a token.
    Requests are admitted between two steps; those admitted together stop decoding for `prompt_fixed + prompt_token * (new
    tokens)`. `host`: what a turn takes in the process that plays the engine's episodes, one turn at a time."""

    max_batch: int
    fixed: float
    per_sequence: float = 0.0
    prompt_fixed: float = 0.0
    prompt_token: float = 0.0
    host: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """`per_token`: forward and backward pass of a token on one GPU; `fixed`: of an update, besides. `row_bytes`, `update_bytes`:
    what collectives move once around the ring for each row and each update (an all-reduce counts twice), at `bandwidth`
    bytes/s."""

    gpus: int = 1
    updates: int = 1
    per_token: float
    fixed: float = 0.0
    tokens_per_row: int = 16384
    row_bytes: float = 0.0
    update_bytes: float = 0.0
    bandwidth: float = math.inf
    transfer: float = 0.0  # of the weights to the engines; neither side works


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """`engines` share the episodes equally. `colocated`: they run on the GPUs that train, of which each is one. `overlap`: 1 plays
    the next batch during the update."""

    batch: Batch
    engine: Engine
    trainer: Trainer
    engines: int = 1
    colocated: bool = False
    overlap: int = 0


class Draws(NamedTuple):
    """Reply lengths and user latencies of a batch, by episode and turn."""

    replies: Sequence[Sequence[int]]
    latencies: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """`busy`: seconds in which each engine had at least one sequence; `path`: what the last episode to end spent its time on, which
    sums to `seconds`."""

    seconds: float
    busy: Sequence[float]
    path: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Update:
    """`busy`: mean over GPUs of the seconds that they compute; `parts` sum to `seconds`."""

    seconds: float
    busy: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Means over steps. `step`, `rollouts`, `update`: seconds. Idle shares are of the step; colocated ones are of the same GPUs,
    and equal. `overlapped`: share of the rollouts' time in which the trainer updates. `parts`: seconds of the step by what they are
    spent on; with overlap those of the slower side."""

    step: float
    rollouts: float
    update: float
    trainer_idle: float
    engine_idle: float
    overlapped: float
    parts: Mapping[str, float]

    @property
    def limit(self) -> str:
        """What most of a step is spent on."""
        return max(self.parts, key=lambda part: self.parts[part])


def simulate(inputs: Inputs, seed: int, steps: int = 4) -> Prediction:
    """The steady state, over `steps` steps whose lengths and latencies are drawn. The same seed gives the same draws to any layout,
    engine and trainer."""
    draws = draw_batches(inputs.batch, seed, steps + inputs.overlap)
    played = [rollouts(inputs.batch, each, inputs.engine, inputs.engines) for each in draws]
    return predict(inputs, played, [update(inputs.batch, each, inputs.trainer) for each in draws])


def draw_batches(batch: Batch, seed: int, batches: int) -> list[Draws]:
    return [draw(batch, random.Random(f"{seed}/{k}")) for k in range(batches)]


def draw(batch: Batch, rng: random.Random) -> Draws:
    turns = range(batch.turns)
    replies = [[max(1, round(batch.reply.draw(rng))) for _ in turns] for _ in range(batch.episodes)]
    return Draws(replies, [[batch.user.draw(rng) for _ in turns] for _ in range(batch.episodes)])


def predict(inputs: Inputs, played: Sequence[Rollouts], updated: Sequence[Update]) -> Prediction:
    """The steps of these batches, in order. With overlap the first batch is trained on while the second is played, and so on: there
    is a step less than batches. A process that trains plays its share of the episodes too, in another thread of the same Python
    interpreter, so the update then waits for what these turns take there."""
    batch, trainer, both = inputs.batch, inputs.trainer, inputs.overlap == 1
    shared = inputs.engine.host * batch.episodes * batch.turns / trainer.gpus if both else 0.0
    pairs = list(zip(played[inputs.overlap :], updated, strict=False))
    parts: dict[str, float] = defaultdict(float)
    for r, u in pairs:
        training = dict(u.parts) | ({HOST: shared} if both else {})
        sides = [r.path, training] if not both else [max(r.path, training, key=lambda side: sum(side.values()))]
        for side in [*sides, {TRANSFER: trainer.transfer}]:
            for name, value in side.items():
                parts[name] += value / len(pairs)
    step = sum(parts.values())
    busy_training = fmean(u.busy for _, u in pairs) / step
    busy_sampling = fmean(fmean(r.busy) for r, _ in pairs) / step
    if inputs.colocated:
        busy_training = busy_sampling = busy_training + busy_sampling
    return Prediction(
        step=step,
        rollouts=fmean(r.seconds for r, _ in pairs),
        update=fmean(u.seconds for _, u in pairs) + shared,
        trainer_idle=1 - busy_training,
        engine_idle=1 - busy_sampling,
        overlapped=fmean(min(1.0, (u.seconds + shared) / r.seconds) for r, u in pairs) if both else 0.0,
        parts=dict(parts),
    )


# --- the update ----------------------------------------------------------------------------------------------------------------


def update(batch: Batch, draws: Draws, trainer: Trainer) -> Update:
    """All updates of a step. Turn samples of an episode share their prefix in a row; a row begins with a whole prompt. There are a
    multiple of `gpus` rows, of equal cost, and no more than samples (ctcgrpo/training/packing.py)."""
    kept = [[reply if batch.visible is None else batch.visible for reply in episode] for episode in draws.replies]
    prompts = [[batch.opening + sum(k[:t]) + t * batch.line for t in range(batch.turns)] for k in kept]
    longest = max(p + r for ps, rs in zip(prompts, draws.replies, strict=True) for p, r in zip(ps, rs, strict=True))
    again = 0 if batch.visible is None else batch.visible  # what is in the samples with its reasoning, and in prompts without
    each = sum(map(sum, draws.replies)) + batch.episodes * (batch.turns - 1) * (batch.line + again)
    openings = batch.tasks * min(trainer.updates, batch.group_size)
    tokens, samples = (each + openings * batch.opening) / trainer.updates, batch.episodes * batch.turns / trainer.updates
    rows = min(math.ceil(tokens / trainer.tokens_per_row / trainer.gpus) * trainer.gpus, math.ceil(samples))
    cut = batch.opening if rows * trainer.updates <= batch.episodes else fmean(map(fmean, prompts))
    forwarded = tokens + (rows - 1) * cut
    most = max(longest, forwarded / min(rows, trainer.gpus))
    around = (trainer.gpus - 1) / trainer.gpus / trainer.bandwidth
    parts = {
        TOKENS: tokens / trainer.gpus * trainer.per_token,
        REPEATED: (most - tokens / trainer.gpus) * trainer.per_token,
        SYNC: (math.ceil(rows / trainer.gpus) * trainer.row_bytes + trainer.update_bytes) * around,
        FIXED: trainer.fixed,
    }
    parts = {name: trainer.updates * value for name, value in parts.items()}
    busy = trainer.updates * (trainer.fixed + min(most, forwarded / trainer.gpus) * trainer.per_token)
    return Update(sum(parts.values()), busy, parts)


# --- rollouts ------------------------------------------------------------------------------------------------------------------


def rollouts(batch: Batch, draws: Draws, engine: Engine, engines: int) -> Rollouts:
    """A batch from its first prompt to the last user's answer. Engines take equal, contiguous shares of the episodes."""
    return _Rollouts(batch, draws, engine, engines).run()


class _Server:
    """An engine's state. `given`: tokens that a sequence would have if it had run from the start, so that a sequence ends when
    `given` reaches a number known at its admission, whatever the others do."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: list[tuple[float, int]] = []  # a heap: `given` at which an episode's reply ends
        self.waiting: deque[int] = deque()
        self.opened: set[int] = set()  # groups whose opening is in the prefix cache
        self.clock = self.given = self.prefill = self.busy = self.host_free = 0.0
        self.changes = 0
        self.notified = False  # whether it looks for new requests when its current step ends

    @property
    def per_token(self) -> float:
        return self.engine.fixed + self.engine.per_sequence * len(self.running)

    def advance(self, now: float) -> None:
        passed, self.clock = now - self.clock, now
        if self.running:
            self.busy += passed
            stopped = min(self.prefill, passed)
            self.prefill -= stopped
            self.given += (passed - stopped) / self.per_token

    @property
    def next_end(self) -> float:
        return self.clock + self.prefill + max(0.0, self.running[0][0] - self.given) * self.per_token

    @property
    def next_step(self) -> float:
        """When the current step ends; now, if it ends now."""
        if not self.running or (self.prefill < _ROUNDING and abs(self.given - round(self.given)) < _ROUNDING):
            return self.clock
        return self.clock + self.prefill + (math.floor(self.given + _ROUNDING) + 1 - self.given) * self.per_token

    def admit(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """Each an episode, the new tokens of its prompt, and the tokens of its reply."""
        if requests:
            self.prefill += self.engine.prompt_fixed + self.engine.prompt_token * sum(new for _, new, _ in requests)
        for episode, _, reply in requests:
            heappush(self.running, (self.given + reply, episode))


class _Rollouts:
    def __init__(self, batch: Batch, draws: Draws, engine: Engine, engines: int) -> None:
        self.batch, self.draws = batch, draws
        self.servers = [_Server(engine) for _ in range(engines)]
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        self.now = 0.0
        self.turn = [0] * batch.episodes
        self.path: list[dict[str, float]] = [defaultdict(float) for _ in range(batch.episodes)]
        self.since = [0.0] * batch.episodes
        self.calls, self.calling = 0, deque[int]()  # user calls in progress, and episodes that wait to make one

    def run(self) -> Rollouts:
        for episode in range(self.batch.episodes):
            self.host(episode)
        while self.events:
            self.now, _, event = heappop(self.events)
            event()
        ends = [sum(path.values()) for path in self.path]
        last = max(range(len(ends)), key=ends.__getitem__)
        return Rollouts(ends[last], [server.busy for server in self.servers], dict(self.path[last]))

    def at(self, time: float, event: Callable[[], None]) -> None:
        heappush(self.events, (time, next(self.order), event))

    def spent(self, episode: int, on: str) -> None:
        self.path[episode][on] += self.now - self.since[episode]
        self.since[episode] = self.now

    def server(self, episode: int) -> _Server:
        return self.servers[episode * len(self.servers) // self.batch.episodes]

    def host(self, episode: int) -> None:
        server = self.server(episode)
        server.host_free = max(self.now, server.host_free) + server.engine.host
        self.at(server.host_free, lambda: self.ask(episode))

    def ask(self, episode: int) -> None:
        self.spent(episode, HOST)
        server = self.server(episode)
        server.waiting.append(episode)
        server.advance(self.now)
        if not server.notified:
            server.notified = True
            self.at(server.next_step, lambda: self.step_ends(server))

    def step_ends(self, server: _Server) -> None:
        server.notified = False
        server.advance(self.now)
        server.given = float(round(server.given))
        self.between_steps(server)

    def fill(self, server: _Server) -> None:
        """Admit what there is room for, and note when the next reply ends."""
        batch, admitted = self.batch, list[tuple[int, int, int]]()
        while server.waiting and len(server.running) + len(admitted) < server.engine.max_batch:
            episode = server.waiting.popleft()
            self.spent(episode, SLOT)
            turn, group = self.turn[episode], episode // batch.group_size
            new = batch.line + (batch.visible or 0)  # a reply without its reasoning is new where later prompts have it
            if turn == 0:
                new = 0 if group in server.opened else batch.opening
                server.opened.add(group)
            admitted.append((episode, new, self.draws.replies[episode][turn]))
        server.admit(admitted)
        if server.running:
            server.changes += 1
            change = server.changes
            self.at(server.next_end, lambda: self.reply_ends(server, change))

    def reply_ends(self, server: _Server, change: int) -> None:
        if change != server.changes:  # requests were admitted since, and its time is another one
            return
        server.advance(self.now)
        server.given = server.running[0][0]
        self.between_steps(server)

    def between_steps(self, server: _Server) -> None:
        """Replies that are complete leave, and requests enter."""
        while server.running and server.running[0][0] <= server.given:
            _, episode = heappop(server.running)
            self.spent(episode, REPLY)
            self.calling.append(episode)
        self.fill(server)
        self.call()

    def call(self) -> None:
        limit = self.batch.users_at_once or math.inf
        while self.calling and self.calls < limit:
            episode = self.calling.popleft()
            self.calls += 1
            self.spent(episode, BUSY_USER)
            self.at(self.now + self.draws.latencies[episode][self.turn[episode]], partial(self.answered, episode))

    def answered(self, episode: int) -> None:
        self.spent(episode, USER)
        self.calls -= 1
        self.turn[episode] += 1
        if self.turn[episode] < self.batch.turns:
            self.host(episode)
        self.call()
