"""The policy engine that a trainer's arguments ask for: transformers, vLLM on the training GPUs, or vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from ctcgrpo.config import CTCGRPOConfig
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import PolicyEngine
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.rollout.vllm_weights import ServerWeights
from ctcgrpo.types import TurnSample

if TYPE_CHECKING:
    from ctcgrpo.training.update import PolicyUpdate


def make_engine(
    trainer: PolicyUpdate,
    args: CTCGRPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: frozenset[int],
    interrupted: Callable[[], bool],
) -> PolicyEngine:
    """An engine that samples from `trainer.model`, as `use_vllm` and `vllm_mode` say. Raises PolicyEngineError where it cannot be
    had. `interrupted` is polled between tokens."""
    accelerator = trainer.accelerator
    length = args.max_prompt_length + args.max_completion_length
    if not args.use_vllm:
        batcher = TransformersBatcher(
            accelerator.unwrap_model(trainer.model),
            pad_id=tokenizer.pad_token_id,
            stop_ids=stop_ids,
            max_batch=args.max_batch,
            dtype=torch.bfloat16 if args.sampling_dtype == "bfloat16" else None,
            autocast=accelerator.autocast,
            interrupted=interrupted,
        )
        return ContinuousEngine(batcher, interrupted=interrupted)
    if args.vllm_mode == "colocate":
        vllm = ColocatedVllm(
            lambda: trainer.model,
            accelerator,
            tokenizer,
            stop_ids=stop_ids,
            max_length=length,
            max_requests=args.max_batch,
            gpu_memory=args.vllm_gpu_memory_utilization,
            seed=args.seed,
        )
        return ContinuousEngine(vllm, interrupted=interrupted)
    urls = server_urls(args)
    weights = ServerWeights(
        lambda: trainer.model,
        accelerator,
        tokenizer,
        urls=urls,
        group_port=args.vllm_group_port,
        timeout=args.vllm_server_timeout,
        patience=args.vllm_server_patience,
    )

    def score(samples: Sequence[TurnSample]) -> list[list[float]] | None:
        if not trainer.is_in_train:  # sharded weights run forward only as training has wrapped them
            return None
        return [scores.tolist() for scores in trainer.logprobs(trainer.model_wrapped, samples, packed=False)]

    return VllmServerEngine(
        urls,
        weights=weights,
        stop_ids=stop_ids,
        max_length=length,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        run=f"{args.run_name or args.output_dir}/{args.seed}",
        timeout=args.vllm_server_timeout,
        patience=args.vllm_server_patience,
        score=score,
        vocabulary=len(tokenizer),
        temperature=args.temperature,
        check_every=args.vllm_server_check_every,
    )


def server_urls(args: CTCGRPOConfig) -> tuple[str, ...]:
    """The vLLM servers that `args` name."""
    if args.vllm_server_urls:
        return tuple(args.vllm_server_urls)
    return (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}",)
