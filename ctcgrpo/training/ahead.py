"""A batch of episodes that is played in a thread while the trainer updates on the batch before it."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ctcgrpo.types import Episode


@dataclass(frozen=True, slots=True)
class Played:
    """A finished batch. `step`: of its rollouts, from 1; `tasks`: the positions of its tasks in the dataset; `version`: optimizer
    steps of the weights that it was sampled from; `seconds`: that it took; `waited`: of these, seconds that the trainer waited."""

    step: int
    tasks: Sequence[int]
    version: int
    episodes: list[Episode]
    seconds: float
    waited: float


@dataclass(slots=True)
class PlayingAhead:
    """A batch in progress. `play` gets a function that returns whether it should stop, and raises RunPaused then; and one that it
    calls with each episode that is over, which `over` gathers."""

    step: int
    tasks: Sequence[int]
    version: int
    play: Callable[[Callable[[], bool], Callable[[Episode], None]], list[Episode]]
    announced: bool = False  # whether the trainer's hooks know that it waits for this batch
    ended: float | None = None
    over: list[Episode] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _result: Future[list[Episode]] = field(default_factory=Future)
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, name="rollouts", daemon=True).start()

    def _run(self) -> None:
        try:
            episodes = self.play(self._stopped.is_set, self.over.append)
        except BaseException as error:  # noqa: BLE001 - raised again in the trainer's thread
            self.ended = time.perf_counter()
            self._result.set_exception(error)
        else:
            self.ended = time.perf_counter()
            self._result.set_result(episodes)

    def wait(self) -> Played:
        """The batch once it is finished. Raises what `play` raised. A batch that is waited for no longer (Ctrl-C) is cancelled."""
        started = time.perf_counter()
        try:
            episodes = self._result.result()
        except BaseException:
            self.stop()
            raise
        now = time.perf_counter()
        return Played(self.step, self.tasks, self.version, episodes, (self.ended or now) - self._started, now - started)

    def stop(self) -> None:
        """Cancel the batch, and wait until its environments are closed."""
        self._stopped.set()
        self._result.exception()
