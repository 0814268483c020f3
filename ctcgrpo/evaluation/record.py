"""What a sample of an evaluation writes down while it lasts, so that an error leaves what was said until then; and reading it
back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from inspect_ai.log import EvalSample
from inspect_ai.util import StoreModel

from ctcgrpo import errors
from ctcgrpo.evaluation.benches import FAULTS
from ctcgrpo.evaluation.results import Line, Result
from ctcgrpo.evaluation.speaking import Said

_KINDS = {
    error.__name__: error.kind
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.CtcGrpoError)
}


class Record(StoreModel):
    """`about` says who played the other role, and with which prompts; `over` that the sample came to its end."""

    lines: list[dict[str, Any]] = []
    tokens: dict[str, list[int]] = {}
    faults: list[str] = []
    about: dict[str, Any] = {}
    over: bool = False

    # Assigned anew each time: the store sees assignments, not changes within a list.

    def model_said(self, said: Said) -> None:
        self.lines = [*self.lines, {"speaker": "model", "text": said.text}]
        there = {"empty": not said.text, "cut": said.cut, "empty_cut": said.cut and not said.text}
        self.faults = [*self.faults, *(name for name in FAULTS if there[name])]
        self.spend("model", said.tokens)

    def user_said(self, text: str, state: Mapping[str, float] | None = None, why: str = "") -> None:
        self.lines = [*self.lines, {"speaker": "user", "text": text, "state": dict(state or {}), "why": why}]

    def spend(self, role: str, tokens: tuple[int, int]) -> None:
        read, written = self.tokens.get(role, [0, 0])
        self.tokens = {**self.tokens, role: [read + tokens[0], written + tokens[1]]}


def result_of(sample: EvalSample) -> Result:
    """A sample of a log as a Result. Its group stands in the sample's metadata, its measures in its score's."""
    record, failure = sample.store_as(Record), failure_of(sample)
    score = None if failure is not None else next(iter((sample.scores or {}).values()))
    value = None if score is None else score.as_float()
    assert value is None or math.isfinite(value)
    faults = {name: float(name in record.faults) for name in FAULTS}
    return Result(
        scenario=str(sample.id),
        repeat=sample.epoch,
        group=str(sample.metadata["group"]),
        score=value,
        measures={} if score is None else {name: float(x) for name, x in (score.metadata or {}).items()} | faults,
        failure=failure,
        lines=tuple(Line(**line) for line in record.lines),
        tokens={role: (read, written) for role, (read, written) in record.tokens.items()},
    )


def failure_of(sample: EvalSample) -> tuple[str, str] | None:
    """Kind and message of what kept a sample from being scored; None where it was."""
    if sample.limit is not None:
        return "limit", f"the sample ran into its limit on {sample.limit.type}: what it had come to is no result"
    if sample.error is not None:
        raised = (sample.error.traceback or sample.error.message).strip().splitlines()[-1]
        name, _, message = raised.partition(": ")
        kind = _KINDS.get(name.rpartition(".")[2])
        return ("model", raised) if kind is None else (kind, message)
    return None if sample.scores else ("unscored", "the sample has no score")
