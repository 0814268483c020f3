"""A policy in a folder, loaded to reply: contexts and sampling equal those of training, id by id.

In a run's folder the recipe decides how contexts are made (reasoning, length). Requests of several dialogues are batched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ctcgrpo.model.finite import refuse_nonfinite
from ctcgrpo.policy.context import ContextBuilder, ReasoningPolicy
from ctcgrpo.policy.loading import load_tokenizer, loading_weights, stop_ids
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.settings import context_builder, template_kwargs


def run_around(model: str) -> RunFolder | None:
    """The run whose folder has this policy (checkpoints/RUN/final); None for a model from elsewhere."""
    folder = Path(model).expanduser()
    run = RunFolder(folder.resolve().parent) if folder.exists() else None
    return run if run is not None and run.recipe_file.exists() else None


class OpenedPolicy:
    """Model, tokenizer and engine of `name`, a model's folder or Hub id. `recipe`: of the run that it belongs to."""

    def __init__(self, name: str, recipe: Recipe | None, *, max_batch: int = 64, chat_template: Path | None = None) -> None:
        """Load model and tokenizer; `chat_template` replaces the tokenizer's own. Raises PolicyError where this fails."""
        self.recipe = recipe
        self.tokenizer = load_tokenizer(name, chat_template=chat_template)
        self.stop_ids = stop_ids(name, self.tokenizer, template_kwargs=None if recipe is None else template_kwargs(recipe))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with loading_weights(f"{name} cannot be loaded"):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        refuse_nonfinite(model, name)
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        batcher = TransformersBatcher(model, pad_id=self.tokenizer.pad_token_id, stop_ids=self.stop_ids, max_batch=max_batch)
        self.engine = ContinuousEngine(batcher)
        self.engine.take_weights(0)

    def room_after(self, prompt: int) -> int:
        """The maximum length of a reply within the model's positions."""
        return sys.maxsize if self.positions is None else max(1, self.positions - prompt)

    def contexts(self, reasoning: ReasoningPolicy | None = None) -> ContextBuilder:
        """The recipe's contexts, with another `reasoning` if given. Without a recipe, prompts leave room for a reply. Raises
        PolicyError for an unusable chat template."""
        if self.recipe is None:
            positions = self.positions or 32768
            room = max(positions // 2, positions - 4096)
            return ContextBuilder(self.tokenizer, stop_ids=self.stop_ids, max_prompt_tokens=room, reasoning=reasoning or "strip")
        policy = self.recipe.policy
        if reasoning is not None:
            policy = policy.model_copy(update={"reasoning_context": reasoning})
        return context_builder(self.recipe.model_copy(update={"policy": policy}), self.tokenizer, self.stop_ids)
