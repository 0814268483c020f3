"""Serves an environment of this package, any of them, as an OpenEnv environment.

    app = openenv_app(Guess, TASKS, max_turns=4)        # in my_server.py; then: uvicorn my_server:app

A session plays one episode at a time. Reset takes a task by `id` or `index`, else by `seed`; step takes a reply. An observation
holds the messages for the policy, the turn's reward, and the turn's info as metadata. At the end the metadata also hold the
`outcome`.
`GuardedApp` has the limits that OpenEnv's app lacks.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server import Action, ConcurrencyConfig, Observation, State, create_fastapi_app
from openenv.core.env_server import Environment as OpenEnvironment
from openenv.core.env_server.types import EnvironmentMetadata
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from ctcgrpo import __version__
from ctcgrpo.environments.openenv_guard import Guard
from ctcgrpo.errors import CtcGrpoError, EnvironmentFailed
from ctcgrpo.rollout.session import SECONDS_PER_CALL, Session
from ctcgrpo.types import Environment, Message, Task
from ctcgrpo.util.naming import did_you_mean, quoted

SPLIT = "train"  # the only split of OpenEnv's task endpoints
_MOST_SESSIONS = 1024  # each has a thread
_LONGEST_ID = 255
_CLOSE_SECONDS = 15.0
_random = random.SystemRandom()


class Reply(Action):  # type: ignore[misc]
    """A reply of the policy."""

    message: str = Field(description="the visible text of the reply, without reasoning")


class PolicyObservation(Observation):  # type: ignore[misc]
    """The messages for the policy. `metadata`: the turn's info, and at the end the `outcome`."""

    message: str = Field("", description="what the user says; several messages are joined by a blank line")
    messages: list[dict[str, str]] = Field([], description="all messages with role and content, a system message included")


class EpisodeState(State):  # type: ignore[misc]
    """The episode so far."""

    task: str = Field("", description="the task's id; empty before the first reset")
    tag: str = ""
    seed: int = 0
    done: bool = False
    episode_return: float = Field(0.0, description="sum of the rewards")
    outcome: float | None = Field(None, description="of a finished episode")
    info: dict[str, float | int | str] = Field({}, description="of the last turn, or of the start")


@dataclass(frozen=True, slots=True)
class Served:
    """What all sessions share. `max_turns`: an episode ends after this many replies at the latest; None: the environment decides.
    `seconds_per_call`: limit of a call of the environment."""

    factory: Callable[[], Environment]
    tasks: Sequence[Task]
    name: str
    max_turns: int | None = None
    seconds_per_call: float = SECONDS_PER_CALL
    places: Mapping[str, int] = field(init=False)
    closing: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {task.id: k for k, task in enumerate(self.tasks)})

    def chosen(self, id: Any, index: Any, seed: int) -> Task:
        """Raises EnvironmentFailed for a task that is not there."""
        if id is not None:
            if not isinstance(id, str) or id not in self.places:
                known = did_you_mean(id, self.places) if isinstance(id, str) else "expected a text"
                raise EnvironmentFailed(f"reset: id = {quoted(id)}: no such task; {known}")
            return self.tasks[self.places[id]]
        if index is None:
            return self.tasks[seed % len(self.tasks)]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.tasks):
            raise EnvironmentFailed(f"reset: index = {quoted(index)}; expected an integer from 0 to {len(self.tasks) - 1}")
        return self.tasks[index]


class ServedEpisode(OpenEnvironment):  # type: ignore[misc]
    """One session of the server, and the episode that it plays. `Session` checks what the environment returns, and calls plain
    methods in threads."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = EpisodeState()

    async def reset_async(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        id: str | None = None,
        split: str | None = None,
        index: int | None = None,
    ) -> PolicyObservation:
        """Begins an episode of the task `id`, or `index`, else of the one that `seed` picks; without a seed of a random one. Raises
        EnvironmentFailed for a task that is not there, and for what the environment does wrong."""
        await self._end()
        seed = _random.getrandbits(31) if seed is None else _checked_seed(seed)
        if split not in (None, SPLIT):
            raise EnvironmentFailed(f"reset: split = {quoted(split)}; expected {SPLIT!r}")
        episode_id = _checked_episode_id(episode_id)
        task = self._served.chosen(id, index, seed)
        session = Session(self._served.factory, f"openenv/{episode_id}", self._served.seconds_per_call)
        self._session, self._loop = session, asyncio.get_running_loop()
        self._state = EpisodeState(episode_id=episode_id, task=task.id, tag=task.tag, seed=seed)
        messages = await self._or_end(session.reset(task.data, seed=seed))
        self._state.info = dict(session.info)
        return _observed(messages, metadata=self._state.info)

    async def step_async(self, action: Reply) -> PolicyObservation:
        """The environment's answer to a reply. Raises EnvironmentFailed outside of an episode; an error of the environment ends the
        episode."""
        session, state = self._session, self._state
        if session is None:
            raise EnvironmentFailed("step: no episode is in progress; call reset first")
        answer = await self._or_end(session.step(action.message))
        state.step_count += 1
        state.episode_return += answer.reward or 0.0
        state.info = dict(answer.info)
        metadata = dict(answer.info)
        if answer.done or state.step_count == self._served.max_turns:
            metadata["outcome"] = state.outcome = await self._or_end(session.outcome())
            state.done = True
            await self._end()
        return _observed(answer.messages, reward=answer.reward, done=state.done, metadata=metadata)

    def reset(self, *args: Any, **kwargs: Any) -> PolicyObservation:
        raise TypeError("use reset_async")

    def step(self, *args: Any, **kwargs: Any) -> PolicyObservation:
        raise TypeError("use step_async")

    @property
    def state(self) -> EpisodeState:
        return self._state

    def close(self) -> None:
        """Closes the environment, in the server's event loop. OpenEnv calls this there, or in a thread of the session."""
        session, self._session = self._session, None
        if session is None:
            return
        assert self._loop is not None
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            task = running.create_task(session.close())
            self._served.closing.add(task)
            task.add_done_callback(self._served.closing.discard)
        else:
            asyncio.run_coroutine_threadsafe(session.close(), self._loop).result(_CLOSE_SECONDS)

    def get_metadata(self) -> EnvironmentMetadata:
        described = f"{self._served.name}, {len(self._served.tasks)} tasks; an action is a reply in a dialogue"
        return EnvironmentMetadata(name=self._served.name, description=described, version=__version__)

    def list_splits(self) -> list[str]:
        return [SPLIT]

    def num_tasks(self, split: str) -> int:
        return len(self.list_tasks(split))

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """Ids and tags; raises IndexError for another split."""
        if split != SPLIT:
            raise IndexError(split)
        return [{"index": k, "id": task.id, "tag": task.tag} for k, task in enumerate(self._served.tasks)]

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(index)
        return self.list_tasks(split)[index]

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[dict[str, Any]]:
        return self.list_tasks(split)[start:stop]

    async def _or_end(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The result of a call; an error ends the episode."""
        try:
            return await call
        except CtcGrpoError:
            await self._end()
            raise

    async def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def openenv_app(
    factory: Callable[[], Environment],
    tasks: Sequence[Task | Mapping[str, Any]],
    *,
    name: str = "ctcgrpo",
    max_turns: int | None = None,
    seconds_per_call: float = SECONDS_PER_CALL,
    token: str | None = None,
    most_sessions: int = _MOST_SESSIONS,
    most_bytes: int = 16_000_000,
    idle_seconds: float = 3600.0,
) -> FastAPI:
    """The application of an OpenEnv server that plays `tasks` with environments of `factory`, by OpenEnv's own app factory.

    `factory` and rows of `tasks` are as in CTCGRPOTrainer; a factory that is an asynchronous context manager is entered while the
    server runs. `token`: a bearer token that requests need. `most_sessions`: episodes at the same time; a further one is refused
    (CAPACITY_REACHED). `most_bytes`: of a request. `idle_seconds`: without a message, after which a session is closed. Raises
    TypeError or ValueError for tasks that are none.
    """
    from ctcgrpo.training.tasks import tasks_of

    served = Served(factory, list(tasks_of(tasks, "tasks")), name, max_turns, seconds_per_call)

    def episode() -> ServedEpisode:
        return ServedEpisode(served)

    app: FastAPI = create_fastapi_app(
        episode,
        Reply,
        PolicyObservation,
        concurrency_config=ConcurrencyConfig(max_concurrent_envs=most_sessions, session_timeout=idle_seconds),
        env_name=name,
        state_cls=EpisodeState,
        mode="simulation",
    )
    app.add_exception_handler(CtcGrpoError, _refused)
    app.add_middleware(Guard, token=token, most_bytes=most_bytes, idle_seconds=idle_seconds)
    if isinstance(factory, AbstractAsyncContextManager):
        _keep_open(app, factory)
    return app


def _keep_open(app: FastAPI, shared: AbstractAsyncContextManager[Any]) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with shared, inner(app) as state:
            yield state

    app.router.lifespan_context = lifespan


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=400)


def _observed(messages: Sequence[Message], **of_turn: Any) -> PolicyObservation:
    text = "\n\n".join(message["content"] for message in messages if message["role"] != "system")
    return PolicyObservation(message=text, messages=[{"role": m["role"], "content": m["content"]} for m in messages], **of_turn)


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise EnvironmentFailed(f"reset: seed = {quoted(seed)}; expected an integer of 0 or more")
    return seed


def _checked_episode_id(episode_id: Any) -> str:
    if episode_id is None:
        return str(uuid.uuid4())
    if not isinstance(episode_id, str) or len(episode_id) > _LONGEST_ID:
        raise EnvironmentFailed(f"reset: episode_id = {quoted(episode_id)}; expected a text of at most {_LONGEST_ID} characters")
    return episode_id
