"""The types of an episode, for any environment: its interface, its records, and the trainer's samples."""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Info = Mapping[str, float | int | str]
"""Extra information on a turn: numbers become metrics by name, and everything is written to the trace."""
_NOTHING: Info = MappingProxyType({})


class Message(TypedDict):
    """A chat message. `instructions`: the developer's text at the end of a system message's content. Only there control tokens
    (<think>) are encoded as such; texts of users and policies never become control tokens."""

    role: Literal["system", "user", "assistant"]
    content: str
    instructions: NotRequired[str]


Observation = str | Sequence[Message]  # what the policy reads next: a line of the user, or chat messages


@dataclass(frozen=True, slots=True)
class Step:
    """The result of a reply. `message`: the next observation, a user's line or messages of roles user and system; None only where
    `done` (a last message is recorded). `reward`: of the turn, finite; None: the turn is unscored, and shares the reward of the
    next scored turn (`turn_rewards`). `info`: finite numbers and texts."""

    message: Observation | None
    reward: float | None = None
    done: bool = False
    info: Info = field(default_factory=lambda: _NOTHING)


class Environment:
    """Plays one episode against the policy. Subclass it.

    Each episode has its own instance. The runner sets `name` (the episode's name in logs) and `group_seed` (the same for all
    episodes of a group, for what they should have in common) before `reset`, sums the rewards in `episode_return`, and calls
    `close` once, also after a failure. An exception, an invalid value, or a call over the timeout
    makes a failed episode with its reason, never a reward.

    `reset`, `step`, `outcome` and `close` may be plain or async methods. A plain one runs in a thread, so that other episodes
    continue. Calls of one episode are sequential, but not always in the same thread; a call that timed out may still run during
    `close`. The constructor and async methods run in the event loop, and must not block it.
    """

    name: str = ""
    group_seed: int = 0
    episode_return: float = 0.0
    info: Info = _NOTHING  # information on the start, as `Step.info` on a turn; set by `reset`

    def reset(self, task: Mapping[str, Any], *, seed: int) -> Observation | Awaitable[Observation]:
        """The first observation: the user's line, or messages, optionally with a system message first. Without a message of the
        user the policy begins the dialogue."""
        raise NotImplementedError

    def step(self, reply: str) -> Step | Awaitable[Step]:
        """`reply` is the visible text, without reasoning."""
        raise NotImplementedError

    def outcome(self) -> float:
        """The outcome of a finished episode, a finite number; by default the sum of its rewards."""
        return self.episode_return

    def branch(self, *, seed: int) -> "Environment | Awaitable[Environment]":
        """A copy of this episode after a step, which continues independently of it; `seed` determines what is random from here on.
        Only credit `vine` needs it. The runner sets the copy's `name` and `episode_return`, and calls its `close`."""
        raise NotImplementedError

    def close(self) -> Awaitable[None] | None:
        """Release the episode's resources. Exceptions are logged, and do not fail a finished episode."""
        return None


def turn_rewards(rewards: Sequence[float | None]) -> tuple[float, ...]:
    """The reward of each turn of an episode, from the rewards of its turns, where None is an unscored turn.

    A reward is split equally over its turn and the unscored turns directly before it, so the sum stays the same. Unscored turns
    after the last reward get 0.

    >>> turn_rewards([0.1, None, 0.5, None])
    (0.1, 0.25, 0.25, 0.0)
    """
    credited: list[float] = []
    for k, reward in enumerate(rewards, 1):
        if reward is not None:
            share = k - len(credited)
            credited += [reward / share] * share
    return (*credited, *[0.0] * (len(rewards) - len(credited)))


NO_TAG = "all"  # the tag of tasks without one


@dataclass(frozen=True, slots=True)
class Task:
    """A task: its id, the data for `Environment.reset`, and a `tag` to stratify and report by.

    In a data set these are the column `id` (else the row's position), the whole row, and the column `tag` (else "all").
    """

    id: str
    data: Mapping[str, Any]
    tag: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The response of a policy engine to one request.

    `token_ids` (n,) are the sampled ids, end-of-turn token included when one was sampled. `logprobs` (n,) are natural
    logs under the distribution that was sampled from: temperature applied, top-p and top-k renormalised.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the policy and its result. `reward`, `done`, `info`: as in `Step`. `message`: the text of the observation after
    it; several messages are joined by a blank line; empty without one.

    `reply` is the visible text, without reasoning; `reasoning` is None for a completion without a reasoning part.
    `continuations` are the episodes that were played on from after this turn, each with the turns up to it (credit `vine`).
    `faults` names errors in the form of the completion ("broken_tags", "unclosed_reasoning",
    "empty_reasoning", "empty_reply", "cut"). `done` also holds for the last turn that an episode may have.
    """

    prompt_ids: tuple[int, ...]
    completion: Completion
    reply: str
    reasoning: str | None
    faults: tuple[str, ...]
    message: str
    reward: float | None
    done: bool
    info: Info = field(default_factory=lambda: _NOTHING)
    dropped_exchanges: int = 0
    continuations: "tuple[Episode, ...]" = ()


@dataclass(frozen=True, slots=True)
class TurnCredit:
    """The credit of a turn in training. `advantage` is outcome term + turn term (unless a control permutes advantages)."""

    outcome: float
    turn: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason of a failed episode. `kind` is one of `ctcgrpo.errors.EPISODE_ERRORS`' kinds."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of a task: a result, or a failure with its reason.

    `outcome` is finite, or NaN exactly when `failure` is set. `group` is the position of the task in its step and `rollout` the
    position of the episode in its group; both are global, not per process. `opening` is the first observation, empty where
    the policy begins; `info` is that of the start. `version`: optimizer steps of the weights that it was sampled from.
    """

    task: str
    tag: str
    step: int
    group: int
    rollout: int
    turns: tuple[Turn, ...]
    outcome: float
    failure: Failure | None = None
    opening: str = ""
    info: Info = field(default_factory=lambda: _NOTHING)
    version: int | None = None
    seconds_policy: float = 0.0
    seconds_environment: float = 0.0

    @property
    def name(self) -> str:
        """The episode's name in logs: step/task/rollout."""
        return f"{self.step}/{self.task}/{self.rollout}"

    @property
    def final_info(self) -> Info:
        """The info of the last turn, or of the start."""
        return self.turns[-1].info if self.turns else self.info


@dataclass(frozen=True, slots=True, eq=False)
class TurnSample:
    """The training sample of a turn: context, sampled tokens, and one advantage for all of them, reasoning included.

    `prompt_ids` (p,) and `completion_ids` (n,) become int32 arrays. `old_logprobs` (n,), a float32 array, are log-probabilities at
    the sampling temperature, of the policy before the step's first update; None: the current ones are used
    (ratio 1). `sampled_logprobs` (n,), float32, are those that importance weights compare with them: the engine's, plus, where
    top-p and top-k truncate, the log of the mass that they keep of the policy; None: no weights.
    """

    prompt_ids: npt.NDArray[np.int32]
    completion_ids: npt.NDArray[np.int32]
    advantage: float
    old_logprobs: npt.NDArray[np.float32] | None = None
    sampled_logprobs: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "completion_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))
        for name in ("old_logprobs", "sampled_logprobs"):
            if (logprobs := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(logprobs, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)
