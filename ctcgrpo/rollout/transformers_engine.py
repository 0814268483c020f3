"""The policy engine on transformers' `generate`: batched, seeded per request, any device.

`generate` runs the model, its cache, padding and stopping; a logits processor replaces its sampling. The processor draws
each row's token by inverse transform from that row's own stream of uniforms, records the exact log-probability, and
leaves `generate` a single choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ctcgrpo.errors import PolicyEngineError, RunInterrupted
from ctcgrpo.records import Completion
from ctcgrpo.rollout.engine import PolicyEngine, Sampling


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling
    result: asyncio.Future[Completion]


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws one token a row and records its log-probability; `uniforms` (rows, steps) float64, one stream a row.

    After generation `logprobs` and `log_kept` hold one tensor (rows,) a step, as in `records.Completion`.
    """

    def __init__(self, uniforms: torch.Tensor, sampling: Sampling) -> None:
        self._uniforms = uniforms
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self.logprobs: list[torch.Tensor] = []
        self.log_kept: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        greedy = self._sampling.temperature == 0
        full = torch.log_softmax(scores.float() / (1.0 if greedy else self._sampling.temperature), dim=-1)
        if greedy:
            kept, chosen = full, full.argmax(dim=-1)
        else:
            kept = self._warpers(input_ids, full) if len(self._warpers) else full
            cumulative = kept.double().exp().cumsum(dim=-1)
            u = self._uniforms[:, len(self.logprobs)].to(cumulative.device)
            drawn = torch.searchsorted(cumulative, (u * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
            # Rounding can put u at the very end: the last token of positive mass is meant.
            last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
            chosen = torch.minimum(drawn, last)
        log_kept = torch.zeros_like(full[:, 0]) if kept is full else torch.logsumexp(kept, dim=-1)
        self.logprobs.append(full.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - log_kept)
        self.log_kept.append(log_kept)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen.unsqueeze(-1), 0.0)  # type: ignore[return-value]


class _Asked(StoppingCriteria):  # type: ignore[misc]
    """Stops between two tokens when the run is asked to: a whole batch of long replies may take minutes."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._asked(), device=input_ids.device)


def _fail(requests: Iterable[_Request], error: Exception) -> None:
    for request in requests:
        if not request.result.done():
            request.result.set_exception(error)


class TransformersEngine(PolicyEngine):
    """Batches whatever requests are waiting, in the order of their arrival, up to `max_batch` at a time.

    Requests made together are batched together, so a caller that makes them in a fixed order and waits for all of them
    fixes the composition of every batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        stop_ids: Iterable[int],
        max_batch: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._interrupted = interrupted
        self._model = model
        self._autocast = autocast
        self._pad_id = pad_id
        self._stop_ids = sorted(stop_ids)
        self._max_batch = max_batch
        self._waiting: list[_Request] = []
        self._pump: asyncio.Task[None] | None = None

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        result: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(prompt_ids, seed, sampling, result))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run_batches())
        return await result

    async def _run_batches(self) -> None:
        while self._waiting:
            sampling = self._waiting[0].sampling
            batch = [r for r in self._waiting if r.sampling == sampling][: self._max_batch]
            self._waiting = [r for r in self._waiting if r not in batch]
            batch = [r for r in batch if not r.result.cancelled()]
            if not batch:
                continue
            try:
                completions = await asyncio.to_thread(self._generate_batch, batch, sampling)
            except RuntimeError as error:  # what torch raises, out-of-memory included
                _fail(batch, PolicyEngineError(f"transformers could not generate: {error}"))
                continue
            except Exception as error:  # noqa: BLE001 - whoever waits has to see it, or would wait for ever
                _fail([*batch, *self._waiting], error)
                self._waiting = []
                return
            for request, completion in zip(batch, completions, strict=True):
                if not request.result.done():
                    request.result.set_result(completion)

    @torch.no_grad()
    def _generate_batch(self, batch: list[_Request], sampling: Sampling) -> list[Completion]:
        device = self._model.device
        width = max(len(request.prompt_ids) for request in batch)
        ids = torch.full((len(batch), width), self._pad_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        streams = [torch.Generator().manual_seed(request.seed) for request in batch]
        uniforms = torch.stack(
            [torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=stream) for stream in streams]
        )
        sampler = SeededSampler(uniforms, sampling)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            pad_token_id=self._pad_id,
            eos_token_id=self._stop_ids,
        )
        with self._ready(), self._autocast():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_Asked(self._interrupted)]),
            )
        if self._interrupted():
            raise RunInterrupted("interrupted in the middle of a reply")
        sampled = output[:, width:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        log_kept = torch.stack(sampler.log_kept, dim=1).tolist()
        return [self._completion(*row) for row in zip(sampled, logprobs, log_kept, strict=True)]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model without dropout, and without its own generation config: `generate` would fill in from it whatever ours
        leaves open (penalties, suppressed tokens, beams), and the log-probabilities would not be the policy's."""
        was_training, own_config = self._model.training, self._model.generation_config
        self._model.eval()
        self._model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self._model.train(was_training)
            self._model.generation_config = own_config

    def _completion(self, ids: list[int], logprobs: list[float], log_kept: list[float]) -> Completion:
        stop = next((k for k, token in enumerate(ids) if token in self._stop_ids), None)
        n = len(ids) if stop is None else stop + 1
        return Completion(tuple(ids[:n]), tuple(logprobs[:n]), tuple(log_kept[:n]), "length" if stop is None else "stop")
