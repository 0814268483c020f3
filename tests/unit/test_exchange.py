"""Turn samples as arrays come back as they were, whatever they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcgrpo.training.exchange import packed, unpacked
from ctcgrpo.types import TurnSample

few = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@given(st.lists(st.tuples(few, few, st.floats(-3, 3)), max_size=8), st.booleans())
@settings(deadline=None)
def test_every_sample_comes_back_in_its_place(parts: list[tuple[list[int], list[int], float]], with_old: bool) -> None:
    samples = [TurnSample(p, c, a, [-float(k)] * len(c) if with_old else None) for k, (p, c, a) in enumerate(parts)]
    back = unpacked(packed(samples))
    assert len(back) == len(samples)
    for one, other in zip(samples, back, strict=True):
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist() and other.prompt_ids.dtype == np.int32
        assert one.completion_ids.tolist() == other.completion_ids.tolist()
        assert one.advantage == other.advantage
        assert (one.old_logprobs is None) == (other.old_logprobs is None)
        if one.old_logprobs is not None and other.old_logprobs is not None:
            assert one.old_logprobs.tolist() == other.old_logprobs.tolist()


def test_a_shared_context_is_sent_once() -> None:
    context = list(range(1000))
    samples = [TurnSample([*context, k], [5, 6], 0.0) for k in range(50)]
    assert sum(array.nbytes for array in packed(samples)) < 4 * (1000 + 50 * 4) + 50 * 24 + 100


def test_samples_with_and_without_old_logprobs_do_not_mix() -> None:
    with pytest.raises(ValueError, match="either all samples"):
        packed([TurnSample([1], [2], 0.0, [-1.0]), TurnSample([1], [2], 0.0)])
