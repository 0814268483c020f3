"""Saves and loads the state of a centering in a checkpoint."""

import json
from pathlib import Path

from ctcgrpo.centering import Centering
from ctcgrpo.credit_calls import called
from ctcgrpo.errors import CreditError, OutputError
from ctcgrpo.util.files import read_object

CREDIT_STATE = "credit_state.json"


def state_text(centering: Centering) -> str | None:
    """The state of a centering as JSON; None for one without a state. Raises CreditError for a state that JSON cannot hold."""
    state = called(centering.where, centering.state_dict)
    try:
        return None if state is None else json.dumps(state, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        what = f"{centering.where}: state_dict is not JSON-serializable ({error})"
        raise CreditError(f"{what}; expected numbers, texts, lists and dicts") from None


def load_state(centering: Centering, checkpoint: Path) -> None:
    """Load the state of a centering, if it has one, from a checkpoint. Raises OutputError for a missing or damaged file."""
    if called(centering.where, centering.state_dict) is None:
        return
    file = checkpoint / CREDIT_STATE
    if not file.exists():
        raise OutputError(
            f"{checkpoint} holds no {CREDIT_STATE}: it was saved with a centering that has no state; set {centering.where} back to "
            "resume, or start in another folder"
        )
    try:
        called(centering.where, centering.load_state_dict, read_object(file))
    except (OutputError, CreditError) as error:
        where = "" if isinstance(error, OutputError) else f"{file} cannot be used: "
        raise OutputError(f"{where}{error}; remove {checkpoint} to resume from an older checkpoint") from None
