"""The trainer: TRL's GRPOTrainer, for episodes of several turns with an advantage for each turn.

    trainer = CTCGRPOTrainer(model, args=CTCGRPOConfig(...), environment=MyEnvironment, train_dataset=tasks)
    trainer.train()

How it differs from GRPOTrainer:
1. a step plays episodes against an environment (`collect`) in place of one completion for each prompt;
2. each turn of an episode is a sample of its own, with its own advantage (`ctcgrpo.credit`);
3. `training_step` is a whole optimizer step over all of them (`PolicyUpdate.update`);
4. a step of rollouts can make several updates (`num_iterations`), each on an equal share of every group, with old
   log-probabilities recomputed once before the first;
5. with `overlap`, the next step's episodes are played while this step's updates run; with `update_parts`, gradients of the groups
   that are over are computed while others are played.
TRL and transformers keep everything else: loading, PEFT, optimizer, schedule, distribution, logging, checkpoints.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerControl

from ctcgrpo.audit.measure import audit_step
from ctcgrpo.audit.record import STEPS_FILE
from ctcgrpo.centering import make_centering
from ctcgrpo.config import CTCGRPOConfig
from ctcgrpo.credit import VINE
from ctcgrpo.errors import TooManyFailures, too_many_failed
from ctcgrpo.policy.builtin import build_builtin, is_builtin
from ctcgrpo.policy.chat_template import end_of_turn
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.loading import load_tokenizer
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.engines import make_engine
from ctcgrpo.rollout.runner import Play, RolloutRunner, validation_slots
from ctcgrpo.rollout.traces import add_credit, step_name
from ctcgrpo.training.ahead import Played
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.playing import NO_HOOKS, PLAYING, EpisodePlayer, RolloutHooks, shared_by
from ctcgrpo.training.samples import (
    StepCredit,
    Summary,
    episode_weights,
    step_credit,
    summarise,
    try_credit,
    turn_samples,
    update_of,
)
from ctcgrpo.training.tasks import step_schedule, tags_of, tasks_of
from ctcgrpo.training.update import Floats
from ctcgrpo.types import Environment, Episode, Task, TurnSample
from ctcgrpo.util.processes import on_main

_log = logging.getLogger(__name__)
INSTEAD = dict.fromkeys(
    ("reward_funcs", "reward_processing_classes", "tools", "rollout_func", "environment_factory"),
    "environment=MyEnvironment, whose Step.reward and outcome() are the rewards (ctcgrpo/environments/README.md)",
) | {"quantization_config": "CTCGRPOConfig(model_init_kwargs={'quantization_config': ...})"}
"""Arguments of GRPOTrainer that this trainer does not take, and what to pass instead."""


class CTCGRPOTrainer(EpisodePlayer):
    """See the module's docstring.

    `environment`: an `Environment` class, or a callable that makes one for each episode. One that is an asynchronous context
    manager too is entered while a batch of episodes is played.
    `train_dataset`, `eval_dataset`: a `datasets.Dataset` or a list of mappings, a task a row (`tasks_of`).
    `model`: as in `GRPOTrainer`, or a built-in policy (builtin/smollm2, builtin/tiny).
    `contexts`, `hooks`: for custom prompts and callbacks. Everything else is as in `GRPOTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: CTCGRPOConfig | None = None,
        environment: Callable[[], Environment] | None = None,
        train_dataset: Dataset | Sequence[Task | Mapping[str, Any]] | None = None,
        eval_dataset: Dataset | Sequence[Task | Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        contexts: ContextBuilder | None = None,
        hooks: RolloutHooks = NO_HOOKS,
        **unknown: NoReturn,
    ) -> None:
        for argument in unknown:
            instead = f"; instead pass {INSTEAD[argument]}" if argument in INSTEAD else ""
            raise TypeError(f"CTCGRPOTrainer does not take {argument}{instead}")
        name = model if isinstance(model, str) else model.config._name_or_path
        self.base_model = name
        if args is None:
            args = CTCGRPOConfig(f"{name.rpartition('/')[2]}-CTC-GRPO")
        if not isinstance(args, CTCGRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a CTCGRPOConfig (GRPOConfig with alpha, max_turns, ...)")
        args = copy.copy(args)  # changes below are for this trainer only
        if not callable(environment):
            raise TypeError(f"environment is {environment!r}; expected a class or a function that makes an Environment")
        try_credit(args)
        self._tasks = tasks_of([] if train_dataset is None else train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else tasks_of(eval_dataset, "eval_dataset")
        if isinstance(model, str) and is_builtin(model):
            base = Path(args.output_dir, "base").resolve()
            model = name = on_main(args.distributed_state, lambda: build_builtin(model, base, args.seed))
        if processing_class is None and not name:
            raise ValueError("the model has no name to load its tokenizer by; pass processing_class")
        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision")
            processing_class = load_tokenizer(name, revision, trust_remote_code=args.trust_remote_code)
        schedule = self._schedule(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"task": [position for step in schedule for position in step]}),
            eval_dataset=None if held_out is None else Dataset.from_dict({"task": list(range(len(held_out)))}),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=None if callbacks is None else list(callbacks),
            optimizers=optimizers,
        )
        self._held_out = held_out
        self._hooks = hooks
        contexts = contexts or self._contexts(processing_class)
        self.engine = make_engine(self, args, processing_class, stop_ids=contexts.stop_ids, interrupted=hooks.interrupted)
        self.runner = RolloutRunner(
            engine=self.engine,
            environment=environment,
            shared=shared_by(environment),
            contexts=contexts,
            tokenizer=processing_class,
            stop_ids=contexts.stop_ids,
            play=Play(
                sampling=Sampling(args.temperature, args.top_p, args.top_k, args.max_completion_length),
                max_turns=args.max_turns,
                seed=args.seed,
                deterministic=args.deterministic,
                deadline=args.deadline,
                seconds_per_call=args.environment_timeout,
                continuations=args.continuations if args.credit == VINE else 0,
            ),
            interrupted=hooks.interrupted,
        )
        if (args.overlap or args.update_parts > 1) and not self.engine.has_own_weights:
            raise ValueError(
                f"{'overlap = 1' if args.overlap else f'update_parts = {args.update_parts}'} needs an engine with weights of its "
                "own: vLLM servers (use_vllm, vllm_mode = 'server'), or the transformers engine with sampling_dtype = 'bfloat16'"
            )
        if args.update_parts > self.tasks_per_step:
            raise ValueError(
                f"update_parts = {args.update_parts} with {self.tasks_per_step} groups a step (per_device_train_batch_size x "
                "processes / num_generations); expected at most as many parts as groups"
            )
        self._step_tasks = schedule
        self._reset_playing()
        self._updates: list[list[TurnSample]] = []
        self._seconds_recompute = 0.0  # in this step
        self.centering = make_centering(args.centering)
        self._checked = False
        self.stop_requested = False  # whether any process was interrupted; synchronised at the end of a step
        self.phase = "the start of the run"  # current activity, for log lines

    def _schedule(self, args: CTCGRPOConfig) -> list[list[int]]:
        """The tasks of each step, by position. Sets `args.max_steps`, and leaves the order to the schedule."""
        per_step, odd = divmod(args.generation_batch_size, args.num_generations)
        assert not odd  # GRPOConfig refuses that
        batches = math.ceil(args.max_steps / args.num_iterations)
        if args.max_steps <= 0:
            batches = math.ceil(args.num_train_epochs * len(self._tasks) / per_step)
            args.max_steps = batches * args.num_iterations
        seed = args.seed if args.data_seed is None else args.data_seed
        seed = None if args.shuffle_dataset is False else seed
        args.shuffle_dataset = False
        return step_schedule(tags_of(self._tasks), steps=batches, per_step=per_step, seed=seed)

    def _contexts(self, tokenizer: PreTrainedTokenizerBase) -> ContextBuilder:
        kwargs = dict(self.args.chat_template_kwargs or {})
        ends = {*self.eos_token_ids, *([end_of_turn(tokenizer, kwargs)] if tokenizer.chat_template else [])} - {None}
        return ContextBuilder(
            tokenizer,
            stop_ids=ends,
            max_prompt_tokens=self._max_prompt_tokens(),
            reasoning=self.args.reasoning_context,
            template_kwargs=kwargs,
        )

    def _max_prompt_tokens(self) -> int:
        """`max_prompt_length`, or less where that and a completion exceed the model's positions."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if self.args.max_completion_length >= positions:
            length = self.args.max_completion_length
            raise ValueError(f"max_completion_length = {length}; expected less than the {positions} positions of the model")
        return int(min(self.args.max_prompt_length, positions - self.args.max_completion_length))

    # --- the whole run ---------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in GRPOTrainer. Raises TooManyFailures, TrainingDiverged, and KeyboardInterrupt on Ctrl-C; the last
        checkpoint stays."""
        try:
            self.engine.version = None  # weights may have changed between calls
            return super().train(*args, **kwargs)
        finally:
            self._drop_ahead()
            self.engine.version = None  # the best weights may be loaded under the last version number

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("CTCGRPOTrainer.predict is not supported: episodes have no labels; use evaluate(eval_dataset)")

    # --- one optimizer step --------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        updates = self.args.num_iterations
        update = self.state.global_step % updates
        self.refuse_nonfinite_weights()
        self.begin_update()
        seconds = self._seconds_recompute = 0.0
        trained: set[int] = set()
        if update == 0 or not self._updates:
            self._hooks.before_rollouts(self.rollout_step)
            tasks = [row["task"] for row in inputs]
            trained, seconds, waited = self._update_while_playing(model)
            self._updates = self._new_batch(self._take_played(self.rollout_step + 1, tasks), trained, waited)
            self.phase = f"{'the update' if updates == 1 else f'the {updates} updates'} of step {self.rollout_step + 1}"
        if not trained:
            self._measure_memory()
        started = time.perf_counter()
        loss = self.update(model, self._updates[update])
        self._log_number("seconds/update", seconds + time.perf_counter() - started)
        if self._on_gpu:  # to compare with the estimate of `ctcgrpo check`
            peak = torch.cuda.max_memory_allocated() - self.engine.sleeping_bytes
            self._log_number("memory/peak_gib", peak / 2**30)
        if update == updates - 1:
            self._updates = []
            asked = bool(self._sum_over_processes([float(self._hooks.interrupted())])[0])
            self.stop_requested = asked and self.state.global_step + 1 < self.state.max_steps
        return loss

    @property
    def _on_gpu(self) -> bool:
        return bool(self.accelerator.device.type == "cuda")

    def _measure_memory(self) -> None:
        """The peak from here on is that of the update."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    # --- one batch of rollouts -------------------------------------------------------------------------------------------

    def _update_while_playing(self, model: torch.nn.Module) -> tuple[set[int], float, float]:
        """With `update_parts`, gradients of all but the last part of the step's groups, each part once its episodes are over. Gives
        these groups, the seconds that it took, and those that the trainer waited."""
        trained: set[int] = set()
        seconds = waited = 0.0
        if self.args.update_parts > 1 and self._ahead is None and self._played is None:
            self._play_ahead(self.rollout_step + 1)
        for left in range(self.args.update_parts, 1, -1):
            if self._ahead is None:
                break  # all episodes are over
            self._announce(self._ahead)
            self.phase, started = PLAYING, time.perf_counter()
            groups = self._complete_groups(math.ceil((self.tasks_per_step - len(trained)) / left), trained)
            released = time.perf_counter()
            waited += released - started
            self.phase = f"a part of the update of step {self.rollout_step + 1}"
            if not groups or len(groups) + len(trained) == self.tasks_per_step:
                break  # what is left is the last part
            if not trained:
                self._measure_memory()
            recomputed = self._seconds_recompute
            episodes = [e for e in tuple(self._ahead.over) if e.group in groups]
            summaries = gather_object([summarise(e, self.args) for e in episodes])
            centering = copy.deepcopy(self.centering)  # the whole step's credit changes its state, once
            credit = step_credit(summaries, self.args, centering, step=self.rollout_step, seed=self.args.seed)
            [samples] = self._samples(sorted(episodes, key=lambda e: (e.group, e.rollout)), credit)
            self.update(model, samples, is_last=False)
            trained |= groups
            seconds += time.perf_counter() - released - (self._seconds_recompute - recomputed)
        return trained, seconds, waited

    def _new_batch(self, played: Played, trained: Set[int] = frozenset(), waited: float = 0.0) -> list[list[TurnSample]]:
        """The samples of each update, but for groups that are `trained` on already; `waited`: seconds, for those."""
        episodes, waited = played.episodes, waited + played.waited
        if self.args.overlap:
            self._play_ahead(self.rollout_step + 2)
        self._log_number("policy_version", played.version)
        self._hooks.update(self.rollout_step + 1)
        summaries = gather_object([summarise(e, self.args) for e in episodes])
        self.refuse_failures(summaries, episodes)
        credit = step_credit(summaries, self.args, self.centering, step=self.rollout_step, seed=self.args.seed)
        add_credit(self._trace_file(step_name(self.rollout_step + 1)), episodes, credit.turns)
        for name, value in rollout_metrics(summaries, credit).items():
            self._log_number(name, value)
        seconds = played.seconds
        self._log_number("seconds/rollout", seconds)
        if self.args.overlap:
            self._log_number("overlap/staleness", self.state.global_step - played.version)
        if self.args.overlap or self.args.update_parts > 1:
            self._log_number("overlap/trainer_waited", waited)
            self._log_number("overlap/share", max(0.0, 1 - waited / seconds))
        if self.args.audit_every and (self.rollout_step + 1) % self.args.audit_every == 0:
            self._audit(episodes)
        in_environments = sum(e.seconds_environment for e in episodes)
        self._log_number("seconds/simulator_per_episode", in_environments / max(1, len(episodes)))
        self._log_number("tokens_per_second", sum(sum(s.turn_tokens) for s in summaries) / seconds)
        samples = self._samples([e for e in episodes if e.group not in trained], credit)
        if self._seconds_recompute:
            self._log_number("seconds/recompute", self._seconds_recompute)
        return samples

    def _samples(self, episodes: Sequence[Episode], credit: StepCredit) -> list[list[TurnSample]]:
        """The samples of this process's episodes, for each update of the step."""
        updates, recorded = self.args.num_iterations, self.args.old_logprobs == "recorded"
        level = self.args.importance_level
        trained = [e for e in episodes if (e.group, e.rollout) in credit.turns]
        parts = [[e for e in trained if update_of(e, updates) == k] for k in range(updates)]
        ordered = [e for part in parts for e in part]
        samples = turn_samples(ordered, credit.advantages, recorded=recorded)
        if not self._sum_over_processes([float(len(samples))])[0]:  # nothing to compare: no metric may say that all is well
            return [[] for _ in parts]
        started = time.perf_counter()
        if not self._checked and self._how is not None:
            self._refuse_other_logprobs(self._few(samples))
        recomputes = updates > 1 or level == "episode"
        if level != "none":
            samples = self._comparable(samples)
        compares = recomputes or not self._checked or (level == "none" and (self.args.use_vllm or self.args.overlap))
        if compares:
            current = self._compare_with_engine(samples if recomputes else self._few(samples), corrected=level != "none")
            if level == "episode":
                samples = self._weighted(ordered, samples, current)
            if updates > 1 and not recorded:
                samples = [replace(sample, old_logprobs=now) for sample, now in zip(samples, current, strict=True)]
        if level == "none":
            samples = [replace(sample, sampled_logprobs=None) for sample in samples]
        self._checked = True
        if compares or (level != "none" and self.runner.play.sampling.truncates):
            self._seconds_recompute += time.perf_counter() - started
        rest = iter(samples)
        return [[next(rest) for e in part for _ in e.turns] for part in parts]

    def _comparable(self, samples: Sequence[TurnSample]) -> list[TurnSample]:
        """Samples with the engine's log-probabilities made comparable with the trainer's, which are without top-p and top-k: plus
        the log of the mass that these keep of the trainer's policy."""
        if not self.runner.play.sampling.truncates:
            return list(samples)
        self.model_wrapped.train()
        kept = self.log_kept(self.model_wrapped, samples)
        return [
            replace(sample, sampled_logprobs=sample.sampled_logprobs + log_kept)
            for sample, log_kept in zip(samples, kept, strict=True)
            if sample.sampled_logprobs is not None
        ]

    def _weighted(
        self, episodes: Sequence[Episode], samples: Sequence[TurnSample], current: Sequence[Floats]
    ) -> list[TurnSample]:
        """Samples with the importance weight of their episode in their advantage, which is the same as a weight in the loss."""
        bound = self.args.importance_max
        weights = episode_weights(episodes, samples, current, bound=bound)
        truncated = sum(weight >= bound * (1 - 1e-9) for weight in weights)
        turns, total, most = self._sum_over_processes([float(len(weights)), math.fsum(weights), float(truncated)])
        self._log_number("importance/mean", total / max(1.0, turns))
        self._log_number("importance/truncated", most / max(1.0, turns))
        return [
            replace(sample, advantage=sample.advantage * weight, sampled_logprobs=None)
            for sample, weight in zip(samples, weights, strict=True)
        ]

    def _audit(self, episodes: Sequence[Episode]) -> None:
        """Append the moments of this step to OUTPUT_DIR/audit.jsonl."""
        started = time.perf_counter()
        found = audit_step(self, self.rollout_step + 1, episodes)
        if found is not None and self.accelerator.is_main_process:
            with Path(self.args.output_dir, STEPS_FILE).open("a", encoding="utf-8") as out:
                out.write(found.model_dump_json() + "\n")
        self._log_number("seconds/audit", time.perf_counter() - started)

    def _compare_with_engine(self, samples: Sequence[TurnSample], *, corrected: bool) -> list[Floats]:
        """The current log-probabilities of samples, and, as metrics, how far those of the engine are off. `corrected`: samples are
        those of `_comparable`; `importance/gap` is then of the update, over all of its tokens, unless weights are of episodes."""
        self.model_wrapped.train()
        current = self.logprobs(self.model_wrapped, samples)
        gaps = [np.zeros(0, np.float32)]
        if not corrected:  # what top-p and top-k keep takes a forward pass, which a metric is not worth over all samples
            samples = self._comparable(self._few(samples) if self.runner.play.sampling.truncates else samples)
        for sample, now in zip(samples, current, strict=False):  # the few are the first ones
            gaps += [] if sample.sampled_logprobs is None else [np.abs(sample.sampled_logprobs - now)]
        of_tokens = np.concatenate(gaps)
        found = of_tokens[of_tokens < np.inf] if not np.isnan(of_tokens).any() else of_tokens
        # The maxima propagate NaN, so that it is visible. -inf: nothing was compared.
        largest = torch.tensor(found.max(initial=-np.inf), device=self.accelerator.device)
        overall = float(self.accelerator.gather(largest.unsqueeze(0)).max())
        self._log_number("logprob_gap", math.nan if overall == -math.inf else overall)
        if self.args.importance_level not in ("token", "turn"):
            removed = float(np.isinf(of_tokens).sum())
            self._log_gap(*self._sum_over_processes([float(found.sum()), removed, float(len(of_tokens))]))
        return current

    def refuse_failures(self, summaries: Sequence[Summary], episodes: Sequence[Episode]) -> None:
        """Raises TooManyFailures where the episodes of a step, or their continuations, are no longer representative. `summaries`:
        of all processes; `episodes`: of this one."""
        failed = [s for s in summaries if s.failure]
        if too_many_failed(len(failed), len(summaries), self.args.max_failed):
            kinds = {kind: sum(s.failure == kind for s in failed) for kind in sorted({str(s.failure) for s in failed})}
            example = next((f"; for example {e.name}: {e.failure.message}" for e in episodes if e.failure), "")
            raise TooManyFailures(
                f"step {self.rollout_step + 1}: {len(failed)} of {len(summaries)} episodes failed ({kinds}), "
                f"above max_failed = {self.args.max_failed}{example}"
            )
        lost = sum(s.failed_continuations for s in summaries)
        played = sum(s.played_continuations for s in summaries)
        if played and too_many_failed(lost, played, self.args.max_failed):
            branches = (c for e in episodes for turn in e.turns for c in turn.continuations)
            example = next((f"; for example {e.name}: {e.failure.message}" for e in branches if e.failure), "")
            raise TooManyFailures(
                f"step {self.rollout_step + 1}: {lost} of {played} continuations failed, above max_failed = "
                f"{self.args.max_failed}{example}"
            )

    # --- evaluation --------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Play `num_generations_eval` episodes of each task of `eval_dataset` (the trainer's where absent), with the same seeds
        each time. Gives their metrics, as training's, with the prefix: eval_outcome/all, eval_outcome/TAG, eval_failed/..."""
        tasks = self._held_out if eval_dataset is None else tasks_of(eval_dataset, "eval_dataset")
        if tasks is None:
            raise ValueError("no eval_dataset; pass one to the trainer or to evaluate()")
        self.refuse_nonfinite_weights()
        step, samples = self.state.global_step // self.args.num_iterations, self.args.num_generations_eval
        slots = validation_slots(tasks, samples, step)
        mine = slots[self.accelerator.process_index :: self.accelerator.num_processes]
        training = self.model.training
        episodes = self.play(mine, f"{metric_key_prefix}-{step:06d}", replace(self.runner.play, deadline=None, continuations=0))
        summaries = gather_object([summarise(e, self.args) for e in episodes])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in rollout_metrics(summaries, None).items()}
        self.model.eval()  # TRL logs what training has gathered since its last log otherwise
        self.log(metrics)
        self.model.train(training)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = control
        return metrics
