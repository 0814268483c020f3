"""Episodes as JSONL, one line each, written the moment an episode is over: what a person reads to see what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctcgrpo.types import Episode, Turn


def trace_record(episode: Episode) -> dict[str, Any]:
    """An episode as plain data; a failed one has `outcome` null and says why in `failure`."""
    return {
        "step": episode.step,
        "task": episode.task,
        "tag": episode.tag,
        "group": episode.group,
        "rollout": episode.rollout,
        "outcome": episode.outcome if episode.failure is None else None,
        "failure": None if episode.failure is None else {"kind": episode.failure.kind, "message": episode.failure.message},
        "opening": episode.opening,
        "info": dict(episode.info),
        "turns": [_turn(turn) for turn in episode.turns],
        "seconds_policy": round(episode.seconds_policy, 4),
        "seconds_environment": round(episode.seconds_environment, 4),
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "reasoning": turn.reasoning,
        "reply": turn.reply,
        "faults": list(turn.faults),
        "message": turn.message,
        "reward": turn.reward,
        "done": turn.done,
        "info": dict(turn.info),
        "prompt_tokens": len(turn.prompt_ids),
        "completion_tokens": len(turn.completion.token_ids),
        "finish_reason": turn.completion.finish_reason,
        "dropped_exchanges": turn.dropped_exchanges,
    }


class TraceWriter:
    """Starts a file anew and adds a line for each episode."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("", encoding="utf-8")

    def __call__(self, episode: Episode) -> None:
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(trace_record(episode), ensure_ascii=False) + "\n")
