"""The record that a sample of an evaluation writes during play, so that an error keeps the dialogue so far; its Inspect task; and
reading both from a log."""

import math
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Target, grouped, mean, scorer
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.util import StoreModel

from ctcgrpo import errors
from ctcgrpo.evaluation.benches import FAULTS
from ctcgrpo.evaluation.model_calls import ModelReply, tokens_in
from ctcgrpo.evaluation.results import Line, Result

_KINDS = {
    error.__name__: error.kind
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.CtcGrpoError)
}
_THROUGHPUT_OPTIONS = {
    "max_connections",
    "adaptive_connections",
    "max_retries",
    "timeout",
    "attempt_timeout",
    "stream_idle_timeout",
}
"""Options of sampling without effect on figures."""


class Record(StoreModel):
    """The record of a sample. `about`: who played the other role, with which prompts; `over`: whether it ended normally."""

    lines: list[dict[str, Any]] = []
    tokens: dict[str, list[int]] = {}
    faults: list[str] = []
    about: dict[str, Any] = {}
    over: bool = False

    # The store records assignments, not changes within a list.

    def add_reply(self, reply: ModelReply) -> None:
        self.lines = [*self.lines, {"speaker": "model", "text": reply.text}]
        present = {"empty": not reply.text, "cut": reply.cut, "empty_cut": reply.cut and not reply.text}
        self.faults = [*self.faults, *(name for name in FAULTS if present[name])]
        self.add_tokens("model", reply.tokens)

    def add_user_message(self, text: str, state: Mapping[str, float] | None = None, why: str = "") -> None:
        self.lines = [*self.lines, {"speaker": "user", "text": text, "state": dict(state or {}), "why": why}]

    def add_tokens(self, role: str, tokens: tuple[int, int]) -> None:
        input, output = self.tokens.get(role, [0, 0])
        self.tokens = {**self.tokens, role: [input + tokens[0], output + tokens[1]]}


def recorded_task(
    name: str,
    dataset: MemoryDataset,
    play: Callable[[TaskState, Record], Awaitable[None]],
    score: Callable[[TaskState, Record], Awaitable[Score]],
    *,
    measure: str,
    config: GenerateConfig,
    repeats: int,
) -> Task:
    """A task whose samples are played until they are over, and then scored; their mean is called `measure`."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        record = state.store_as(Record)
        await play(state, record)
        record.over = True
        return state

    async def scored(state: TaskState, target: Target) -> Score:
        record = state.store_as(Record)
        if not record.over:
            raise RuntimeError("the sample hit a limit before its end, so it has no score")
        return await score(state, record)

    return Task(
        name=name,
        dataset=dataset,
        # A solver's arguments go into the log; the scenarios must not.
        solver=solver(name="converse")(lambda: solve)(),
        scorer=scorer(metrics=[grouped(mean(), "group", all_label="all")], name=measure)(lambda: scored)(),
        config=config,
        epochs=Epochs(repeats, "mean"),
        fail_on_error=False,
    )


def newest_log(folder: Path, log_line: Callable[[str], None]) -> EvalLog | None:
    """The header of the last log in a folder that can be read; None where there is none. Unreadable logs are named."""
    # Names begin with the time to the second.
    for file in sorted(folder.glob("*.eval"), key=lambda file: (file.name[:19], file.stat().st_mtime_ns), reverse=True):
        try:
            return read_eval_log(str(file), header_only=True)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            log_line(f"{file} cannot be read ({error}); using the previous log")
    return None


def results_of(header: EvalLog) -> tuple[list[Result], dict[str, Any]]:
    """A result for every sample of a log, in the order of the data set, repeats together; and the facts that decide them. Their
    `prices` are by role, for a million tokens: of the simulator where its configuration says so."""
    log = read_eval_log(header.location)
    order = {name: k for k, name in enumerate(log.eval.dataset.sample_ids or [])}
    samples = sorted(log.samples or [], key=lambda sample: (order.get(sample.id, 0), sample.epoch))
    about = next((dict(record.about) for sample in samples if (record := sample.store_as(Record)).about), {})
    price = about.pop("price", None)
    return [result_of(sample) for sample in samples], {
        "model": log.eval.model,
        "roles": {role: getattr(found, "model", str(found)) for role, found in (log.eval.model_roles or {}).items()},
        "other": about,
        "task": dict(log.eval.task_args),
        "limit": log.eval.config.limit,
        "generation": log.plan.config.merge(log.eval.model_generate_config).model_dump(
            exclude_none=True, exclude=_THROUGHPUT_OPTIONS
        ),
        "versions": dict(log.eval.packages),
        "prices": {} if price is None else {"simulator": price},
        "began": log.eval.created,
        "log": Path(log.location).name,
        "used": _used(log),
    }


def _used(log: EvalLog) -> dict[str, tuple[int, int]]:
    """Tokens (input, output) of Inspect's calls by role, those of repeated dialogues too. Without the evaluated model where it
    also plays a role: Inspect counts by name."""
    used = {role: tokens_in(usage) for role, usage in log.stats.role_usage.items()}
    separate = log.eval.model not in {getattr(found, "model", None) for found in (log.eval.model_roles or {}).values()}
    usage = log.stats.model_usage.get(log.eval.model) if separate else None
    return used if usage is None else {**used, "model": tokens_in(usage)}


def result_of(sample: EvalSample) -> Result:
    """A sample of a log as a Result. Its group is in the sample's metadata, its measures in the score's."""
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
        tokens={role: (input, output) for role, (input, output) in record.tokens.items()},
    )


def failure_of(sample: EvalSample) -> tuple[str, str] | None:
    """Kind and message of a sample's failure; None for a scored sample."""
    if sample.limit is not None:
        return "limit", f"the sample hit its limit on {sample.limit.type}, so it has no score"
    if sample.error is not None:
        raised = (sample.error.traceback or sample.error.message).strip().splitlines()[-1]
        name, _, message = raised.partition(": ")
        kind = _KINDS.get(name.rpartition(".")[2])
        return ("model", raised) if kind is None else (kind, message)
    return None if sample.scores else ("unscored", "the sample has no score")
