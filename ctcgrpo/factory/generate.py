"""Generates a set: requests each scenario from a model, parses and repairs the answer, retries, and reports the result of each
request. Answers are stored, so a re-run after a kill pays for none again; everything else is recomputed, with the same result."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2

from ctcgrpo.environments.eibench.scenario_format import read_record
from ctcgrpo.environments.eibench.scenarios import read_records
from ctcgrpo.errors import OutputError, ScenarioError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.factory.asking import Answers
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.factory.drafts import Written, read_draft, schema, shown
from ctcgrpo.factory.duplicates import duplicates, to_drop
from ctcgrpo.factory.sampling import Wanted, pools, wanted
from ctcgrpo.factory.storage import check_new, write_layout, writing
from ctcgrpo.llm_client.store import Store, content_key
from ctcgrpo.types import Message
from ctcgrpo.util.files import write_whole
from ctcgrpo.util.terminal import LogLine

Status = Literal["valid", "repaired", "rejected", "unanswered"]
REPORT = "report.json"
_LONGEST_BACK = 12_000  # characters of a faulty answer that are sent back with its faults


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one request. `reasons`: of a rejection, or of no answer. `repairs`: of anchors, as FIELD: before -> after."""

    asked: Wanted
    status: Status
    record: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    attempts: int = 0

    def line(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("status", "reasons", "repairs", "attempts")}
        return {"id": self.asked.id, "scene": self.asked.scene, **fields, "seed": self.asked.seed._asdict()}


def generate(
    config: FactoryConfig, *, count: int, held_out: Sequence[Mapping[str, Any]] = (), log_line: LogLine = print
) -> tuple[list[Outcome], Mapping[str, Any]]:
    """An outcome for each of `count` requests, and the cost of all stored answers. Near-duplicates of `held_out` are rejected.

    Raises RecipeError for an API key that is not set, ScenarioError for seeds or examples that cannot be read, and BudgetSpent when
    the budget is spent; answers received by then are stored."""
    examples = _examples(config)
    draws = config.model_dump(include={"scenes", "shots", "prefix", "seed"})
    asked = wanted(pools(config.seeds or config.language), count=count, examples=examples, **draws)
    with closing(Store(config.store)) as store:
        written, spent = asyncio.run(_all(config, store, asked, examples, log_line))
    return _without_duplicates(written, held_out), spent


def _examples(config: FactoryConfig) -> dict[str, dict[str, str]]:
    """Examples as drafts, by scene and id. Raises ScenarioError for a scene without an example."""
    if config.examples is None or not config.shots:
        return {}
    found: dict[str, dict[str, str]] = {scene: {} for scene in config.scenes}
    for place, record in read_records(config.examples):
        scenario = read_record(record, place)
        if scenario.scene in found and scenario.language == config.language and (text := shown(record, scenario)):
            found[scenario.scene][scenario.id] = text
    if lacking := [scene for scene, texts in found.items() if not texts]:
        which = f"{', '.join(lacking)} in {config.language!r} with a script to show"
        advice = "name another set, or ask without (shots: 0)"
        raise ScenarioError(f"examples {config.examples!r} holds no scenario of {which}; {advice}")
    return found


async def _all(
    config: FactoryConfig, store: Store, asked: Sequence[Wanted], examples: Mapping[str, Mapping[str, str]], log_line: LogLine
) -> tuple[list[Outcome], Mapping[str, Any]]:
    done = 0
    async with Answers(config, store, log_line) as answers:

        async def one(request: Wanted) -> Outcome:
            nonlocal done
            outcome = await _written(config, answers, request, [examples[request.scene][k] for k in request.examples])
            done += 1
            if done % max(1, len(asked) // 20) == 0:
                log_line(f"{done} of {len(asked)} requests ended")
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in asked]
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
        return [task.result() for task in tasks], answers.pool.spent()


def messages(config: FactoryConfig, asked: Wanted, examples: Sequence[str]) -> list[Message]:
    """The prompt for one scenario."""
    source = (files("ctcgrpo.factory") / "prompts" / f"{config.language}.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source)
    prompt = template.render(scene=asked.scene, seed=asked.seed, examples=examples)
    system, _, user = prompt.partition("\n====\n")
    return [{"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}]


async def _written(config: FactoryConfig, answers: Answers, asked: Wanted, examples: Sequence[str]) -> Outcome:
    first = messages(config, asked, examples)
    writer = config.writer
    models = sorted(endpoint.model for endpoint in writer.endpoints)
    identity = json.dumps([models, writer.temperature, writer.top_p, writer.most_tokens])
    conversation, found = first, Written()
    for attempt in range(1, config.attempts + 1):
        key = content_key("factory", identity, json.dumps(conversation, ensure_ascii=False), asked.id, str(attempt))
        try:
            text = await answers.ask(key, conversation, dialogue=asked.id, schema=schema())
        except SimulatorTransportError as error:
            return Outcome(asked, "unanswered", reasons=[str(error)], attempts=attempt - 1)
        except SimulatorReplyError as error:
            return Outcome(asked, "rejected", reasons=[str(error)], attempts=attempt)
        found = read_draft(text, asked, language=config.language, licence=config.licence, source=config.source)
        if found.record is not None:
            repairs = [str(move) for move in found.moves]
            return Outcome(asked, "repaired" if repairs else "valid", found.record, repairs=repairs, attempts=attempt)
        faults = "\n".join(f"- {fault}" for fault in found.faults)
        again = f"That cannot be used:\n{faults}\nAnswer with the whole JSON object again, mended, and with nothing else."
        before: Message = {"role": "assistant", "content": text[:_LONGEST_BACK]}
        conversation = [*first, before, {"role": "user", "content": again}]
    return Outcome(asked, "rejected", reasons=found.faults, attempts=config.attempts)


def _without_duplicates(outcomes: Sequence[Outcome], held_out: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Reject near-duplicates, except the first of each, and near-duplicates of held-out records."""
    results = list(outcomes)
    written = [(k, outcome.record) for k, outcome in enumerate(outcomes) if outcome.record is not None]
    records = [record for _, record in written]
    leaks = duplicates(records, held_out) if held_out else []
    for place, reason in to_drop(records, duplicates(records), held_out, leaks).items():
        k = written[place][0]
        results[k] = replace(results[k], status="rejected", record=None, reasons=[reason])
    return results


def check_target(folder: Path, config: FactoryConfig) -> list[Path]:
    """The files that this configuration wrote to a folder before. Raises OutputError for a folder with anything else in it."""
    report = folder / REPORT
    if not report.is_file():
        check_new(folder)
        return []
    before = json.loads(report.read_text(encoding="utf-8"))
    if before.get("config") != _digest(config):
        raise OutputError(f"{folder} contains a set of another configuration; choose another folder")
    ours = [*before["files"], REPORT]
    if other := sorted(f.name for f in folder.iterdir() if f.name not in ours):
        raise OutputError(f"{folder} contains {other[0]}, which is not of this set; move it, or choose another folder")
    return [folder / name for name in ours]


def _digest(config: FactoryConfig) -> str:
    """A digest of the fields that determine the records: not of the store, the budget or the writer."""
    settings = config.model_dump_json(exclude={"store", "budget", "writer", "attempts"})
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def write_set(outcomes: Sequence[Outcome], folder: Path, config: FactoryConfig) -> list[Path]:
    """Write the records, a file for each scene, and the report on each request. Replaces an earlier set of this configuration."""
    for file in check_target(folder, config):
        file.unlink(missing_ok=True)
    files = write_layout([outcome.record for outcome in outcomes if outcome.record is not None], folder)
    requests = [outcome.line() for outcome in outcomes]
    report = {"config": _digest(config), "files": [file.name for file in files], "requests": requests}
    with writing(folder):
        write_whole(folder / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    return files
