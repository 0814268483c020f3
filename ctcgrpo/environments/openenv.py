"""Any OpenEnv server as an environment. Each episode has a connection, and so a session of the server, of its own.

    environment:
      factory: ctcgrpo.environments.openenv:OpenEnv
      options: {url: http://127.0.0.1:8000}
      tasks: tasks.jsonl        # a row's fields go to the server's reset

The rewards of the server's steps are the rewards of turns. What the server cannot do makes a failed episode, whose reason names the
address. Importing this module takes seconds: openenv imports its web interface.
"""

import asyncio
import contextlib
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from ctcgrpo.errors import EnvironmentFailed, RecipeError
from ctcgrpo.simulator.config import bearer_token
from ctcgrpo.types import Environment, Info, Message, Observation, Step
from ctcgrpo.util.importing import installing, is_reference, load_object
from ctcgrpo.util.naming import cut, quoted

try:
    from openenv.core.client_types import StepResult
    from openenv.core.generic_client import GenericEnvClient
    from websockets.exceptions import WebSocketException
    from websockets.protocol import State
except ModuleNotFoundError as missing:
    raise RecipeError(f"OpenEnv needs the extra openenv: {installing('openenv')} ({missing})") from None

ServerFields = Mapping[str, Any]
_TEXTS = ("message", "text", "prompt", "content", "response")
"""Fields of an observation that may hold its text, in this order."""
_ROLES = ("system", "user")
_SCHEMES = ("http", "https", "ws", "wss")
_FULL, _INVALID = "CAPACITY_REACHED", "VALIDATION_ERROR"  # error codes of OpenEnv
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries to get a session of a full server
_CONNECT_SECONDS = 60.0  # at most; a busy server takes long to accept hundreds of connections
_OWN_VARIABLES = "CTCGRPO_"
_LONGEST_REASON = 500
_WRONG = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, WebSocketException)
"""What openenv's client raises where the server is gone or late, reports an error, or does not speak its protocol."""
_jitter = random.Random()


class OpenEnv(Environment):
    """One episode on an OpenEnv server.

    `url`: the server's (http, https, ws, wss). `action`: the field of an action that takes the reply, or `module:function`, from a
    reply to an action. `observation`: the field that holds the text, or `module:function`, from an observation to a line of the
    user or messages; by default `observation_text`. `system`: a system message before the first observation. `outcome`: the number
    of the last observation, or of its metadata, that is the episode's outcome; by default the sum of the rewards. `scored`: a step
    without a reward fails the episode; by default its turn is unscored. `token_env`: the environment variable (CTCGRPO_...) with
    the bearer token. `timeout`: seconds that the server may take for an answer. `patience`: seconds to wait for a session of a
    server that has no free one. Raises RecipeError for a wrong option.
    """

    def __init__(
        self,
        url: str,
        *,
        action: str | Callable[[str], Mapping[str, Any]] = "message",
        observation: str | Callable[[ServerFields], Observation] | None = None,
        system: str | None = None,
        outcome: str | None = None,
        scored: bool = False,
        token_env: str | None = None,
        timeout: float = 120.0,
        patience: float = 600.0,
    ) -> None:
        self._url = _checked_url(url)
        self._headers = _authorization(token_env)
        self._action: Callable[[str], Mapping[str, Any]] = _function(action, "action", lambda name, reply: {name: reply})
        self._text: Callable[[ServerFields], Observation] = observation_text
        if observation is not None:
            self._text = _function(observation, "observation", self._field)
        self._system, self._outcome_field, self._scored = system, outcome, scored
        self._timeout, self._patience = timeout, patience
        self._client: _Session | None = None
        self._outcome: float | None = None

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Observation:
        """Sends the task's row and the seed to the server's reset. A `seed` of the row replaces the episode's: where it picks the
        task, all rollouts of a group need the same one."""
        # A data set fills the fields that a row lacks with None.
        result = await self._begin({"seed": seed, **{name: value for name, value in task.items() if value is not None}})
        seen = self._observation(result, "reset")
        if result.done:
            raise self._failed("the first observation has done = true, so there is nothing to reply to")
        self.info = self._info(result)
        message = self._text(seen)
        if self._system is None:
            return message
        first: Message = {"role": "system", "content": self._system}
        return [first, {"role": "user", "content": message}] if isinstance(message, str) else [first, *message]

    async def step(self, reply: str) -> Step:
        assert self._client is not None, "reset comes first"
        action = self._action(reply)
        with self._blamed("step"):
            result = await self._client.step(action)
        seen, done, reward = self._observation(result, "step"), result.done, result.reward
        if not isinstance(done, bool):
            raise self._failed(f"step: done = {quoted(done)}; expected true or false")
        if reward is None and self._scored:
            raise self._failed("step: no reward; expected a finite number (options.scored)")
        if reward is not None and not _is_finite(reward):
            raise self._failed(f"step: reward = {quoted(reward)}; expected a finite number or null")
        if done and self._outcome_field is not None:
            self._outcome = self._final(result, self._outcome_field)
        message = self._text(seen)
        return Step(message if message or not done else None, None if reward is None else float(reward), done, self._info(result))

    def outcome(self) -> float:
        if self._outcome_field is None:
            return self.episode_return
        if self._outcome is None:
            raise self._failed(
                f"options.outcome = {self._outcome_field!r}: the server did not end the episode; expected an end within "
                "rollout.max_turns; try a larger rollout.max_turns, or a smaller limit of the server"
            )
        return self._outcome

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _begin(self, fields: Mapping[str, Any]) -> StepResult:
        """The first observation of a new session; waits while the server has no free one."""
        give_up, pause = time.monotonic() + self._patience, _PAUSE
        while True:
            self._client = client = _Session(
                base_url=self._url,
                connect_timeout_s=min(_CONNECT_SECONDS, self._timeout),
                message_timeout_s=self._timeout,
                websocket_ping_interval_s=None,  # a server that is busy for long is not gone; `timeout` limits its answers
                mode="simulation",
                headers=self._headers,
            )
            with self._blamed("cannot connect"):
                await client.connect()
            with self._blamed("reset"):
                try:
                    result = await client.reset(**fields)
                    client.is_begun = True
                    return result
                except RuntimeError as error:
                    if _FULL not in str(error) or time.monotonic() > give_up:
                        raise
            await client.close()
            await asyncio.sleep(pause * _jitter.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _observation(self, result: StepResult, what: str) -> ServerFields:
        seen = result.observation
        if not isinstance(seen, Mapping):
            raise self._failed(f"{what}: observation = {quoted(seen)}; expected an object")
        return seen

    def _field(self, name: str, seen: ServerFields) -> Observation:
        if name not in seen:
            raise self._failed(f"options.observation = {name!r}: the observation has {', '.join(map(cut, seen)) or 'no fields'}")
        value: Observation = seen[name]
        return value

    def _final(self, result: StepResult, name: str) -> float:
        value = _metadata(result).get(name, result.observation.get(name))
        if not _is_finite(value):
            raise self._failed(f"options.outcome = {name!r}: the last observation has {quoted(value)}; expected a finite number")
        return float(value)

    def _info(self, result: StepResult) -> Info:
        """Numbers and texts of the metadata, without the outcome."""
        found = {k: v for k, v in _metadata(result).items() if k != self._outcome_field}
        return {name: value for name, value in found.items() if isinstance(value, str) or _is_finite(value)}

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        """What openenv's client raises becomes a failed episode that names the server."""
        try:
            yield
        except _WRONG as error:
            raise self._failed(f"{what}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._timeout:g} s (options.timeout)"
        if isinstance(error, ConnectionError):
            return f"{error.__cause__ or error}; start the server there, or correct environment.options.url and token_env"
        if isinstance(error, WebSocketException):
            return f"the server closed the connection ({error})"
        text = f"{error}" if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        if _FULL in text:
            text = (
                f"{text}; waited {self._patience:g} s (options.patience); rollout.deterministic needs a session for every episode"
            )
        if _INVALID in text:
            text = f"{text}; expected the action's fields of {self._url}/schema; set options.action"
        return text

    def _failed(self, reason: str) -> EnvironmentFailed:
        return EnvironmentFailed(f"OpenEnv server {self._url}: {cut(reason, _LONGEST_REASON)}")


class _Session(GenericEnvClient):  # type: ignore[misc]
    """A connection that is never replaced once its episode has begun. openenv's client would open another one, with a session that
    was not reset, and the episode would continue in it."""

    is_begun = False

    async def _connect_async(self) -> Any:
        if self.is_begun and (self._ws is None or self._ws.state is not State.OPEN):
            raise RuntimeError("the connection was lost, and the episode with it")
        return await super()._connect_async()


def observation_text(observation: ServerFields) -> Observation:
    """The text of an observation: its `messages`, where these are chat messages of users and systems; else the first text among
    message, text, prompt, content and response; else all of it but the metadata as JSON.

    >>> observation_text({"prompt": "Guess a word.", "tries": 6})
    'Guess a word.'
    >>> observation_text({"board": [0, 1], "metadata": {}})
    '{"board": [0, 1]}'
    """
    messages = observation.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    for name in _TEXTS:
        if isinstance(text := observation.get(name), str) and (text or "messages" in observation):
            return text
    shown = {name: value for name, value in observation.items() if name != "metadata"}
    return json.dumps(shown, ensure_ascii=False) if shown else ""


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _metadata(result: StepResult) -> Mapping[str, Any]:
    found = result.metadata or result.observation.get("metadata")
    return found if isinstance(found, Mapping) else {}


def _function(given: Any, option: str, of_field: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
    """The function that an option gives or names; `of_field` of the field that it names."""
    where = f"environment.options.{option}"
    if callable(given):
        return cast(Callable[[Any], Any], given)
    if not isinstance(given, str):
        raise RecipeError(f"{where} = {quoted(given)}; expected the name of a field, or module:function")
    if is_reference(given):
        return cast(Callable[[Any], Any], load_object(given, where))
    return functools.partial(of_field, given)


def _checked_url(url: str) -> str:
    where = "environment.options.url"
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in _SCHEMES or not parts.netloc:
        raise RecipeError(f"{where} = {quoted(url)}; expected the URL of an OpenEnv server, such as http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query:
        raise RecipeError(
            f"{where}: the URL holds a name, a password or a query; expected none; try options.token_env for a token"
        )
    return url.rstrip("/")


def _authorization(token_env: str | None) -> dict[str, str] | None:
    if token_env is None:
        return None
    where = f"environment.options.token_env = {quoted(token_env)}"
    if not isinstance(token_env, str) or not token_env.startswith(_OWN_VARIABLES):
        raise RecipeError(f"{where}; expected the name of an environment variable that begins with {_OWN_VARIABLES}")
    token = bearer_token(token_env)
    if token is None:
        raise RecipeError(f"{where}: the variable is blank or not set; expected the server's token")
    return {"Authorization": f"Bearer {token}"}
