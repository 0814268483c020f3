"""From a log of Inspect to results, and to what decides them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, read_eval_log

from ctcgrpo.evaluation.record import Record, result_of
from ctcgrpo.evaluation.results import Result

_HOW_FAST = {"max_connections", "adaptive_connections", "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout"}
"""Options of sampling that decide no figure."""


def newest_log(folder: Path, say: Callable[[str], None]) -> EvalLog | None:
    """The header of the last log in a folder that can be read; None where there is none. `say` hears of those that cannot."""
    found = sorted(folder.glob("*.eval"), key=lambda file: file.name) if folder.is_dir() else []
    for file in reversed(found):
        try:
            return read_eval_log(str(file), header_only=True)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            say(f"{file} cannot be read ({error}); the one before it is taken")
    return None


def results_of(header: EvalLog) -> tuple[list[Result], dict[str, Any]]:
    """A result for every sample, in the order of the data set, repeats together; and the facts that decide them."""
    log = read_eval_log(header.location)
    order = {name: k for k, name in enumerate(log.eval.dataset.sample_ids or [])}
    samples = sorted(log.samples or [], key=lambda sample: (order.get(sample.id, 0), sample.epoch))
    about = next((dict(record.about) for sample in samples if (record := sample.store_as(Record)).about), {})
    return [result_of(sample) for sample in samples], facts_of(log, about)


def facts_of(log: EvalLog, about: dict[str, Any]) -> dict[str, Any]:
    """`prices` by role, for a million tokens: of the simulator where its configuration says so."""
    price = about.pop("price", None)
    return {
        "model": log.eval.model,
        "roles": {role: getattr(found, "model", str(found)) for role, found in (log.eval.model_roles or {}).items()},
        "other": about,
        "task": dict(log.eval.task_args),
        "limit": log.eval.config.limit,
        "generation": log.plan.config.merge(log.eval.model_generate_config).model_dump(exclude_none=True, exclude=_HOW_FAST),
        "versions": dict(log.eval.packages),
        "prices": {} if price is None else {"simulator": price},
        "began": log.eval.created,
        "log": Path(log.location).name,
    }
