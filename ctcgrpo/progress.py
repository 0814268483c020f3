"""What a run shows while it runs: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ctcgrpo.records import Episode
from ctcgrpo.terminal import Terminal


class RunProgress:
    """Shows steps, the mean outcome, failures and the time left; says nothing on processes other than the main one."""

    def __init__(self, *, name: str, steps: int, episodes_per_step: int, enabled: bool) -> None:
        self._name = name
        self._steps = steps
        self._episodes_per_step = episodes_per_step
        self._enabled = enabled
        self._console = Terminal(80)
        self._live: Progress | None = None
        self._started = time.monotonic()
        self._first_step = 0
        self._episodes = self._failed = 0

    def start(self, step: int) -> None:
        self._started, self._first_step = time.monotonic(), step
        if not self._enabled:
            return
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._live.start()
            self._run = self._live.add_task(self._name, total=self._steps, completed=step, note="")
            self._rollout = self._live.add_task("  episodes", total=self._episodes_per_step, note="")

    def episode(self, episode: Episode) -> None:
        """An episode of this process is over."""
        self._episodes += 1
        if episode.failure:
            self._failed += 1
            self.say(f"episode {episode.name} failed: {episode.failure.kind}: {episode.failure.message}")
        if self._live:
            note = f"{self._failed} failed" if self._failed else ""
            self._live.update(self._rollout, completed=self._episodes, note=note)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """A step is over; `step` counts from 1."""
        self._episodes = self._failed = 0
        if not self._enabled:
            return
        outcome = metrics.get("outcome/all")
        score = "-" if outcome is None or math.isnan(outcome) else f"{outcome:+.3f}"
        failed = int(metrics.get("episodes/failed") or 0)
        note = f"score {score}" + (f", {failed} failed" if failed else "")
        if self._live:
            self._live.update(self._run, completed=step, note=note)
            self._live.update(self._rollout, completed=0, note="")
        else:
            pace = (time.monotonic() - self._started) / max(1, step - self._first_step)
            left = pace * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {note}  {pace:.1f} s a step, {_duration(left)} left")

    def stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, message: str) -> None:
        if self._enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
