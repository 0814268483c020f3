"""Scores published result files of SAGE and EQ-Bench 3 again, without calling any model."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo import __version__
from ctcgrpo.environments.sage_protocol import measures
from ctcgrpo.errors import ScenarioError
from ctcgrpo.evaluation.eqbench3_protocol import DRAFTING, InvalidVerdict, Kind, checked_scores, task_score
from ctcgrpo.evaluation.results import Line, Result
from ctcgrpo.util.files import read_json_lines


def rescored(bench: str, file: Path, *, other: str | None, run: str | None) -> tuple[list[Result], dict[str, Any]]:
    """The results in a file, and the facts of their summary. `other` names the simulator or judge where the file does not, `run`
    one of several runs in it. Raises ScenarioError for what cannot be read."""
    if bench == "sage":
        results, model = read_sage(file), file.name.removesuffix(".jsonl").removesuffix("_result")
    else:
        results, model, other = read_judgements(file, run)
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


def read_sage(file: Path) -> list[Result]:
    """A file of SAGE's results, a dialogue a line. Raises ScenarioError naming line and field."""
    if not file.is_file():
        raise ScenarioError(f"{file} not found")
    results: list[Result] = []
    repeats = Counter[str]()
    for place, record in read_json_lines(file, ScenarioError):
        emotion, history = record.get("emo_point"), record.get("history")
        for name in ("id", "character"):
            if not isinstance(record.get(name), str) or not record[name]:
                raise ScenarioError(f"{place}: {name} = {record.get(name)!r}; expected a text")
        if type(emotion) is not int or not 0 <= emotion <= 100:
            raise ScenarioError(f"{place}: emo_point = {emotion!r}; expected a whole number from 0 to 100")
        if not isinstance(history, list) or not all(isinstance(message, dict) and "role" in message for message in history):
            raise ScenarioError(f"{place}: history: expected a list of messages")
        lines = tuple(map(_line, history))
        points = [line.state["emotion"] for line in lines if line.state]
        if points and points[-1] != emotion:
            raise ScenarioError(f"{place}: emo_point = {emotion}; expected {points[-1]:g}, the last of its history")
        id, found = record["id"], measures(emotion, len(points))
        repeats[id] += 1
        results.append(Result(id, repeats[id], record["character"], float(emotion), found, lines=lines))
    if not results:
        raise ScenarioError(f"{file} holds no results")
    return results


def _line(message: Mapping[str, Any]) -> Line:
    text = str(message.get("content", ""))
    if message["role"] == "assistant":
        return Line("model", text)
    point, planning = message.get("emotion-point"), message.get("planning")
    why = str(planning.get("analyse", "")) if isinstance(planning, dict) else ""
    return Line("user", text, {"emotion": point} if isinstance(point, int) else {}, why)


def read_judgements(file: Path, run: str | None = None) -> tuple[list[Result], str, str]:
    """A runs file of EQ-Bench 3: results of one run in it, its model and its judge. `run` is the run's key, or its model's name,
    where there are several. Judgements that lack a criterion are failed results. Raises ScenarioError for a file or a run that is
    not there."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"{file} not found") from None
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{file}: invalid JSON: {error}") from None
    entries = data.items() if isinstance(data, dict) else ()
    runs = {key: entry for key, entry in entries if isinstance(entry, dict) and "scenario_tasks" in entry}
    chosen = [entry for key, entry in runs.items() if run is None or run in (key, entry.get("model_name"))]
    if len(chosen) != 1:
        named = f"{len(chosen)} runs by that name" if run else f"{len(runs)} runs"
        problem = named if runs else "no runs with scenario_tasks"
        raise ScenarioError(f"{file} has {problem}; choose one with --run: {', '.join(runs) or 'none'}")
    [found] = chosen
    results = []
    for iteration, tasks in found["scenario_tasks"].items():
        if not str(iteration).isdigit() or not isinstance(tasks, dict):
            raise ScenarioError(f"{file}: scenario_tasks holds {iteration!r}; it maps iterations (numbers) to tasks by id")
        results += [_judged(str(id), int(iteration), task) for id, task in tasks.items()]
    judge = found.get("rubric_judge_model") or found.get("judge_model") or "not named"
    return results, found.get("model_name", "not named"), judge


def _judged(id: str, iteration: int, task: Mapping[str, Any]) -> Result:
    kind: Kind = "analysis" if not task.get("debrief_prompt") else "drafting" if id in DRAFTING else "role-play"
    lines = [Line("user" if m["role"] == "user" else "model", m["content"]) for m in task.get("conversation_history") or []]
    if debrief := task.get("debrief_response"):
        lines.append(Line("model", debrief))
    try:
        scores = checked_scores(task.get("rubric_scores") or {}, kind)
    except InvalidVerdict as error:
        return Result(id, iteration, kind, None, {}, ("judge", str(task.get("error") or error)), tuple(lines))
    return Result(id, iteration, kind, task_score(scores, kind), scores, lines=tuple(lines))
