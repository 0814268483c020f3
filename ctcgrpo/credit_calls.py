"""Looks up credits, centerings and scales by name, and calls them. Any may be custom, so results are checked."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ctcgrpo.errors import CreditError
from ctcgrpo.util.importing import blame, is_reference, load_object

Array = NDArray[np.float64]
_F = TypeVar("_F")


def choose(what: str, options: Mapping[str, _F], name: str) -> _F:
    """The function that `name` stands for; `what` is the option of CTCGRPOConfig, which errors begin with."""
    if not isinstance(name, str):
        raise ValueError(f"{what} = {name!r}; expected a name, 'my_module:my_function': settings are recorded as text")
    if is_reference(name):
        chosen: _F = load_object(name, what)
        return chosen
    if name not in options:
        raise ValueError(f"{what} = {name!r}; expected one of {', '.join(options)}, or my_module:my_function")
    return options[name]


def called(where: str, function: Callable[..., _F], *arguments: Any) -> _F:
    """The result of a possibly custom function. Raises CreditError for any exception."""
    try:
        return function(*arguments)
    except CreditError:
        raise
    except Exception as error:
        raise CreditError(f"{where} raised {blame(error)}") from error


def listed(where: str, values: Iterable[Any], length: int, of: str) -> list[Any]:
    try:
        found = list(values)
    except TypeError:
        raise CreditError(f"{where} returned a {type(values).__name__}; expected a sequence") from None
    if len(found) != length:
        raise CreditError(f"{where} returned {len(found)} values for {length} {of}; expected one each")
    return found


def numbers(where: str, values: Any, length: int, *, or_one: bool = False) -> Array:
    """`values` as finite numbers (length,), or as one number where that is allowed. Raises CreditError."""
    expected = f"{length} finite numbers, one per turn or rollout" + (", or one number" if or_one else "")
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise CreditError(f"{where} returned {type(values).__name__}; expected {expected}") from None
    if found.shape != (length,) and not (or_one and found.shape == ()):
        raise CreditError(f"{where} returned an array of shape {found.shape}; expected {expected}")
    if not np.isfinite(found).all():
        raise CreditError(f"{where} returned {found.tolist()}; expected {expected}")
    return found
