"""What a TRL user configures: GRPOConfig, with the options of turn-level credit and of episodes of several turns.

`per_device_train_batch_size` counts episodes: a step plays `per_device_train_batch_size x processes / num_generations` tasks with
`num_generations` episodes each. `tokens_per_row` bounds the memory of the update, so gradients need no accumulation over batches.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from trl import GRPOConfig

from ctcgrpo.options import CreditOptions, RolloutOptions, UpdateOptions, out_of_bounds

WITHOUT_EFFECT: dict[str, str] = {
    "generation_batch_size": "per_device_train_batch_size sets how many episodes a step plays",
    "pad_to_multiple_of": "rows are packed; tokens_per_row sets their length",
    "min_p": "the engines truncate by top_p and top_k",
    "generation_kwargs": "the engines sample by temperature, top_p and top_k",
    "repetition_penalty": "it would falsify log-probabilities; make repetition a matter of the reward",
    "cache_implementation": "the engine has a cache of its own",
    "vllm_model_impl": "vLLM chooses it",
    "vllm_enable_sleep_mode": "a colocated engine always sleeps during the update",
    "vllm_structured_outputs_regex": "the engines sample freely",
    "vllm_max_model_length": "it is max_prompt_length + max_completion_length",
    "vllm_tensor_parallel_size": "each process has an engine of its own; start vLLM servers for tensor parallelism",
    "epsilon_high": "epsilon clips on both sides; dual_clip bounds negative advantages",
    "delta": "use dual_clip",
    "sapo_temperature_neg": "the loss is PPO's",
    "sapo_temperature_pos": "the loss is PPO's",
    "vespo_k_pos": "the loss is PPO's",
    "vespo_lambda_pos": "the loss is PPO's",
    "vespo_k_neg": "the loss is PPO's",
    "vespo_lambda_neg": "the loss is PPO's",
    "importance_sampling_level": "ratios are per token",
    "reward_weights": "an environment gives one reward a turn",
    "multi_objective_aggregation": "an environment gives one reward a turn",
    "loss_type": "the loss is a sum over tokens divided by the trained tokens of the step; loss_weights weighs turns alike",
    "mask_truncated_completions": "an environment decides what a cut reply earns",
    "top_entropy_quantile": "all tokens are trained on",
    "use_adaptive_entropy": "entropy_coef is constant",
    "entropy_coef_min": "entropy_coef is constant",
    "entropy_coef_max": "entropy_coef is constant",
    "entropy_coef_delta": "entropy_coef is constant",
    "entropy_target": "entropy_coef is constant",
    "max_tool_calling_iterations": "an environment answers every reply; max_turns bounds them",
    "vllm_importance_sampling_correction": "old_logprobs says whose log-probabilities the ratio starts from",
    "vllm_importance_sampling_mode": "old_logprobs says whose log-probabilities the ratio starts from",
    "vllm_importance_sampling_clip_max": "old_logprobs says whose log-probabilities the ratio starts from",
    "vllm_importance_sampling_clip_min": "old_logprobs says whose log-probabilities the ratio starts from",
    "vllm_importance_sampling_cap": "old_logprobs says whose log-probabilities the ratio starts from",
    "off_policy_mask_threshold": "episodes are sampled from the policy of the step",
    "use_bias_correction_kl": "the KL term is the plain one",
    "log_completions": "every episode is written to OUTPUT_DIR/traces",
    "log_multimodal": "every episode is written to OUTPUT_DIR/traces",
    "num_completions_to_print": "every episode is written to OUTPUT_DIR/traces",
    "log_unique_prompts": "every episode is written to OUTPUT_DIR/traces",
    "log_completions_hub_repo": "every episode is written to OUTPUT_DIR/traces",
    "use_transformers_continuous_batching": "the engine batches continuously anyway",
    "transformers_continuous_batching_config": "the engine batches continuously anyway",
    "use_transformers_paged": "the engine batches continuously anyway",
    "router_aux_loss_coef": "the loss has no such term",
    "label_smoothing_factor": "the loss has no labels",
    "label_names": "the loss has no labels",
    "neftune_noise_alpha": "noise in embeddings would falsify log-probabilities",
    "use_liger_kernel": "its layers have not been tried with rows of shared prefixes; packing chooses the kernel of attention",
    "liger_kernel_config": "its layers have not been tried with rows of shared prefixes",
    "torch_compile": "rows differ in shape, so nearly every one would be compiled again",
    "torch_compile_backend": "rows differ in shape, so nearly every one would be compiled again",
    "torch_compile_mode": "rows differ in shape, so nearly every one would be compiled again",
    "auto_find_batch_size": "tokens_per_row bounds memory",
    "torch_empty_cache_steps": "tokens_per_row bounds memory",
    "use_cache": "the engine has a cache of its own, and the update needs none",
    "fp16": "losses are not scaled; use bf16, or float32 with bf16=False",
    "fp16_full_eval": "an evaluation samples as training does",
    "bf16_full_eval": "an evaluation samples as training does",
    "average_tokens_across_devices": "the loss is always divided by the trained tokens of all processes",
    "include_num_input_tokens_seen": "trained_tokens and replies/tokens are logged",
    "per_device_eval_batch_size": "an evaluation plays num_generations_eval episodes of each task; max_batch bounds a batch",
    "prediction_loss_only": "an evaluation plays episodes",
    "eval_do_concat_batches": "an evaluation plays episodes",
    "eval_use_gather_object": "an evaluation plays episodes",
    "eval_accumulation_steps": "an evaluation plays episodes",
    "include_for_metrics": "an evaluation's metrics are those of its episodes; Step.info adds numbers to them",
    "batch_eval_metrics": "an evaluation plays episodes",
    "remove_unused_columns": "all of a row goes to Environment.reset",
    "train_sampling_strategy": "shuffle_dataset decides the order of tasks",
    "length_column_name": "rows are packed",
    "dataloader_drop_last": "every step has as many tasks",
    "dataloader_num_workers": "a row is read when its task is played; there is nothing to load ahead",
    "dataloader_persistent_workers": "a row is read when its task is played; there is nothing to load ahead",
    "dataloader_prefetch_factor": "a row is read when its task is played; there is nothing to load ahead",
    "dataloader_multiprocessing_context": "a row is read when its task is played; there is nothing to load ahead",
    "dataloader_in_order": "a row is read when its task is played; there is nothing to load ahead",
    "accelerator_config": "batches are groups of episodes, dealt out by the trainer",
    "ds3_gather_for_generation": "with ZeRO-3 a vLLM engine samples",
    "enable_jit_checkpoint": "save_steps sets when checkpoints are made, at the end of a batch of episodes",
}
"""Fields of GRPOConfig that the trainer would not read, or that would not work with it, and what to use instead."""

_OPTIMIZERS = ("lomo", "layerwise", "schedule_free")
"""Parts of the names of optimizers that update in the middle of a backward pass, or have to be told that training begins."""


@dataclass
class CTCGRPOConfig(CreditOptions, RolloutOptions, UpdateOptions, GRPOConfig):  # type: ignore[misc]
    """GRPOConfig with alpha, centering, max_turns, ... (ctcgrpo/options.py). Raises ValueError for values out of bounds, and for
    fields of GRPOConfig that would do nothing, by name.

    `num_iterations` updates are made of a step's episodes, so it has to divide `num_generations`. `num_generations_eval` episodes
    (1 where absent) of each task of `eval_dataset` are played in an evaluation. Where the machine has no accelerator, `use_cpu`
    is set for bfloat16, TRL's default, which needs it there. Dropout is off (`disable_dropout`): it would add noise to
    log-probabilities.
    """

    disable_dropout: bool = field(default=True, metadata={"help": "whether the policy has no dropout"})

    def __post_init__(self) -> None:
        if wrong := next(out_of_bounds(vars(self)), None):
            raise ValueError(f"CTCGRPOConfig.{wrong}")
        for name, default in without_effect().items():
            if getattr(self, name) != default:
                instead = WITHOUT_EFFECT[name]
                raise ValueError(f"CTCGRPOConfig.{name} = {getattr(self, name)!r} has no use here: {instead}; leave it out")
        if found := next((part for part in _OPTIMIZERS if part in str(self.optim)), None):
            raise ValueError(
                f"CTCGRPOConfig.optim = {str(self.optim)!r}; expected an optimizer that updates once a step: the gradients of a "
                f"step come from several rows ({found} does not)"
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if str(getattr(getattr(self, name), "value", getattr(self, name))) == "epoch":
                raise ValueError(
                    f"CTCGRPOConfig.{name} = 'epoch'; expected 'steps' (and {name.removesuffix('_strategy')}_steps): the tasks of "
                    "a run are one schedule, in which tags come equally often"
                )
        if self.save_strategy == "steps" and self.save_steps >= 1 and self.save_steps % self.num_iterations:
            raise ValueError(
                f"CTCGRPOConfig.save_steps = {self.save_steps}; expected a multiple of num_iterations ({self.num_iterations}): a "
                "checkpoint is resumed from at the end of a batch of episodes"
            )
        if self.gradient_accumulation_steps != 1 or self.steps_per_generation not in (None, 1):
            raise ValueError(
                "CTCGRPOConfig.gradient_accumulation_steps and steps_per_generation must be 1: a step is one optimizer step over "
                "all of its episodes; tokens_per_row bounds memory, per_device_train_batch_size sets the number of episodes"
            )
        if self.num_generations and self.num_generations % self.num_iterations:
            raise ValueError(
                f"CTCGRPOConfig.num_iterations = {self.num_iterations}; expected a divisor of num_generations "
                f"({self.num_generations}): each update takes an equal share of every group"
            )
        if self.old_logprobs == "recorded" and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "CTCGRPOConfig.old_logprobs = 'recorded' with top_p or top_k, under which recorded log-probabilities are "
                "renormalised; expected 'recomputed', or top_p = 1 and top_k = 0"
            )
        if self.deterministic and self.deadline is not None:
            raise ValueError("CTCGRPOConfig.deadline depends on the clock, which deterministic excludes; leave one out")
        if self.num_generations_eval is None:  # type: ignore[has-type]
            self.num_generations_eval = 1
        self.per_device_eval_batch_size = self.num_generations_eval  # TRL wants a multiple
        if self.bf16 is not False and not self.fp16 and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


def without_effect() -> dict[str, Any]:
    """The default of each field of `WITHOUT_EFFECT` that the installed versions of TRL and transformers have."""
    found = [f for f in fields(GRPOConfig) if f.name in WITHOUT_EFFECT]
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in found}
