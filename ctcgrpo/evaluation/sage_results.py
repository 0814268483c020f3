"""Results of SAGE as it publishes them, to be rescored without asking anybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.environments.sage_protocol import measures
from ctcgrpo.errors import ScenarioError
from ctcgrpo.evaluation.results import Line, Result
from ctcgrpo.util.files import read_json_lines


def read_results(file: Path) -> list[Result]:
    """A file of results as SAGE publishes them, a dialogue a line. Raises ScenarioError naming line and field."""
    if not file.is_file():
        raise ScenarioError(f"{file} not found")
    results: list[Result] = []
    for place, record in read_json_lines(file, ScenarioError):
        emotion, history = record.get("emo_point"), record.get("history")
        for name in ("id", "character"):
            if not isinstance(record.get(name), str) or not record[name]:
                raise ScenarioError(f"{place}: {name} is {record.get(name)!r}; a result names it")
        if type(emotion) is not int or not 0 <= emotion <= 100:
            raise ScenarioError(f"{place}: emo_point is {emotion!r}; it is a whole number from 0 to 100")
        if not isinstance(history, list) or not all(isinstance(said, dict) and "role" in said for said in history):
            raise ScenarioError(f"{place}: history is no list of messages")
        lines = tuple(map(_line, history))
        points = [line.state["emotion"] for line in lines if line.state]
        if points and points[-1] != emotion:
            raise ScenarioError(f"{place}: emo_point is {emotion}, but its history ends at {points[-1]:g}")
        results.append(
            Result(
                scenario=record["id"],
                repeat=1 + sum(r.scenario == record["id"] for r in results),
                group=record["character"],
                score=float(emotion),
                measures=measures(emotion, len(points)),
                lines=lines,
            )
        )
    if not results:
        raise ScenarioError(f"{file} holds no results")
    return results


def _line(said: Mapping[str, Any]) -> Line:
    text = str(said.get("content", ""))
    if said["role"] == "assistant":
        return Line("model", text)
    point, planning = said.get("emotion-point"), said.get("planning")
    why = str(planning.get("analyse", "")) if isinstance(planning, dict) else ""
    return Line("user", text, {"emotion": point} if isinstance(point, int) else {}, why)
