"""From a log of Inspect to results, and to what decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log

from ctcgrpo.evaluation.record import Record, result_of
from ctcgrpo.evaluation.results import Result

_HOW_FAST = {"max_connections", "adaptive_connections", "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout"}
"""Options of sampling that decide no figure."""


def newest_log(folder: Path) -> EvalLog | None:
    """The header of the last log in a folder; None where there is none."""
    found = list_eval_logs(str(folder)) if folder.is_dir() else []
    return read_eval_log(max(found, key=lambda info: Path(info.name).name), header_only=True) if found else None


def results_of(header: EvalLog) -> tuple[list[Result], dict[str, Any]]:
    """A result for every sample, in the order of the data set, repeats together; and the facts that decide them."""
    log = read_eval_log(header.location)
    order = {name: k for k, name in enumerate(log.eval.dataset.sample_ids or [])}
    samples = sorted(log.samples or [], key=lambda sample: (order.get(sample.id, 0), sample.epoch))
    about = next((record.about for sample in samples if (record := sample.store_as(Record)).about), {})
    return [result_of(sample) for sample in samples], facts_of(log, about)


def facts_of(log: EvalLog, about: dict[str, Any]) -> dict[str, Any]:
    """`cost` are US dollars for what Inspect asked; None where it knows no price of a model."""
    costs = [usage.total_cost for usage in log.stats.model_usage.values()]
    return {
        "model": log.eval.model,
        "roles": {role: getattr(found, "model", str(found)) for role, found in (log.eval.model_roles or {}).items()},
        "other": about,
        "task": dict(log.eval.task_args),
        "limit": log.eval.config.limit,
        "generation": log.plan.config.merge(log.eval.model_generate_config).model_dump(exclude_none=True, exclude=_HOW_FAST),
        "versions": dict(log.eval.packages),
        "cost": sum(c for c in costs if c is not None) if costs and None not in costs else None,
        "began": log.eval.created,
        "log": Path(log.location).name,
    }
