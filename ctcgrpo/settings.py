"""From a recipe's sections to the settings of the parts: no logic, one function a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from trl import GRPOConfig

from ctcgrpo.environments.eibench import EIBench, User
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.policy.persona import Briefing
from ctcgrpo.recipe import Recipe
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.runner import Play
from ctcgrpo.rollout.session import SECONDS_PER_CALL
from ctcgrpo.sharding import FSDP2, sharding_arguments
from ctcgrpo.training.trainer import UpdateOptions

_PATIENCE = 4 * 3600
"""Seconds that a process waits for the others: the slowest dialogue of a step, or of a validation, decides, and PyTorch's own
limit of half an hour would end the run in the middle of it."""


def play_settings(recipe: Recipe) -> Play:
    rollout = recipe.rollout
    return Play(
        sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens),
        max_turns=rollout.max_turns,
        seed=recipe.run.seed,
        deterministic=rollout.deterministic,
        deadline=rollout.deadline,
        # A simulator's client has limits of its own, which this one must not cut short.
        seconds_per_call=max(SECONDS_PER_CALL, 2 * (recipe.simulator.timeout + recipe.simulator.patience)),
    )


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """What the chat template is rendered with."""
    return {"enable_thinking": recipe.policy.reasons, **recipe.policy.template_kwargs}


def briefing(recipe: Recipe) -> Briefing:
    """Raises PolicyError for instructions that cannot be had."""
    policy = recipe.policy
    return Briefing(policy.persona_sections, load_instructions(policy.instructions), policy.reasons)


def eibench_environment(recipe: Recipe, user: User) -> Callable[[], EIBench]:
    """Makes an environment for an episode. Raises PolicyError for instructions that cannot be had."""
    told, scoring, turns = briefing(recipe), recipe.scoring, recipe.rollout.max_turns
    return lambda: EIBench(user, briefing=told, max_turns=turns, variant=scoring.variant, turn_weights=scoring.turn_weights)


def context_builder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> ContextBuilder:
    """Raises PolicyError for a chat template that cannot serve."""
    return ContextBuilder(
        tokenizer,
        stop_ids=ends,
        max_prompt_tokens=recipe.rollout.max_prompt_tokens,
        reasoning=recipe.policy.reasoning_context,
        template_kwargs=template_kwargs(recipe),
    )


def update_options(recipe: Recipe) -> UpdateOptions:
    training = recipe.training
    return UpdateOptions(
        updates_per_step=training.updates_per_step,
        tokens_per_row=training.tokens_per_row,
        packing=training.packing,
        clip=training.clip,
        dual_clip=training.dual_clip,
        loss_weights=training.loss_weights,
        entropy_bonus=training.entropy_bonus,
        recorded_logprobs=training.old_logprobs == "recorded",
        max_failed=recipe.rollout.max_failed,
        keep_checkpoints=training.keep_checkpoints,
    )


def lora_config(recipe: Recipe) -> LoraConfig | None:
    lora = recipe.policy.lora
    if lora is None:
        return None
    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, task_type="CAUSAL_LM")


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if recipe.policy.quantization == "none":
        return {}
    compute = torch.bfloat16 if recipe.training.bf16 or recipe.policy.dtype == "bfloat16" else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": config}


def _sharding(recipe: Recipe) -> dict[str, Any]:
    sharding, checkpointing = recipe.training.sharding, recipe.training.gradient_checkpointing
    arguments = sharding_arguments(sharding)
    if sharding == FSDP2 and checkpointing:  # FSDP's own is cheaper: the other would gather weights once more
        arguments["fsdp_config"]["activation_checkpointing"] = True
        checkpointing = False
    return {**arguments, "gradient_checkpointing": checkpointing}


def trainer_arguments(recipe: Recipe, processes: int) -> GRPOConfig:
    """TRL's and transformers' side of the settings. Making them sets up the process group."""
    training, rollout = recipe.training, recipe.rollout
    updates = training.updates_per_step
    steps = training.max_steps * updates
    cosine = training.schedule == "cosine"
    arguments = GRPOConfig(
        output_dir=str(recipe.folder),
        run_name=recipe.run.name,
        report_to=[],  # tracking.py knows what is worth showing
        seed=recipe.run.seed,
        max_steps=steps,
        per_device_train_batch_size=recipe.scenarios.per_step * rollout.group_size // processes,
        gradient_accumulation_steps=1,
        num_generations=rollout.group_size,
        steps_per_generation=1,
        num_iterations=updates,
        shuffle_dataset=False,
        remove_unused_columns=False,
        temperature=rollout.temperature,
        max_completion_length=rollout.max_new_tokens,
        model_init_kwargs={
            "dtype": recipe.policy.dtype,
            "attn_implementation": recipe.policy.attention,
            "revision": recipe.policy.revision,
            **_quantization(recipe),
        },
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate} if cosine else {},
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        **_sharding(recipe),
        bf16=training.bf16,
        use_cpu=training.bf16 and not torch.accelerator.is_available(),  # else transformers refuses bf16 without a GPU
        beta=training.kl,
        disable_dropout=True,
        logging_steps=updates,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every * updates,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_timeout=_PATIENCE,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if training.sharding == FSDP2 and training.bf16:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = fsdp2_precision()
    return arguments


def fsdp2_precision() -> MixedPrecisionPolicy:
    """Compute in bfloat16. Left to itself accelerate sums gradients in it as well, and rounds log-probabilities to it."""
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
