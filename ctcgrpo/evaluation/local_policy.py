"""A policy in a folder as an Inspect model: --model ctcgrpo/checkpoints/RUN/final (or best, base, an export, any model's folder).

Contexts and sampling equal those of training, id by id: later prompts contain earlier turns as sampled, a prompt that is too long
drops its oldest exchange, and requests of all dialogues are batched. In a run's folder the recipe decides how contexts are made
(reasoning, length). The task decides the policy's instructions.
"""

from __future__ import annotations

import secrets
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from inspect_ai.model import ChatMessage, ChatMessageAssistant, GenerateConfig, ModelAPI, ModelOutput, ModelUsage
from inspect_ai.tool import ToolChoice, ToolInfo

from ctcgrpo.environments.eibench.persona import BETWEEN
from ctcgrpo.errors import PolicyEngineError, PolicyError
from ctcgrpo.evaluation.eibench import INSTRUCTIONS
from ctcgrpo.evaluation.generation import LOCAL_TOKENS
from ctcgrpo.policy.context import ContextBuilder, Dialogue, Line, ReasoningPolicy
from ctcgrpo.policy.reasoning import OPEN
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.run.folders import is_model
from ctcgrpo.run.opened_policy import OpenedPolicy, run_around
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.types import Completion

_MAX_SAMPLED = 65536  # replies whose token ids are kept for later turns
_REASONING_POLICIES: Mapping[str, ReasoningPolicy] = {"none": "strip", "all": "keep"}  # by Inspect's reasoning_history


class _Parts(OpenedPolicy):
    """The loaded policy, with contexts of each kind, so that an unusable template is refused before anything is played."""

    def __init__(self, name: str, recipe: Recipe | None, max_batch: int) -> None:
        super().__init__(name, recipe, max_batch=max_batch)
        policies: tuple[ReasoningPolicy | None, ...] = (None, *_REASONING_POLICIES.values())
        self.contexts_by_reasoning = {reasoning: self.contexts(reasoning) for reasoning in policies}


_LOADED: weakref.WeakSet[LocalPolicy] = weakref.WeakSet()


def close_all() -> None:
    """Close every loaded policy: Inspect keeps its models, and a GPU has room for one."""
    for policy in list(_LOADED):
        policy.close()


class LocalPolicy(ModelAPI):
    """`recipe`: the recipe file that decides how contexts are made (default: that of the run around the folder). `max_batch`: limit
    on concurrent requests. Raises PolicyError for a folder without a model."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        recipe: str | None = None,
        max_batch: int = 64,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        folder = Path(model_name).expanduser()
        self._model = str(folder) if folder.exists() else model_name
        if folder.exists() and not is_model(folder):
            raise PolicyError(f"{model_name}: no model in it; expected a folder with a config.json (checkpoints/RUN/final)")
        run = run_around(model_name)
        file = run.recipe_file if recipe is None and run is not None else recipe
        self._recipe = None if file is None else resolved_recipe(file)
        self._max_batch = max_batch
        _LOADED.add(self)
        self._sampled: OrderedDict[str, Completion] = OrderedDict()

    @cached_property
    def _parts(self) -> _Parts:
        """Model and tokenizer, loaded at the first call: Inspect also makes models without calling them."""
        return _Parts(self._model, self._recipe, self._max_batch)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise PolicyEngineError("tools were offered; expected none: local policies do not call tools")
        contexts = self._parts.contexts_by_reasoning[_REASONING_POLICIES.get(config.reasoning_history or "")]
        prompt_ids, _ = contexts.prompt(self._dialogue(input, contexts))
        completion = await self._parts.engine.generate(
            prompt_ids,
            seed=secrets.randbits(31) if config.seed is None else config.seed,
            sampling=Sampling(
                temperature=1.0 if config.temperature is None else config.temperature,
                top_p=1.0 if config.top_p is None else config.top_p,
                top_k=config.top_k or 0,
                max_new_tokens=min(config.max_tokens or LOCAL_TOKENS, self._parts.room_after(len(prompt_ids))),
            ),
        )
        text = self._parts.tokenizer.decode([token for token in completion.token_ids if token not in self._parts.stop_ids])
        if contexts.opens_reasoning:
            text = OPEN + text
        output = ModelOutput.from_content(
            self.model_name, text, stop_reason="max_tokens" if completion.finish_reason == "length" else "stop"
        )
        read, written = len(prompt_ids), len(completion.token_ids)
        output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        self._store(output.choices[0].message, completion)
        return output

    def max_connections(self) -> int:
        return self._max_batch

    def close(self) -> None:
        """Free the memory; the next call loads the model again."""
        if "_parts" in self.__dict__:
            self._parts.engine.close()
            del self._parts

    def _store(self, message: ChatMessageAssistant, completion: Completion) -> None:
        assert message.id is not None
        self._sampled[message.id] = completion
        if len(self._sampled) > _MAX_SAMPLED:
            self._sampled.popitem(last=False)

    def _dialogue(self, messages: list[ChatMessage], contexts: ContextBuilder) -> Dialogue:
        """The dialogue of some messages. Raises PolicyEngineError for messages that do not alternate."""
        persona = messages[0].text if messages and messages[0].role == "system" else ""
        instructions = str((messages[0].metadata or {}).get(INSTRUCTIONS, "")) if persona else ""
        turns = messages[1 if persona else 0 :]
        opening = turns[0].text if turns and turns[0].role == "user" else ""
        turns = turns[1 if opening else 0 :]
        if not (persona or opening) or [m.role for m in turns] != ["assistant", "user"] * (len(turns) // 2):
            raise PolicyEngineError(f"messages = {', '.join(m.role for m in messages)}; expected user and assistant in turns")
        role = persona.removesuffix(instructions).removesuffix(BETWEEN if instructions else "")
        dialogue = Dialogue(Line("system", role, instructions), (Line("user", opening),) if opening else ())
        for reply, line in zip(turns[::2], turns[1::2], strict=True):
            dialogue = contexts.extend(dialogue, self._completion(reply), line.text)
        return dialogue

    def _completion(self, reply: ChatMessage) -> Completion:
        """The sampled ids of a reply, or, for a reply from elsewhere, its text."""
        if (completion := self._sampled.get(reply.id or "")) is not None:
            return completion
        ids = tuple(self._parts.tokenizer.encode(reply.text, add_special_tokens=False))
        return Completion(ids, (0.0,) * len(ids), "stop")
