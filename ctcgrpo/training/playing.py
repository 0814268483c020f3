"""Plays episodes with the policy that is trained, on every process its share, now or while an update runs."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ctcgrpo.errors import PolicyEngineError, RunPaused
from ctcgrpo.rollout.engine import PolicyEngine
from ctcgrpo.rollout.runner import Play, RolloutRunner, Slot
from ctcgrpo.rollout.scheduling import ExpectedLengths
from ctcgrpo.rollout.traces import TraceWriter, step_name, trace_file
from ctcgrpo.training.ahead import Played, PlayingAhead
from ctcgrpo.training.checkpointing import CheckpointedUpdate
from ctcgrpo.types import Environment, Episode, Task
from ctcgrpo.util.processes import raise_on_all, run_coroutine, together

_T = TypeVar("_T")
PLAYING = "episodes"
_POLL_SECONDS = 0.05  # interval at which processes tell each other which episodes are over
_log = logging.getLogger(__name__)


class RolloutHooks:
    """Callbacks of a trainer on its rollouts; a subclass can observe and stop them. All processes call them. With `overlap` or
    `update_parts`, `episode` and `interrupted` are called in another thread too, while an update runs."""

    def before_rollouts(self, step: int) -> None:
        """Called after `step` trained batches of rollouts, before the next one."""

    def rollouts(self, step: int, episodes: int) -> None:
        """This process begins to play `episodes` episodes of a step (from 1), or, with `overlap`, to wait for them."""

    def episode(self, episode: Episode) -> None:
        """An episode is over. By default a failed one is logged as a warning."""
        if episode.failure:
            _log.warning("episode %s failed: %s: %s", episode.name, episode.failure.kind, episode.failure.message)

    def update(self, step: int) -> None:
        """The episodes of a step are over; its update begins."""

    def interrupted(self) -> bool:
        """Whether the run should stop at the next safe point and save a checkpoint."""
        return False


NO_HOOKS = RolloutHooks()


class EpisodePlayer(CheckpointedUpdate):
    """See the module's docstring. A subclass sets the attributes below, and calls `_reset_playing`."""

    engine: PolicyEngine
    runner: RolloutRunner
    phase: str  # current activity, for log lines
    _hooks: RolloutHooks
    _tasks: Sequence[Task]
    _step_tasks: list[list[int]]  # positions of the tasks of each step

    @property
    def tasks_per_step(self) -> int:
        """Groups in a step."""
        return int(self.args.generation_batch_size // self.args.num_generations)

    def _reset_playing(self) -> None:
        self._lengths = ExpectedLengths()
        self._ahead: PlayingAhead | None = None
        self._played: Played | None = None
        self._engine_free: float | None = None  # when the engine finished its last batch

    def collect(self, step: int, positions: Sequence[int]) -> list[Episode]:
        """Play this process's contiguous share of the episodes of `step` (from 1); `positions`: of their tasks in the dataset."""
        slots = self._slots(step, positions)
        self._hooks.rollouts(step, len(slots))
        return self.play(slots, step_name(step))

    def share_of(self, step: int) -> list[int]:
        """The positions, in the dataset, of the tasks of this process's episodes of `step` (from 1), as `collect` takes them."""
        tasks = [task for task in self._step_tasks[step - 1] for _ in range(self.args.num_generations)]
        share = len(tasks) // self.accelerator.num_processes
        return tasks[self.accelerator.process_index * share :][:share]

    def _slots(self, step: int, positions: Sequence[int]) -> list[Slot]:
        """Of this process; `positions` as in `collect`."""
        size = self.args.num_generations
        first = self.accelerator.process_index * len(positions)
        places = (divmod(first + k, size) for k in range(len(positions)))
        return [Slot(self._tasks[position], step, *place) for position, place in zip(positions, places, strict=True)]

    def play(
        self,
        slots: Sequence[Slot],
        name: str,
        play: Play | None = None,
        environment: Callable[[], Environment] | None = None,
    ) -> list[Episode]:
        """Play episodes with the current policy, on every process (each with its own slots), and write their traces to
        OUTPUT_DIR/traces/NAME.rank-R.jsonl. `play`, `environment`: default: those of training.

        When any process is asked to pause (Ctrl-C, a spent budget), all of them raise RunPaused together.
        """
        self.await_ahead()
        before, started = self.phase, time.perf_counter()
        self._take_weights()
        self.phase = PLAYING
        runner = replace(self.runner, play=play or self.runner.play)
        if environment is not None:
            runner = replace(runner, environment=environment, shared=shared_by(environment))
        try:
            return self._finished(lambda: self._run(slots, name, runner, lambda _: None))
        finally:
            self.phase = before
            if self._engine_free is not None:  # the engine does not wait during a validation
                self._engine_free += time.perf_counter() - started

    def _take_weights(self) -> None:
        self._refuse_sharded_sampling()
        before, self.phase = self.phase, "the transfer of the policy's weights to the engine"
        together(lambda: self.engine.take_weights(self.state.global_step))
        self.phase = before

    def _run(self, slots: Sequence[Slot], name: str, runner: RolloutRunner, over: Callable[[Episode], None]) -> list[Episode]:
        """An episode for each slot, in order. `over` is called with each that is over."""
        write = TraceWriter(self._trace_file(name))
        trains = all(slot.seed_step is None for slot in slots)  # tasks of a validation may have the same ids

        def on_episode(episode: Episode) -> None:
            write(episode)
            if trains:
                self._lengths.note(episode)
            self._hooks.episode(episode)
            over(episode)

        # The order decides which requests share a batch, which deterministic runs must not depend on after a resume.
        order = range(len(slots)) if runner.play.deterministic else self._lengths.longest_first(slots)
        episodes = run_coroutine(runner.run([slots[k] for k in order], on_episode))
        found = dict(zip(order, episodes, strict=True))
        return [found[k] for k in range(len(slots))]

    def _finished(self, wait: Callable[[], _T]) -> _T:
        """The result of `wait`, when it is there on all processes, and the engine had the same weights throughout."""
        pause: RunPaused | None = None
        result: _T | None = None
        try:
            result = wait()
        except RunPaused as error:
            pause = error
        finally:
            self.engine.sleep()
        raise_on_all(pause)
        together(self.engine.confirm)
        return cast(_T, result)

    def _refuse_sharded_sampling(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin
        sharded = self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        if sharded and not self.args.use_vllm:
            raise PolicyEngineError("transformers cannot sample from weights sharded by ZeRO-3 or FSDP; set use_vllm=True")

    def _trace_file(self, name: str) -> Path:
        traces = Path(self.args.output_dir, "traces")
        traces.mkdir(parents=True, exist_ok=True)
        return trace_file(traces, name, self.accelerator.process_index)

    # --- overlap -----------------------------------------------------------------------------------------------------------

    def _play_ahead(self, step: int) -> None:
        """Begin to play the episodes of `step` (from 1), if the run has it, with the current weights, in a thread."""
        if step > len(self._step_tasks):
            return
        self._take_weights()
        if self._engine_free is not None:
            self._log_number("overlap/engine_waited", time.perf_counter() - self._engine_free)
        tasks = self.share_of(step)
        slots = self._slots(step, tasks)

        def play(stopped: Callable[[], bool], over: Callable[[Episode], None]) -> list[Episode]:
            interrupted = self._hooks.interrupted
            runner = replace(self.runner, interrupted=lambda: stopped() or interrupted())
            return self._run(slots, step_name(step), runner, over)

        self._ahead = PlayingAhead(step, tasks, self.state.global_step, play)

    def _complete_groups(self, at_least: int, but: Set[int]) -> set[int]:
        """Wait until `at_least` groups of the batch in progress, besides `but`, are over on all processes, and return all that are;
        none where the batch has ended, complete or interrupted. Collective: all processes get the same."""
        ahead, size = self._ahead, self.args.num_generations
        assert ahead is not None
        while True:
            counts = torch.zeros(self.tasks_per_step + 1, device=self.accelerator.device)
            counts[-1] = ahead.ended is not None  # first: what is over when it has ended is all of it
            for episode in tuple(ahead.over):
                counts[episode.group] += 1
            *over, ended = self.accelerator.reduce(counts).tolist()
            complete = {group for group, episodes in enumerate(over) if episodes == size} - but
            if ended == self.accelerator.num_processes:
                return set()
            if len(complete) >= at_least:
                return complete
            time.sleep(_POLL_SECONDS)

    def _announce(self, ahead: PlayingAhead) -> None:
        """Tell the hooks, once, that the trainer has come to this batch."""
        if not ahead.announced:
            ahead.announced = True
            self._hooks.rollouts(ahead.step, len(ahead.tasks))

    def await_ahead(self) -> None:
        """Wait for the batch that is played ahead, if there is one. The engine is idle afterwards."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        before, self.phase = self.phase, PLAYING
        self._announce(ahead)
        try:
            self._played = self._finished(ahead.wait)
        finally:
            self._engine_free = ahead.ended
            self.phase = before

    def _take_played(self, step: int, tasks: Sequence[int]) -> Played:
        """The episodes of a step (from 1): those played ahead, or else played now."""
        self.await_ahead()
        played, self._played = self._played, None
        if played is not None:
            if (played.step, list(played.tasks)) != (step, list(tasks)):
                raise RuntimeError(f"step {played.step} was played ahead, and the trainer asks for another one ({step})")
            return played
        started, version = time.perf_counter(), self.state.global_step
        episodes = self.collect(step, tasks)
        self._engine_free = time.perf_counter()
        seconds = self._engine_free - started
        return Played(step, tasks, version, episodes, seconds, seconds)

    def _drop_ahead(self) -> None:
        """Cancel a batch that is played ahead when training ends early. It is played again when the run resumes."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.stop()
            self.engine.sleep()
            self._trace_file(step_name(ahead.step)).unlink(missing_ok=True)
        if self._played is not None:
            self._trace_file(step_name(self._played.step)).unlink(missing_ok=True)
        self._played = None


def shared_by(environment: Callable[[], Environment]) -> AbstractAsyncContextManager[Any]:
    """What is entered while a batch of episodes is played."""
    return environment if isinstance(environment, AbstractAsyncContextManager) else contextlib.nullcontext()
