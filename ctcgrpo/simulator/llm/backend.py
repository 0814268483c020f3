"""The user, played by an LLM: call it, parse the answer, ask for a corrected one if needed, and average over k answers.

A turn is made from a valid answer, or it fails with the reason.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from ctcgrpo.environments.eibench.records import MAX_DELTA
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.llm_client.account import Account
from ctcgrpo.llm_client.calls import ChatCompletion
from ctcgrpo.llm_client.endpoints import CallRecord, Deadline, EndpointPool, Outage
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.simulator.llm import answers as fields
from ctcgrpo.simulator.llm.answers import Answer, Unreadable, read_answer
from ctcgrpo.simulator.llm.official import OfficialPrompts
from ctcgrpo.simulator.llm.prompts import TemplatePrompts, gives_away
from ctcgrpo.simulator.protocol import Reaction, ScenarioCard, SimulatorBackend, TurnRequest, Usage
from ctcgrpo.types import Message

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_LONGEST_BACK = 4000  # characters of an unreadable answer that are shown to the LLM again


class ChatModel(Protocol):
    """A source of chat completions: endpoints, or a model of Inspect AI."""

    async def complete(
        self, messages: Sequence[Message], *, dialogue: str, seed: int, schema: dict[str, Any], deadline: Deadline
    ) -> ChatCompletion:
        """A completion before `deadline`, constrained to a JSON schema where possible. Raises SimulatorTransportError where none
        came, SimulatorReplyError for a request that is refused permanently, BudgetSpent where the budget is spent."""
        ...

    # As in SimulatorBackend.
    def is_ready(self) -> bool: ...
    def outage(self) -> Outage | None: ...
    def spent(self) -> Mapping[str, Any]: ...
    async def close(self) -> None: ...


class LlmBackend(SimulatorBackend):
    """`about`: what decides the answers beside the prompts. `samples` answers are averaged. Each takes up to `tries` calls until it
    is valid, within `deadline` seconds per turn."""

    name = "llm"

    def __init__(
        self,
        llm: ChatModel,
        prompts: TemplatePrompts,
        *,
        about: Mapping[str, Any],
        samples: int = 1,
        tries: int = 3,
        deadline: float = 180.0,
        bounded_strings: bool = False,
    ) -> None:
        self.llm, self.prompts = llm, prompts
        self._about = about
        self._samples, self._tries, self._deadline = samples, tries, deadline
        self._schema = _answer_schema(bounded=bounded_strings)

    @classmethod
    def configured(
        cls,
        config: SimulatorConfig,
        store: Store | None,
        on_call: Callable[[CallRecord], None] = lambda record: None,
        log_line: Callable[[str], None] = _log.warning,
    ) -> Self:
        """Raises RecipeError for a key that is not set, and for a folder without the official code."""
        llm = config.llm
        assert llm is not None, "the configuration requires it"
        models = sorted({endpoint.model for endpoint in llm.endpoints})
        return cls(
            EndpointPool(llm, Account(config.budget, store), on_call, log_line),
            chosen_prompts(llm.official, reflections=llm.reflections),
            about={"models": models, "temperature": llm.temperature, "settings": config.digest},
            samples=llm.samples,
            tries=llm.tries,
            deadline=llm.deadline,
            bounded_strings=all(endpoint.bounded_strings for endpoint in llm.endpoints),
        )

    def about(self) -> dict[str, Any]:
        return {"backend": self.name, "prompts": self.prompts.name, "samples": self._samples, **self._about}

    def check(self, card: ScenarioCard) -> None:
        self.prompts.check(card)

    def spent(self) -> Mapping[str, Any]:
        return self.llm.spent()

    def outage(self) -> Outage | None:
        return self.llm.outage()

    def is_ready(self) -> bool:
        return self.llm.is_ready()

    async def close(self) -> None:
        await self.llm.close()

    async def react(self, request: TurnRequest) -> Reaction:
        messages = self.prompts.messages(request)
        seeds = [request.seed + k for k in range(self._samples)]
        results = await _together([self._answer(request, messages, seed, Deadline(self._deadline)) for seed in seeds])
        calls = [call for _, made in results for call in made]
        prompt, completion = sum(c.prompt_tokens for c in calls), sum(c.completion_tokens for c in calls)
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, calls=len(calls))
        return averaged([answer for answer, _ in results], usage)

    async def _answer(
        self, request: TurnRequest, messages: list[Message], seed: int, deadline: Deadline
    ) -> tuple[Answer, list[ChatCompletion]]:
        """One valid answer, and the usage of its calls, at most `tries`."""
        card = request.scenario
        calls: list[ChatCompletion] = []
        problem: Unreadable | None = None
        for attempt in range(self._tries):
            asked = messages
            if problem is not None:
                back: list[Message] = [{"role": "assistant", "content": calls[-1].text[:_LONGEST_BACK] or "-"}]
                asked = [*messages, *back, {"role": "user", "content": self.prompts.correction(card, problem)}]
            calls.append(
                await self.llm.complete(asked, dialogue=card.id, seed=seed + attempt, schema=self._schema, deadline=deadline)
            )
            last = calls[-1]
            if last.ended == "content_filter":
                raise SimulatorReplyError(f"{last.endpoint}: the provider's content filter blocked the user's answer")
            if last.ended == "refusal":
                raise SimulatorReplyError(f"{last.endpoint}: the model refused to answer as the user: {last.note}")
            try:
                answer = read_answer(last.text, request.state)
                if gives_away(messages, card.user_persona, answer.reply):
                    raise Unreadable("leak", fields.REPLY)
                return answer, calls
            except Unreadable as error:
                problem = error
        why = last.note or f"{problem}{', cut off by llm.max_tokens' if last.ended == 'length' else ''}"
        shown = f"; the last answer: {_excerpt(last.text)!r}" if last.text else ""
        raise SimulatorReplyError(f"{last.endpoint}: no valid answer in {self._tries} tries; last problem: {why}{shown}")


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:120]} ... {line[-80:]}"


def chosen_prompts(official: Path | None, *, reflections: bool = True) -> TemplatePrompts:
    """The project's own prompts, or the authors' from a copy of their code, which is executed and always includes reflections."""
    return TemplatePrompts(reflections=reflections) if official is None else OfficialPrompts(official)


async def _together(asked: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results. The first error cancels the others and is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in asked]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def averaged(answers: Sequence[Answer], usage: Usage) -> Reaction:
    """The reaction of k answers: their mean change, rounded half away from zero; the words of the answer closest to it; a majority
    vote on whether the user continues."""
    anger = sum(a.anger_delta for a in answers) / len(answers)
    trust = sum(a.trust_delta for a in answers) / len(answers)
    goes_on = 2 * sum(a.goes_on for a in answers) >= len(answers)
    fitting = [a for a in answers if a.goes_on == goes_on]
    closest = min(fitting, key=lambda a: abs(a.anger_delta - anger) + abs(a.trust_delta - trust))
    why = closest.stop_reason if not goes_on and closest.stop_reason else closest.reflection
    return Reaction(closest.reply, _rounded(anger), _rounded(trust), goes_on, why, closest.reflection, usage)


def _rounded(mean: float) -> int:
    """To the nearest whole number, halves away from zero: the same in both directions."""
    return int(mean + 0.5) if mean >= 0 else -int(-mean + 0.5)


def _answer_schema(*, bounded: bool) -> dict[str, Any]:
    """The JSON schema of an answer, its fields in the order of writing."""

    def text(most: int) -> dict[str, Any]:
        return {"type": "string", "maxLength": most} if bounded else {"type": "string"}

    change = {"type": "integer", "minimum": -MAX_DELTA, "maximum": MAX_DELTA}
    properties = {
        fields.REFLECTION: text(600),
        fields.ANGER: change,
        fields.TRUST: change,
        fields.REPLY: text(400),
        fields.CONTINUE: {"type": "string", "enum": ["yes", "no"]},
        fields.STOP_REASON: text(120),
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
