"""Results that others played, scored anew: nothing is asked of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctcgrpo import __version__
from ctcgrpo.evaluation.eqbench3_protocol import read_judgements
from ctcgrpo.evaluation.results import Result
from ctcgrpo.evaluation.sage_results import read_results


def rescored(bench: str, file: Path, *, other: str | None, run: str | None) -> tuple[list[Result], dict[str, Any]]:
    """The results in a file, and the facts of their summary. `other` names the simulator or judge where the file does not, `run`
    one of several runs in it. Raises ScenarioError for what cannot be read."""
    if bench == "sage":
        results, model = read_results(file), file.name.removesuffix(".jsonl").removesuffix("_result")
    else:
        results, found = read_judgements(file, run)
        model, other = found["model"], found["judge"]
    return results, {
        "model": model,
        "roles": {},
        "other": {"models": [other or "not named in the file"]},
        "task": {"rescored": file.name},
        "limit": None,
        "generation": {},
        "versions": {"ctcgrpo": __version__},
        "data": None,
        "data_set": "rescored results",
        "prices": {},
    }
