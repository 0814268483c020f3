"""Calls the environment of one episode, and checks its results. Any failure of the environment's code becomes an error that fails
the episode."""

import asyncio
import contextlib
import contextvars
import inspect
import logging
import math
import numbers
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ctcgrpo.credit import VINE
from ctcgrpo.errors import CreditError, CtcGrpoError, EnvironmentFailed
from ctcgrpo.options import RolloutOptions
from ctcgrpo.types import Environment, Info, Message, Step
from ctcgrpo.util.importing import blame

SECONDS_PER_CALL = RolloutOptions.environment_timeout
_CLOSE_SECONDS = 10.0  # a stopping run waits for all environments to close
_KEYS = {"role", "content", "instructions"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A checked `Step` with plain Python values. `messages` is empty at the end of an episode without a last message."""

    messages: tuple[Message, ...]
    reward: float | None
    done: bool
    info: Info


class Session:
    """Makes an environment when the episode begins and calls it, with a timeout of `limit` seconds per call.

    All methods but `close` raise EnvironmentFailed for exceptions of the environment, for invalid values, and on timeout. Errors of
    this project (of a simulator, a spent budget) pass through unchanged.
    """

    def __init__(
        self, factory: Callable[[], Environment], name: str, limit: float = SECONDS_PER_CALL, *, group_seed: int = 0
    ) -> None:
        self._factory = factory
        self._name = name
        self._limit = limit
        self._group_seed = group_seed
        self._environment: Environment | None = None
        self.info: Info = {}

    async def branch(self, name: str, *, seed: int) -> "Session":
        """A session of this name that continues the episode from here. Raises CreditError where the environment cannot."""
        environment = self._made()
        kind = type(environment)
        if kind.branch is Environment.branch:
            raise CreditError(
                f"credit {VINE!r} plays episodes on from their turns, which needs {kind.__name__}.branch; define it, in most "
                "environments as copy.deepcopy(self) with random state from the seed (ctcgrpo/environments/README.md)"
            )
        earned = environment.episode_return
        made = await self._call("branch", environment.branch, seed=seed)
        if not isinstance(made, Environment) or made is environment:
            raise EnvironmentFailed(f"branch returned {_shown(made)}; expected another Environment")
        made.name, made.episode_return = name, earned
        branched = Session(self._factory, name, self._limit, group_seed=self._group_seed)
        branched._environment, branched.info = made, self.info
        return branched

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> tuple[Message, ...]:
        """At least one message."""
        with _blamed("the environment's constructor"):
            made = self._factory()
        if not isinstance(made, Environment):
            raise EnvironmentFailed(f"the environment's constructor returned {_shown(made)}; expected an Environment")
        self._environment = made
        with _blamed("setting the environment's name"):
            made.name, made.group_seed = self._name, self._group_seed
        observation = await self._call("reset", made.reset, task, seed=seed)
        messages = _messages(observation, "reset", {"system", "user", "assistant"})
        if not messages:
            raise EnvironmentFailed("reset returned no message; expected a line of the user, or messages")
        with _blamed("reading the environment's info"):
            self.info = _info(made.info, "reset")
        return messages

    async def step(self, reply: str) -> Answer:
        environment = self._made()
        step = await self._call("step", environment.step, reply)
        if not isinstance(step, Step):
            raise EnvironmentFailed(f"step returned {_shown(step)}; expected a Step")
        reward = None if step.reward is None else _finite(step.reward, "step returned a reward of", " or None")
        if not isinstance(step.done, bool | np.bool_):
            raise EnvironmentFailed(f"step returned done = {_shown(step.done)}; expected True or False")
        done, messages = bool(step.done), _messages(step.message, "step", {"system", "user"})
        if not messages and not done:
            raise EnvironmentFailed("step returned no message and done = False; expected a message, or done = True")
        environment.episode_return += reward or 0.0
        return Answer(messages, reward, done, _info(step.info, "step"))

    async def outcome(self) -> float:
        return _finite(await self._call("outcome", self._made().outcome), "outcome returned")

    async def close(self) -> None:
        """Close the environment, on the first call. Only logs errors, since the episode is over and its result counts."""
        try:
            await self.close_or_fail()
        except CtcGrpoError as error:
            _log.warning("episode %s: %s", self._name, error)

    async def close_or_fail(self) -> None:
        """As `close`, but raises EnvironmentFailed."""
        environment, self._environment = self._environment, None
        if environment is not None:
            await self._call("close", environment.close, limit=min(self._limit, _CLOSE_SECONDS))

    def _made(self) -> Environment:
        assert self._environment is not None, "reset comes first"
        return self._environment

    async def _call(self, what: str, method: Callable[..., Any], *args: Any, limit: float | None = None, **kwargs: Any) -> Any:
        limit = self._limit if limit is None else limit
        with _blamed(what):
            try:
                async with asyncio.timeout(limit) as scope:
                    if inspect.iscoroutinefunction(method):
                        return await method(*args, **kwargs)
                    answer = await _in_thread(lambda: method(*args, **kwargs))
                    return await answer if inspect.isawaitable(answer) else answer
            except TimeoutError:
                if scope.expired():
                    raise EnvironmentFailed(f"{what} exceeded its timeout of {limit:g} s") from None
                raise


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Any exception of the environment's code becomes EnvironmentFailed; a cancellation of this task does not."""
    try:
        yield
    except CtcGrpoError:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise EnvironmentFailed(f"{what} raised CancelledError without a cancellation") from error
    except (Exception, SystemExit) as error:
        raise EnvironmentFailed(f"{what} raised {blame(error)}") from error


async def _in_thread(call: Callable[[], Any]) -> Any:
    """As `asyncio.to_thread`, in a new daemon thread: a call that never returns blocks neither other calls nor the exit."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    answered: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def deliver(value: Any, error: BaseException | None) -> None:
        if not answered.done():
            answered.set_result((value, error))

    def run() -> None:
        value, error = None, None
        try:
            value = context.run(call)
        except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, value, error)

    threading.Thread(target=run, name="environment", daemon=True).start()
    value, error = await answered
    if error is not None:
        raise error
    return value


def _messages(observation: Any, where: str, roles: set[str]) -> tuple[Message, ...]:
    if observation is None or (observation == "" and where == "reset"):
        return ()
    if isinstance(observation, str):
        return ({"role": "user", "content": observation},)
    if not isinstance(observation, Sequence):
        raise EnvironmentFailed(f"{where} returned {_shown(observation)} as message; expected a text, or a list of messages")
    return tuple(_message(message, where, roles) for message in observation)


def _message(message: Any, where: str, roles: set[str]) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= _KEYS:
        raise EnvironmentFailed(f"{where} returned the message {_shown(message)}; expected {{'role': ..., 'content': ...}}")
    if message["role"] not in roles:
        raise EnvironmentFailed(f"{where} returned a message of role {message['role']!r}; expected {' or '.join(sorted(roles))}")
    if wrong := next((name for name in message if not isinstance(message[name], str)), None):
        raise EnvironmentFailed(f"{where} returned a message whose {wrong} is {_shown(message[wrong])}; expected a text")
    return cast(Message, dict(message))


def _finite(value: Any, what: str, otherwise: str = "") -> float:
    number = isinstance(value, numbers.Real | np.bool_)
    if not number or not math.isfinite(value):
        raise EnvironmentFailed(f"{what} {value if number else _shown(value)}; expected a finite number{otherwise}")
    return float(value)


def _info(info: Any, where: str) -> Info:
    """With numbers of NumPy as Python's own, which can be written down."""
    if not isinstance(info, Mapping):
        raise EnvironmentFailed(f"{where} returned info = {_shown(info)}; expected names with numbers or texts")
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in info.items()}
    for name, value in plain.items():
        if not isinstance(name, str):
            raise EnvironmentFailed(f"{where} returned info with the name {_shown(name)}; expected a text")
        if not isinstance(value, str | int | float) or (not isinstance(value, str) and not math.isfinite(value)):
            raise EnvironmentFailed(f"{where} returned info {name} = {_shown(value)}; expected a finite number, or a text")
    return plain


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
