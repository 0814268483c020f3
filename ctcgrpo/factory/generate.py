"""Writing a set: ask a model for each scenario, read, repair, ask again, and say what became of each. What was paid for is kept in
the store, so the same command after a kill asks for nothing twice; everything behind the answers is computed anew, and comes out
alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2

from ctcgrpo.environments.eibench.scenario_format import read_record
from ctcgrpo.environments.eibench.scenarios import read_records
from ctcgrpo.errors import OutputError, ScenarioError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.factory.asking import answer_once
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.factory.drafts import Written, read_draft, schema, shown
from ctcgrpo.factory.duplicates import duplicates, to_drop
from ctcgrpo.factory.sampling import Wanted, pools, wanted
from ctcgrpo.factory.storage import check_new, write_layout, writing
from ctcgrpo.llm_client.account import Account
from ctcgrpo.llm_client.endpoints import EndpointPool
from ctcgrpo.llm_client.store import Store, content_key
from ctcgrpo.simulator.llm.backend import ChatModel
from ctcgrpo.types import Message
from ctcgrpo.util.files import write_whole

Status = Literal["valid", "repaired", "rejected", "unanswered"]
REPORT = "report.json"
_LONGEST_BACK = 12_000
"""Characters of a faulty answer that its writer is shown again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `reasons` of a rejection (or of no answer); `repairs` of anchors, as FIELD: before -> after."""

    asked: Wanted
    status: Status
    record: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    attempts: int = 0

    def line(self) -> dict[str, Any]:
        return {
            "id": self.asked.id,
            "scene": self.asked.scene,
            "status": self.status,
            "reasons": self.reasons,
            "repairs": self.repairs,
            "attempts": self.attempts,
            "seed": self.asked.as_dict,
        }


def generate(
    config: FactoryConfig, *, count: int, held_out: Sequence[Mapping[str, Any]] = (), say: Callable[[str], None] = print
) -> tuple[list[Outcome], Mapping[str, Any]]:
    """An outcome for each of `count` requests, and what all answers in the store have cost. `held_out`: records that none may be
    like.

    Raises RecipeError for a key that is not set, ScenarioError for seeds or examples that cannot be had, BudgetSpent where the
    budget is spent: what was answered by then is kept.
    """
    examples = _examples(config)
    by_scene: dict[str, list[str]] = {}
    for name, (scene, _) in examples.items():
        by_scene.setdefault(scene, []).append(name)
    asked = wanted(
        pools(config.seeds or config.language),
        count=count,
        scenes=config.scenes,
        examples=by_scene,
        shots=config.shots,
        prefix=config.prefix,
        seed=config.seed,
    )
    store = Store(config.store)
    try:
        return asyncio.run(_all(config, asked, examples, store, held_out, say))
    finally:
        store.close()


def _examples(config: FactoryConfig) -> dict[str, tuple[str, str]]:
    """By id: scene, and how the example is shown. Raises ScenarioError for a scene that the set shows nothing of."""
    if config.examples is None or not config.shots:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for place, record in read_records(config.examples):
        scenario = read_record(record, place)
        if scenario.scene in config.scenes and scenario.language == config.language and (text := shown(record, scenario)):
            found[scenario.id] = scenario.scene, text
    lacking = [scene for scene in config.scenes if scene not in {scene for scene, _ in found.values()}]
    if lacking:
        raise ScenarioError(
            f"examples {config.examples!r} holds no scenario of {', '.join(lacking)} in {config.language!r} with a script to show; "
            "name another set, or ask without (shots: 0)"
        )
    return found


async def _all(
    config: FactoryConfig,
    asked: Sequence[Wanted],
    examples: Mapping[str, tuple[str, str]],
    store: Store,
    held_out: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> tuple[list[Outcome], Mapping[str, Any]]:
    pool = EndpointPool(config.writer, Account(config.budget, store), say=say)
    writer = _Writer(config, pool, store)
    room = asyncio.Semaphore(sum(endpoint.concurrency for endpoint in config.writer.endpoints))
    done = 0

    async def one(request: Wanted) -> Outcome:
        nonlocal done
        async with room:
            outcome = await writer.write(request, messages(config, request, [examples[k][1] for k in request.examples]))
        done += 1
        if done % max(1, len(asked) // 20) == 0:
            say(f"{done} of {len(asked)} are written")
        return outcome

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in asked]
    except BaseExceptionGroup as problems:
        raise problems.exceptions[0] from None
    finally:
        spent = pool.spent()
        await pool.close()
    return _without_duplicates([task.result() for task in tasks], held_out), spent


def messages(config: FactoryConfig, asked: Wanted, examples: Sequence[str]) -> list[Message]:
    """What a writer is asked for one scenario."""
    system, _, user = (
        _template(config.language).render(scene=asked.scene, seed=asked.seed, examples=examples).partition("\n====\n")
    )
    return [{"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}]


def _template(language: str) -> jinja2.Template:
    text = (files("ctcgrpo.factory") / "prompts" / f"{language}.j2").read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)


class _Writer:
    def __init__(self, config: FactoryConfig, llm: ChatModel, store: Store) -> None:
        self._config, self._llm, self._store = config, llm, store
        self._schema = schema()
        writer = config.writer
        self._identity = json.dumps(
            [sorted(e.model for e in writer.endpoints), writer.temperature, writer.top_p, writer.most_tokens]
        )

    async def write(self, asked: Wanted, first: list[Message]) -> Outcome:
        said = list(first)
        found = Written()
        for attempt in range(1, self._config.attempts + 1):
            try:
                text = await self._answer(asked, said, attempt)
            except SimulatorTransportError as error:
                return Outcome(asked, "unanswered", reasons=[str(error)], attempts=attempt - 1)
            except SimulatorReplyError as error:
                return Outcome(asked, "rejected", reasons=[str(error)], attempts=attempt)
            config = self._config
            found = read_draft(text, asked, language=config.language, licence=config.licence, source=config.source)
            if found.record is not None:
                repairs = [str(move) for move in found.moves]
                return Outcome(asked, "repaired" if repairs else "valid", found.record, repairs=repairs, attempts=attempt)
            said = [
                *first,
                {"role": "assistant", "content": text[:_LONGEST_BACK]},
                {"role": "user", "content": _correction(found)},
            ]
        return Outcome(asked, "rejected", reasons=found.faults, attempts=self._config.attempts)

    async def _answer(self, asked: Wanted, said: list[Message], attempt: int) -> str:
        key = content_key("factory", self._identity, json.dumps(said, ensure_ascii=False), asked.id, str(attempt))
        return await answer_once(
            self._llm,
            self._store,
            key,
            said,
            dialogue=asked.id,
            schema=self._schema,
            seconds=self._config.writer.deadline,
        )


def _correction(found: Written) -> str:
    faults = "\n".join(f"- {fault}" for fault in found.faults)
    return f"That cannot be used:\n{faults}\nAnswer with the whole JSON object again, mended, and with nothing else."


def _without_duplicates(outcomes: list[Outcome], held_out: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Of records that are alike the first stays; those like a held-out one go."""
    written = [k for k, outcome in enumerate(outcomes) if outcome.record is not None]
    told = list(outcomes)
    records = [outcomes[k].record or {} for k in written]
    leaks = duplicates(records, held_out) if held_out else []
    for place, reason in to_drop(records, duplicates(records), held_out, leaks).items():
        k = written[place]
        told[k] = Outcome(outcomes[k].asked, "rejected", None, [reason], outcomes[k].repairs, outcomes[k].attempts)
    return told


def check_target(folder: Path, config: FactoryConfig) -> None:
    """Before anything is paid for: raises OutputError for a folder that holds something else than what this configuration wrote."""
    if (folder / REPORT).is_file():
        before = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if before.get("config") != _digest(config):
            raise OutputError(f"{folder} holds a set that another configuration wrote; name another folder")
        ours = {REPORT, *before["files"]}
        if other := sorted(f.name for f in folder.iterdir() if f.name not in ours):
            raise OutputError(f"{folder} holds {other[0]}, which is not of this set; move it, or name another folder")
        return
    check_new(folder)


def _digest(config: FactoryConfig) -> str:
    """Of what decides the records: neither where answers are kept, nor who answers and at what cost."""
    told = config.model_dump_json(exclude={"store", "budget", "writer", "attempts"})
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def write_set(outcomes: Sequence[Outcome], folder: Path, config: FactoryConfig) -> list[Path]:
    """The records by scene, and the report: what became of each request. What the same configuration wrote there before goes."""
    check_target(folder, config)
    if (folder / REPORT).is_file():
        for name in json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]:
            (folder / name).unlink(missing_ok=True)
        (folder / REPORT).unlink()
    files = write_layout([outcome.record for outcome in outcomes if outcome.record is not None], folder)
    told = {
        "config": _digest(config),
        "files": [f.name for f in files],
        "requests": [outcome.line() for outcome in outcomes],
    }
    with writing(folder):
        write_whole(folder / REPORT, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    return files


def counted(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.status for outcome in outcomes)
