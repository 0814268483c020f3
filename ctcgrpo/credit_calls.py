"""Credits, centerings and scales by name, and calling them: any of them may be a user's own, so its result is checked."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ctcgrpo.errors import CreditError
from ctcgrpo.util.importing import blame, is_reference, load_object

Array = NDArray[np.float64]
_F = TypeVar("_F")


def choose(what: str, options: Mapping[str, _F], name: str) -> _F:
    if not isinstance(name, str):
        raise ValueError(
            f"credit.{what}: {name!r}; expected its name as 'my_module:my_function', since a run records its settings as text"
        )
    if is_reference(name):
        chosen: _F = load_object(name, f"credit.{what}")
        return chosen
    if name not in options:
        raise ValueError(f"credit.{what}: {name!r} is unknown; available: {', '.join(options)}, or my_module:my_function")
    return options[name]


def called(where: str, function: Callable[..., _F], *arguments: Any) -> _F:
    """What a function gives that may be a user's own. Raises CreditError for whatever it raises."""
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
        raise CreditError(f"{where} gave a {type(values).__name__}; expected a sequence") from None
    if len(found) != length:
        raise CreditError(f"{where} gave {len(found)} values for {length} {of}; expected one for each")
    return found


def numbers(where: str, values: Any, length: int, *, or_one: bool = False) -> Array:
    """`values` as finite numbers (length,), or as one number where that is allowed. Raises CreditError."""
    expected = f"{length} finite numbers, one a turn or rollout" + (", or one number" if or_one else "")
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise CreditError(f"{where} gave {type(values).__name__}; expected {expected}") from None
    if found.shape != (length,) and not (or_one and found.shape == ()):
        raise CreditError(f"{where} gave an array of shape {found.shape}; expected {expected}")
    if not np.isfinite(found).all():
        raise CreditError(f"{where} gave {found.tolist()}; expected {expected}")
    return found
