"""Asking the models of an evaluation: the one that is evaluated, and those that play a role beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)

from ctcgrpo.errors import RecipeError
from ctcgrpo.policy.reasoning import parse_completion


@dataclass(frozen=True, slots=True)
class Said:
    """A model's visible text. `message` goes into later contexts: the text alone, under the id of what was sampled."""

    text: str
    reasoning: str
    message: ChatMessageAssistant
    tokens: tuple[int, int]


async def say(
    messages: Sequence[ChatMessage],
    *,
    seed: int,
    model: Model | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> Said:
    """What the model that is evaluated (or another) says next. Reasoning is told apart whether its provider does so or leaves it
    between <think> tags; an answer without any text is an empty one, which is the model's own doing."""
    config = GenerateConfig(seed=seed, temperature=temperature, max_tokens=max_tokens)
    output = await (model or get_model()).generate(list(messages), config=config)
    return said(output)


def said(output: ModelOutput) -> Said:
    sampled = output.choices[0].message if output.choices else ChatMessageAssistant(content="")
    parsed = parse_completion(sampled.text, "length" if output.choices and output.stop_reason == "max_tokens" else "stop")
    apart = [part.reasoning for part in sampled.content_list if part.type == "reasoning"]
    usage = output.usage
    read = (
        (usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)) if usage else 0
    )
    return Said(
        text=parsed.reply,
        reasoning="\n".join([*apart, *([parsed.reasoning] if parsed.reasoning else [])]),
        message=ChatMessageAssistant(id=sampled.id, content=parsed.reply, model=sampled.model, source="generate"),
        tokens=(read, usage.output_tokens if usage else 0),
    )


def role(name: str) -> Model:
    """The model that plays a role. Raises RecipeError where nobody was named for it."""
    try:
        return get_model(role=name, required=True)
    except ValueError:
        raise RecipeError(
            f"this benchmark needs a {name}: --model-role {name}=PROVIDER/MODEL (with `ctcgrpo evaluate`: --{name} PROVIDER/MODEL)"
        ) from None
