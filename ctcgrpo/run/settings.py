"""Converts a recipe's sections to the settings of each component; no other logic."""

from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ctcgrpo.config import CTCGRPOConfig
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.model.sharding import FSDP2, sharding_arguments
from ctcgrpo.options import RolloutOptions
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.weights_and_biases import PROJECT

_OF_ROLLOUT = {"max_turns", "temperature", "top_p", "top_k", "max_batch", "deterministic", "overlap", "deadline", "max_failed"}
_OF_TRAINING = {
    *("tokens_per_row", "packing", "dual_clip", "loss_weights", "old_logprobs", "importance", "importance_max", "audit_every"),
    *("loss_total", "update_parts"),
    *("learning_rate", "weight_decay", "max_grad_norm", "bf16"),
}
"""Fields with the same names in the trainer's configuration."""


def template_kwargs(recipe: Recipe) -> dict[str, Any]:
    """The variables of the chat template."""
    return {"enable_thinking": recipe.policy.reasons, **recipe.policy.template_kwargs}


def briefing(recipe: Recipe) -> Briefing:
    """Raises PolicyError for instructions that cannot be loaded."""
    policy = recipe.policy
    return Briefing(policy.persona_sections, load_instructions(policy.instructions), policy.reasons)


def environment_timeout(recipe: Recipe) -> float:
    """Timeout in seconds of a call of the environment. It must exceed the timeouts of the simulator's client."""
    if recipe.environment is not None:
        return recipe.environment.timeout
    return max(RolloutOptions.environment_timeout, 2 * (recipe.simulator.timeout + recipe.simulator.patience))


def context_builder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> ContextBuilder:
    """Raises PolicyError for an unusable chat template."""
    return ContextBuilder(
        tokenizer,
        stop_ids=ends,
        max_prompt_tokens=recipe.rollout.max_prompt_tokens,
        reasoning=recipe.policy.reasoning_context,
        template_kwargs=template_kwargs(recipe),
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
    if sharding == FSDP2 and checkpointing:  # FSDP's own is cheaper: the other gathers weights again
        arguments["fsdp_config"]["activation_checkpointing"] = True
        checkpointing = False
    return {**arguments, "gradient_checkpointing": checkpointing}


def trainer_config(recipe: Recipe, processes: int) -> CTCGRPOConfig:
    """The trainer's configuration. Sets up the process group. Raises ValueError where this machine cannot run it."""
    training, rollout, vllm = recipe.training, recipe.rollout, recipe.rollout.vllm
    updates = training.updates_per_step
    steps = training.max_steps * updates
    cosine = training.schedule == "cosine"
    config = CTCGRPOConfig(
        output_dir=str(recipe.folder),
        run_name=recipe.run.name,
        report_to=[],  # tracking.py forwards to run.report_to
        project=PROJECT,
        seed=recipe.run.seed,
        max_steps=steps,
        per_device_train_batch_size=recipe.tasks_per_step * rollout.group_size // processes,
        **asdict(recipe.credit_options()),
        # rollouts
        num_generations=rollout.group_size,
        **rollout.model_dump(include=_OF_ROLLOUT),
        max_prompt_length=rollout.max_prompt_tokens,
        max_completion_length=rollout.max_new_tokens,
        reasoning_context=recipe.policy.reasoning_context,
        chat_template_kwargs=template_kwargs(recipe),
        sampling_dtype=rollout.dtype,
        environment_timeout=environment_timeout(recipe),
        use_vllm=rollout.engine != "transformers",
        vllm_mode="server" if rollout.engine == "vllm_server" else "colocate",
        vllm_gpu_memory_utilization=vllm.gpu_memory,
        vllm_server_urls=list(vllm.urls) or None,
        vllm_group_port=vllm.group_port,
        vllm_server_timeout=vllm.timeout,
        vllm_server_patience=vllm.patience,
        vllm_server_check_every=vllm.check_every,
        # the update
        num_iterations=updates,
        **training.model_dump(include=_OF_TRAINING),
        epsilon=training.clip,
        entropy_coef=training.entropy_bonus,
        beta=training.kl,
        disable_dropout=True,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate} if cosine else {},
        warmup_steps=round(training.warmup * steps),
        **_sharding(recipe),
        model_init_kwargs={
            "dtype": recipe.policy.dtype,
            "attn_implementation": recipe.policy.attention,
            "revision": recipe.policy.revision,
            **_quantization(recipe),
        },
        # logs and checkpoints
        logging_steps=updates,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every * updates,
        save_total_limit=training.keep_checkpoints,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_timeout=training.process_timeout,
    )
    if training.sharding == FSDP2 and training.bf16:
        config.fsdp_plugin_args["mixed_precision_policy"] = fsdp2_precision()
    return config


def fsdp2_precision() -> MixedPrecisionPolicy:
    """Compute in bfloat16. By default accelerate would also sum gradients and round log-probabilities in bfloat16."""
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
