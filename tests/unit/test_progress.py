"""What a run shows while it runs, with a clock of the test: plain lines, and the live display of a terminal."""

from __future__ import annotations

import io
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from ctcgrpo.run import progress
from ctcgrpo.run.progress import RunProgress
from ctcgrpo.types import Episode, Failure
from ctcgrpo.util.terminal import Terminal

EPISODE = Episode("support-train-01", "support", 1, 0, 0, (), 0.1)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def shown(*, terminal: bool) -> tuple[RunProgress, io.StringIO]:
    out = Screen() if terminal else io.StringIO()
    return RunProgress(name="q", steps=5, enabled=True, console=Terminal(100, file=out)), out


def seen(out: io.StringIO, text: str) -> bool:
    """Whether the display, which a thread renews, comes to hold it."""
    deadline = time.perf_counter() + 20
    while text not in out.getvalue() and time.perf_counter() < deadline:
        time.sleep(0.05)
    return text in out.getvalue()


def play(run: RunProgress, wait: Callable[[float], None], episodes: int, seconds: float) -> None:
    for _ in range(episodes):
        wait(seconds)
        run.episode(EPISODE)


def test_a_process_counts_its_own_episodes() -> None:
    out = io.StringIO()
    RunProgress(name="q", steps=5, enabled=True, processes=2, console=Terminal(100, file=out)).rollouts(1, 4)
    assert out.getvalue() == "step 1: playing 4 episodes on each of 2 processes\n"


def test_no_part_of_the_first_step_is_silent(wait: Callable[[float], None]) -> None:
    run, out = shown(terminal=False)
    run.start(0)
    run.log_line("validation after step 0: playing 8 episodes")
    run.validation(8)
    play(run, wait, 8, 6.0)
    run.rollouts(1, 4)
    play(run, wait, 4, 10.0)
    run.update(1)
    wait(20.0)
    run.step(1, {"outcome/all": -0.5})
    assert out.getvalue().splitlines() == [
        "validation after step 0: playing 8 episodes",
        "  3 of 8 episodes",
        "  6 of 8 episodes",
        "step 1: playing 4 episodes",
        "  2 of 4 episodes",
        "  4 of 4 episodes",
        "step 1: rollouts took 40 s; updating the policy (the first update also compares log-probabilities)",
        "step 1/5  score -0.500  60.0 s a step, 4 min 0 s left",  # without the 48 s of the validation
    ]
    run.rollouts(2, 4)
    play(run, wait, 4, 10.0)
    run.update(2)
    run.step(2, {"outcome/all": math.nan})
    assert out.getvalue().splitlines()[8:] == ["step 2/5  score -  50.0 s a step, 2 min 30 s left"]


def test_a_terminal_shows_the_time_left_also_where_a_step_takes_minutes(wait: Callable[[float], None]) -> None:
    run, out = shown(terminal=True)
    run.start(0)
    run.validation(2)
    play(run, wait, 2, 30.0)
    assert seen(out, "validation") and seen(out, "2/2")
    run.rollouts(1, 4)
    run.episode(replace(EPISODE, outcome=math.nan, failure=Failure("engine", "gone")))
    play(run, wait, 2, 60.0)
    assert seen(out, "3/4") and seen(out, "1 failed"), "a step's episodes are counted without those of the validation"
    run.update(1)
    assert seen(out, "  update") and "/?" not in out.getvalue()
    run.step(1, {"outcome/all": 0.25})
    run.stop()
    assert "8 min 0 s left, score +0.250" in out.getvalue()


def test_episodes_of_the_next_step_are_counted_when_it_begins(wait: Callable[[float], None]) -> None:
    run, out = shown(terminal=False)
    run.start(0)
    run.rollouts(1, 4)
    play(run, wait, 4, 10.0)
    for _ in range(3):  # during the update
        wait(6.0)
        run.episode(replace(EPISODE, step=2))
    assert "5 of 4" not in out.getvalue() and "4 of 4" in out.getvalue()
    run.rollouts(2, 4)
    wait(16.0)
    run.episode(replace(EPISODE, step=2))
    assert out.getvalue().splitlines()[-1] == "  4 of 4 episodes"


def test_a_validation_while_the_next_step_is_played_ahead(wait: Callable[[float], None]) -> None:
    """It comes between the episodes of a step and its update, during which those of the step after it begin."""
    run, out = shown(terminal=True)
    run.start(0)
    run.rollouts(1, 4)
    play(run, wait, 4, 10.0)
    run.update(1)
    failed = replace(EPISODE, step=2, outcome=math.nan, failure=Failure("engine", "gone"))
    for episode in (failed, *[replace(EPISODE, step=2)] * 3):
        wait(5.0)
        run.episode(episode)
    run.step(1, {"outcome/all": 0.0})
    run.rollouts(2, 4)
    assert seen(out, "4/4") and seen(out, "1 failed")
    run.validation(2)
    play(run, wait, 2, 30.0)
    run.update(2)
    wait(20.0)
    for _ in range(3):
        run.episode(replace(EPISODE, step=3))
    run.step(2, {"outcome/all": 0.0})
    run.rollouts(3, 4)
    assert seen(out, "3/4")
    run.stop()
    assert "2 min 0 s left" in out.getvalue(), "80 s for two steps: the validation takes none of a step's time, the update does"


def test_episodes_that_end_in_another_thread_find_the_row_that_is_shown() -> None:
    run, _ = shown(terminal=True)
    run.start(0)
    errors: list[BaseException] = []

    def episodes() -> None:
        try:
            while not over.is_set():
                run.episode(EPISODE)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    over, thread = threading.Event(), threading.Thread(target=episodes)
    thread.start()
    for _ in range(300):
        run.rollouts(1, 4)
        run.update(1)
    over.set()
    thread.join()
    run.stop()
    assert not errors
