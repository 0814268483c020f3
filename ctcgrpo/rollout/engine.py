"""What a policy engine is: token ids in, token ids and log-probabilities out, one request at a time.

Every request carries a seed of its own, derived from where it stands in the run, so what is sampled does not depend on
timing, process count or neighbours in the batch, but through floating-point batch composition.
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
    """All processes call `take_weights` and `rest` together; in between each makes requests at its own pace, within
    `async with engine`."""

    version: int | None = None  # how many optimizer steps the weights that it samples from have seen; None before it has any

    def take_weights(self, version: int) -> None:
        """Sample from the trained policy as it is now, from here on. Raises PolicyEngineError where the weights cannot be
        handed over whole, and while requests are under way: a batch of rollouts comes from one version."""
        self.version = version

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        """Sample one completion. Raises PolicyEngineError where the engine cannot."""

    def confirm(self) -> None:  # noqa: B027 - one that shares the trainer's memory can hold no other weights
        """Raises PolicyEngineError where what was sampled since `take_weights` may come from other weights."""

    def rest(self) -> None:  # noqa: B027 - an engine without memory of its own has nothing to give back
        """Nothing is asked for until `take_weights` comes again: leave the memory to the update."""

    @property
    def sleeping_bytes(self) -> int:
        """GPU memory that PyTorch counts as allocated, and that nothing stands behind while the engine rests."""
        return 0

    def close(self) -> None:  # noqa: B027
        """The run is over; called once more does no harm."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


def request_seed(*where: object) -> int:
    """A seed in [0, 2**31), which every provider of models takes, from (run seed, step, group, scenario, rollout, turn)."""
    digest = hashlib.sha256("/".join(map(str, where)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
