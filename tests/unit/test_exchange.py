"""Turn samples as arrays come back as they were, whatever they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcgrpo.training.exchange import packed, unpacked
from ctcgrpo.types import TurnSample

few = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@given(st.lists(st.tuples(few, few, st.floats(-3, 3)), max_size=8), st.booleans(), st.booleans())
@settings(deadline=None)
def test_every_sample_comes_back_in_its_place(
    parts: list[tuple[list[int], list[int], float]], with_old: bool, with_sampled: bool
) -> None:
    def logprobs(of: float, n: int, given: bool) -> list[float] | None:
        return [of] * n if given else None

    samples = [
        TurnSample(p, c, a, logprobs(-k, len(c), with_old), logprobs(-k - 0.5, len(c), with_sampled))
        for k, (p, c, a) in enumerate(parts)
    ]
    back = unpacked(packed(samples))
    assert len(back) == len(samples)
    for one, other in zip(samples, back, strict=True):
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist() and other.prompt_ids.dtype == np.int32
        assert one.completion_ids.tolist() == other.completion_ids.tolist()
        assert one.advantage == other.advantage
        for before, after in ((one.old_logprobs, other.old_logprobs), (one.sampled_logprobs, other.sampled_logprobs)):
            assert (before is None) == (after is None)
            if before is not None and after is not None:
                assert before.tolist() == after.tolist()


def test_a_shared_context_is_sent_once() -> None:
    context = list(range(1000))
    samples = [TurnSample([*context, k], [5, 6], 0.0) for k in range(50)]
    assert sum(array.nbytes for array in packed(samples)) < 4 * (1000 + 50 * 4) + 50 * 24 + 100


def test_samples_with_and_without_old_logprobs_do_not_mix() -> None:
    with pytest.raises(ValueError, match="some samples have old log-probabilities and others do not"):
        packed([TurnSample([1], [2], 0.0, [-1.0]), TurnSample([1], [2], 0.0)])
