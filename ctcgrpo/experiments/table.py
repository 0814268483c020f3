"""The table of a sweep: one row per trial, over its seeds, with intervals, from the best to the worst."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from rich.text import Text

from ctcgrpo.errors import OutputError
from ctcgrpo.experiments.curves import MEASURES, Curves, compared, curves_of
from ctcgrpo.experiments.spec import Sweep
from ctcgrpo.run.data_digest import SKIPPED
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import same, valid_validations
from ctcgrpo.util.files import read_json
from ctcgrpo.util.intervals import crossed

_STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early"}
_STATES |= {TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}


def table_of(sweep: Sweep, study: optuna.Study, folder: Path, against: str | None = None) -> list[dict[str, Any]]:
    """A row for each point: `params`, `score` (mean over seeds and held-out scenarios, after training), `ci95` (over both),
    `gain` over the untrained policy, `by_seed`, and its `state`. A trial that was run again has one row. With variants also
    `area`, `final` and `reach` (see `curves.compared`), compared with `against` or the baseline. Raises OutputError where the
    variants of an environment had different users or data."""
    by_folder = {trial.user_attrs["folder"]: trial for trial in study.trials if "folder" in trial.user_attrs}
    rows = [_row(name, trial, folder) for name, trial in by_folder.items()]
    rows.sort(key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["trial"]))
    if not sweep.variants:
        return rows
    compare(rows, curves_by_environment(sweep, rows, folder), against or sweep.baseline)
    order = list(sweep.environments)

    def place(row: Mapping[str, Any]) -> tuple[int, bool, float]:
        mean = row[sweep.primary]["mean"] if sweep.primary in row else 0.0
        return order.index(row["params"]["environment"]), row["score"] is None, -mean

    return sorted(rows, key=place)


def point_of(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial, also of an enqueued one; empty where none was chosen."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _row(name: str, trial: FrozenTrial, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": name, "params": point_of(trial), "state": _STATES.get(trial.state, "failed")}
    row |= {"reason": trial.user_attrs.get("reason", ""), "score": None, "ci95": None, "gain": None, "by_seed": {}}
    if trial.state != TrialState.COMPLETE:
        return row
    seeds = trial.user_attrs["seeds"]
    try:
        found = [[v.by_scenario for v in valid_validations(_run(folder, name, seed).validation_file)] for seed in seeds]
    except OutputError as error:  # it was valid when the trial ended
        return row | {"state": "damaged", "reason": str(error)}
    after = [run[-1] for run in found]
    if not set.intersection(*map(set, after)):
        return row | {"state": "damaged", "reason": "its seeds have no scenario in common"}
    row["by_seed"] = {str(seed): sum(scores.values()) / len(scores) for seed, scores in zip(seeds, after, strict=True)}
    row["score"] = sum(row["by_seed"].values()) / len(seeds)
    row["ci95"] = list(crossed(after))
    before = [sum(run[0].values()) / len(run[0]) for run in found]
    row["gain"] = row["score"] - sum(before) / len(before)
    if trial.value is not None and not same(trial.value, row["score"]):
        row["reason"] = (
            f"the score is {row['score']:+.3f} in validation.jsonl, {trial.value:+.3f} in summary.json: one is damaged"
        )
    return row


def _run(folder: Path, trial: str, seed: int | str) -> RunFolder:
    return RunFolder(folder / trial / f"seed-{seed}")


# --- variants --------------------------------------------------------------------------------------------------------------------


def curves_by_environment(sweep: Sweep, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Curves]]:
    """The curves of finished trials, by environment and variant. Raises OutputError for runs with different users or data."""
    found: dict[str, dict[str, Curves]] = {}
    met: dict[str, tuple[Path, dict[str, Any]]] = {}
    varied = {field for changes in sweep.variants.values() for field in changes}
    for row in rows:
        if row["score"] is None:
            continue
        environment, variant = row["params"]["environment"], row["params"]["variant"]
        runs = {seed: _run(folder, row["trial"], seed) for seed in row["by_seed"]}
        for run in runs.values():
            user = run.path / "simulator.json"  # a user's own environment has none
            shared = {user.name: read_json(user)} if user.exists() else {}
            data = read_json(run.path / "data.json")
            shared |= {f"{name} in data.json": data[name] for name in data if name not in (SKIPPED, *varied)}
            first, theirs = met.setdefault(environment, (run.path, shared))
            if differ := [name for name in {**theirs, **shared} if theirs.get(name) != shared.get(name)]:
                what = f"{run.path} cannot be compared with {first}: {', '.join(differ)} differ"
                raise OutputError(f"{what}; remove one of the runs")
        try:
            pairs = {int(s): [(v.step, v.overall) for v in valid_validations(r.validation_file)] for s, r in runs.items()}
            found.setdefault(environment, {})[variant] = curves_of(pairs)
        except ValueError as error:
            raise OutputError(f"{folder / row['trial']}: {error}") from None
    return found


def compare(rows: Sequence[dict[str, Any]], curves: Mapping[str, Mapping[str, Curves]], against: str | None) -> None:
    """Add the measures of `curves.compared` to the rows of finished trials."""
    for row in rows:
        if row["score"] is not None:
            variants = curves[row["params"]["environment"]]
            row |= compared(variants[row["params"]["variant"]], variants.get(against or ""))


# --- in the terminal -------------------------------------------------------------------------------------------------------------

_SAME = 5e-4  # scores within this are the same in the table


def all_equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether several trials finished, all with the same score."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    return len(scores) > 1 and max(scores) - min(scores) < _SAME


def printed(rows: Sequence[Mapping[str, Any]], title: str, primary: str | None = None, against: str | None = None) -> Table:
    """A table for the terminal, without parameters that are the same in every row. With the `primary` measure of variants, it has
    columns for the measures and the differences to the variant `against`."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    names = [name for name in names if len({json.dumps(row["params"].get(name)) for row in rows}) > 1 or len(rows) == 1]
    measures = [] if primary is None else [primary, *(m for m in MEASURES if m != primary)]
    columns = ["score", "95 % interval", "gain"]
    if measures:
        columns = [title for m in measures for title in (m, f"against {against}")] + ["steps to its final score"]
    table, trial = Table(title=Text(title)), [] if measures else ["trial"]
    for name in (*trial, *names, *columns, "seeds", ""):
        table.add_column(Text(name), justify="right" if name in (*columns, "seeds") else "left")
    for row in rows:
        figures = ["-"] * len(columns)
        if row["score"] is not None and measures:
            figures = [shown for m in measures for shown in (_interval(row[m]), _interval(row[m]["against"]))]
            figures.append(_reach(row["reach"]))
        elif row["score"] is not None:
            low, high = row["ci95"]
            figures = [f"{row['score']:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{row['gain']:+.3f}"]
        status = row["state"] if not row["reason"] else f"{row['state']}: {row['reason']}"
        cells = [*(row[name] for name in trial), *(_shown(row["params"].get(name)) for name in names), *figures]
        shown = (*cells, str(len(row["by_seed"]) or "-"), "" if status == "done" else status)
        table.add_row(*map(Text, shown))  # a reason is the last line of a log: text, never markup
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def _reach(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    steps, low, high = ("never" if s is None else f"{s:.1f}" for s in (found["steps"], *found["ci95"]))
    return f"{steps} ({low} to {high})"
