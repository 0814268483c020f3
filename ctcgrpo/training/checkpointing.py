"""Checkpoints that count once they are complete, and resuming from the newest of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ctcgrpo.checkpoint_pickles import weights_only
from ctcgrpo.errors import OutputError
from ctcgrpo.files import checkpoints, is_complete, mark_complete
from ctcgrpo.processes import on_main
from ctcgrpo.training.update import PolicyUpdate


class CheckpointedUpdate(PolicyUpdate):
    """A checkpoint is complete once every process has written its files and the marker COMPLETE is there. `save_total_limit` counts
    complete ones; `train(resume_from_checkpoint=True)` takes the newest complete one."""

    def state_of_run(self) -> Mapping[str, str]:
        """What a resumed run needs beyond the policy and its optimizer: texts by the name of their file."""
        return {}

    def load_state_of_run(self, folder: Path) -> None:
        """Read what `state_of_run` gave, on every process."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(self._newest_complete())
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_now(self) -> None:
        """A checkpoint of the last finished optimizer step, unless it has one."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # One process looks: on a shared disk others may see the marker later, and saving takes all of them.
        if self.state.global_step and not on_main(self.accelerator.state, lambda: is_complete(folder)):
            self._save_checkpoint(self.model, trial=None)

    def _newest_complete(self) -> Path:
        complete = {step: folder for step, folder in checkpoints(Path(self.args.output_dir)).items() if is_complete(folder)}
        if not complete:
            raise OutputError(f"{self.args.output_dir} has no complete checkpoint to resume from; train without it to start")
        return complete[max(complete)]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.refuse_nonfinite_weights()
        state = self.state_of_run()  # on all processes: what fails here fails on all of them
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # transformers would remove others before
        try:
            with self._without_card():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for name, text in state.items():
                (folder / name).write_text(text, encoding="utf-8")
            mark_complete(folder)
            self._rotate()
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        """Remove all but the newest complete checkpoints, once the newest is complete."""
        if not self.args.save_total_limit:
            return
        folders = checkpoints(Path(self.args.output_dir))
        complete = sorted(step for step, folder in folders.items() if is_complete(folder))
        oldest_kept = complete[-self.args.save_total_limit :][0]
        best = self.state.best_model_checkpoint
        for step, folder in folders.items():
            if step < oldest_kept and (best is None or folder.name != Path(best).name):
                shutil.rmtree(folder)

    @contextlib.contextmanager
    def _without_card(self) -> Any:
        """A model card is written on `push_to_hub`, not at every checkpoint."""
        self.create_model_card = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del self.create_model_card

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """DeepSpeed loads its part of a checkpoint here."""
        with self._weights_only(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with self._weights_only(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._weights_only(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: losses are scaled for float16 alone, and a file of that name is not this run's."""

    def _weights_only(self, checkpoint: str | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if checkpoint is None else weights_only(Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._take_up_schedule()
            self.load_state_of_run(Path(checkpoint))

    def _take_up_schedule(self) -> None:
        """A run that is given more steps takes its learning rate from the longer schedule, not from the end of the shorter one."""
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # not DeepSpeed's own
            steps = schedule.last_epoch
            rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates
