"""CTCGRPOConfig: TRL's GRPOConfig with the options of turn-level credit and multi-turn episodes.

`per_device_train_batch_size` counts episodes: a step plays `per_device_train_batch_size x processes / num_generations` tasks with
`num_generations` episodes each. `tokens_per_row` bounds the memory of the update, so gradients need no accumulation over batches.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from trl import GRPOConfig

from ctcgrpo.options import CreditOptions, Importance, RolloutOptions, UpdateOptions, conflicts, importance_level, out_of_bounds

WITHOUT_EFFECT: dict[str, str] = {
    name: instead
    for instead, names in {
        "per_device_train_batch_size sets how many episodes a step plays": "generation_batch_size",
        "rows are packed; tokens_per_row sets their length": "pad_to_multiple_of",
        "the engines truncate by top_p and top_k": "min_p",
        "the engines sample by temperature, top_p and top_k": "generation_kwargs",
        "it would make recorded log-probabilities wrong; penalise repetition in the reward": "repetition_penalty",
        "the engine has a cache of its own": "cache_implementation",
        "vLLM chooses it": "vllm_model_impl",
        "a colocated engine always sleeps during the update": "vllm_enable_sleep_mode",
        "the engines sample freely": "vllm_structured_outputs_regex",
        "it is max_prompt_length + max_completion_length": "vllm_max_model_length",
        "each process has an engine of its own; start vLLM servers for tensor parallelism": "vllm_tensor_parallel_size",
        "epsilon clips on both sides; dual_clip bounds negative advantages": "epsilon_high",
        "use dual_clip": "delta",
        "the loss is PPO's clipped loss": (
            "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
        ),
        "ratios are per token": "importance_sampling_level",
        "an environment gives one reward a turn": "reward_weights multi_objective_aggregation",
        "the loss is a sum over tokens divided by the trained tokens of the step; loss_weights weighs turns alike": "loss_type",
        "the environment rewards cut replies": "mask_truncated_completions",
        "all tokens are trained on": "top_entropy_quantile",
        "entropy_coef is constant": "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        "max_turns bounds the replies of an episode": "max_tool_calling_iterations",
        "importance and importance_max set the importance weights": (
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
            "vllm_importance_sampling_clip_min vllm_importance_sampling_cap"
        ),
        "episodes are sampled from the policy of the step": "off_policy_mask_threshold",
        "the KL term has no bias correction": "use_bias_correction_kl",
        "every episode is written to OUTPUT_DIR/traces": (
            "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo"
        ),
        "the engine batches continuously anyway": (
            "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged"
        ),
        "the loss has no such term": "router_aux_loss_coef",
        "the loss has no labels": "label_smoothing_factor label_names",
        "noise in embeddings would make log-probabilities wrong": "neftune_noise_alpha",
        "its layers are untested with rows of shared prefixes; packing selects the attention kernel": ("use_liger_kernel"),
        "its layers are untested with rows of shared prefixes": "liger_kernel_config",
        "rows differ in shape, so nearly every one would be recompiled": (
            "torch_compile torch_compile_backend torch_compile_mode"
        ),
        "tokens_per_row bounds memory": "auto_find_batch_size torch_empty_cache_steps",
        "the engine has a cache of its own, and the update needs none": "use_cache",
        "losses are not scaled; use bf16, or float32 with bf16=False": "fp16",
        "an evaluation samples as training does": "fp16_full_eval bf16_full_eval",
        "the loss is always divided by the trained tokens of all processes": "average_tokens_across_devices",
        "trained_tokens and replies/tokens are logged": "include_num_input_tokens_seen",
        "an evaluation plays num_generations_eval episodes of each task; max_batch bounds a batch": "per_device_eval_batch_size",
        "an evaluation plays episodes": (
            "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics"
        ),
        "an evaluation's metrics are those of its episodes; Step.info adds numbers to them": "include_for_metrics",
        "all of a row goes to Environment.reset": "remove_unused_columns",
        "shuffle_dataset decides the order of tasks": "train_sampling_strategy",
        "rows are packed": "length_column_name",
        "every step has as many tasks": "dataloader_drop_last",
        "a row is read when its task is played, so nothing is prefetched": (
            "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order"
        ),
        "the trainer distributes groups of episodes": "accelerator_config",
        "with ZeRO-3 a vLLM engine samples": "ds3_gather_for_generation",
        "save_steps sets when checkpoints are saved, at the end of a batch of episodes": "enable_jit_checkpoint",
    }.items()
    for name in names.split()
}
"""Fields of GRPOConfig that the trainer ignores or does not support, and what to use instead."""

_OPTIMIZERS = ("lomo", "layerwise", "schedule_free")
"""Parts of the names of optimizers that update within the backward pass, or need a call when training begins."""


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
        if isinstance(self.scale_rewards, bool):  # as GRPOConfig takes it
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if wrong := next(out_of_bounds(vars(self)), None):
            raise ValueError(f"CTCGRPOConfig.{wrong}")
        for name, default in without_effect().items():
            if getattr(self, name) != default:
                instead = WITHOUT_EFFECT[name]
                raise ValueError(f"CTCGRPOConfig.{name} = {getattr(self, name)!r} has no effect: {instead}; leave it out")
        if found := next((part for part in _OPTIMIZERS if part in str(self.optim)), None):
            raise ValueError(
                f"CTCGRPOConfig.optim = {str(self.optim)!r}; expected an optimizer that updates once per step ({found} does "
                "not): the gradients of a step come from several rows"
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if str(getattr(getattr(self, name), "value", getattr(self, name))) == "epoch":
                raise ValueError(
                    f"CTCGRPOConfig.{name} = 'epoch'; expected 'steps' (and {name.removesuffix('_strategy')}_steps): a run "
                    "is one schedule of tasks, stratified by tag, without epochs"
                )
        if self.save_strategy == "steps" and self.save_steps >= 1 and self.save_steps % self.num_iterations:
            raise ValueError(
                f"CTCGRPOConfig.save_steps = {self.save_steps}; expected a multiple of num_iterations ({self.num_iterations}): "
                "runs resume at the end of a batch of episodes"
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
        if wrong := next(conflicts(vars(self)), None):
            raise ValueError(f"CTCGRPOConfig.{wrong}")
        if self.num_generations_eval is None:  # type: ignore[has-type]
            self.num_generations_eval = 1
        self.per_device_eval_batch_size = self.num_generations_eval  # TRL requires a multiple
        if self.bf16 is not False and not self.fp16 and not torch.accelerator.is_available():
            self.use_cpu = True
        self.dataloader_pin_memory &= torch.cuda.is_available()
        if getattr(self, "activation_checkpointing", False) is None:  # TRL sets the old name, of which transformers warns
            self.activation_checkpointing = self.gradient_checkpointing
        try:
            super().__post_init__()
        except ValueError:
            episodes = self.generation_batch_size  # known once TRL has the number of processes
            if not episodes or episodes % self.num_generations == 0:
                raise
            raise ValueError(
                f"CTCGRPOConfig.per_device_train_batch_size x processes = {self.per_device_train_batch_size} x {self.world_size} = "
                f"{episodes} episodes a step; expected a multiple of num_generations ({self.num_generations}): a task has that many"
            ) from None

    @property
    def importance_level(self) -> Importance:
        """`importance` with auto resolved."""
        return importance_level(
            self.importance,
            old_logprobs=self.old_logprobs,
            overlap=self.overlap,
            vllm=self.use_vllm,
            truncates=self.top_p < 1 or bool(self.top_k),
        )


def without_effect() -> dict[str, Any]:
    """The default of each field of `WITHOUT_EFFECT` that the installed versions of TRL and transformers have."""
    found = [f for f in fields(GRPOConfig) if f.name in WITHOUT_EFFECT]
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in found}
