"""The policy engine in the training process: continuous batching over the turns of all dialogues.

Requests wait in an inbox. A pump admits them between two steps, and returns completions that a step finished, so a dialogue
continues as soon as its reply is complete. A step samples one token for every request in progress. Steps run in a thread of their
own, in sequence until one finishes a request, so that the event loop stays free for the simulator. A batcher makes the steps:
vLLM, or transformers.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.types import Completion

Finished = tuple[str, Completion]  # A request that is over: its name, and what came of it


class Batcher(ABC):
    """Samples for several requests at once, a token a step. `add`, `abort`, `step` and `under_way` are called from one thread, the
    others from the one that trains, while nothing is under way."""

    name: str
    has_own_weights = False  # as PolicyEngine.has_own_weights

    @abstractmethod
    def take_weights(self) -> None:
        """Sample from the trained policy as it is now. Raises PolicyEngineError while requests are under way."""

    @abstractmethod
    def add(self, name: str, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> None:
        """Raises PolicyEngineError for a request that cannot be served."""

    @abstractmethod
    def abort(self, names: Sequence[str]) -> None:
        """Cancel these requests; names that are not in progress are ignored."""

    @abstractmethod
    def step(self) -> list[Finished]:
        """A token for each request under way; gives those that are over. Raises RuntimeError or PolicyEngineError where the engine
        cannot: the requests fail. Anything else is a defect, and ends the run."""

    @property
    @abstractmethod
    def under_way(self) -> int: ...

    @abstractmethod
    def sleep(self) -> None: ...

    @property
    def sleeping_bytes(self) -> int:
        """As `PolicyEngine.sleeping_bytes`."""
        return 0

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    name: str
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling
    result: asyncio.Future[Completion]


class ContinuousEngine(PolicyEngine):
    def __init__(self, batcher: Batcher, *, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._batcher = batcher
        self.has_own_weights = batcher.has_own_weights
        self._interrupted = interrupted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._names = count()
        self._inbox: list[_Request] = []
        self._running: dict[str, _Request] = {}
        self._pump: asyncio.Task[None] | None = None
        self._awake = self._closed = False
        self.mixed_steps = 0  # steps in which requests that had begun already ran with new ones

    def take_weights(self, version: int) -> None:
        if self._awake and version == self.version:
            return
        if self._inbox or self._running:
            waiting = len(self._inbox) + len(self._running)
            raise PolicyEngineError(f"{waiting} requests are in progress; weights cannot change before they finish")
        self._until_idle()
        self._batcher.take_weights()
        self.version, self._awake = version, True

    def sleep(self) -> None:
        self._until_idle()
        self._batcher.sleep()
        self._awake = False

    @property
    def sleeping_bytes(self) -> int:
        return self._batcher.sleeping_bytes

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.shutdown()
            self._batcher.close()

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        if not self._awake:
            raise PolicyEngineError("generate was called before take_weights")
        result: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._inbox.append(_Request(str(next(self._names)), prompt_ids, seed, sampling, result))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._inbox or self._running:
            given_up = [name for name, request in self._running.items() if request.result.done()]
            new, self._inbox = [r for r in self._inbox if not r.result.done()], []
            for name in given_up:
                del self._running[name]
            self._running.update((r.name, r) for r in new)
            try:
                if self._interrupted():
                    raise RunInterrupted("interrupted in the middle of a reply")
                refused, finished = await loop.run_in_executor(self._thread, self._exchange_and_step, given_up, new)
            except (Exception, asyncio.CancelledError) as error:
                await self._give_up(error)
                if isinstance(error, asyncio.CancelledError):
                    raise
                continue
            for name, problem in refused.items():
                _resolve(self._running.pop(name), problem)
            for name, completion in finished:
                if (request := self._running.pop(name, None)) is not None:
                    _resolve(request, completion)

    def _exchange_and_step(
        self, given_up: Sequence[str], new: Iterable[_Request]
    ) -> tuple[dict[str, PolicyEngineError], list[Finished]]:
        """In the sampling thread: what leaves, what enters (a request that is refused fails alone), and steps until one has ended
        something, or somebody comes or goes."""
        refused: dict[str, PolicyEngineError] = {}
        asked = self._running  # whoever gives all of it up puts another in its place
        self._batcher.abort(given_up)
        before = self._batcher.under_way
        for request in new:
            try:
                self._batcher.add(request.name, request.prompt_ids, request.seed, request.sampling)
            except PolicyEngineError as error:
                refused[request.name] = error
        self.mixed_steps += 0 < before < self._batcher.under_way
        while self._batcher.under_way:
            finished = self._batcher.step()
            if finished or self._inbox or self._interrupted() or any(r.result.done() for r in asked.values()):
                return refused, finished
        return refused, []

    async def _give_up(self, error: BaseException) -> None:
        """A step failed, or the run stops: no request may stay under way, and none may wait for ever."""
        waiting = [*self._running.values(), *self._inbox]
        names = list(self._running)
        self._running, self._inbox = {}, []
        problem = error
        if isinstance(error, RuntimeError | asyncio.CancelledError):  # what torch raises, out-of-memory included
            problem = PolicyEngineError(f"{self._batcher.name} failed: {type(error).__name__}: {error}")
        # Submitted by itself, so that a loop that ends does not take it along.
        cleared = asyncio.wrap_future(self._thread.submit(self._batcher.abort, names))
        if isinstance(error, asyncio.CancelledError):  # steps may be under way; they end for want of somebody who waits
            for request in waiting:
                _resolve(request, problem)
        try:
            await asyncio.shield(cleared)
        except Exception as other:  # noqa: BLE001 - an engine that is broken for good; the requests fail with the first reason
            problem.add_note(f"and could not be cleared: {other}")
        finally:
            for request in waiting:
                _resolve(request, problem)

    def _until_idle(self) -> None:
        """What was given up may still be on its way out."""
        self._thread.submit(lambda: None).result()


def _resolve(request: _Request, outcome: Completion | BaseException) -> None:
    if request.result.done():
        return
    if isinstance(outcome, Completion):
        request.result.set_result(outcome)
    else:
        request.result.set_exception(outcome)
