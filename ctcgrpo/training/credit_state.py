"""Saves the credit of a run in a checkpoint: its options, and the state of its centering."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctcgrpo.centering import Centering
from ctcgrpo.credit_calls import called
from ctcgrpo.errors import CreditError, OutputError
from ctcgrpo.options import CreditOptions
from ctcgrpo.util.files import read_object
from ctcgrpo.util.naming import differences

CREDIT_STATE = "credit_state.json"


def state_text(options: CreditOptions, centering: Centering) -> str:
    """Options and state (null without one) as JSON. Raises CreditError for a state that JSON cannot hold."""
    state = called(centering.where, centering.state_dict)
    try:
        return json.dumps({"options": _values(options), "state": state}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        what = f"{centering.where}: state_dict is not JSON-serializable ({error})"
        raise CreditError(f"{what}; expected numbers, texts, lists and dicts") from None


def load_state(options: CreditOptions, centering: Centering, checkpoint: Path) -> None:
    """Load the state of a centering, if it has one, from a checkpoint. Raises OutputError for a checkpoint of other options, and
    for a missing or damaged file."""
    file = checkpoint / CREDIT_STATE
    try:
        saved = read_object(file)
        if not isinstance(saved.get("options"), dict):
            raise OutputError(f"{file}: expected the options of the credit and the state of its centering")
        if not (changed := differences(saved["options"], _values(options))):
            if called(centering.where, centering.state_dict) is not None:
                called(centering.where, centering.load_state_dict, saved.get("state"))
            return
    except (OutputError, CreditError) as error:
        where = "" if isinstance(error, OutputError) else f"{file} cannot be used: "
        raise OutputError(f"{where}{error}; remove {checkpoint} to resume from an older checkpoint") from None
    raise OutputError(
        f"{checkpoint} was saved with another credit ({'; '.join(changed)}); undo the change to resume, or start another run in "
        "another folder"
    )


def _values(options: CreditOptions) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(CreditOptions)}
