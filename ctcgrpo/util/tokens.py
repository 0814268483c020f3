"""Sequences of token ids."""

from typing import Any

import numpy as np
import numpy.typing as npt


def common_prefix(a: npt.NDArray[np.integer[Any]], b: npt.NDArray[np.integer[Any]]) -> int:
    """How many tokens two sequences begin with together."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
