"""Checks of a custom environment: import, tasks, one complete episode, and unusual replies."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ctcgrpo.credit import VINE
from ctcgrpo.errors import CtcGrpoError, RecipeError
from ctcgrpo.preflight.subject import NO_VALIDATION, Finding, Subject, ok, warning
from ctcgrpo.rollout.session import Answer, Session
from ctcgrpo.run.data_digest import tasks_digest
from ctcgrpo.run.recipe import OwnEnvironment
from ctcgrpo.run.run_tasks import environment_factory, read_tasks, refuse_uneven_tags
from ctcgrpo.types import Message, Task

_REPLY, _EMOJI = "I see.", "\U0001f642\U0001f44d\U0001f3fd"
_BLOCKED = 1.0  # seconds for which an environment may keep the event loop to itself
_PAUSE = 0.01
_RESETS = 8  # tasks of each set whose first messages are looked at, at most


def environment(s: Subject) -> Iterator[Finding]:
    settings = _settings(s)
    s.factory = environment_factory(settings)
    yield ok(settings.factory)


def tasks(s: Subject) -> Iterator[Finding]:
    settings = _settings(s)
    s.tasks = read_tasks(settings.tasks, "environment.tasks", settings.folder)
    refuse_uneven_tags(settings, s.tasks)
    tags = len({task.tag for task in s.tasks})
    yield ok(f"{len(s.tasks)} training tasks" + (f" of {tags} tags" if tags > 1 else ""))


def validation(s: Subject) -> Iterator[Finding]:
    if s.recipe.validation is None:
        yield NO_VALIDATION
        return
    s.held_out_tasks = read_tasks(s.recipe.validation_source(), "validation.tasks", _settings(s).folder, "test")
    trained = {*_contents(s.tasks).values(), *_named(s.tasks)}
    both = [name for name, content in _contents(s.held_out_tasks).items() if content in trained]
    both = list(dict.fromkeys([*both, *(name for name in _named(s.held_out_tasks) if name in trained)]))
    if both:
        yield warning(
            f"{len(both)} of {len(s.held_out_tasks)} held-out tasks (validation.tasks) are also training tasks, for example "
            f"{both[0]!r}: scores will not show generalization to other tasks"
        )
    else:
        yield ok(f"{len(s.held_out_tasks)} held-out tasks")


def episode(s: Subject) -> Iterator[Finding]:
    """Plays one episode with the same reply in every turn, and resets some tasks. Costs what the environment's calls cost."""
    if s.factory is None or not s.tasks:
        return
    openings = {task.id: _played(s, task, ())[0] for task in _evenly(s.tasks)}
    openings |= {f"{task.id} (held out)": _played(s, task, ())[0] for task in _evenly(s.held_out_tasks)}
    started = time.monotonic()
    _, answers, outcome, blocked = _played(s, s.tasks[0], [_REPLY] * s.recipe.rollout.max_turns)
    seconds = time.monotonic() - started
    s.openings = openings
    s.observations = [answer.messages for answer in answers if answer.messages]
    rewards = [answer.reward for answer in answers]
    turns = len(rewards)
    over = "done" if answers[-1].done else f"not done after rollout.max_turns = {turns}"
    earned = ", ".join("not scored" if reward is None else f"{reward:+.3f}" for reward in rewards[:5])
    took = f" in {seconds:.0f} s" if seconds >= 1 else ""
    text = (
        f"task {s.tasks[0].id!r} with the reply {_REPLY!r}: {turns} {'turn' if turns == 1 else 'turns'} ({over}){took}, rewards "
        f"{earned}{', ...' if turns > 5 else ''}, outcome {outcome:+.3f}"
    )
    blank = all(reward is None for reward in rewards) and not outcome
    nothing = f"{text}: no turn is scored and the outcome is 0, so there is no training signal"
    yield warning(nothing) if blank else ok(text)
    if blocked > _BLOCKED:
        yield warning(
            f"the constructor or an async method blocks for {blocked:.1f} s, in which all other episodes wait: await what takes "
            "time, or make it a plain method, which runs in a thread"
        )


def replies(s: Subject) -> Iterator[Finding]:
    """A policy may reply anything. An environment that raises on a reply makes a failed episode, which gives no signal."""
    if not s.openings:
        return
    long = 4 * s.recipe.rollout.max_new_tokens
    odd = {"an empty reply": "", f"a reply of {long:,} characters": ("word " * long)[:long], "a reply of emoji": _EMOJI}
    bad = []
    for what, reply in odd.items():
        try:
            _played(s, s.tasks[0], [reply])
        except CtcGrpoError as error:
            bad.append(warning(f"{what} fails the episode: {error}"))
    yield from bad or [ok(f"{', '.join(odd)}: no error")]


_Played = tuple[Sequence[Message], Sequence[Answer], float, float]


def _played(s: Subject, task: Task, replies: Sequence[str]) -> _Played:
    """First messages, answers and outcome of an episode with at most these replies, and the longest time in seconds for which it
    blocked the event loop. Raises RecipeError that names the task."""
    try:
        return asyncio.run(_play(s, task, replies))
    except CtcGrpoError as error:
        raise RecipeError(f"{_settings(s).factory}, task {task.id!r}: {error}") from error


async def _play(s: Subject, task: Task, replies: Sequence[str]) -> _Played:
    assert s.factory is not None
    session = Session(s.factory, f"check/{task.id}", _settings(s).timeout)
    answers: list[Answer] = []
    outcome = blocked = 0.0

    async def watch() -> None:
        nonlocal blocked
        while True:
            before = time.monotonic()
            await asyncio.sleep(_PAUSE / 2)
            blocked = max(blocked, time.monotonic() - before)

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.sleep(_PAUSE)
        opening = await session.reset(task.data, seed=s.recipe.run.seed)
        for reply in replies:
            await asyncio.sleep(_PAUSE)  # for the watcher, so that each call counts for itself
            answers.append(await session.step(reply))
            if answers[-1].done:
                break
            if s.recipe.credit.credit == VINE and len(answers) == 1:
                branch = await session.branch(f"check/{task.id}/after-1", seed=s.recipe.run.seed)
                try:
                    await branch.step(reply)
                finally:
                    await branch.close()
        if answers:
            outcome = await session.outcome()
        await session.close_or_fail()
    finally:
        await session.close()
    await asyncio.sleep(_PAUSE)
    watcher.cancel()
    return opening, answers, outcome, blocked


def _settings(s: Subject) -> OwnEnvironment:
    assert s.recipe.environment is not None  # checks_of
    return s.recipe.environment


def _contents(tasks: Sequence[Task]) -> Mapping[str, str]:
    """Digests of tasks without their id, by id."""
    return tasks_digest([replace(task, data={k: v for k, v in task.data.items() if k != "id"}) for task in tasks])


def _named(tasks: Sequence[Task]) -> list[str]:
    """The ids given in the data; other ids are positions."""
    return [task.id for task in tasks if "id" in task.data]


def _evenly(tasks: Sequence[Task]) -> list[Task]:
    most = min(_RESETS, len(tasks))
    return [tasks[k * len(tasks) // most] for k in range(most)]
