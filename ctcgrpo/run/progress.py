"""Progress of a run: a live display in a terminal, plain lines elsewhere."""

import math
import threading
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from ctcgrpo.types import Episode
from ctcgrpo.util.terminal import Terminal, print_line

_QUIET_SECONDS = 15.0  # maximum time between plain lines in the first step, whose duration is unknown


class _Done(MofNCompleteColumn):
    """Completed count, where the total is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class RunProgress:
    """Shows the phase, steps, the mean outcome, failures and the time left, on the main process only."""

    def __init__(self, *, name: str, steps: int, enabled: bool, processes: int = 1, console: Terminal | None = None) -> None:
        self._name = name
        self._each = f" on each of {processes} processes" if processes > 1 else ""
        self._steps = steps
        self._enabled = enabled
        self._console = console or Terminal(80)
        self._live: Progress | None = None
        self._part: TaskID | None = None
        self._started = self._phase_started = self._said = time.monotonic()
        self._first_step = 0
        self._validates = self._knows_pace = False
        self._episodes = self._of = self._failed = 0
        self._lock = threading.Lock()  # episodes of the next step end in another thread
        self._step = math.inf  # the step whose episodes are counted; any in a validation
        self._ahead = self._failed_ahead = 0  # episodes of the step after it, which are played during the update

    def start(self, step: int) -> None:
        self._started, self._first_step = time.monotonic(), step
        if not self._enabled:
            return
        if self._console.is_terminal:
            what, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            self._live = Progress(what, BarColumn(), _Done(), TimeElapsedColumn(), note, console=self._console)
            self._live.start()
            self._run = self._live.add_task(self._name, total=self._steps, completed=step, note="")

    def validation(self, episodes: int) -> None:
        """A validation begins; this process plays `episodes` of its episodes."""
        with self._lock:
            self._step = math.inf
            self._plays(episodes, "  validation")
            self._validates = True

    def rollouts(self, step: int, episodes: int) -> None:
        """A step begins; `step` counts from 1."""
        with self._lock:
            self._step = step
            self._plays(episodes, "  episodes")
            self._episodes, self._failed, self._ahead, self._failed_ahead = self._ahead, self._failed_ahead, 0, 0
            self._show_episodes()
        if not self._knows_pace and not self._live:
            self.log_line(f"step {step}: playing {episodes} episodes{self._each}")

    def update(self, step: int) -> None:
        """The step's episodes are played, and the policy is trained on them."""
        with self._lock:
            self._step = step  # a validation may have come between
            self._leave_out_validation()
            if self._live:
                self._show(self._live, "  update", None)
        if not self._live and not self._knows_pace:
            played = f"step {step}: rollouts took {_duration(time.monotonic() - self._phase_started)}"
            self.log_line(f"{played}; updating the policy (the first update also compares log-probabilities)")

    def episode(self, episode: Episode) -> None:
        """An episode of this process is over."""
        if episode.failure:
            self.log_line(f"episode {episode.name} failed: {episode.failure.kind}: {episode.failure.message}")
        with self._lock:
            if episode.step > self._step:
                self._ahead += 1
                self._failed_ahead += episode.failure is not None
                return
            self._episodes += 1
            self._failed += episode.failure is not None
            self._show_episodes()
        if not self._live and not self._knows_pace and time.monotonic() - self._said > _QUIET_SECONDS:
            self.log_line(f"  {self._episodes} of {self._of} episodes")

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """A step is over; `step` counts from 1."""
        self._knows_pace = True
        if not self._enabled:
            return
        outcome = metrics.get("outcome/all")
        score = "-" if outcome is None or math.isnan(outcome) else f"{outcome:+.3f}"
        failed = int(metrics.get("episodes/failed") or 0)
        pace = (time.monotonic() - self._started) / max(1, step - self._first_step)
        left = f"{_duration(pace * (self._steps - step))} left"
        note = f"score {score}" + (f", {failed} failed" if failed else "")
        if self._live:
            self._live.update(self._run, completed=step, note=f"{left}, {note}")
        else:
            self.log_line(f"step {step}/{self._steps}  {note}  {pace:.1f} s a step, {left}")

    def stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def log_line(self, message: str) -> None:
        self._said = time.monotonic()
        if self._enabled:
            print_line(self._console, message)

    def _plays(self, episodes: int, what: str) -> None:
        self._leave_out_validation()
        self._phase_started = time.monotonic()
        self._episodes, self._of, self._failed = 0, episodes, 0
        if self._live:
            self._show(self._live, what, episodes)

    def _leave_out_validation(self) -> None:
        """A step's pace excludes validations."""
        if self._validates:
            self._started += time.monotonic() - self._phase_started
            self._validates = False

    def _show_episodes(self) -> None:
        if self._live and self._part is not None:
            note = f"{self._failed} failed" if self._failed else ""
            self._live.update(self._part, completed=self._episodes, note=note)

    def _show(self, live: Progress, what: str, total: int | None) -> None:
        """Replace the second row; without a total it is a bar that moves."""
        if self._part is not None:
            live.remove_task(self._part)
        self._part = live.add_task(what, total=total, note="")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
