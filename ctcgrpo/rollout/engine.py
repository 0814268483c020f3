"""The interface of policy engines: from token ids to sampled token ids with log-probabilities, per request.

Each request has its own seed, derived from its place in the run. So samples do not depend on timing, process count or the
rest of the batch, except through floating-point differences between batch compositions.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ctcgrpo.types import Completion


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is sampled. temperature 0 is greedy; top_p 1 and top_k 0 switch truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0


class PolicyEngine(ABC):
    """All processes call `take_weights` and `sleep` together. In between, each makes requests at its own pace, within
    `async with engine`."""

    version: int | None = None  # optimizer steps of the weights that it samples from; None before the first
    has_own_weights: bool = False  # whether it can sample while the trained weights change

    def take_weights(self, version: int) -> None:
        """Load the trained policy's current weights. Raises PolicyEngineError where the transfer fails, and while requests are in
        progress: a batch of rollouts must come from one version."""
        self.version = version

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        """Sample one completion. Raises PolicyEngineError where the engine cannot."""

    def confirm(self) -> None:  # noqa: B027 - an engine in the trainer's memory has no other weights
        """Raises PolicyEngineError where what was sampled since `take_weights` may come from other weights."""

    def sleep(self) -> None:  # noqa: B027 - an engine without memory of its own has none to free
        """Free GPU memory for the update. No requests come until the next `take_weights`."""

    @property
    def sleeping_bytes(self) -> int:
        """GPU memory that PyTorch counts as allocated, but that the sleeping engine has unmapped."""
        return 0

    def close(self) -> None:  # noqa: B027
        """Shut down at the end of the run; may be called again."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


def request_seed(*where: object) -> int:
    """A seed in [0, 2**31), which every provider of models takes, from (run seed, step, group, scenario, rollout, turn)."""
    digest = hashlib.sha256("/".join(map(str, where)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
