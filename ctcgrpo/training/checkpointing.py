"""Saves checkpoints and marks them complete, resumes from the newest complete one, and pushes to the Hub."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ctcgrpo.centering import Centering
from ctcgrpo.errors import OutputError
from ctcgrpo.policy.builtin import is_builtin, wheel_of
from ctcgrpo.training.checkpoint_pickles import weights_only
from ctcgrpo.training.credit_state import CREDIT_STATE, load_state, state_text
from ctcgrpo.training.update import PolicyUpdate
from ctcgrpo.util.files import checkpoints, is_complete, mark_complete, newest_complete
from ctcgrpo.util.processes import on_main


class CheckpointedUpdate(PolicyUpdate):
    """A checkpoint is complete once every process has written its files and the marker COMPLETE is there. `save_total_limit` counts
    complete ones; `train(resume_from_checkpoint=True)` takes the newest complete one."""

    _tag_names = ("trl", "grpo", "ctcgrpo")
    _name = "CTC-GRPO"
    _paper: Mapping[str, str] = {"title": "the EIBench paper", "id": "2606.15532"}
    base_model: str  # the name of the model that training starts from, as it was given
    centering: Centering  # of credit, whose state a checkpoint holds

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            newest = newest_complete(folder := Path(self.args.output_dir))
            if newest is None:
                raise OutputError(f"{folder} has no complete checkpoint; to start a new run, leave resume_from_checkpoint out")
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_now(self) -> None:
        """Save a checkpoint of the last finished optimizer step, unless it exists."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # One process looks: on a shared disk others may see the marker later, and saving takes all of them.
        if self.state.global_step and not on_main(self.accelerator.state, lambda: is_complete(folder)):
            self._save_checkpoint(self.model, trial=None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.refuse_nonfinite_weights()
        credit = state_text(self.args, self.centering)  # on all processes: what fails here fails on all of them
        # transformers would remove other checkpoints, and push this one, before it is complete
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            with self._without_card():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process:
            (folder / CREDIT_STATE).write_text(credit, encoding="utf-8")
            mark_complete(folder)
            self._rotate()
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(folder))

    def _rotate(self) -> None:
        """Remove all but the newest complete checkpoints and the best one."""
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
        """Model cards are written only for the Hub, not at every checkpoint."""
        self.create_model_card = lambda *args, **kwargs: None  # type: ignore[method-assign]
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

    def load_weights(self, folder: Path) -> None:
        """The weights, or the adapter, of a checkpoint or of a saved policy."""
        self._load_from_checkpoint(str(folder))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight is loaded under the other name."""
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

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
            self._restore_schedule()
            load_state(self.args, self.centering, Path(checkpoint))

    def _restore_schedule(self) -> None:
        """An extended run takes its learning rate from the longer schedule, not from the end of the shorter one."""
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # not DeepSpeed's own
            steps = schedule.last_epoch
            rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    # --- the Hub ---------------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in GRPOTrainer; a base model that is not from the Hub is named as it was given."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir, "README.md")
            wheel = wheel_of(self.base_model)
            local = self.base_model if is_builtin(self.base_model) else Path(self.base_model).name
            name = f"`{local or 'a model without a name'}`"
            if wheel:
                name = f"[{wheel.hub_id}](https://huggingface.co/{wheel.hub_id})"
            text = card.read_text(encoding="utf-8").replace("[None](https://huggingface.co/None)", name)
            card.write_text(text, encoding="utf-8")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in GRPOTrainer. What is pushed is in OUTPUT_DIR/hub: policy, tokenizer, card, TensorBoard's files; no dialogues."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        kwargs = {"model_name": self._public_name} | kwargs
        with self._published():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        name = self._public_name
        with self._published():
            self.create_model_card(model_name=name)
            super()._push_from_checkpoint(checkpoint_folder)

    @property
    def _public_name(self) -> str:
        return str(self.args.hub_model_id or Path(self.args.output_dir).absolute().name).rpartition("/")[2]

    @contextlib.contextmanager
    def _published(self) -> Iterator[None]:
        """transformers pushes all of `args.output_dir`, where every dialogue of the run is."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            (folder / "hub").mkdir(parents=True, exist_ok=True)
            if (folder / "runs").is_dir():
                shutil.copytree(folder / "runs", folder / "hub" / "runs", dirs_exist_ok=True)
        self.args.output_dir = str(folder / "hub")
        try:
            yield
        finally:
            self.args.output_dir = str(folder)
