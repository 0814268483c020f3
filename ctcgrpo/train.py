"""A run, from a recipe to a checkpoint: puts the parts together and holds no logic of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig

from ctcgrpo.errors import PolicyError, RecipeError, RunInterrupted, ScenarioError, TooManyFailures
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.progress import RunProgress
from ctcgrpo.recipe import Recipe
from ctcgrpo.records import Episode, Scenario
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.runner import Play, RolloutRunner, Slot
from ctcgrpo.rollout.traces import TraceWriter
from ctcgrpo.rollout.transformers_engine import TransformersEngine
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.scenarios import load_scenarios
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.scripted import ScriptedBackend
from ctcgrpo.simulator.server import embedded
from ctcgrpo.training.samples import CreditOptions
from ctcgrpo.training.schedule import step_schedule
from ctcgrpo.training.trainer import CtcGrpoTrainer, UpdateOptions

BUILTIN_TINY = "builtin/tiny"


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end; gives the folder of the trained policy.

    Raises the errors of `ctcgrpo.errors`: what would fail later fails here, before anything is loaded; what happens on
    the way (Ctrl-C, too many failed episodes) leaves a checkpoint to go on from.
    """
    with contextlib.ExitStack() as stack:
        run = _prepare(recipe, stack)
        return run.to_the_end()


class _Run:
    """A run that is ready to go."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        resume: Path | None,
        trainer: CtcGrpoTrainer,
        progress: RunProgress,
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._resume = resume
        self._trainer = trainer
        self._progress = progress

    def to_the_end(self) -> Path:
        trainer, progress = self._trainer, self._progress
        try:
            trainer.train(resume_from_checkpoint=str(self._resume) if self._resume else None)
        except (RunInterrupted, TooManyFailures) as error:
            progress.stop()
            trainer.save_now()
            raise type(error)(f"{error}. {self._how_to_go_on()}") from None
        finally:
            progress.stop()
        if trainer.stop_requested:
            raise RunInterrupted(f"interrupted. {self._how_to_go_on()}")
        trainer.save_model(str(self._folder.final))
        if trainer.accelerator.is_main_process:
            self._folder.finish()
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        progress.say(f"trained policy: {self._folder.final}")
        return self._folder.final

    def _how_to_go_on(self) -> str:
        checkpoint = self._folder.newest_checkpoint()
        saved = f"Saved {checkpoint}" if checkpoint else "Nothing was trained yet"
        return f"{saved}; the same command again goes on from there"


def _prepare(recipe: Recipe, stack: contextlib.ExitStack) -> _Run:
    scenarios = [s for s in load_scenarios(recipe.scenarios.train, "train") if s.scene in recipe.scenarios.scenes]
    if missing := set(recipe.scenarios.scenes) - {s.scene for s in scenarios}:
        raise ScenarioError(
            f"scenarios.scenes asks for {', '.join(sorted(missing))}, which {recipe.scenarios.train} has none of"
        )
    # The arguments come before everything else that asks which process this is: they set up the process group, and
    # DeepSpeed, if it is to shard a model while loading, has to be configured by then.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.check_processes(processes)
    arguments = _arguments(recipe, processes)
    state: PartialState = arguments.distributed_state
    if state.num_processes != processes:
        raise RecipeError(
            f"{processes} processes were launched but {state.num_processes} run together; "
            "without GPUs set ACCELERATE_USE_CPU=true"
        )
    folder = RunFolder(recipe.folder)
    resume = _on_main(state, lambda: folder.open(recipe))
    model_path = _policy_path(recipe, folder, state)
    tokenizer = load_tokenizer(model_path, recipe.policy.revision)
    stop_ids = _stop_ids(model_path, tokenizer)
    contexts = ContextBuilder(
        tokenizer,
        stop_ids=stop_ids,
        max_prompt_tokens=recipe.rollout.max_prompt_tokens,
        reasoning=recipe.policy.reasoning_context,
        template_kwargs={"enable_thinking": recipe.policy.reasons},
    )
    contexts.check(scenarios)
    _check_positions(recipe, model_path)

    simulator = SimulatorClient(
        _simulator_url(recipe, state, stack), timeout=recipe.simulator.timeout, attempts=recipe.simulator.attempts
    )
    asyncio.run(_check_simulator(simulator))
    progress = RunProgress(
        name=recipe.run.name,
        steps=recipe.training.max_steps,
        episodes_per_step=recipe.scenarios.per_step * recipe.rollout.group_size // state.num_processes,
        enabled=state.is_main_process,
    )
    interrupted = stack.enter_context(_interrupts(progress))
    write_trace = TraceWriter(folder.traces, state.process_index)

    def on_episode(episode: Episode) -> None:
        write_trace(episode)
        progress.episode(episode)

    runner: list[RolloutRunner] = []  # made once the trainer has loaded the model that it samples from

    def collect(step: int, rows: Sequence[dict[str, Any]]) -> list[Episode]:
        return asyncio.run(runner[0].run(_slots(recipe, scenarios, step, rows, state.process_index)))

    trainer = CtcGrpoTrainer(
        model=str(model_path),
        args=arguments,
        train_dataset=_data_set(recipe, scenarios),
        processing_class=tokenizer,
        peft_config=_lora(recipe),
        collect=collect,
        credit=_credit_options(recipe),
        options=_update_options(recipe),
        interrupted=interrupted,
        callbacks=[_Bookkeeping(recipe, folder, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_StopWhenAsked(trainer))
    runner.append(
        RolloutRunner(
            engine=TransformersEngine(
                trainer.accelerator.unwrap_model(trainer.model),
                pad_id=tokenizer.pad_token_id,
                stop_ids=stop_ids,
                max_batch=recipe.rollout.max_batch,
            ),
            simulator=simulator,
            contexts=contexts,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            play=_play(recipe),
            on_episode=on_episode,
            interrupted=interrupted,
        )
    )
    return _Run(recipe, folder, resume, trainer, progress)


# --- the policy ----------------------------------------------------------------------------------------------------------


def _policy_path(recipe: Recipe, folder: RunFolder, state: PartialState) -> str:
    if recipe.policy.model != BUILTIN_TINY:
        return recipe.policy.model

    def build() -> None:
        if not (folder.base / "config.json").exists():
            build_tiny(folder.base, _texts(load_scenarios("english/train")), seed=recipe.run.seed)

    _on_main(state, build)
    return str(folder.base)


def _texts(scenarios: Sequence[Scenario]) -> Iterator[str]:
    for scenario in scenarios:
        yield from (scenario.policy_persona, scenario.user_persona, scenario.opening_line)


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, padding on the left, with a pad token."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise PolicyError(f"policy.model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stop_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a reply: the tokenizer's end of sequence, and what the model's generation config adds."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # not every model comes with a generation config
        declared = GenerationConfig.from_pretrained(model).eos_token_id
        ids |= set(declared if isinstance(declared, list) else [declared])
    ids.discard(None)
    if not ids:
        raise PolicyError(f"tokenizer of {model!r} has no end-of-sequence token, so no reply would ever end")
    return frozenset(ids)


def _check_positions(recipe: Recipe, model: str) -> None:
    limit = getattr(AutoConfig.from_pretrained(model, revision=recipe.policy.revision), "max_position_embeddings", None)
    wanted = recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens
    if limit is not None and wanted > limit:
        raise PolicyError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens is {wanted}, but {model!r} has {limit} positions; "
            "lower one of them"
        )


def _lora(recipe: Recipe) -> LoraConfig | None:
    lora = recipe.policy.lora
    if lora is None:
        return None
    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
    )


# --- the simulator -------------------------------------------------------------------------------------------------------


def _simulator_url(recipe: Recipe, state: PartialState, stack: contextlib.ExitStack) -> str:
    """The URL that all processes ask; the main one keeps the embedded server."""
    if recipe.simulator.url != "embedded":
        return recipe.simulator.url
    return str(_on_main(state, lambda: stack.enter_context(embedded(ScriptedBackend(), recipe.simulator.port))))


async def _check_simulator(simulator: SimulatorClient) -> None:
    async with simulator:
        await simulator.health()


# --- the trainer's settings ------------------------------------------------------------------------------------------------


def _data_set(recipe: Recipe, scenarios: Sequence[Scenario]) -> Dataset:
    """One row for each scenario of each step, in the order in which they are played."""
    schedule = step_schedule(
        scenarios, steps=recipe.training.max_steps, per_step=recipe.scenarios.per_step, seed=recipe.run.seed
    )
    return Dataset.from_dict({"scenario": [index for step in schedule for index in step]})


def _slots(
    recipe: Recipe, scenarios: Sequence[Scenario], step: int, rows: Sequence[dict[str, Any]], process: int
) -> list[Slot]:
    """What this process plays: its contiguous slice of the step's scenarios x rollouts."""
    size = recipe.rollout.group_size
    first = process * len(rows)
    return [Slot(scenarios[row["scenario"]], step, (first + k) // size, (first + k) % size) for k, row in enumerate(rows)]


def _play(recipe: Recipe) -> Play:
    rollout = recipe.rollout
    return Play(
        sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens),
        max_turns=rollout.max_turns,
        seed=recipe.run.seed,
        variant=recipe.scoring.variant,
        deterministic=rollout.deterministic,
    )


def _credit_options(recipe: Recipe) -> CreditOptions:
    credit, scoring = recipe.credit, recipe.scoring
    return CreditOptions(
        alpha=credit.alpha,
        centering=credit.centering,
        credit=credit.credit,
        gamma=credit.gamma,
        center_weights=credit.center_weights,
        scale=credit.scale,
        std_min=credit.std_min,
        turn_weights=scoring.turn_weights,
        shaping=(scoring.no_reasoning_penalty, scoring.fault_penalty) if recipe.policy.reasons else None,
    )


def _update_options(recipe: Recipe) -> UpdateOptions:
    training = recipe.training
    return UpdateOptions(
        updates_per_step=training.updates_per_step,
        tokens_per_row=training.tokens_per_row,
        clip=training.clip,
        entropy_bonus=training.entropy_bonus,
        recorded_logprobs=training.old_logprobs == "recorded",
        max_failed=recipe.rollout.max_failed,
    )


def _arguments(recipe: Recipe, processes: int) -> GRPOConfig:
    training, rollout = recipe.training, recipe.rollout
    updates = training.updates_per_step
    steps = training.max_steps * updates
    cosine = training.schedule == "cosine"
    if recipe.run.wandb != "disabled":
        os.environ["WANDB_MODE"] = recipe.run.wandb
    return GRPOConfig(
        output_dir=str(recipe.folder),
        run_name=recipe.run.name,
        report_to=["wandb"] if recipe.run.wandb != "disabled" else [],
        seed=recipe.run.seed,
        max_steps=steps,
        per_device_train_batch_size=recipe.scenarios.per_step * rollout.group_size // processes,
        gradient_accumulation_steps=1,
        num_generations=rollout.group_size,
        steps_per_generation=1,
        num_iterations=updates,
        shuffle_dataset=False,
        remove_unused_columns=False,
        temperature=rollout.temperature,
        max_completion_length=rollout.max_new_tokens,
        model_init_kwargs={
            "dtype": recipe.policy.dtype,
            "attn_implementation": recipe.policy.attention,
            "revision": recipe.policy.revision,
        },
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate} if cosine else {},
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=training.bf16,
        beta=0.0,
        disable_dropout=True,
        logging_steps=updates,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every * updates,
        save_total_limit=training.keep_checkpoints,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl and moves the progress display."""

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: RunProgress) -> None:
        self._updates = recipe.training.updates_per_step
        self._folder = folder
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step // self._updates
        if state.is_world_process_zero:
            self._folder.rewind(step)
        self._progress.start(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero or "outcome/all" not in logs:
            return
        step = state.global_step // self._updates
        self._folder.append_metrics({"step": step, **logs})
        self._progress.step(step, logs)


class _StopWhenAsked(TrainerCallback):  # type: ignore[misc]
    """Ends the run, with a checkpoint, after the last update of a step in which somebody pressed Ctrl-C."""

    def __init__(self, trainer: CtcGrpoTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.stop_requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        else:
            self._trainer.stop_requested = False


# --- processes and signals -----------------------------------------------------------------------------------------------


def _on_main(state: PartialState, do: Callable[[], Any]) -> Any:
    """Do something on the main process and give its result, or its error, to all."""
    result: list[Any] = [None, None]
    if state.is_main_process:
        try:
            result[0] = do()
        except Exception as error:  # noqa: BLE001 - raised again below, on every process
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


@contextlib.contextmanager
def _interrupts(progress: RunProgress) -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and a scheduler's TERM) asks the run to stop at the next safe point; a second one stops it at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        progress.say("stopping at the next safe point and saving; once more stops at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
