"""What a live report shows of a run on top: progress, scores by scene, failures. Pure functions of its records."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from ctcgrpo.environments.eibench.records import in_order
from ctcgrpo.report.live import Live
from ctcgrpo.report.reading import Run
from ctcgrpo.run.scores import Validation
from ctcgrpo.types import NO_TAG

RECENT = 10  # steps
_SECONDS = ("seconds/recompute", "seconds/audit", "seconds/update")  # the parts of a step besides rollouts

Metrics = Sequence[Mapping[str, Any]]


def live_figures(live: Live) -> dict[str, Any]:
    """As JSON; the names are those that live.js reads."""
    run = live.run
    seconds = step_seconds(run.metrics)
    return {
        "phase": phase(run),
        "finished": run.finished,
        "written": run.written.timestamp() if run.written else 0.0,
        "seconds": seconds,
        "progress": _progress(run, seconds),
        "scores": _scores(run),
        "failures": {"rows": failures(run.metrics), "newest": list(live.failed)},
        "latest": live.latest,
    }


def phase(run: Run) -> str:
    """What the run does now, as far as its files tell."""
    done, of = steps_done(run.metrics), run.recipe.training.max_steps
    if run.finished:
        return f"{done} of {of} steps"
    parts = {(part.kind, part.step): part for part in run.parts}
    validated = {v.step: v for v in run.validations}
    validation = parts.get(("validation", done))
    if validation is not None and done not in validated:  # with overlap the next step's episodes are there already
        return f"Validation after step {done}: playing, {validation.episodes}{_expected(run.validations)} episodes"
    playing = parts.get(("step", done + 1))
    if playing is not None:
        episodes = run.recipe.tasks_per_step * run.recipe.rollout.group_size
        if playing.episodes < episodes:
            return f"Step {done + 1}: playing, {playing.episodes} of {episodes} episodes"
        return f"Step {done + 1}: {episodes} episodes played; updating the policy"
    if done == of:
        return f"Step {done} is done; saving the policy"
    return f"Step {done + 1}: no episode yet" if done or run.validations else "No episode yet"


def steps_done(metrics: Metrics) -> int:
    return max((m["step"] for m in metrics), default=0)


def step_seconds(metrics: Metrics) -> float | None:
    """Seconds of a step without validation and saving: the median of the last ones; None before the first."""
    found = [_rollout_seconds(m) + sum(m.get(name) or 0.0 for name in _SECONDS) for m in metrics[-RECENT:]]
    return median(found) if found else None


def _rollout_seconds(m: Mapping[str, Any]) -> float:
    """Where rollouts and updates overlap, those that the trainer waited."""
    return float(m.get("overlap/trainer_waited", m.get("seconds/rollout")) or 0.0)


def failures(metrics: Metrics) -> list[tuple[str, int, int]]:
    """By kind: failed episodes in the last 10 steps and in all, the most frequent first."""

    def count(of: Metrics) -> dict[str, int]:
        found: dict[str, int] = {}
        for m in of:
            for name, n in m.items():
                if name.startswith("failed/") and n:
                    kind = name.removeprefix("failed/")
                    found[kind] = found.get(kind, 0) + int(n)
        return found

    recent, every = count(metrics[-RECENT:]), count(metrics)
    return [(kind, recent.get(kind, 0), n) for kind, n in sorted(every.items(), key=lambda pair: (-pair[1], pair[0]))]


def _expected(validations: Sequence[Validation]) -> str:
    """All validations play the same number of episodes; the first one's is not recorded before it ends."""
    if not validations:
        return ""
    last = validations[-1]
    return f" of {sum(map(len, last.outcomes.values())) + last.failed}"


def _progress(run: Run, seconds: float | None) -> dict[str, Any]:
    done, of = steps_done(run.metrics), run.recipe.training.max_steps
    last = run.validations[-1] if run.validations else None
    return {
        "done": done,
        "max_steps": of,
        "seconds": seconds,
        "left": None if seconds is None or run.finished else seconds * max(0, of - done),
        "score": last.overall if last is not None and last.by_scenario else None,
        "score_note": "not validated yet" if last is None else f"after step {last.step}",
    }


def _scores(run: Run) -> dict[str, Any]:
    """Rows (name, held out first and now, in training first and now), overall and by tag; None where nothing was measured."""
    tags = in_order({tag for part in run.parts for tag in part.tags} - {NO_TAG})
    first, last = run.metrics[:RECENT], run.metrics[-RECENT:]
    ends = (run.validations[0], run.validations[-1]) if run.validations else ()
    rows = [["overall", *_held_out(ends, None), *(_mean(of, NO_TAG) for of in (first, last))]]
    rows += [[tag, *_held_out(ends, tag), *(_mean(of, tag) for of in (first, last))] for tag in tags]
    steps = [f"after step {v.step}" for v in ends]
    held = f"Held out: {' and '.join(dict.fromkeys(steps))}. " if steps else ""
    n = len(first)
    return {"rows": rows, "note": f"{held}Training: mean outcome of the first and of the last {n} steps." if n else held}


def _held_out(ends: Sequence[Validation], tag: str | None) -> list[float | None]:
    found: list[float | None] = []
    for v in ends:
        values = list(v.by_scenario.values()) if tag is None else v.by_scene.get(tag, [])
        found.append(fmean(values) if values else None)
    return found or [None, None]


def _mean(metrics: Metrics, tag: str) -> float | None:
    found = [value for m in metrics if (value := m.get(f"outcome/{tag}")) is not None]
    return fmean(found) if found else None
