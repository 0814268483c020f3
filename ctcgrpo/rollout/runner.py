"""Playing episodes: the policy and the simulated user take turns until the user leaves or the rounds are over.

What fails is a record with its reason. With `deterministic`, all episodes of a step take each turn together, in a fixed
order, so the composition of every batch is fixed and a run repeats bit by bit; otherwise each goes at its own pace, and with a
`deadline` those that are not over by then are failed ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import EPISODE_ERRORS, CtcGrpoError, DeadlinePassed, RunInterrupted
from ctcgrpo.policy.context import ContextBuilder, Dialogue
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.records import Completion, Episode, Failure, Scenario, Turn, UserState
from ctcgrpo.rollout.engine import PolicyEngine, Sampling, request_seed
from ctcgrpo.scoring import Variant, outcome_score
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import ScenarioCard, Utterance, turn_request

_LOOK_SECONDS = 0.1
"""How often a batch of episodes looks whether it is to stop."""


@dataclass(slots=True)
class Awaited:
    """How many replies of the policy, and answers of the user, are being waited for."""

    replies: int = 0
    answers: int = 0

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        self.replies += 1
        try:
            yield
        finally:
            self.replies -= 1

    @contextlib.contextmanager
    def answer(self) -> Iterator[None]:
        self.answers += 1
        try:
            yield
        finally:
            self.answers -= 1

    def __str__(self) -> str:
        return f"{self.replies} replies of the policy and {self.answers} answers of the user in progress"


@dataclass(frozen=True, slots=True)
class Slot:
    """An episode to be played: `group` is the scenario's position in the step, `rollout` the episode's in its group.
    `seed_step` takes the step's place in the seeds where it is given."""

    scenario: Scenario
    step: int
    group: int
    rollout: int
    seed_step: int | None = None

    @property
    def seeds(self) -> tuple[object, ...]:
        """What of an episode's place its seeds depend on."""
        step = self.step if self.seed_step is None else self.seed_step
        return step, self.group, self.scenario.id, self.rollout


@dataclass(frozen=True, slots=True)
class Play:
    """How episodes are played."""

    sampling: Sampling
    max_turns: int
    seed: int
    variant: Variant = "training"
    deterministic: bool = False
    deadline: float | None = None
    """Seconds after the start of a batch."""


class RolloutRunner:
    """Plays slots against one engine and one simulator."""

    def __init__(
        self,
        *,
        engine: PolicyEngine,
        simulator: SimulatorClient,
        contexts: ContextBuilder,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        play: Play,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine = engine
        self.simulator = simulator
        self.contexts = contexts
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.play = play
        self._interrupted = interrupted
        self.awaited = Awaited()

    def with_play(self, play: Play) -> RolloutRunner:
        """The same parts, playing otherwise; what is `awaited` is counted together."""
        other = copy.copy(self)
        other.play = play
        return other

    async def run(
        self, slots: Sequence[Slot], on_episode: Callable[[Episode], None] = lambda episode: None
    ) -> list[Episode]:
        """One episode a slot, in the order of the slots; `on_episode` sees each the moment it is over.

        Raises RunPaused as soon as the run is asked to stop, or the simulator may spend no more; replies and answers in progress
        are given up then.
        """
        players = [_Player(self, slot, on_episode) for slot in slots]
        async with self.simulator, self.engine:
            if self.play.deterministic:
                for _ in range(self.play.max_turns):
                    await self._together(players, _Player.policy_turn)
                    await self._together(players, _Player.user_turn)
            else:
                await self._together(players, _Player.to_the_end, self.play.deadline)
                for player in players:
                    player.cut()
        return [player.episode() for player in players]

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
        """Raises RunInterrupted once the run is asked to stop."""
        while True:
            self.check_interrupt()
            await asyncio.sleep(_LOOK_SECONDS)

    def check_interrupt(self) -> None:
        if self._interrupted():
            raise RunInterrupted("interrupted in the middle of a rollout")


class _Player:
    """One episode on its way."""

    def __init__(self, runner: RolloutRunner, slot: Slot, on_episode: Callable[[Episode], None]) -> None:
        self._runner = runner
        self._on_episode = on_episode
        self._slot = slot
        self._card = ScenarioCard.of(slot.scenario)
        self._dialogue: Dialogue = runner.contexts.start(slot.scenario)
        self._history = [Utterance(speaker="user", text=slot.scenario.opening_line)] if slot.scenario.opening_line else []
        self._state: UserState = slot.scenario.anchors.initial
        self._turns: list[Turn] = []
        self._pending: tuple[tuple[int, ...], int, Completion] | None = None
        self._failure: Failure | None = None
        self._seconds_policy = self._seconds_simulator = 0.0
        self.over = False

    async def to_the_end(self) -> None:
        while not self.over:
            await self.policy_turn()
            await self.user_turn()

    async def policy_turn(self) -> None:
        """Sample the policy's next completion."""
        runner, slot, play = self._runner, self._slot, self._runner.play
        runner.check_interrupt()
        started = time.perf_counter()
        try:
            prompt_ids, dropped = runner.contexts.prompt(self._dialogue)
            seed = request_seed(play.seed, *slot.seeds, len(self._turns))
            with runner.awaited.reply():
                completion = await runner.engine.generate(prompt_ids, seed=seed, sampling=play.sampling)
            self._pending = (prompt_ids, dropped, completion)
        except EPISODE_ERRORS as error:
            self._fail(error)
        self._seconds_policy += time.perf_counter() - started

    async def user_turn(self) -> None:
        """Let the user react to it."""
        if self.over or self._pending is None:
            return
        runner, slot, play = self._runner, self._slot, self._runner.play
        runner.check_interrupt()
        prompt_ids, dropped, completion = self._pending
        self._pending = None
        ids = [token for token in completion.token_ids if token not in runner.stop_ids]
        parsed = parse_completion(runner.tokenizer.decode(ids), completion.finish_reason, runner.contexts.opens_reasoning)
        round = len(self._turns) + 1
        self._history.append(Utterance(speaker="policy", text=parsed.reply))
        started = time.perf_counter()
        try:
            request = turn_request(
                self._card,
                self._history,
                self._state,
                request_id=f"{play.seed}/{slot.step}/{slot.group}/{slot.scenario.id}/{slot.rollout}/{round}",
                max_rounds=play.max_turns,
                seed=request_seed("user", play.seed, *slot.seeds, round),
            )
            with runner.awaited.answer():
                answer = await runner.simulator.turn(request)
        except EPISODE_ERRORS as error:
            self._fail(error)
            return
        finally:
            self._seconds_simulator += time.perf_counter() - started
        after = UserState(answer.state.anger, answer.state.trust)
        goes_on = answer.goes_on and round < play.max_turns
        self._turns.append(
            Turn(
                prompt_ids=prompt_ids,
                completion=completion,
                reply=parsed.reply,
                reasoning=parsed.reasoning,
                faults=parsed.faults,
                before=self._state,
                after=after,
                user_line=answer.reply,
                user_goes_on=goes_on,
                why=answer.why,
                dropped_exchanges=dropped,
            )
        )
        self._state = after
        self._history.append(Utterance(speaker="user", text=answer.reply, reflection=answer.reflection))
        self._dialogue = runner.contexts.extend(self._dialogue, completion, answer.reply)
        if not goes_on:
            self._finish()

    def cut(self) -> None:
        """The deadline has passed."""
        if not self.over:
            self._fail(DeadlinePassed(f"rollout.deadline of {self._runner.play.deadline:g} s has passed"))

    def _fail(self, error: CtcGrpoError) -> None:
        self._failure = Failure(error.kind, f"turn {len(self._turns) + 1}: {error}")
        self._finish()

    def _finish(self) -> None:
        self.over = True
        self._on_episode(self.episode())

    def episode(self) -> Episode:
        scenario = self._slot.scenario
        valid = self._failure is None
        return Episode(
            scenario=scenario,
            step=self._slot.step,
            group=self._slot.group,
            rollout=self._slot.rollout,
            turns=tuple(self._turns),
            outcome=outcome_score(self._state, scenario.anchors, self._runner.play.variant) if valid else float("nan"),
            failure=self._failure,
            seconds_policy=self._seconds_policy,
            seconds_simulator=self._seconds_simulator,
        )
