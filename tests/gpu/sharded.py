"""A sharded run of two steps on given samples, for sharding.py: each process calls it, under torchrun.

    torchrun --nproc_per_node N -m tests.gpu.sharded BACKEND BASE FOLDER [--resume] [--tokens N] [--gloo]

Writes FOLDER/checkpoint-1 and -2, and the last weights, whole, to FOLDER/weights.pt. With --resume it starts from checkpoint-1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.attention import samples_of
from tests.gpu.policy import MIDDLE, SMALL
from tests.gpu.training import trainer_on
from tests.sameness import _backend_of, backend_arguments, on_cpu_with_gloo, weights

STEPS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["zero1", "zero2", "zero3", "fsdp2"])
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--gloo", action="store_true", help="on a CPU")
    asked = parser.parse_args(arguments)
    if asked.gloo:
        on_cpu_with_gloo(asked.backend)
    trainer = trainer_on(
        samples_of(asked.tokens, (SMALL if asked.gloo else MIDDLE).vocabulary),
        asked.base,
        asked.folder,
        bf16=True,
        max_steps=STEPS,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        tokens_per_row=asked.tokens // 2,
        save_strategy="steps",
        save_steps=1,
        model_init_kwargs={"dtype": "float32"},
        **backend_arguments(asked.backend),
    )
    trainer.train(resume_from_checkpoint=str(asked.folder / "checkpoint-1") if asked.resume else None)
    whole = weights(trainer.model)
    losses = [entry["policy_loss"] for entry in trainer.state.log_history if "policy_loss" in entry]
    if trainer.accelerator.is_main_process:
        named = {"weights": whole, "steps": trainer.state.global_step, "batches": trainer.batches, "loss": losses[-1]}
        torch.save(named | {"backend": _backend_of(trainer.model_wrapped)}, asked.folder / "weights.pt")
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
