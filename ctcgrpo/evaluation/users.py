"""Who plays the user in EIBench: an Inspect model with the role `simulator`, the scripted user, an LLM by a configuration of
ours, or a simulator server that runs already. Prompts, reading and states are those of training."""

import atexit
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentText,
    Model,
    ResponseSchema,
)
from inspect_ai.util import JSONSchema

from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.generation import config_of
from ctcgrpo.evaluation.model_calls import generate_output, model_of_role, temperature_of, tokens_of, why_empty
from ctcgrpo.evaluation.presets import TRIES
from ctcgrpo.llm_client.calls import ChatCompletion
from ctcgrpo.llm_client.endpoints import Deadline, Outage
from ctcgrpo.simulator.choice import SimulatorChoice, named_simulator, read_health
from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.simulator.llm.backend import LlmBackend, chosen_prompts
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.scripted.backend import ScriptedBackend
from ctcgrpo.simulator.service import InProcess
from ctcgrpo.types import Message

TEMPERATURE = 0.7
MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


class Served:
    """A simulator server. Each turn has its own client, since a client is bound to its event loop."""

    def __init__(self, choice: SimulatorChoice) -> None:
        self._choice, self._urls = choice, _servers.enter_context(choice.served())

    async def turn(self, request: TurnRequest) -> TurnReply:
        async with self._choice.client(self._urls) as client:
            return await client.turn(request)

    async def about(self) -> dict[str, Any]:
        health = await read_health(self._choice.client(self._urls))
        about = {name: value for name, value in health.items() if name not in ("status", "deadline", "version")}
        return about | priced(self._choice.config)


class InspectModel:
    """An Inspect model as the LLM behind the simulator: Inspect makes the calls, repeats them, limits them and logs them."""

    def __init__(self, model: Model, left_out: frozenset[str]) -> None:
        """`left_out`: settings that are not sent (generation.names_of)."""
        self._model, self._left_out = model, left_out
        self.temperature = None if "simulator.temperature" in left_out else temperature_of(model, TEMPERATURE)

    async def complete(
        self, messages: Sequence[Message], *, dialogue: str, seed: int, schema: dict[str, Any], deadline: Deadline
    ) -> ChatCompletion:
        prompt: list[ChatMessage] = [MESSAGES[m["role"]](content=m["content"]) for m in messages]
        config = config_of(
            "simulator",
            self._left_out,
            seed=seed % 2**31,
            temperature=self.temperature,
            response_schema=ResponseSchema(name="answer", json_schema=JSONSchema.model_validate(schema), strict=True),
        )
        output = await generate_output(prompt, role="simulator", model=self._model, config=config)
        message = output.choices[0].message
        ended = "length" if output.stop_reason == "max_tokens" else str(output.stop_reason)
        note = "" if message.text.strip() else why_empty(output)
        parts = [] if isinstance(message.content, str) else message.content
        if any(isinstance(part, ContentText) and part.refusal for part in parts):
            ended, note = "refusal", " ".join(message.text.split())[:400]
        read, written = tokens_of(output)
        return ChatCompletion(message.text, ended, read, written, str(self._model), note)

    def is_ready(self) -> bool:
        return True

    def outage(self) -> Outage | None:
        """None: Inspect retries calls by itself."""
        return None

    def spent(self) -> Mapping[str, Any]:
        """Empty: Inspect counts tokens."""
        return {}

    async def close(self) -> None: ...


def chosen_user(
    simulator: str | None, official: Path | None, left_out: frozenset[str] = frozenset(), tries: int | None = None
) -> InProcess | Served:
    """`simulator`: None for the model with that role, "scripted", a configuration's file, or a server's URL. `official`: a folder
    with the authors' code, whose prompts the role's model is given. `left_out`: settings that are not sent to it. `tries`: calls to
    the LLM a turn, until its answer can be read; by default 3, or as configured. Raises RecipeError for an invalid combination."""
    choice = None if simulator is None else named_simulator(simulator)
    if tries is not None and choice is not None and choice.llm is None:
        raise RecipeError(f"tries = {tries}: {simulator!r} calls no LLM from this process; leave it out")
    if official is not None and simulator is not None:
        raise RecipeError("official needs a model with the role simulator; in a configuration set llm.official instead")
    if choice is None:
        model = model_of_role("simulator")
        llm = InspectModel(model, left_out)
        about = {"models": [str(model)], "temperature": llm.temperature}
        return InProcess(LlmBackend(llm, chosen_prompts(official), about=about, tries=tries or TRIES))
    if choice == SimulatorChoice():
        return InProcess(ScriptedBackend())
    if tries is not None and choice.llm is not None:
        section = choice.llm.model_copy(update={"tries": tries})
        choice = replace(choice, config=choice.config.model_copy(update={"llm": section}))
    return Served(choice)


def priced(config: SimulatorConfig) -> dict[str, Any]:
    """The price of a million tokens; empty where the endpoints' prices differ."""
    prices = {endpoint.price for endpoint in config.llm.endpoints} if config.llm is not None else set()
    price = prices.pop() if len(prices) == 1 else None
    if price is None or not (price.prompt or price.completion):
        return {}
    return {"price": {"input": price.prompt, "output": price.completion, "currency": config.budget.currency}}


_servers = ExitStack()  # of this process, until it ends
atexit.register(_servers.close)
