"""Plays episodes: policy and environment alternate until the environment is done, or `max_turns` is reached.

With `continuations`, each episode is then continued several times from after each turn but the last, to estimate the expected
outcome there (credit `vine`). Continuations are not trained on; only their outcomes are recorded.

A failed episode is recorded with its reason. An environment is closed as soon as its episode is over. With `deterministic`, all
episodes of a step take each turn together and in a fixed order, so that every batch has the same composition and a run is
reproducible bit by bit. Otherwise episodes run independently, and those that are unfinished at the `deadline` fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import EPISODE_ERRORS, CtcGrpoError, DeadlinePassed, RunInterrupted
from ctcgrpo.policy.context import ContextBuilder, Dialogue
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.rollout.engine import PolicyEngine, Sampling, request_seed
from ctcgrpo.rollout.session import SECONDS_PER_CALL, Session
from ctcgrpo.types import Completion, Environment, Episode, Failure, Task, Turn

_LOOK_SECONDS = 0.1  # interval at which a batch of episodes checks whether to stop


class Awaited(Counter[str]):
    """Counts of policy replies and environment calls in progress."""

    @contextlib.contextmanager
    def one(self, what: Literal["replies", "answers"]) -> Iterator[None]:
        self[what] += 1
        try:
            yield
        finally:
            self[what] -= 1

    def __str__(self) -> str:
        return f"{self['replies']} policy replies and {self['answers']} environment calls in progress"


@dataclass(frozen=True, slots=True)
class Slot:
    """An episode to play. `group` is the task's position in the step, `rollout` the episode's in its group. `seed_step` replaces
    the step in the seeds. `continues`, for a continuation: the number of turns before it, and its index."""

    task: Task
    step: int
    group: int
    rollout: int
    seed_step: int | None = None
    continues: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The episode's name in logs."""
        after = "" if self.continues is None else "/after-{}/{}".format(*self.continues)
        return f"{self.step}/{self.task.id}/{self.rollout}{after}"

    @property
    def seeds(self) -> tuple[object, ...]:
        """What the seeds of the episode depend on."""
        return *self.group_seeds, self.rollout, *(() if self.continues is None else ("after", *self.continues))

    @property
    def group_seeds(self) -> tuple[object, ...]:
        """The same for all episodes of a group."""
        return self.step if self.seed_step is None else self.seed_step, self.group, self.task.id


def validation_slots(tasks: Sequence[Task], samples: int, step: int) -> list[Slot]:
    """The episodes of a validation: `samples` for each task, with the same seeds at every step."""
    return [Slot(task, step, group, k, seed_step=0) for group, task in enumerate(tasks) for k in range(samples)]


@dataclass(frozen=True, slots=True)
class Play:
    """How episodes are played."""

    sampling: Sampling
    max_turns: int
    seed: int
    deterministic: bool = False
    deadline: float | None = None  # seconds after the start of a batch
    seconds_per_call: float = SECONDS_PER_CALL  # timeout of a call of an environment
    continuations: int = 0  # of each turn of an episode but its last


@dataclass(slots=True, kw_only=True)
class RolloutRunner:
    """Plays slots with one engine, each with its own environment. `shared`, for example a client, is entered while a batch is
    played."""

    engine: PolicyEngine
    environment: Callable[[], Environment]
    shared: AbstractAsyncContextManager[Any]
    contexts: ContextBuilder
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    play: Play
    interrupted: Callable[[], bool] = lambda: False
    awaited: Awaited = field(default_factory=Awaited)

    async def run(self, slots: Sequence[Slot], on_episode: Callable[[Episode], None] = lambda _: None) -> list[Episode]:
        """One episode for each slot, in order. `on_episode` is called when an episode ends, before its continuations are played.

        Raises RunPaused when the run is interrupted or a simulator's budget is spent; calls in progress are cancelled.
        """
        players = [_Player(self, slot, on_episode) for slot in slots]
        async with self.shared, self.engine:
            try:
                await self._play(players)
                await self._play([branch for player in players if player.finished for branch in player.branches])
            finally:
                await asyncio.gather(*(p.close() for player in players for p in (player, *player.branches)))
        return [player.with_continuations() for player in players]

    async def _play(self, players: Sequence[_Player]) -> None:
        if self.play.deterministic:
            await self._together(players, _Player.reset)
            for _ in range(self.play.max_turns):
                await self._together(players, _Player.policy_turn)
                await self._together(players, _Player.environment_turn)
        else:
            await self._together(players, _Player.play_to_end, self.play.deadline)
            for player in players:
                player.cut()

    async def _together(
        self,
        players: Sequence[_Player],
        what: Callable[[_Player], Coroutine[None, None, None]],
        deadline: float | None = None,
    ) -> None:
        tasks = [asyncio.create_task(what(player)) for player in players if not player.over]
        everything = asyncio.gather(*tasks)
        interrupt = asyncio.create_task(self._interrupt())
        try:
            watched: set[asyncio.Future[Any]] = {everything, interrupt}
            over, _ = await asyncio.wait(watched, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            for done in over:
                done.result()
        finally:
            for task in (*tasks, interrupt):
                task.cancel()
            await asyncio.gather(*tasks, everything, interrupt, return_exceptions=True)

    async def _interrupt(self) -> None:
        while True:
            self.check_interrupt()
            await asyncio.sleep(_LOOK_SECONDS)

    def check_interrupt(self) -> None:
        if self.interrupted():
            raise RunInterrupted("interrupted in the middle of a rollout")


class _Player:
    """Plays a slot: from the start, or from the given session, dialogue and turns."""

    def __init__(
        self,
        runner: RolloutRunner,
        slot: Slot,
        on_episode: Callable[[Episode], None],
        session: Session | None = None,
        dialogue: Dialogue | None = None,
        turns: Sequence[Turn] = (),
    ) -> None:
        self._runner = runner
        self._on_episode = on_episode
        self._slot = slot
        group_seed = request_seed("group", runner.play.seed, *slot.group_seeds)
        self._session = session or Session(runner.environment, slot.name, runner.play.seconds_per_call, group_seed=group_seed)
        self._closing: asyncio.Task[None] | None = None
        self._dialogue = dialogue
        self._turns = list(turns)
        self.branches: list[_Player] = []  # its continuations
        self._pending: tuple[tuple[int, ...], int, Completion] | None = None
        self._outcome = math.nan
        self._failure: Failure | None = None
        self._seconds_policy = self._seconds_environment = 0.0
        self.over = False

    async def play_to_end(self) -> None:
        await self.reset()
        while not self.over:
            await self.policy_turn()
            await self.environment_turn()

    @property
    def finished(self) -> bool:
        """Whether the episode is over and has an outcome."""
        return self.over and self._failure is None

    async def reset(self) -> None:
        """Start the episode. A continuation has started already."""
        if self._dialogue is not None:
            return
        slot, play = self._slot, self._runner.play
        seed = request_seed("user", play.seed, *slot.seeds)
        try:
            with self._asking():
                messages = await self._session.reset(slot.task.data, seed=seed)
            self._dialogue = self._runner.contexts.start(messages)
        except EPISODE_ERRORS as error:
            self._fail(error)

    async def policy_turn(self) -> None:
        runner, slot, play = self._runner, self._slot, self._runner.play
        runner.check_interrupt()
        if self.over:
            return
        assert self._dialogue is not None
        started = time.perf_counter()
        try:
            prompt_ids, dropped = runner.contexts.prompt(self._dialogue)
            seed = request_seed(play.seed, *slot.seeds, len(self._turns))
            with runner.awaited.one("replies"):
                completion = await runner.engine.generate(prompt_ids, seed=seed, sampling=play.sampling)
            self._pending = (prompt_ids, dropped, completion)
        except EPISODE_ERRORS as error:
            self._fail(error)
        self._seconds_policy += time.perf_counter() - started

    async def environment_turn(self) -> None:
        if self.over or self._pending is None:
            return
        runner, play = self._runner, self._runner.play
        runner.check_interrupt()
        assert self._dialogue is not None
        prompt_ids, dropped, completion = self._pending
        self._pending = None
        ids = [token for token in completion.token_ids if token not in runner.stop_ids]
        parsed = parse_completion(runner.tokenizer.decode(ids), completion.finish_reason, runner.contexts.opens_reasoning)
        try:
            with self._asking():
                answer = await self._session.step(parsed.reply)
            done = answer.done or len(self._turns) + 1 >= play.max_turns
            self._turns.append(
                Turn(
                    prompt_ids=prompt_ids,
                    completion=completion,
                    reply=parsed.reply,
                    reasoning=parsed.reasoning,
                    faults=parsed.faults,
                    message="\n\n".join(message["content"] for message in answer.messages),
                    reward=answer.reward,
                    done=done,
                    info=answer.info,
                    dropped_exchanges=dropped,
                )
            )
            if done:
                with self._asking():
                    self._outcome = await self._session.outcome()
                self._finish()
            else:
                self._dialogue = runner.contexts.extend(self._dialogue, completion, answer.messages)
                await self._branch()
        except EPISODE_ERRORS as error:
            self._fail(error)

    async def _branch(self) -> None:
        if self._slot.continues is not None:
            return
        for k in range(self._runner.play.continuations):
            slot = replace(self._slot, continues=(len(self._turns), k))
            with self._asking():
                session = await self._session.branch(slot.name, seed=request_seed("user", self._runner.play.seed, *slot.seeds))
            self.branches.append(_Player(self._runner, slot, lambda _: None, session, self._dialogue, self._turns))

    def cut(self) -> None:
        """Fail the episode if it is unfinished at the deadline."""
        if not self.over:
            self._fail(DeadlinePassed(f"the episode was unfinished at the deadline of {self._runner.play.deadline:g} s"))

    async def close(self) -> None:
        """Close the environment, or wait until it is closed."""
        self._closing = self._closing or asyncio.create_task(self._session.close())
        await self._closing

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self._runner.awaited.one("answers"):
                yield
        finally:
            self._seconds_environment += time.perf_counter() - started

    def _fail(self, error: CtcGrpoError) -> None:
        self._failure = Failure(error.kind, f"turn {len(self._turns) + 1}: {error}")
        self._finish()

    def _finish(self) -> None:
        self.over = True
        self._closing = asyncio.create_task(self._session.close())
        self._on_episode(self.episode())

    def with_continuations(self) -> Episode:
        episode = self.episode()
        found: dict[int, list[Episode]] = {}
        for branch in self.branches if self.finished else ():
            assert branch._slot.continues is not None
            found.setdefault(branch._slot.continues[0], []).append(branch.episode())
        turns = (replace(turn, continuations=tuple(found.get(k, ()))) for k, turn in enumerate(episode.turns, 1))
        return replace(episode, turns=tuple(turns))

    def episode(self) -> Episode:
        slot = self._slot
        return Episode(
            task=slot.task.id,
            tag=slot.task.tag,
            step=slot.step,
            group=slot.group,
            rollout=slot.rollout,
            turns=tuple(self._turns),
            outcome=self._outcome,
            failure=self._failure,
            opening="" if self._dialogue is None else self._dialogue.opening_text,
            info=self._session.info,
            version=self._runner.engine.version,
            seconds_policy=self._seconds_policy,
            seconds_environment=self._seconds_environment,
        )
