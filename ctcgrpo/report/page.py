"""Writes a run as one HTML page that needs no network: figures computed here, and compressed episodes.

Text of models, users and datasets is embedded as data, and shown as text, never as markup.
"""

import base64
import gzip
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ctcgrpo import __version__
from ctcgrpo.audit.record import OfCredit
from ctcgrpo.audit.table import by_gain, caption, shown
from ctcgrpo.environments.eibench.records import in_order
from ctcgrpo.report.parts import BINS, Part, Spread, Trace, credit_of, joined, mean_path
from ctcgrpo.report.reading import Run
from ctcgrpo.run.recipe import OwnEnvironment
from ctcgrpo.run.scores import Validation, alarm_texts, alarms, gap, improvement, other_scores
from ctcgrpo.simulator.choice import who_played
from ctcgrpo.types import NO_TAG
from ctcgrpo.util.files import write_whole
from ctcgrpo.util.intervals import interval

MOST_BYTES = 20_000_000  # of compressed episodes; beyond it whole groups are left out, evenly over the steps
_PHASES = 3  # parts of training, whose states and credit are compared
_OF_EPISODE = ("kind", "step", "task", "tag", "rollout", "outcome")  # the page knows their order
_OF_TURN = ("reasoning", "reply", "message", "reward", "info", "faults", "completion_tokens")
_TIMES = ("seconds/rollout", "seconds/update")
_WORDS = {"task": "scenario", "tag": "scene", "range": ", in −1 to +1"}
"""The page's words for tasks and tags, and the range of scores."""
_WORDS_OF_TASKS = {"task": "task", "tag": "tag", "range": ""}


def write_report(run: Run, file: Path, trials: Sequence[Mapping[str, Any]] = ()) -> dict[str, int]:
    """Write the page; gives the number of episodes shown, of all episodes, and its size in bytes."""
    kept = _within(run.episodes, MOST_BYTES)
    packed = _packed([lean(e) for e in kept])
    figures = {**figures_of(run), "shown": len(kept), "of": len(run.episodes), "trials": list(trials)}
    write_whole(file, _render(run.name, figures["words"], figures=_packed(figures), episodes=packed))
    return {"shown": len(kept), "of": len(run.episodes), "bytes": file.stat().st_size}


def live_page(name: str, run: Run | None, nonce: str) -> str:
    """The page that asks for a run's figures and dialogues again and again. Its script and style have the `nonce`. `run` is None
    before there is one."""
    return _render(name, _WORDS if run is None else words_of(run), live=True, nonce=nonce)


def words_of(run: Run) -> dict[str, str]:
    """The page's words for tasks and tags."""
    return _WORDS if run.recipe.environment is None else _WORDS_OF_TASKS


def _render(name: str, words: Mapping[str, str], **parts: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctcgrpo.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    facts = {"live": False, "nonce": "", "version": __version__, **parts}
    return environment.get_template("page.html.j2").render(name=name, words=words, **facts)


def figures_of(run: Run) -> dict[str, Any]:
    """The data of the charts."""
    trained = [part for part in run.parts if part.kind == "step"]
    tags = in_order({tag for part in run.parts for tag in part.tags} - {NO_TAG})
    return {
        "name": run.name,
        "finished": run.finished,
        "steps": max((part.step for part in trained), default=0),
        "max_steps": run.recipe.training.max_steps,
        "problems": list(run.problems),
        "facts": _facts(run),
        "words": words_of(run),
        "tags": tags,
        "headline": _headline(run.validations),
        "credit_options": run.recipe.credit.model_dump(mode="json"),
        "validations": [_validation(validation) for validation in run.validations],
        "warnings": [f"Warning, {text}." for text in alarm_texts(alarms(run.validations))],
        "training": [
            {"step": m["step"], "overall": m.get(f"outcome/{NO_TAG}"), **{tag: m.get(f"outcome/{tag}") for tag in tags}}
            for m in run.metrics
        ],
        "times": [{"step": m["step"], **{name: m.get(name) for name in _TIMES}} for m in run.metrics],
        "failures": _failures(run.metrics),
        "states": [_states(phase) for phase in _phases(trained)],
        "credit": _credit(trained),
        "audits": [
            {
                "caption": caption(a),
                "rows": [[name, *_of_credit(of)] for name, of in by_gain(a)],
                "baseline": a.baseline,
                "tags": [[tag, str(of.groups), shown(of.correlation)] for tag, of in a.tags.items()],
            }
            for a in run.audits
        ],
    }


def _of_credit(of: OfCredit) -> list[str]:
    return [shown(of.gain), shown(of.cosine), shown(of.noise, ".0f", "unbounded")]


def _facts(run: Run) -> dict[str, str]:
    """The run's main settings, by name, in words: model, user, data, recipe, date."""
    recipe, lora, own = run.recipe, run.recipe.policy.lora, run.recipe.environment
    other = (run.simulator or {}).get("validation")
    repeat = shlex.join(["ctcgrpo", "train", str(run.path / "recipe.yaml"), f"run.name={recipe.run.name}-again"])
    return {
        "model": recipe.policy.model + (f", LoRA of rank {lora.rank}" if lora else ", all weights"),
        **({"simulated user": who_played(run.simulator)} if own is None else {"environment": _named(own)}),
        **({"other user": who_played(other)} if isinstance(other, Mapping) else {}),
        "trained on": recipe.eibench_scenarios().train if own is None else own.tasks,
        "validated on": "nothing" if recipe.validation is None else recipe.validation_source(),
        "recipe": f"{recipe.run.name}, seed {recipe.run.seed}",
        "date": f"{run.written:%Y-%m-%d %H:%M} UTC" if run.written else "unknown",
        "command to repeat it": repeat,
    }


def _named(own: OwnEnvironment) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in own.options.items())
    return f"{own.factory}({options})" if options else own.factory


def _headline(validations: Sequence[Validation]) -> dict[str, Any] | None:
    """The first and the last held-out score, and the paired improvement between them; None before there are two."""
    if len(validations) < 2 or not (validations[0].by_scenario and validations[-1].by_scenario):
        return None
    before, after = validations[0], validations[-1]
    ends = {name: {"step": v.step, "score": v.overall} for name, v in (("before", before), ("after", after))}
    unlike = other_scores(validations)
    found = {**ends, "improvement": improvement(before, after).model_dump()}
    return found if unlike is None else {**found, "other": unlike.model_dump()}


def _validation(validation: Validation) -> dict[str, Any]:
    scores = {"overall": list(validation.by_scenario.values()), **validation.by_scene}
    found = {
        name: {"mean": sum(values) / len(values), "ci95": list(_interval(tuple(values))), "n": len(values)}
        for name, values in scores.items()
        if values and name != NO_TAG
    }
    made = {"step": validation.step, "failed": validation.failed, "scores": found}
    if validation.other is None or not validation.other.by_scenario:
        return made
    unlike = _validation(validation.other)["scores"]["overall"]
    return {**made, "other": unlike, "gap": gap(validation).model_dump()}


@lru_cache(maxsize=4096)
def _interval(values: tuple[float, ...]) -> tuple[float, float]:
    """A live report shows the same validations again and again."""
    return interval(values)


def _phases(trained: Sequence[Part]) -> list[list[Part]]:
    steps = sorted({part.step for part in trained})
    phases = np.array_split(np.array(steps, dtype=int), min(_PHASES, len(steps)) or 1)
    return [[part for part in trained if phase[0] <= part.step <= phase[-1]] for phase in phases if len(phase)]


def _states(phase: Sequence[Part]) -> dict[str, Any]:
    """The means of the numbers in `info` at the start and after each turn, by tag and name."""
    found: dict[str, Any] = {"from": min(p.step for p in phase), "to": max(p.step for p in phase), "tags": {}}
    for tag in sorted({tag for part in phase for tag in part.tags}):
        names = dict.fromkeys(name for part in phase for name in part.states.get(tag, ()))
        if names:
            found["tags"][tag] = {
                name: mean_path([part.states[tag][name] for part in phase if name in part.states.get(tag, ())]) for name in names
            }
    return found


def _credit(trained: Sequence[Part]) -> dict[str, Any]:
    """Histograms of the turns' advantages, by turn and by scene; values beyond the ends count in the outermost bins."""

    def counts(spreads: Sequence[Spread]) -> dict[str, Any]:
        spread = joined(spreads)
        return {"counts": spread.counts, "mean": spread.mean, "std": spread.std}

    turns = sorted({turn for part in trained for turn in part.by_turn})
    scenes = sorted({tag for part in trained for tag in part.by_scene})
    return {
        "bins": BINS.tolist(),
        "turns": {str(turn): counts([part.by_turn[turn] for part in trained if turn in part.by_turn]) for turn in turns},
        "scenes": {tag: counts([part.by_scene[tag] for part in trained if tag in part.by_scene]) for tag in scenes},
    }


def _failures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = Counter[str]()
    for m in metrics:
        found.update({name.removeprefix("failed/"): n for name, n in m.items() if name.startswith("failed/") and n})
    return dict(found)


def lean(e: Trace) -> list[Any]:
    """An episode as a list of values without names, to save space."""
    turns = [[t[name] for name in _OF_TURN] for t in e["turns"]]
    credit = credit_of(e)
    terms = None if credit is None else [[round(c[name], 6) for name in ("advantage", "outcome", "turn")] for c in credit]
    failure = None if e["failure"] is None else f"{e['failure']['kind']}: {e['failure']['message']}"
    return [*(e[name] for name in _OF_EPISODE), failure, e["opening"], e["info"], turns, terms]


def _within(episodes: Sequence[Trace], most: int) -> list[Trace]:
    """All episodes, or whole groups evenly over the steps, within `most` bytes after compression."""
    size = len(_packed([lean(e) for e in episodes]))
    if size <= most:
        return list(episodes)
    groups = list(dict.fromkeys((e["kind"], e["step"], e["group"]) for e in episodes))
    keep = max(1, int(len(groups) * most / size * 0.95))
    chosen = {groups[int(k)] for k in np.linspace(0, len(groups) - 1, keep)}
    return [e for e in episodes if (e["kind"], e["step"], e["group"]) in chosen]


def _packed(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()
