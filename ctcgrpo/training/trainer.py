"""The trainer: TRL's GRPOTrainer with a variable number of turn samples per rollout and an advantage per turn.

How it differs from GRPOTrainer:
1. a batch of rollouts is collected by `collect` (episodes against a simulator), not generated from prompts;
2. `training_step` is a whole optimizer step: it loops over rows of turn samples (which share what they have in common, and are
   dealt out so that all processes have equally much to do) and synchronises gradients on the last;
3. the loss is a sum over tokens divided by the trained tokens of the whole step, over all rows and processes;
4. a step of rollouts can make several updates, each on an equal share of every group, with old log-probabilities
   recomputed once before the first.
TRL and transformers keep everything else: loading, PEFT, optimizer, schedule, distribution, logging, checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, gather_object
from torch.optim.lr_scheduler import LambdaLR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from ctcgrpo.centering import make_centering
from ctcgrpo.checkpoint_pickles import weights_only
from ctcgrpo.errors import PolicyError, RunPaused, TooManyFailures, TrainingDiverged, too_many_failed
from ctcgrpo.files import checkpoints, is_complete, mark_complete
from ctcgrpo.policy.attention import use_layouts, with_layout
from ctcgrpo.policy.finite import nonfinite_gradient, nonfinite_weight, refuse_nonfinite
from ctcgrpo.processes import on_main
from ctcgrpo.training.credit_state import CREDIT_STATE, load_state, state_text
from ctcgrpo.training.head import score_trained_positions_only
from ctcgrpo.training.loss import TokenSums, token_sums
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.planning import Plan, forward_costs, plan
from ctcgrpo.training.rows import Row
from ctcgrpo.training.samples import (
    CreditOptions,
    StepCredit,
    Summary,
    step_credit,
    summarise,
    turn_samples,
    update_of,
)
from ctcgrpo.training.tree_attention import Packing, how_to_attend, tree_layout
from ctcgrpo.types import Episode, TurnSample

LossWeights = Literal["token", "turn"]
"""What weighs alike in the loss: every trained token of a step, or every trained turn."""


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """What the update needs beyond TRL's GRPOConfig."""

    updates_per_step: int = 1
    tokens_per_row: int = 16384
    packing: Packing = "auto"
    clip: float = 0.2
    dual_clip: float | None = None
    entropy_bonus: float = 0.001
    loss_weights: LossWeights = "token"
    recorded_logprobs: bool = False
    max_failed: float = 0.5
    keep_checkpoints: int = 3


PACKED_TOLERANCE = 0.02
"""How far packed log-probabilities may be from plain ones on the mean, in nats. bfloat16 differs by some 0.01 between any two ways
of computing attention; a wrong one differs by more than 0.1."""

_COMPARED_TOKENS = 2048
"""How many tokens (each sample with its context) of a process are scored in two ways before a run trains on them."""

Collect = Callable[[int, Sequence[dict[str, Any]]], list[Episode]]
"""Plays this process's share of a step's episodes: (step, its rows of the data set) -> episodes."""


class CtcGrpoTrainer(GRPOTrainer):  # type: ignore[misc]
    """See the module's docstring. `args.num_iterations` must equal `options.updates_per_step`; the data set holds one row a
    scenario and step, in order. `before_step` is called with the number of batches done before the next one is collected, `confirm`
    after it, to refuse it; `credited` is given this process's episodes once the step's credit is known.
    `interrupted` is polled between rollouts and after the last update of a step."""

    def __init__(
        self,
        *,
        model: Any,
        args: GRPOConfig,
        collect: Collect,
        credit: CreditOptions,
        options: UpdateOptions,
        confirm: Callable[[], None] = lambda: None,
        before_step: Callable[[int], None] = lambda step: None,
        credited: Callable[[Sequence[Episode], StepCredit], None] = lambda episodes, credit: None,
        interrupted: Callable[[], bool] = lambda: False,
        **kwargs: Any,
    ) -> None:
        if args.num_iterations != options.updates_per_step or args.gradient_accumulation_steps != 1:
            raise ValueError("num_iterations must equal updates_per_step, and gradient_accumulation_steps must be 1")
        score_trained_positions_only()
        super().__init__(model=model, args=args, reward_funcs=_no_reward, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        refuse_nonfinite(policy, str(model if isinstance(model, str) else policy.name_or_path))
        half = args.bf16 or policy.dtype == torch.bfloat16
        self._how = how_to_attend(options.packing, self.accelerator.device, half=half)
        if self._how is not None:
            reference = [] if self.ref_model is None else [self.accelerator.unwrap_model(self.ref_model)]
            for model in (policy, *reference):
                use_layouts(model)
        self._costs = forward_costs(policy, gathers=self._how in ("segments", "flash3"))
        self._collect = collect
        self._credit = credit
        self._options = options
        self._confirm = confirm
        self._before_step = before_step
        self._credited = credited
        self._interrupted = interrupted
        self._updates: list[list[TurnSample]] = []
        self._centering = make_centering(credit.centering)
        self._checked = False
        self.stop_requested = False
        """Whether any process was interrupted; agreed on by all of them at the end of a step."""

    @property
    def rollout_step(self) -> int:
        """The batch of rollouts that the next optimizer step belongs to, from 0."""
        return int(self.state.global_step) // self._options.updates_per_step

    # --- one optimizer step --------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        update = self.state.global_step % self._options.updates_per_step
        self.refuse_nonfinite_weights()
        if update == 0 or not self._updates:
            self._before_step(self.rollout_step)
            self._updates = self._new_batch(inputs)
        started = time.perf_counter()
        loss = self.update(model, self._updates[update])
        self._log_number("seconds/update", time.perf_counter() - started)
        if self.accelerator.device.type == "cuda":  # to hold against what `ctcgrpo check` computed
            self._log_number("memory/peak_gib", torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
        if update == self._options.updates_per_step - 1:
            self._updates = []
            asked = bool(self._sum_over_processes([float(self._interrupted())])[0])
            self.stop_requested = asked and self.state.global_step + 1 < self.state.max_steps
        return loss

    def update(self, model: torch.nn.Module, samples: Sequence[TurnSample]) -> torch.Tensor:
        """Forward and backward over this process's samples of one optimizer step; gradients end up synchronised.

        Returns the step's loss, a scalar over all processes. Every process runs the same number of rows. A step
        without any trained token leaves no gradient anywhere, so the optimizer changes nothing.
        """
        made = self._plan(gather_object(list(samples)))
        self._log_number("packing/tokens", made.tokens)
        self._log_number("packing/forwarded", made.forwarded)
        self._log_number("packing/padding", made.padding)
        self._log_number("packing/imbalance", made.imbalance)
        return self.update_rows(model, made.rows)

    def update_rows(self, model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
        """`update` for rows already made, equally many on every process."""
        model.train()
        counts = (float(sum(len(row.at) for row in rows)), float(sum(row.samples for row in rows)))
        tokens, turns = self._sum_over_processes(counts)
        total = tokens if self._options.loss_weights == "token" else turns
        if not tokens:
            return torch.zeros((), device=self.accelerator.device)
        totals: list[TokenSums] = []
        for k, row in enumerate(rows):
            is_last = k == len(rows) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with self._without_sync(model, is_last):
                sums = self._row_sums(model, row)
                if is_last:  # before DeepSpeed's backward, which is followed by its optimizer step at once
                    self._refuse_nonfinite_loss([*totals, sums])
                # Data-parallel training averages gradients over processes: the factor makes it a sum.
                loss = sums.loss * (self.accelerator.num_processes / total)
                self.accelerator.backward(loss, **self._backward_kwargs())
            totals.append(TokenSums(*(getattr(sums, field.name).detach() for field in fields(TokenSums))))
        self._refuse_nonfinite_gradients(model)
        return self._log_update(totals, tokens)

    # --- what is not finite ----------------------------------------------------------------------------------------------

    def _refuse_nonfinite_loss(self, totals: Sequence[TokenSums]) -> None:
        self._refuse(
            None
            if all(bool(torch.isfinite(t.loss)) for t in totals)
            else f"step {self.rollout_step + 1}: the loss is not finite",
            "log-probabilities overflow: lower training.learning_rate, or compute in float32 (training.bf16=false)",
        )

    def _refuse_nonfinite_gradients(self, model: torch.nn.Module) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            measured = getattr(model, "get_global_grad_norm", None)
            norm = measured() if measured else None
            name = None if norm is None or math.isfinite(norm) else "their norm"
        else:
            name = nonfinite_gradient(model)
        self._refuse(
            name and f"step {self.rollout_step + 1}: gradients are not finite ({name})",
            "the backward pass overflows: lower training.learning_rate, or compute in float32 (training.bf16=false)",
        )

    def refuse_nonfinite_weights(self) -> None:
        """Raises TrainingDiverged on all processes where the policy holds NaN or infinite weights on any: nothing may be sampled
        from it, and no checkpoint made of it."""
        name = nonfinite_weight(self.accelerator.unwrap_model(self.model))
        clipping = f"set training.max_grad_norm (it is {self.args.max_grad_norm:g}; 1 is usual)"
        self._refuse(
            name and f"after the optimizer step of step {self._last_step} the policy's weights are not finite ({name})",
            f"training.learning_rate = {self.args.learning_rate:g} is too high: lower it, or {clipping}",
        )

    @property
    def _last_step(self) -> int:
        """The batch of rollouts, from 1, that the last optimizer step belongs to."""
        return (int(self.state.global_step) - 1) // self._options.updates_per_step + 1

    def _refuse(self, problem: str | None, cause: str) -> None:
        """Raises TrainingDiverged on all processes where one of them has a problem."""
        if found := next((text for text in gather_object([problem]) if text is not None), None):
            raise TrainingDiverged(f"{found}; likely cause: {cause}")

    def _plan(self, samples: Sequence[TurnSample], *, packed: bool = True) -> Plan:
        return plan(
            samples,
            packed=packed and self._how is not None,
            tokens_per_row=self._options.tokens_per_row,
            pad_id=self._tokenizer.pad_token_id,
            costs=self._costs,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )

    def _row_sums(self, model: torch.nn.Module, row: Row) -> TokenSums:
        row = row.to(self.accelerator.device)
        logprobs, entropy = self._score(model, row)
        return token_sums(
            logprobs,
            entropy,
            row.old_logprobs,
            row.advantages,
            clip=self._options.clip,
            dual_clip=self._options.dual_clip,
            weights=row.turn_weights if self._options.loss_weights == "turn" else None,
            entropy_bonus=self._options.entropy_bonus,
            reference=self._reference(model, row) if self.beta else None,
            kl_weight=self.beta,
        )

    @torch.no_grad()
    def _reference(self, model: torch.nn.Module, row: Row) -> torch.Tensor:
        """Log-probabilities (E,) under the policy as it was before training: TRL's copy of it, or itself without its adapter."""
        if self.ref_model is not None:
            return _of_entries(self._forward(self.ref_model, row).log_probs, row)
        policy = self.accelerator.unwrap_model(model)
        with use_adapter(policy, None):
            return _of_entries(self._forward(policy, row).log_probs, row)

    def _score(self, model: torch.nn.Module, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy (E,) of a row's trained tokens at the sampling temperature."""
        output = self._forward(model, row)
        return _of_entries(output.log_probs, row), _of_entries(output.entropy, row)

    def _forward(self, model: torch.nn.Module, row: Row) -> Any:
        layout = None
        if row.segments is not None and self._how is not None:
            layout = tree_layout(row.segments, self._how, self.accelerator.device)
        with self.accelerator.autocast():
            return model(
                input_ids=row.input_ids,
                position_ids=row.positions,
                shift_labels=row.labels,
                fused_lm_head=True,
                **with_layout(layout, row.attention_mask),
            )

    def logprobs(
        self, model: torch.nn.Module, samples: Sequence[TurnSample], *, packed: bool = True
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of the completions of this process's samples at the sampling temperature, under the current weights;
        `packed` False computes them the plain way, whatever `options.packing` says."""
        everybodys = gather_object([list(samples)])
        before = sum(len(part) for part in everybodys[: self.accelerator.process_index])
        rows = self._plan([s for part in everybodys for s in part], packed=packed).rows
        scored = {k: v for part in gather_object([self._scored(model, rows)]) for k, v in part.items()}
        return [scored[before + k] for k in range(len(samples))]

    @torch.no_grad()
    def _scored(self, model: torch.nn.Module, rows: Sequence[Row]) -> dict[int, tuple[float, ...]]:
        """By a sample's place: what the rows say of it."""
        result: dict[int, tuple[float, ...]] = {}
        for row in rows:
            scores, _ = self._score(model, row.to(self.accelerator.device))
            which, counts = torch.unique_consecutive(row.sample, return_counts=True)
            parts = scores.float().cpu().split_with_sizes(counts.tolist())
            for k, numbers in zip(which.tolist(), parts, strict=True):
                result[k] = tuple(numbers.tolist())
        return result

    def _without_sync(self, model: torch.nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        # DeepSpeed reduces by itself and takes its boundary from gradient_state; FSDP2 would keep whole gradients between rows.
        reduces = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if is_last or reduces:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _backward_kwargs(self) -> dict[str, Any]:
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    # --- one batch of rollouts -------------------------------------------------------------------------------------------

    def _new_batch(self, inputs: Sequence[dict[str, Any]]) -> list[list[TurnSample]]:
        """Play the step's episodes, share their credit out, and split their turns over the step's updates."""
        started = time.perf_counter()
        self._log_number("policy_version", self.state.global_step)
        episodes = self.unless_paused(lambda: self._collect(self.rollout_step + 1, inputs))
        summaries = gather_object([summarise(e, self._credit) for e in episodes])
        self._refuse_failures(summaries, episodes)
        credit = step_credit(summaries, self._credit, self._centering, step=self.rollout_step)
        self._credited(episodes, credit)
        for name, value in rollout_metrics(summaries, credit).items():
            self._log_number(name, value)
        seconds = time.perf_counter() - started
        self._log_number("seconds/rollout", seconds)
        self._log_number(
            "seconds/simulator_per_episode", sum(e.seconds_environment for e in episodes) / max(1, len(episodes))
        )
        self._log_number("tokens_per_second", sum(sum(s.turn_tokens) for s in summaries) / seconds)

        updates = self._options.updates_per_step
        parts = [[e for e in episodes if update_of(e, updates) == k] for k in range(updates)]
        samples = [turn_samples(p, credit.advantages, recorded=self._options.recorded_logprobs) for p in parts]
        if updates > 1 or not self._checked:
            started = time.perf_counter()
            everything = [sample for part in samples for sample in part]
            few = self._few(everything)
            if not self._checked and self._how is not None:
                self._refuse_other_logprobs(few)
            self._checked = True
            current = iter(self._check_recorded(episodes, everything if updates > 1 else few))
            if updates > 1 and not self._options.recorded_logprobs:
                samples = [[replace(sample, old_logprobs=next(current)) for sample in part] for part in samples]
            self._log_number("seconds/recompute", time.perf_counter() - started)
        return samples

    def unless_paused(self, play: Callable[[], list[Episode]]) -> list[Episode]:
        """Play episodes; when any process was told to pause meanwhile (Ctrl-C, a spent budget), all of them stop here together."""
        episodes: list[Episode] = []
        pause: RunPaused | None = None
        try:
            episodes = play()
        except RunPaused as error:
            pause = error
        told = next((error for error in gather_object([pause]) if error is not None), None)
        if told is not None:
            raise type(told)(str(told))
        self._confirm()
        return episodes

    def _few(self, samples: Sequence[TurnSample]) -> list[TurnSample]:
        """As many of the samples as are compared once a run, at least one where there are any. A wrong kernel shows in the first
        hundred tokens, and on a CPU a pass over a whole row takes a minute."""
        most = min(_COMPARED_TOKENS, self._options.tokens_per_row)
        ends = accumulate(map(len, samples))
        return [s for s, end in zip(samples, ends, strict=True) if end <= most] or list(samples[:1])

    def _refuse_other_logprobs(self, samples: Sequence[TurnSample]) -> None:
        """Once a run, packed log-probabilities are compared with plain ones: a kernel or a model that sees positions in a way of
        its own must not train on something else without a word."""
        self.model_wrapped.train()
        packed, plain = (self.logprobs(self.model_wrapped, samples, packed=packed) for packed in (True, False))
        apart = [abs(a - b) for p, q in zip(packed, plain, strict=True) for a, b in zip(p, q, strict=True)]
        total, tokens = self._sum_over_processes([math.fsum(apart), float(len(apart))])
        mean = total / tokens if tokens else 0.0
        bound = PACKED_TOLERANCE / min(1.0, self.temperature)  # noise in logits counts for more in a cold policy
        self._log_number("packing/logprob_gap", mean)
        if not mean <= bound:
            name = type(self.accelerator.unwrap_model(self.model)).__name__
            raise PolicyError(
                f"{name}: log-probabilities in rows of shared prefixes (training.packing={self._options.packing}, {self._how}) are "
                f"{mean:.3g} nats off the plain ones on the mean, beyond {bound:.2g}; set training.packing=none"
            )

    def _check_recorded(self, episodes: Sequence[Episode], samples: Sequence[TurnSample]) -> list[tuple[float, ...]]:
        """The current log-probabilities of samples, and, as a metric, how far the engine's recorded ones are off:
        the largest difference over tokens, top-p and top-k accounted for where the engine says what it kept."""
        self.model_wrapped.train()
        current = self.logprobs(self.model_wrapped, samples)
        recorded = {(turn.prompt_ids, turn.completion.token_ids): turn.completion for e in episodes for turn in e.turns}
        gaps = [-math.inf]
        for sample, now in zip(samples, current, strict=True):
            completion = recorded[sample.prompt_ids, sample.completion_ids]
            # Where an engine cannot tell what top-p and top-k kept, its log-probabilities are of another distribution.
            gaps += [abs(r + k - c) for r, k, c in zip(completion.logprobs, completion.log_kept, now, strict=False)]
        # The maxima below let a NaN through: it has to be seen. -inf says that nothing was compared.
        largest = torch.tensor(gaps, dtype=torch.float32, device=self.accelerator.device).max()
        overall = float(self.accelerator.gather(largest.unsqueeze(0)).max())
        self._log_number("logprob_gap", math.nan if overall == -math.inf else overall)
        return current

    def _refuse_failures(self, summaries: Sequence[Summary], episodes: Sequence[Episode]) -> None:
        failed = [s for s in summaries if s.failure]
        if too_many_failed(len(failed), len(summaries), self._options.max_failed):
            kinds = {kind: sum(s.failure == kind for s in failed) for kind in sorted({str(s.failure) for s in failed})}
            example = next((f"; first here: {e.name}: {e.failure.message}" for e in episodes if e.failure), "")
            raise TooManyFailures(
                f"step {self.rollout_step + 1}: {len(failed)} of {len(summaries)} episodes failed ({kinds}), "
                f"and rollout.max_failed is {self._options.max_failed}{example}"
            )

    # --- metrics -----------------------------------------------------------------------------------------------------------

    def _log_number(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _log_update(self, totals: Sequence[TokenSums], tokens: float) -> torch.Tensor:
        mine = [float(sum(getattr(t, field.name) for t in totals)) for field in fields(TokenSums)]
        over_all = dict(zip([f.name for f in fields(TokenSums)], self._sum_over_processes(mine), strict=True))
        loss = over_all["loss"] / over_all["weight"]
        self._log_number("policy_loss", loss)
        self._log_number("clip_share", over_all["clipped"] / tokens)
        self._log_number("entropy", over_all["entropy"] / tokens)
        self._log_number("ratio", over_all["ratio"] / tokens)
        if self.beta:
            self._log_number("kl", over_all["kl"] / tokens)
        self._log_number("trained_tokens", tokens)
        return torch.tensor(loss, device=self.accelerator.device)

    def _sum_over_processes(self, values: Sequence[float]) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        gathered: torch.Tensor = self.accelerator.gather(numbers.unsqueeze(0))
        return [float(v) for v in gathered.sum(dim=0)]

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint counts once every process has written its files and the marker stands."""
        self.refuse_nonfinite_weights()
        credit_state = state_text(self._centering)  # on all processes: what fails here fails on all of them
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if credit_state is not None:
                (folder / CREDIT_STATE).write_text(credit_state, encoding="utf-8")
            mark_complete(folder)
            self._rotate()
        self.accelerator.wait_for_everyone()

    def _rotate(self) -> None:
        """Remove all but the newest complete checkpoints, once the newest is complete (transformers would before)."""
        folders = checkpoints(Path(self.args.output_dir))
        complete = sorted(step for step, folder in folders.items() if is_complete(folder))
        oldest_kept = complete[-self._options.keep_checkpoints :][0]
        for step, folder in folders.items():
            if step < oldest_kept:
                shutil.rmtree(folder)

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
            load_state(self._centering, Path(checkpoint))

    def _take_up_schedule(self) -> None:
        """A run that is given more steps takes its learning rate from the longer schedule, not from the end of the shorter one."""
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # not DeepSpeed's own
            steps = schedule.last_epoch
            rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def save_now(self) -> None:
        """A checkpoint of the last finished optimizer step, unless it has one."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # One process looks: on a shared disk others may see the marker later, and saving takes all of them.
        if self.state.global_step and not on_main(self.accelerator.state, lambda: is_complete(folder)):
            self._save_checkpoint(self.model, trial=None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left out: a card with the run's figures is written on export, not at every checkpoint."""


def _of_entries(scores: torch.Tensor, row: Row) -> torch.Tensor:
    return scores.flatten()[row.at]


def _no_reward(**_: Any) -> list[float]:
    raise RuntimeError("rewards come from episodes; TRL's reward path must not run")
