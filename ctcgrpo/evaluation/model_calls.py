"""Calls to the models of an evaluation: the evaluated one, and those of other roles.

Empty replies and replies cut off by the token limit are valid. A provider's error, a context that is too long and a reply blocked
by a filter fail the sample, with the role that caused it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.model._providers.mockllm import MockLLM
from inspect_ai.util import LimitExceededError

from ctcgrpo.errors import CtcGrpoError, JudgeReplyError, PolicyEngineError, RecipeError, SimulatorTransportError
from ctcgrpo.evaluation.reasons import prepared, reason_of, unparsed_response
from ctcgrpo.policy.reasoning import ParsedReply, parse_completion

Role = Literal["model", "simulator", "judge"]
_ERRORS: dict[str, type[CtcGrpoError]] = {
    "model": PolicyEngineError,
    "simulator": SimulatorTransportError,
    "judge": JudgeReplyError,
}
_log = logging.getLogger(__name__)
_OUTCOMES = ("stop", "max_tokens", "unknown", "tool_calls")
_NO_CONTENT = "(no content)"  # what Inspect writes where a provider answered with nothing


@dataclass(frozen=True, slots=True)
class ModelReply:
    """A model's visible text; `cut`: whether the limit on tokens cut it off. `message` goes into later contexts: the text,
    and its reasoning where that is kept, under the id of what was sampled. `tokens`: (input, output)."""

    text: str
    cut: bool
    message: ChatMessageAssistant
    tokens: tuple[int, int]


async def generate_reply(
    messages: Sequence[ChatMessage],
    *,
    role: Role,
    model: Model | None = None,
    config: GenerateConfig,
    keep_reasoning: bool = False,
) -> ModelReply:
    """The next reply of the model in a role; `model` defaults to the evaluated one. Reasoning is separated from the reply, whether
    the provider does so or the text has <think> tags; with `keep_reasoning`, `message` holds it too. Raises the role's error for a
    failed call."""
    output = await generate_output(messages, role=role, model=model or get_model(), config=config)
    sampled = output.choices[0].message
    cut = output.stop_reason == "max_tokens"
    text = "" if sampled.text.strip() == _NO_CONTENT else sampled.text
    parsed = parse_completion(text, "length" if cut else "stop")
    reply = parsed.reply
    if not reply:
        _warn(str(output.model), why_empty(output))
    message = ChatMessageAssistant(
        id=sampled.id,
        content=[*_reasoning_of(sampled, parsed), ContentText(text=reply)] if keep_reasoning else reply,
        model=sampled.model,
        source="generate",
    )
    return ModelReply(reply, cut, message, tokens_of(output))


def _reasoning_of(sampled: ChatMessageAssistant, parsed: ParsedReply) -> list[ContentReasoning]:
    """The reasoning before a reply, as the provider reports it, or else the text between tags."""
    reasoning = [] if isinstance(sampled.content, str) else [p for p in sampled.content if isinstance(p, ContentReasoning)]
    return reasoning or ([ContentReasoning(reasoning=parsed.reasoning)] if parsed.reasoning else [])


@cache
def _warn(model: str, why: str) -> None:
    """Log a warning once per model and reason."""
    _log.warning("%s: %s", model, why)


async def generate_output(messages: Sequence[ChatMessage], *, role: Role, model: Model, config: GenerateConfig) -> ModelOutput:
    """A completion. Raises the role's error for a failed call or a blocked reply."""
    problem = _ERRORS[role]
    if isinstance(model.api, MockLLM):  # by default it counts tokens with a table that is downloaded
        model.api.count_text_tokens = _some_tokens  # type: ignore[method-assign]
    try:
        output = await prepared(model).generate(list(messages), config=config)
    except (CtcGrpoError, LimitExceededError):
        raise
    except Exception as error:  # whatever a provider's client raises
        raise problem(f"{model}: {reason_of(error)}") from error
    if output.error or not output.choices:
        raise problem(f"{model}: {output.error or unparsed_response() or 'its answer has no choices'}")
    if output.stop_reason not in _OUTCOMES:
        text = " ".join(output.completion.split())[-400:]
        raise problem(f"{model}: it ended with {output.stop_reason}: {text or 'no reason given'}")
    return output


async def _some_tokens(text: str) -> int:
    return max(1, len(text) // 4)


def why_empty(output: ModelOutput) -> str:
    """Why a response has no text, and how to fix it."""
    content = output.choices[0].message.content
    if output.stop_reason == "max_tokens":
        return "the reply is empty: reasoning used up the limit on tokens; raise --max-tokens, or reduce reasoning"
    if not isinstance(content, str) and any(isinstance(part, ContentReasoning) for part in content):
        return (
            "content is empty: the text is in reasoning_content; turn reasoning off where the server does not parse it "
            "(-G 'extra_body={chat_template_kwargs: {enable_thinking: false}}')"
        )
    if output.choices[0].message.tool_calls:
        return "content is empty: the model called a tool, and none was offered"
    return f"content is empty (stop_reason {output.stop_reason})"


def tokens_of(output: ModelOutput) -> tuple[int, int]:
    return (0, 0) if output.usage is None else tokens_in(output.usage)


def tokens_in(usage: ModelUsage) -> tuple[int, int]:
    """(input, output) tokens; input includes cached ones."""
    cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
    return usage.input_tokens + cached, usage.output_tokens


def model_of_role(role: Role) -> Model:
    """The model of a role. Raises RecipeError for a role without a model."""
    try:
        return get_model(role=role, required=True)
    except ValueError:
        raise RecipeError(
            f"this benchmark needs a {role}: --model-role {role}=PROVIDER/MODEL (with `ctcgrpo evaluate`: --{role} PROVIDER/MODEL)"
        ) from None


def temperature_of(model: Model, default: float) -> float:
    """The temperature that the model was created with, or the benchmark's default."""
    return default if model.config.temperature is None else model.config.temperature
