"""The policy engine on vLLM in the training process: continuous batching over the turns of all dialogues.

Requests wait in an inbox; a pump lets them in between two steps of vLLM and hands out what a step ended, so a dialogue goes on as
soon as its reply is there, beside others in the middle of theirs. vLLM steps in one thread of its own: the event loop stays free
for the simulator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.records import Completion
from ctcgrpo.rollout.engine import PolicyEngine, Sampling
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm, Finished


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    name: str
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling
    result: asyncio.Future[Completion]


class VllmColocatedEngine(PolicyEngine):
    def __init__(self, vllm: ColocatedVllm, *, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._vllm = vllm
        self._interrupted = interrupted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._names = count()
        self._inbox: list[_Request] = []
        self._running: dict[str, _Request] = {}
        self._pump: asyncio.Task[None] | None = None
        self._awake = self._closed = False
        self.mixed_steps = 0
        """Steps of vLLM in which requests of different ages ran together."""

    def take_weights(self, version: int) -> None:
        if self._awake and version == self.version:
            return
        if self._inbox or self._running:
            raise PolicyEngineError(
                f"{len(self._inbox) + len(self._running)} requests wait; weights cannot change beneath them"
            )
        self._vllm.take_weights()
        self.version, self._awake = version, True

    def rest(self) -> None:
        self._vllm.rest()
        self._awake = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.shutdown()
            self._vllm.close()

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        if not self._awake:
            raise PolicyEngineError("the engine was asked before it had the policy's weights")
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
                return
            for name, problem in refused.items():
                _resolve(self._running.pop(name), problem)
            for done in finished:
                if (request := self._running.pop(done.name, None)) is not None:
                    _resolve(request, done.completion)

    def _exchange_and_step(
        self, given_up: Sequence[str], new: Iterable[_Request]
    ) -> tuple[dict[str, PolicyEngineError], list[Finished]]:
        """In vLLM's thread: what leaves, what enters (a request that is refused fails alone), one step."""
        refused: dict[str, PolicyEngineError] = {}
        self._vllm.abort(given_up)
        before = self._vllm.under_way
        for request in new:
            try:
                self._vllm.add(request.name, request.prompt_ids, request.seed, request.sampling)
            except PolicyEngineError as error:
                refused[request.name] = error
        self.mixed_steps += 0 < before < self._vllm.under_way
        return refused, self._vllm.step() if self._vllm.under_way else []

    async def _give_up(self, error: BaseException) -> None:
        """vLLM failed in the middle of a step, or the run stops: no request may stay in it, and none may wait for ever."""
        waiting = [*self._running.values(), *self._inbox]
        names = list(self._running)
        self._running, self._inbox = {}, []
        problem = (
            error
            if isinstance(error, RunInterrupted)
            else PolicyEngineError(f"vLLM failed: {type(error).__name__}: {error}")
        )
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._vllm.abort, names)
        except Exception as other:  # noqa: BLE001 - an engine that is broken for good; the requests fail with the first reason
            problem.add_note(f"and could not be cleared: {other}")
        for request in waiting:
            _resolve(request, problem)


def _resolve(request: _Request, outcome: Completion | Exception) -> None:
    if request.result.done():
        return
    if isinstance(outcome, Completion):
        request.result.set_result(outcome)
    else:
        request.result.set_exception(outcome)
