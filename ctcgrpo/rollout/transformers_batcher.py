"""Sampling with the trained model itself, on any device: continuous batching, and nothing computed twice.

Requests under way stand in the first slots of a cache; a step forwards one token of each. A request that begins takes over what a
slot holds of its prompt, be it the dialogue's last turn or another rollout's opening, and forwards only the rest.

A copy of the model in another type may sample in its place: on a CPU with bfloat16 instructions in little more than half the time.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.model.attention import use_layouts, with_layout
from ctcgrpo.model.kv_cache import CacheLayout, KvCache
from ctcgrpo.rollout.continuous import Batcher, Finished
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.sampler import draw
from ctcgrpo.types import Completion
from ctcgrpo.util.tokens import common_prefix

Ids = npt.NDArray[np.int64]

_PREFILL_TOKENS = 8192  # how many prompt tokens one forward pass takes, padding included, unless a single prompt is longer
_WORTH_WAITING = 8  # A request waits for another with the same beginning to be forwarded first where that saves so many tokens


@dataclass(slots=True, eq=False)
class _Request:
    name: str
    prompt: Ids
    sampling: Sampling
    uniforms: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def next(self) -> tuple[int, int]:
        """The token to forward next, and its position."""
        last = self.token_ids[-1] if self.token_ids else int(self.prompt[-1])
        return last, len(self.prompt) + len(self.token_ids) - 1


class TransformersBatcher(Batcher):
    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        stop_ids: Iterable[int],
        max_batch: int,
        dtype: torch.dtype | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`max_batch`: requests under way at once; others wait. `dtype`: of a copy of the weights that samples in their place,
        renewed by `take_weights`; None samples with the model itself, under `autocast`. `interrupted` ends a step between two
        layers with RunInterrupted. Raises PolicyError for a model that it cannot serve."""
        use_layouts(model)
        self._trained = self._model = model
        self._dtype = dtype
        self.has_own_weights = dtype is not None
        self._autocast = autocast if dtype is None else nullcontext
        self._interrupted = interrupted
        self._pad_id = pad_id
        self._stop_ids = frozenset(stop_ids)
        self._max_batch = max_batch
        self._was_training = model.training
        self._forget()

    def _forget(self) -> None:
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []  # by slot; the slots behind are idle
        self._cache = KvCache()
        self._held: list[Ids] = []  # by slot, idle ones too: the tokens whose keys and values it holds
        self._left: list[int] = []  # by slot: when its last request left, in requests that have
        self._leavings = 0

    def take_weights(self) -> None:
        if self.under_way:
            raise PolicyEngineError(f"{self.under_way} requests are in progress; weights cannot change before they finish")
        self._forget()
        self._was_training = self._trained.training
        if self._dtype is not None:
            self._renew_copy(self._dtype)
        self._model.eval()

    def sleep(self) -> None:
        self._forget()
        self._trained.train(self._was_training)

    def close(self) -> None:
        self._forget()

    @torch.no_grad()
    def _renew_copy(self, dtype: torch.dtype) -> None:
        if self._model is self._trained:
            self._model = copy.deepcopy(self._trained).requires_grad_(False)
            for (
                module
            ) in self._model.modules():  # TRL's forward of an instance calls the model that it was made for, not the copy
                module.__dict__.pop("forward", None)
            for parameter in self._model.parameters():  # buffers keep their type: rotary frequencies need it
                parameter.data = parameter.data.to(dtype)
        for ours, theirs in zip(self._model.parameters(), self._trained.parameters(), strict=True):
            ours.copy_(theirs)

    @property
    def under_way(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, name: str, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> None:
        stream = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=stream)
        self._waiting.append(_Request(name, np.array(prompt_ids, dtype=np.int64), sampling, uniforms.tolist()))

    def abort(self, names: Sequence[str]) -> None:
        gone = set(names)
        self._waiting = [r for r in self._waiting if r.name not in gone]
        for slot in reversed(range(len(self._running))):
            if self._running[slot].name in gone:
                self._leave(slot)

    @torch.no_grad()
    def step(self) -> list[Finished]:
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)  # a thread has a current device of its own
        try:
            with self._autocast():
                self._admit()
                return self._decode()
        except BaseException:
            self._forget()  # nobody knows which keys and values have been written
            raise

    # --- one token for everybody -------------------------------------------------------------------------------------

    def _decode(self) -> list[Finished]:
        running = self._running
        following = [request.next for request in running]
        self._cache.reserve(len(running), max(position for _, position in following) + 1)
        tokens, positions = torch.tensor(following, device=self._model.device).T.unsqueeze(-1)
        logits = self._forward(tokens, positions, self._layout(len(running), positions))[:, -1]
        for sampling in dict.fromkeys(request.sampling for request in running):
            slots = [s for s, request in enumerate(running) if request.sampling == sampling]
            uniforms = torch.tensor(
                [running[s].uniforms[len(running[s].token_ids)] for s in slots], dtype=torch.float64, device=logits.device
            )
            drawn = draw(logits if len(slots) == len(running) else logits[slots], uniforms, sampling)
            for s, token, logprob in zip(slots, *(x.tolist() for x in drawn), strict=True):
                running[s].token_ids.append(token)
                running[s].logprobs.append(logprob)
        finished = []
        for slot in reversed(range(len(running))):
            request = running[slot]
            if reason := self._reason(request):
                finished.append((request.name, Completion(tuple(request.token_ids), tuple(request.logprobs), reason)))
                self._leave(slot)
        return finished

    def _reason(self, request: _Request) -> Literal["stop", "length"] | None:
        if request.token_ids[-1] in self._stop_ids:
            return "stop"
        return "length" if len(request.token_ids) == request.sampling.max_new_tokens else None

    def _leave(self, slot: int) -> None:
        """The request in a slot is over: the last one under way takes its place, and what it held stays for the next turn."""
        request = self._running[slot]
        self._held[slot] = np.concatenate([request.prompt, np.array(request.token_ids, dtype=np.int64)])[:-1]
        self._leavings += 1
        self._left[slot] = self._leavings
        last = len(self._running) - 1
        self._swap(slot, last)
        self._running[slot] = self._running[last]
        self._running.pop()

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b)
            self._held[a], self._held[b] = self._held[b], self._held[a]
            self._left[a], self._left[b] = self._left[b], self._left[a]

    # --- requests that begin -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let requests in while there is room, and forward what no slot holds of their prompts, but for the last token."""
        room = self._max_batch - len(self._running)
        coming, self._waiting = self._waiting[:room], self._waiting[room:]
        while coming:
            first: list[tuple[int, int]] = []  # (slot, how much of the prompt it holds)
            later = []
            for request in coming:
                source, held = self._best(request.prompt)
                promised = max((common_prefix(request.prompt, self._running[s].prompt) for s, _ in first), default=0)
                if min(promised, len(request.prompt) - 1) >= held + _WORTH_WAITING:
                    later.append(request)
                else:
                    first.append((self._place(request, source, held), held))
            self._prefill(first)
            coming = later

    def _best(self, prompt: Ids) -> tuple[int | None, int]:
        """The slot that holds the most of a prompt, an idle one where several do, and how much. The last token does not count: the
        first new one is predicted from it."""
        best: tuple[int | None, int] = (None, 0)
        for slot in reversed(range(len(self._held))):
            common = min(common_prefix(prompt, self._held[slot]), len(prompt) - 1)
            if common > best[1]:
                best = (slot, common)
            if common == len(prompt) - 1:
                break
        return best

    def _place(self, request: _Request, source: int | None, held: int) -> int:
        """Give a request the slot behind those under way, with the beginning that `source` holds."""
        slot = len(self._running)
        if slot == len(self._held):
            self._open_slot()
        if source is not None and source >= slot:
            self._swap(source, slot)
        else:  # what this slot holds is kept, in a new one or in that which has been idle for the longest
            if len(self._held) < self._max_batch and len(self._held[slot]):
                self._open_slot()
            self._swap(slot, min(range(slot, len(self._held)), key=self._left.__getitem__))
            if source is not None:
                self._cache.copy(source, slot, held)
        self._held[slot] = request.prompt[:held]
        self._running.append(request)
        return slot

    def _open_slot(self) -> None:
        self._held.append(np.zeros(0, dtype=np.int64))
        self._left.append(0)
        self._cache.reserve(len(self._held), 1)

    def _prefill(self, placed: Sequence[tuple[int, int]]) -> None:
        """Batches of about the same length, the longest first."""
        missing = [(len(self._running[slot].prompt) - 1 - held, slot, held) for slot, held in placed]
        missing = sorted((m for m in missing if m[0]), key=lambda m: (-m[0], m[1]))
        while missing:
            longest = missing[0][0]
            fits = max(1, min(_PREFILL_TOKENS // longest, sum(2 * n >= longest for n, _, _ in missing)))
            batch, missing = missing[:fits], missing[fits:]
            tokens = torch.full((len(batch), longest), self._pad_id)
            for row, (n, slot, held) in enumerate(batch):
                tokens[row, :n] = torch.from_numpy(self._running[slot].prompt[held : held + n])
            starts = torch.tensor([[held] for _, _, held in batch])
            ends = torch.tensor([[held + n] for n, _, held in batch])
            # Padding goes where the prompt's last token will: nobody sees it there, and no room is made for it.
            positions = torch.minimum(starts + torch.arange(longest), ends).to(self._model.device)
            self._cache.reserve(len(self._held), int(positions.max()) + 1)
            self._forward(tokens.to(self._model.device), positions, self._layout([slot for _, slot, _ in batch], positions))
        for slot, _ in placed:
            self._held[slot] = self._running[slot].prompt[:-1]

    def _layout(self, slots: Sequence[int] | int, positions: torch.Tensor) -> CacheLayout:
        return CacheLayout(self._cache, slots, positions, self._interrupted)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
        how = {"use_cache": False, "logits_to_keep": 1, **with_layout(layout, None)}
        logits: torch.Tensor = self._model(input_ids=tokens, position_ids=positions, **how).logits
        return logits
