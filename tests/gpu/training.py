"""The trainer on given turn samples, in place of any that it would play."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment
from ctcgrpo.policy.loading import load_tokenizer
from ctcgrpo.training.ahead import Played
from ctcgrpo.types import TurnSample


class GivenSamples(CTCGRPOTrainer):
    """Every step trains on the same samples, of which each process takes its share. `batches` made here; a resumed run makes those
    that were missing."""

    given: Sequence[TurnSample]
    batches = 0

    def _take_played(self, step: int, tasks: Sequence[int]) -> Played:
        return Played(step, tasks, self.state.global_step, [], 0.0, 0.0)

    def _new_batch(self, *_: Any) -> list[list[TurnSample]]:
        self.batches += 1
        return [list(self.given[self.accelerator.process_index :: self.accelerator.num_processes])]


def trainer_on(
    samples: Sequence[TurnSample], base: Path, folder: Path, *, peft_config: Any = None, **config: Any
) -> GivenSamples:
    trainer = GivenSamples(
        model=str(base),
        args=CTCGRPOConfig(
            str(folder),
            per_device_train_batch_size=2,
            num_generations=2,
            temperature=1.0,
            entropy_coef=0.001,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{"save_strategy": "no", "gradient_checkpointing": False} | config,
        ),
        environment=Environment,
        train_dataset=[{"id": f"task {k}"} for k in range(8)],
        processing_class=load_tokenizer(str(base)),
        peft_config=peft_config,
    )
    trainer.given = samples
    trainer.remove_callback(PrinterCallback)
    return trainer
