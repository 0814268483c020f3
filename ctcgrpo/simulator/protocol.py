"""The protocol between rollouts and the simulator, and the interface of a backend.

The server is stateless: a request carries the scenario, the history, the state, the round and a seed. So any replica can answer
it, and a retry is safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctcgrpo.environments.eibench.records import SCENE_NAME, Scenario, UserState
from ctcgrpo.errors import SimulatorReplyError

if TYPE_CHECKING:
    from ctcgrpo.llm_client.endpoints import CallRecord, Outage
    from ctcgrpo.llm_client.store import Store
    from ctcgrpo.simulator.config import SimulatorConfig

MOST_LINES, MOST_CHARACTERS = 2_000, 1_200_000
"""Limits of a TurnRequest: lines of its history, and characters of history and scenario together."""
TURN_PATH = "/v1/turn"
ACCOUNT_PATH = "/v1/account"
HEALTH_PATH, READY_PATH, METRICS_PATH = "/health", "/ready", "/metrics"


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Utterance(_Message):
    """One line. `reflection`: the simulator's reasoning before a line of the user; empty for the policy."""

    speaker: Literal["policy", "user"]
    text: str
    reflection: str = ""


class State(_Message):
    anger: int = Field(ge=0, le=100)
    trust: int = Field(ge=0, le=100)

    @classmethod
    def of(cls, state: UserState) -> Self:
        return cls(anger=state.anger, trust=state.trust)

    def plus(self, anger_delta: int, trust_delta: int) -> State:
        return State.of(UserState(self.anger, self.trust).plus(anger_delta, trust_delta))

    def __str__(self) -> str:
        return f"anger {self.anger}, trust {self.trust}"


class Anchor(_Message):
    """A state that defines the scale of outcomes; the evaluation defaults may exceed 100."""

    anger: int = Field(ge=0)
    trust: int = Field(ge=0)


class ScenarioCard(_Message):
    """The part of a scenario that a backend may read."""

    id: str
    scene: str = Field(pattern=SCENE_NAME)
    language: str
    user_persona: str
    opening_line: str
    policy_persona: str
    goal: str
    success_criteria: tuple[str, ...]
    must_avoid: tuple[str, ...]
    anchors: tuple[Anchor, Anchor, Anchor]
    script: dict[str, Any]

    @classmethod
    def of(cls, scenario: Scenario) -> ScenarioCard:
        fields = {name: getattr(scenario, name) for name in cls.model_fields}
        return cls(**fields | {"anchors": [anchor._asdict() for anchor in scenario.anchors], "script": dict(scenario.script)})


class TurnRequest(_Message):
    """A request for the user's reaction. `history` ends with the policy's reply; `round` counts the policy's replies from 1."""

    request_id: str
    scenario: ScenarioCard
    history: tuple[Utterance, ...] = Field(min_length=1)
    state: State
    round: int = Field(ge=1)
    max_rounds: int = Field(ge=1)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _can_be_answered(self) -> TurnRequest:
        if self.history[-1].speaker != "policy":
            raise ValueError("history ends with another line; expected the policy's reply last")
        card = self.scenario
        size = sum(len(u.text) + len(u.reflection) for u in self.history)
        size += sum(map(len, (card.user_persona, card.policy_persona, card.opening_line, card.goal, *card.success_criteria)))
        if len(self.history) > MOST_LINES:
            raise ValueError(f"history has {len(self.history):,} lines; expected at most {MOST_LINES:,}")
        if size > MOST_CHARACTERS:
            raise ValueError(f"history and scenario have {size:,} characters; expected at most {MOST_CHARACTERS:,}")
        return self


def turn_request(
    card: ScenarioCard, history: Sequence[Utterance], state: UserState, *, request_id: str, max_rounds: int, seed: int
) -> TurnRequest:
    """The request for the user's reaction to the last reply in `history`; `state` is the state before that reply. Raises
    SimulatorReplyError for texts that are too long."""
    try:
        return TurnRequest(
            request_id=request_id,
            scenario=card,
            history=tuple(history),
            state=State.of(state),
            round=sum(utterance.speaker == "policy" for utterance in history),
            max_rounds=max_rounds,
            seed=seed,
        )
    except ValidationError as error:
        raise SimulatorReplyError(f"scenario {card.id!r}: {error.errors()[0]['msg']}") from None


class Usage(_Message):
    """Calls and tokens of a turn; 0 for a turn answered from the store."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0


class TurnReply(_Message):
    """The user's reaction. `state` is the state after the turn, computed by the server from the clipped change."""

    reply: str
    anger_delta: int = Field(ge=-10, le=10)
    trust_delta: int = Field(ge=-10, le=10)
    state: State
    goes_on: bool
    why: str = ""
    reflection: str = ""
    usage: Usage = Usage()


UNAVAILABLE = "unavailable"  # the kind of a TurnProblem that is not for good (503): no LLM can be asked before Retry-After


class TurnProblem(_Message):
    """The body of an error response. `kind`: a permanent error's kind in `ctcgrpo.errors`, or UNAVAILABLE."""

    kind: str
    error: str


@dataclass(frozen=True, slots=True)
class Reaction:
    """A backend's decision, from which the server makes a TurnReply. Deltas outside [-10, 10] are clipped."""

    reply: str
    anger_delta: int
    trust_delta: int
    goes_on: bool
    why: str = ""
    reflection: str = ""
    usage: Usage = field(default_factory=Usage)


class SimulatorBackend(ABC):
    """A class that plays the user. Subclass it with a `name` and `react`, and name it in a configuration (README.md)."""

    name: ClassVar[str]
    options: Mapping[str, Any] = {}

    @classmethod
    def configured(
        cls, config: SimulatorConfig, store: Store | None, on_call: Callable[[CallRecord], None], log_line: Callable[[str], None]
    ) -> Self:
        """The backend of a configuration. `on_call` gets a record of every LLM call, `log_line` a line for each outage. Raises
        RecipeError for a configuration that cannot work on this machine."""
        backend = cls(**config.options)
        backend.options = config.options
        return backend

    def about(self) -> dict[str, Any]:
        """What decides its reactions (prompts, models, sampling), for the health answer and every summary."""
        return {"backend": self.name, **self.options}

    def check(self, card: ScenarioCard) -> None:  # noqa: B027 - may be left out
        """Raises SimulatorReplyError for a scenario that it cannot play."""

    @abstractmethod
    async def react(self, request: TurnRequest) -> Reaction:
        """The user's reaction. Raises SimulatorReplyError where it cannot produce one, SimulatorTransportError where its
        endpoints do not answer, BudgetSpent where the budget is spent."""

    def spent(self) -> Mapping[str, Any]:
        """Spending over all runs that share its store; empty for a backend without costs."""
        return {}

    def outage(self) -> Outage | None:
        """The current outage of all its endpoints, or None."""
        return None

    def is_ready(self) -> bool:
        """Whether it can answer turns now."""
        return True

    async def close(self) -> None:  # noqa: B027 - may be left out
        """Close sessions and files."""
