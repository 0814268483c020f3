"""Episodes as JSONL, one line each: what a person reads to see what happened.

A line is appended the moment an episode is over, so that no run that dies loses one. Once the credit of a step is known, its
file is replaced by one that has it: each turn's `credit` is null before, and stays null for episodes that are not trained on
(validations, failed episodes, lone members of a group).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctcgrpo.types import Episode, Turn, TurnCredit
from ctcgrpo.util.files import write_whole


def trace_record(episode: Episode, credit: Sequence[TurnCredit] | None = None) -> dict[str, Any]:
    """An episode as plain data; a failed one has `outcome` null and says why in `failure`. `credit`: of each of its turns, where it
    is trained on."""
    credits: Sequence[TurnCredit | None] = [None] * len(episode.turns) if credit is None else credit
    return {
        "step": episode.step,
        "task": episode.task,
        "tag": episode.tag,
        "group": episode.group,
        "rollout": episode.rollout,
        "version": episode.version,
        "outcome": episode.outcome if episode.failure is None else None,
        "failure": None if episode.failure is None else {"kind": episode.failure.kind, "message": episode.failure.message},
        "opening": episode.opening,
        "info": dict(episode.info),
        "turns": [_turn(turn, credit) for turn, credit in zip(episode.turns, credits, strict=True)],
        "seconds_policy": round(episode.seconds_policy, 4),
        "seconds_environment": round(episode.seconds_environment, 4),
    }


def _turn(turn: Turn, credit: TurnCredit | None) -> dict[str, Any]:
    return {
        "reasoning": turn.reasoning,
        "reply": turn.reply,
        "faults": list(turn.faults),
        "message": turn.message,
        "reward": turn.reward,
        "credit": None if credit is None else asdict(credit),
        "continuations": [None if c.failure else c.outcome for c in turn.continuations],
        "done": turn.done,
        "info": dict(turn.info),
        "prompt_tokens": len(turn.prompt_ids),
        "completion_tokens": len(turn.completion.token_ids),
        "finish_reason": turn.completion.finish_reason,
        "dropped_exchanges": turn.dropped_exchanges,
    }


def trace_file(traces: Path, name: str, process: int) -> Path:
    """Of what a process plays in a step or a validation."""
    return traces / f"{name}.rank-{process}.jsonl"


def step_name(step: int) -> str:
    return f"step-{step:06d}"


class TraceWriter:
    """Empties a file and adds a line for each episode."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("", encoding="utf-8")

    def __call__(self, episode: Episode) -> None:
        with self._file.open("a", encoding="utf-8") as out:
            out.write(_line(episode, None))


def add_credit(file: Path, episodes: Sequence[Episode], credit: Mapping[tuple[int, int], Sequence[TurnCredit]]) -> None:
    """Replace a step's file in one move by one with the credit of its episodes, by (group, rollout)."""
    write_whole(file, "".join(_line(e, credit.get((e.group, e.rollout))) for e in episodes))


def _line(episode: Episode, credit: Sequence[TurnCredit] | None) -> str:
    return json.dumps(trace_record(episode, credit), ensure_ascii=False) + "\n"
