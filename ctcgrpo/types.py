"""An episode of any environment: what is played, what is recorded, and what the trainer sees of it."""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Info = Mapping[str, float | int | str]
"""What an environment says of a turn beside its reward: numbers become metrics by name, all of it goes into the trace."""
_NOTHING: Info = MappingProxyType({})


class Message(TypedDict):
    """A chat message. `instructions`: the end of a system message's content that is a text of the developer's, in which control
    tokens (<think>) are such; what persons and policies say never becomes a control token."""

    role: Literal["system", "user", "assistant"]
    content: str
    instructions: NotRequired[str]


Heard = str | Sequence[Message]  # what an environment says to the policy: a line of the user, or chat messages


@dataclass(frozen=True, slots=True)
class Step:
    """What comes of a reply. `message`: what the policy hears next, as a user's line or as messages of users and systems; None only
    where `done` (one that is given there is kept in the record). `reward`: what the turn earned, finite; None: the turn is not
    scored, and shares the reward of the next turn that is (`turn_rewards`). `info`: finite numbers and texts."""

    message: Heard | None
    reward: float | None = None
    done: bool = False
    info: Info = field(default_factory=lambda: _NOTHING)


class Environment:
    """Plays one episode against the policy. Subclass it.

    Each episode has an instance of its own. Whoever plays it sets `name` (how logs call the episode) before `reset`, adds the
    rewards up in `episode_return`, and calls `close` once, also after a failure. An exception, a value that is not as described
    here, or a call over the time limit makes a failed episode with its reason, never a reward.

    `reset`, `step`, `outcome` and `close` may be plain or async methods. A plain one runs in a thread, so that other episodes
    continue meanwhile; calls of one episode come one after the other, not always in the same thread, and a call that ran out of
    time may still run while `close` is called. The constructor and async methods run in the event loop: where they block,
    everything waits.
    """

    name: str = ""
    episode_return: float = 0.0
    info: Info = _NOTHING  # what is known of the start, as `Step.info` is of a turn; set by `reset`

    def reset(self, task: Mapping[str, Any], *, seed: int) -> Heard | Awaitable[Heard]:
        """What the policy hears first: the user's line, or messages, a system message at their head or none. Without a message of
        the user the policy opens."""
        raise NotImplementedError

    def step(self, reply: str) -> Step | Awaitable[Step]:
        """`reply` is the visible text, without reasoning."""
        raise NotImplementedError

    def outcome(self) -> float:
        """Of the episode once it is over, finite; by default the sum of its rewards."""
        return self.episode_return

    def close(self) -> Awaitable[None] | None:
        """Give back what the episode held. What it raises is logged, and costs no episode that is over."""
        return None


def turn_rewards(rewards: Sequence[float | None]) -> tuple[float, ...]:
    """What each turn of an episode is credited with, from the rewards of its turns, where None is a turn that is not scored.

    A reward belongs in equal parts to its turn and the unscored turns directly before it, since all of them led to it; so the sum
    stays the same. Unscored turns after the last reward have 0.

    >>> turn_rewards([0.1, None, 0.5, None])
    (0.1, 0.25, 0.25, 0.0)
    """
    credited: list[float] = []
    for k, reward in enumerate(rewards, 1):
        if reward is not None:
            share = k - len(credited)
            credited += [reward / share] * share
    return (*credited, *[0.0] * (len(rewards) - len(credited)))


NO_TAG = "all"  # the tag of tasks that bring none along


@dataclass(frozen=True, slots=True)
class Task:
    """What an episode is about: its id, what `Environment.reset` is given, and a `tag` to stratify and report by.

    In a data set these are the column `id` (else the row's position), the whole row, and the column `tag` (else "all").
    """

    id: str
    data: Mapping[str, Any]
    tag: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy engine returns for one request.

    `token_ids` (n,) are the sampled ids, end-of-turn token included when one was sampled. `logprobs` (n,) are natural
    logs under the distribution that was sampled from: temperature applied, top-p and top-k renormalised. `log_kept`
    (n,) is the log of the probability mass that top-p and top-k kept, so `logprobs + log_kept` is the log-probability
    at the sampling temperature without truncation; it is empty where the engine cannot tell.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    log_kept: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the policy and what came of it (`reward`, `done`, `info` as in `Step`; `message` is the text of what the policy
    heard, that of several messages with a blank line between them, empty where it heard nothing).

    `reply` is the visible text, without reasoning; `reasoning` is None for a completion without a reasoning part.
    `faults` names what is wrong with the form of the completion ("broken_tags", "unclosed_reasoning",
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


@dataclass(frozen=True, slots=True)
class TurnCredit:
    """What a turn was trained with. `advantage` is outcome term + turn term (unless a control dealt it from elsewhere)."""

    outcome: float
    turn: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an episode is not a result. `kind` is one of `ctcgrpo.errors.EPISODE_ERRORS`' kinds."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of a task: a result, or a failure with its reason.

    `outcome` is finite, or NaN exactly when `failure` is set. `group` is the position of the task in its step and `rollout` the
    position of the episode in its group; both are global, not per process. `opening` is what the policy heard first, empty where
    it opens; `info` is what was known at the start.
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
    seconds_policy: float = 0.0
    seconds_environment: float = 0.0

    @property
    def name(self) -> str:
        """How logs call this episode: step/task/rollout."""
        return f"{self.step}/{self.task}/{self.rollout}"

    @property
    def final_info(self) -> Info:
        """That of the last turn, or of the start."""
        return self.turns[-1].info if self.turns else self.info


@dataclass(frozen=True, slots=True, eq=False)
class TurnSample:
    """What the trainer sees of a turn: context, sampled tokens, and one advantage for all of them, reasoning included.

    `prompt_ids` (p,) and `completion_ids` (n,) become int32 arrays. `old_logprobs` (n,), a float32 array, are log-probabilities at
    the sampling temperature, of the policy before the step's first update; None means that the current ones stand in for them
    (ratio 1).
    """

    prompt_ids: npt.NDArray[np.int32]
    completion_ids: npt.NDArray[np.int32]
    advantage: float
    old_logprobs: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "completion_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))
        if self.old_logprobs is not None:
            object.__setattr__(self, "old_logprobs", np.asarray(self.old_logprobs, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)
