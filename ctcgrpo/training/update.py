"""An optimizer step over turn samples, however many there are: rows, loss, gradients, and what is refused.

1. rows of turn samples share what they have in common, and are dealt out so that all processes have equally much to do;
2. gradients are synchronised on the last row;
3. the loss is a sum over tokens divided by the trained tokens of the whole step, over all rows and processes, or by `loss_total`;
4. with that, a step can come in parts, whose gradients add up to those of the whole, in whatever order they come.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import DistributedType
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from ctcgrpo.config import CTCGRPOConfig
from ctcgrpo.errors import PolicyError, TrainingDiverged
from ctcgrpo.model.attention import use_layouts, with_layout
from ctcgrpo.model.finite import nonfinite_gradient, nonfinite_weight, refuse_nonfinite
from ctcgrpo.model.head import score_trained_positions_only
from ctcgrpo.model.sketch import GradientSketch
from ctcgrpo.model.tree_attention import how_to_attend, row_multiple, tree_layout
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.sampler import log_kept
from ctcgrpo.training.exchange import gather_arrays, gather_samples
from ctcgrpo.training.loss import TokenSums, token_sums
from ctcgrpo.training.planning import Plan, forward_costs, plan
from ctcgrpo.training.rows import Row, dummy_row, plain_rows
from ctcgrpo.types import TurnSample
from ctcgrpo.util.processes import raise_on_all

_log = logging.getLogger(__name__)
PACKED_TOLERANCE = 0.02
"""How far packed log-probabilities may be from plain ones on the mean, in nats. bfloat16 differs by some 0.01 between any two ways
of computing attention; a wrong one differs by more than 0.1."""

_LOGITS_AT_ONCE = 256
"""Tokens whose logits are sorted at once for top-p and top-k."""

LARGE_GAP = 0.1
"""Mean difference in nats between log-probabilities of the engine and of the trainer from which a run warns. Between vLLM and a
trainer in bfloat16 it is some 0.01."""

_COMPARED_TOKENS = 2048
"""How many tokens (each sample with its context) of a process are scored in two ways before a run trains on them."""


Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class PolicyUpdate(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with an `update` over turn samples in place of its loss."""

    args: CTCGRPOConfig

    def __init__(self, *, model: Any, args: CTCGRPOConfig, **kwargs: Any) -> None:
        score_trained_positions_only()
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL would start an engine of its own
        try:
            super().__init__(model=model, args=args, reward_funcs=_no_reward, **kwargs)
        finally:
            args.use_vllm = use_vllm
        policy = self.accelerator.unwrap_model(self.model)
        refuse_nonfinite(policy, str(model if isinstance(model, str) else policy.name_or_path))
        half = args.bf16 or policy.dtype == torch.bfloat16
        self._how = how_to_attend(args.packing, self.accelerator.device, half=half)
        if self._how is not None:
            reference = [] if self.ref_model is None else [self.accelerator.unwrap_model(self.ref_model)]
            for model in (policy, *reference):
                use_layouts(model)
        self.begin_update()
        self._warned_of_gap = self._warned_of_total = False
        self._costs = forward_costs(policy, gathers=self._how in ("segments", "flash3"))

    @property
    def rollout_step(self) -> int:
        """The batch of rollouts that the next optimizer step belongs to, from 0."""
        return int(self.state.global_step // self.args.num_iterations)

    def begin_update(self) -> None:
        """Call it before the first part of an optimizer step."""
        self._totals: list[TokenSums] = []
        self._tokens = 0.0
        self._packed = np.zeros(3)  # tokens, forwarded tokens, and positions

    def update(self, model: torch.nn.Module, samples: Sequence[TurnSample], *, is_last: bool = True) -> torch.Tensor:
        """Forward and backward over this process's samples of one optimizer step, or of a part of it; the last part synchronises
        gradients. Parts need `loss_total`: the number of trained tokens in all of them is not known before the last.

        Returns the step's loss, a scalar over all processes, and 0 before the last part. Every process runs the same number of
        rows. A step without any trained token leaves no gradient anywhere, so the optimizer changes nothing.
        """
        made = self._plan(gather_samples(self.accelerator, samples))
        self._packed += made.tokens, made.forwarded, made.forwarded / (1 - made.padding)
        self._log_number("packing/imbalance", made.imbalance)
        loss = self.update_rows(model, made.rows, is_last=is_last)
        if is_last:
            tokens, forwarded, positions = self._packed.tolist()
            self._log_number("packing/tokens", tokens)
            self._log_number("packing/forwarded", forwarded)
            self._log_number("packing/padding", 1 - forwarded / positions if positions else 0.0)
        return loss

    def update_rows(self, model: torch.nn.Module, rows: Sequence[Row], *, is_last: bool = True) -> torch.Tensor:
        """`update` for rows already made, equally many on every process."""
        model.train()
        counts = (float(sum(len(row.at) for row in rows)), float(sum(row.samples for row in rows)))
        tokens, turns = self._sum_over_processes(counts)
        self._tokens += tokens
        if not self._tokens or not (tokens or is_last):
            return torch.zeros((), device=self.accelerator.device)
        total = self.args.loss_total or (tokens if self.args.loss_weights == "token" else turns)
        rows = rows or [dummy_row(self._tokenizer.pad_token_id)]  # gradients are synchronised on the last row
        for k, row in enumerate(rows):
            ends = is_last and k == len(rows) - 1
            self.accelerator.gradient_state._set_sync_gradients(ends)
            with self._without_sync(model, ends):
                sums = self._row_sums(model, row)
                if ends:  # before DeepSpeed's backward, which is followed by its optimizer step at once
                    self._refuse_nonfinite_loss([*self._totals, sums])
                # Data-parallel training averages gradients over processes: the factor makes it a sum.
                loss = sums.loss * (self.accelerator.num_processes / total)
                self.accelerator.backward(loss, **self._backward_kwargs())
            self._totals.append(TokenSums(*(getattr(sums, field.name).detach() for field in fields(TokenSums))))
        if not is_last:
            return torch.zeros((), device=self.accelerator.device)
        self._refuse_nonfinite_gradients(model)
        return self._log_update(self._totals, self._tokens)

    # --- what is not finite ----------------------------------------------------------------------------------------------

    def _refuse_nonfinite_loss(self, totals: Sequence[TokenSums]) -> None:
        finite = all(bool(torch.isfinite(t.loss)) for t in totals)
        self._refuse(
            None if finite else f"step {self.rollout_step + 1}: the loss is not finite",
            "log-probabilities overflow: lower learning_rate, or compute in float32 (bf16=False)",
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
            "the backward pass overflows: lower learning_rate, or compute in float32 (bf16=False)",
        )

    def refuse_nonfinite_weights(self) -> None:
        """Raises TrainingDiverged on all processes where the policy holds NaN or infinite weights on any: nothing may be sampled
        from it, and no checkpoint made of it."""
        name = nonfinite_weight(self.accelerator.unwrap_model(self.model))
        clipping = f"set max_grad_norm (it is {self.args.max_grad_norm:g}; 1 is usual)"
        self._refuse(
            name and f"after the optimizer step of step {self._last_step} the policy's weights are not finite ({name})",
            f"learning_rate = {self.args.learning_rate:g} is too high: lower it, or {clipping}",
        )

    @property
    def _last_step(self) -> int:
        """The batch of rollouts, from 1, that the last optimizer step belongs to."""
        return int((self.state.global_step - 1) // self.args.num_iterations + 1)

    def _refuse(self, problem: str | None, cause: str) -> None:
        """Raises TrainingDiverged on all processes where one of them has a problem."""
        raise_on_all(None if problem is None else TrainingDiverged(f"{problem}; likely cause: {cause}"))

    # --- rows ------------------------------------------------------------------------------------------------------------

    def _plan(self, samples: Sequence[TurnSample], *, packed: bool = True, tokens_per_row: int | None = None) -> Plan:
        return plan(
            samples,
            packed=packed and self._how is not None,
            tokens_per_row=tokens_per_row or self.args.tokens_per_row,
            pad_id=self._tokenizer.pad_token_id,
            costs=self._costs,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            multiple=row_multiple(self._how),
        )

    def _row_sums(self, model: torch.nn.Module, row: Row) -> TokenSums:
        row = row.to(self.accelerator.device)
        logprobs, entropy = self._score(model, row)
        return token_sums(
            logprobs,
            entropy,
            row.old_logprobs,
            row.advantages,
            clip=self.args.epsilon,
            dual_clip=self.args.dual_clip,
            weights=row.turn_weights if self.args.loss_weights == "turn" else None,
            entropy_bonus=self.args.entropy_coef,
            reference=self._reference(model, row) if self.beta else None,
            kl_weight=self.beta,
            sampled_logprobs=row.sampled_logprobs,
            importance_max=self.args.importance_max,
            by_turn=row.sample if self.args.importance_level == "turn" else None,
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

    def _row_log_kept(self, model: torch.nn.Module, row: Row) -> torch.Tensor:
        """(E,), as `log_kept`, of a row on this device."""
        length = row.input_ids.shape[1]
        sequences, places = row.at // length, row.at % length
        scored = torch.unique(places) if len(places) else row.at.new_zeros(1)
        logits = self._forward(model, row, fused_lm_head=False, use_cache=False, logits_to_keep=scored).logits
        tokens, columns = row.labels.flatten()[row.at], torch.searchsorted(scored, places)
        sampling = Sampling(self.args.temperature, self.args.top_p, self.args.top_k)
        parts = torch.split(torch.arange(len(row.at), device=row.at.device), _LOGITS_AT_ONCE)
        kept = [log_kept(logits[sequences[part], columns[part]], tokens[part], sampling) for part in parts]
        return torch.cat(kept) if kept else torch.zeros(0)

    def _forward(self, model: torch.nn.Module, row: Row, **options: Any) -> Any:
        layout = None
        if row.segments is not None and self._how is not None:
            layout = tree_layout(row.segments, self._how, self.accelerator.device)
        with self.accelerator.autocast():
            return model(
                input_ids=row.input_ids,
                position_ids=row.positions,
                **(options or {"shift_labels": row.labels, "fused_lm_head": True}),
                **with_layout(layout, row.attention_mask),
            )

    def logprobs(self, model: torch.nn.Module, samples: Sequence[TurnSample], *, packed: bool = True) -> list[Floats]:
        """Log-probabilities (n,) of the completions of this process's samples at the sampling temperature, without top-p and top-k,
        under the current weights; `packed` False computes them the plain way, whatever `args.packing` says."""
        return self._score_samples(samples, lambda row: self._score(model, row)[0], self.args.tokens_per_row, packed=packed)

    def log_kept(self, model: torch.nn.Module, samples: Sequence[TurnSample]) -> list[Floats]:
        """At each token (n,) of the completions of this process's samples, the log of the probability mass that top-p and top-k
        keep of the current policy; +inf for a token that they remove."""
        # Half the length of a row of the update: whole logits are computed here.
        return self._score_samples(samples, lambda row: self._row_log_kept(model, row), self.args.tokens_per_row // 2)

    def _score_samples(
        self,
        samples: Sequence[TurnSample],
        score: Callable[[Row], torch.Tensor],
        tokens_per_row: int,
        *,
        packed: bool = True,
    ) -> list[Floats]:
        """What `score` gives for the entries (E,) of a row, for each of this process's samples. Collective."""
        everybodys = gather_samples(self.accelerator, samples)
        counts = [int(n) for [found] in gather_arrays(self.accelerator, [np.array([len(samples)])]) for n in found]
        before = sum(counts[: self.accelerator.process_index])
        rows = self._plan(everybodys, packed=packed, tokens_per_row=tokens_per_row).rows
        scored: dict[int, Floats] = {}
        for places, flat in gather_arrays(self.accelerator, self._scored(score, rows)):
            ends = np.cumsum([len(everybodys[k].completion_ids) for k in places])
            scored |= dict(zip(places.tolist(), np.split(flat, ends[:-1]), strict=True)) if len(places) else {}
        return [scored[before + k] for k in range(len(samples))]

    def sketches(self, samples: Sequence[TurnSample]) -> Floats:
        """Sketches (N, D) of the gradient of each sample's summed log-probability (its mean, where turns weigh alike), the
        policy-gradient direction that its advantage multiplies. All processes call it, each with its own samples."""
        policy = self.accelerator.unwrap_model(self.model)
        policy.train()
        pad = self._tokenizer.pad_token_id
        # Half the length of a row of the update, so that its memory is enough here too.
        rows = plain_rows(samples, tokens_per_row=self.args.tokens_per_row // 2, pad_id=pad)
        [most] = [max(int(n) for [found] in gather_arrays(self.accelerator, [np.array([len(rows)])]) for n in found)]
        with GradientSketch(policy, seed=self.args.seed) as sketch:
            found = np.zeros((len(samples), sketch.size), dtype=np.float32)
            for row in (*rows, *[dummy_row(pad)] * (most - len(rows))):  # sharded weights are gathered on all processes together
                row = row.to(self.accelerator.device)
                logprobs, _ = self._score(policy, row)
                parts = sketch.of(logprobs * row.turn_weights if self.args.loss_weights == "turn" else logprobs)
                at, which = (row.at // row.input_ids.shape[1]).tolist(), row.sample.tolist()
                for sequence, place in dict(zip(at, which, strict=True)).items():
                    found[place] = parts[sequence].cpu().numpy()
        return found

    @torch.no_grad()
    def _scored(self, score: Callable[[Row], torch.Tensor], rows: Sequence[Row]) -> tuple[Ints, Floats]:
        """The places of the samples in the rows, and the scores of their tokens, end to end."""
        places: list[int] = []
        parts: list[Floats] = [np.zeros(0, np.float32)]
        for row in rows:
            scores = score(row.to(self.accelerator.device))
            places += torch.unique_consecutive(row.sample).tolist()
            parts.append(scores.float().cpu().numpy())
        return np.array(places, dtype=np.int64), np.concatenate(parts)

    def _without_sync(self, model: torch.nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        # DeepSpeed reduces by itself and takes its boundary from gradient_state; FSDP2 would keep whole gradients between rows.
        reduces = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if is_last or reduces:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _backward_kwargs(self) -> dict[str, Any]:
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    def _few(self, samples: Sequence[TurnSample]) -> list[TurnSample]:
        """As many of the samples as are compared once a run, at least one where there are any. A wrong kernel shows in the first
        hundred tokens, and on a CPU a pass over a whole row takes a minute."""
        most = min(_COMPARED_TOKENS, self.args.tokens_per_row)
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
                f"{name}: log-probabilities in rows of shared prefixes (packing = {self.args.packing!r}, {self._how}) are "
                f"{mean:.3g} nats off the plain ones on the mean, beyond {bound:.2g}; set packing to 'none'"
            )

    # --- metrics ---------------------------------------------------------------------------------------------------------

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
        if self.args.importance_level in ("token", "turn"):
            self._log_gap(over_all["gap"], over_all["removed"], tokens)
            self._log_number("importance/mean", over_all["importance"] / tokens)
            self._log_number("importance/truncated", over_all["truncated"] / tokens)
        self._log_number("trained_tokens", tokens)
        if self.args.loss_weights == "turn":
            self._log_number("trained_turns", over_all["weight"])
        self._warn_of_total(over_all["weight"])
        return torch.tensor(loss, device=self.accelerator.device)

    def _log_gap(self, gap: float, removed: float, tokens: float) -> None:
        """`gap`: sum over `tokens` of how far log-probabilities of the engine and of the trainer are apart, but for `removed` ones,
        which the trainer's top-p and top-k remove."""
        mean = gap / max(1.0, tokens - removed)
        self._log_number("importance/gap", mean)
        self._log_number("importance/removed", removed / max(1.0, tokens))
        if mean > LARGE_GAP and not self._warned_of_gap and self.accelerator.is_main_process:
            self._warned_of_gap = True
            causes = "another precision or quantization, another chat template, or old weights"
            if self.args.overlap:
                causes = "weights that change much in a step (learning_rate), another precision, or another chat template"
            _log.warning(
                "step %d: log-probabilities of the engine and of the trainer differ by %.2g nats a token on average; expected "
                "at most %g. Likely causes: %s. Logged once a run; the metric importance/gap has it for every step",
                *(self.rollout_step + 1, mean, LARGE_GAP, causes),
            )

    def _warn_of_total(self, weight: float) -> None:
        """`weight`: what the loss is divided by without `loss_total`. Another total scales gradients against max_grad_norm."""
        total = self.args.loss_total
        if total is None or self._warned_of_total or weight / 3 <= total <= weight * 3 or not self.accelerator.is_main_process:
            return
        self._warned_of_total = True
        _log.warning(
            "step %d: loss_total is %g, and this step has %g trained %ss; expected a number near that. Gradients are %.2g times as "
            "large as with it. Logged once a run",
            *(self.rollout_step + 1, total, weight, self.args.loss_weights, weight / total),
        )

    def _sum_over_processes(self, values: Sequence[float]) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        gathered: torch.Tensor = self.accelerator.gather(numbers.unsqueeze(0))
        return [float(v) for v in gathered.sum(dim=0)]


def _of_entries(scores: torch.Tensor, row: Row) -> torch.Tensor:
    return scores.flatten()[row.at]


def _no_reward(**_: Any) -> list[float]:
    raise RuntimeError("rewards come from episodes; TRL's reward path must not run")
