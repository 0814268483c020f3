"""What a TRL user configures: GRPOConfig, with the options of turn-level credit and of episodes of several turns.

`per_device_train_batch_size` counts episodes: a step plays `per_device_train_batch_size x processes / num_generations` tasks with
`num_generations` episodes each. `tokens_per_row` bounds the memory of the update, so gradients need no accumulation over batches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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
    "group_by_length": "rows are packed",
    "label_smoothing_factor": "the loss has no labels",
}
"""Fields of GRPOConfig that the trainer would not read, and what to use instead."""


@dataclass
class CTCGRPOConfig(CreditOptions, RolloutOptions, UpdateOptions, GRPOConfig):  # type: ignore[misc]
    """GRPOConfig with alpha, centering, max_turns, ... (ctcgrpo/options.py). Raises ValueError for values out of bounds, and for
    fields of GRPOConfig that would do nothing, by name.

    `num_iterations` updates are made of a step's episodes, so it has to divide `num_generations`. `num_generations_eval` episodes
    (1 where absent) of each task of `eval_dataset` are played in an evaluation. Where the machine has no accelerator, `use_cpu`
    is set, which TRL's default of bfloat16 needs there.
    """

    def __post_init__(self) -> None:
        if wrong := next(out_of_bounds(vars(self)), None):
            raise ValueError(f"CTCGRPOConfig.{wrong}")
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name, instead in WITHOUT_EFFECT.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"CTCGRPOConfig.{name} = {getattr(self, name)!r} would do nothing: {instead}; leave it out")
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
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
