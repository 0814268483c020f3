"""Safe loading of torch.save files: a pickle can call any function, and a run folder may come from somebody else.

transformers loads with `weights_only=True`. DeepSpeed does not. Within `weights_only` every torch.load does.
"""

import contextlib
import os
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState

from ctcgrpo.errors import CtcGrpoError, OutputError
from ctcgrpo.util.files import read_object

_RESTORING = ("load_state_dict", "_load_rng_state")
"""Functions that restore the state that torch.load read. They raise many types of errors for damaged files."""
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load heeds it before its own argument


@contextlib.contextmanager
def weights_only(checkpoint: Path) -> Iterator[None]:
    """Within this context torch.load restores only tensors, plain values and, for a DeepSpeed checkpoint, three classes of ZeRO.
    Raises OutputError for a damaged file, and for one that names anything else, without running any of it."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_zero_classes(checkpoint)):
            yield
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = [*lines, str(error)[:200]][0]
        raise OutputError(
            f"{checkpoint}: a file contains more than weights and numbers ({reason.strip()}) and was not loaded; remove "
            "the folder to use an older checkpoint"
        ) from None
    except CtcGrpoError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or not (isinstance(error, SafetensorError) or _while_reading(error)):
            raise
        reason = f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
        damaged = f"{checkpoint}: a file is damaged ({reason})"
        raise OutputError(f"{damaged}; remove the folder to use an older checkpoint") from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _while_reading(error: Exception) -> bool:
    """Whether it comes from torch.load or from what puts its result in place, and not from the rest of a trainer's start."""
    return any(
        frame.f_globals.get("__name__") == "torch.serialization" or frame.f_code.co_name in _RESTORING
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def refuse_damaged_state(checkpoint: Path) -> None:
    """Raises OutputError for a checkpoint whose JSON files are not as transformers wrote them."""
    try:
        for name in ("config.json", "adapter_config.json"):
            if (file := checkpoint / name).exists():
                read_object(file)
        file = checkpoint / "trainer_state.json"
        steps = TrainerState.load_from_json(str(file)).global_step
        if type(steps) is not int or steps < 0:
            raise OutputError(f"{file}: global_step = {steps!r}; expected a number of steps")
    except OutputError as error:
        raise OutputError(f"{error}; remove {checkpoint} to use an older checkpoint") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{file}: cannot be read ({str(error)[:200]})"
        raise OutputError(f"{reason}; remove {checkpoint} to use an older checkpoint") from None


def _zero_classes(checkpoint: Path) -> list[Any]:
    if not any(checkpoint.glob("global_step*")):
        return []
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
