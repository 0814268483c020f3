"""What a policy engine is: token ids in, token ids and log-probabilities out, one request at a time.

Every request carries a seed of its own, derived from where it stands in the run, so what is sampled does not depend on
timing, process count or neighbours in the batch, but through floating-point batch composition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ctcgrpo.records import Completion


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


class PolicyEngine(Protocol):
    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        """Sample one completion. Raises PolicyEngineError where the engine cannot."""
        ...


def request_seed(*where: object) -> int:
    """A seed in [0, 2**63) from (run seed, step, group, scenario, rollout, turn)."""
    digest = hashlib.sha256("/".join(map(str, where)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
