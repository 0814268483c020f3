"""Sweeps: the file's format, the coordinator with runs that fail, are killed and fall behind, the table, and W&B up to its call."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from ctcgrpo.errors import BudgetSpent, OutputError, RecipeError, RunFailed
from ctcgrpo.experiments import coordinator
from ctcgrpo.experiments.coordinator import _link_best, run_sweep, score_of
from ctcgrpo.experiments.spec import Sweep, load_sweep
from ctcgrpo.experiments.table import all_equal
from ctcgrpo.run.recipe_file import load_recipe, overrides
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.weights_and_biases import AGENT, hand_over
from ctcgrpo.util.files import mark_complete
from ctcgrpo.util.intervals import crossed
from ctcgrpo.util.workers import lock_folder
from tests.conftest import ROOT, Command
from tests.unit.test_report import episode, made

TRAIN = (sys.executable, "-m", "tests.fake_train")
GRID = {"credit.alpha": {"values": [0, 10]}, "credit.std_min": {"values": [0.1, 0.2]}, "run.seed": {"values": [0, 1]}}
VARIANTS = {"outcome_only": {"credit.alpha": 0}, "rollout": {"credit.alpha": 10}}
W_AND_B = {
    "program",
    "method",
    "metric",
    "parameters",
    "name",
    "description",
    "project",
    "entity",
    "command",
    "run_cap",
    "early_terminate",
}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def written(file: Path, **changes: Any) -> Path:
    settings = {"program": "recipes/quickstart.yaml", "method": "grid", "parameters": GRID} | changes
    file.write_text(yaml.safe_dump(settings))
    return file


def run(file: Path, folder: Path, **options: Any) -> list[dict[str, Any]]:
    return run_sweep(*load_sweep(file), folder, train=TRAIN, **options)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_searches_hold_to_the_format_of_wandb(file: Path) -> None:
    if "variants" in yaml.safe_load(file.read_text()):
        return
    sweep, recipe = load_sweep(file)
    data = yaml.safe_load(file.read_text())
    assert set(data) <= W_AND_B and data["method"] in ("grid", "random", "bayes") and recipe.validation is not None
    assert data["metric"] == {"name": "eval/outcome/all", "goal": "maximize"}
    for parameter in data["parameters"].values():
        assert set(parameter) <= {"value", "values", "min", "max", "distribution", "q"}
        assert ("min" in parameter) == ("max" in parameter)
    if sweep.method == "grid":
        assert len(sweep.grid()) > 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parameters": {}}, "expected either parameters .* or variants"),
        ({"parameters": {"credit.alpha": {"values": []}}}, "parameters.credit.alpha.values"),
        ({"parameters": {"credit.alpha": {"values": [1, 1]}}}, "duplicate value"),
        ({"parameters": {"credit.alpha": {"value": 1, "values": [2]}}}, "expected value, values, or min and max"),
        ({"parameters": {"credit.alpha": {"min": 1}}}, "min < max"),
        ({"parameters": {"credit.alpha": {"min": 1, "max": 2}}}, "parameters.credit.alpha is a range; expected a list of values"),
        (
            {"parameters": {"credit.alpha": {"vals": [1]}}},
            "unknown field parameters.credit.alpha.vals; did you mean 'values'?",
        ),
        ({"parameters": {"credit.alpa": {"values": [1]}}}, "parameters.credit.alpa: .*alpa.*did you mean 'alpha'"),
        ({"parameters": {"credit.centering": {"values": ["rollout", "wide"]}}}, "parameters.credit.centering: .*'wide'"),
        ({"parameters": {"validation": {"value": {"every": 1}}}}, "name fields of sections with dots"),
        ({"method": "bayes"}, "method = bayes; expected a run_cap"),
        ({"method": "annealing"}, "method is 'annealing'"),
        ({"metric": {"name": "loss"}}, "metric.name is 'loss'; input should be 'eval/outcome/all'"),
        ({"metric": {"name": "eval/outcome/all", "goal": "minimize"}}, "metric.goal is 'minimize'"),
        ({"program": "recipes/quickstar.yaml"}, "did you mean 'recipes/quickstart.yaml'"),
        (
            {"program": "recipes/tiny.yaml", "parameters": {"credit.alpha": {"values": [1, 2]}}},
            "expected a recipe with a validation section",
        ),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate.min_iter is missing"),
        ({"speed": 1}, "unknown field speed"),
        ({"variants": VARIANTS}, "expected either parameters .* or variants"),
        ({"baseline": "rollout"}, "baseline cannot be combined with parameters"),
        ({"seeds": [3, 4]}, "parameters.run.seed: expected a list of seeds"),
        ({"parameters": {"run.seed": {"min": 1, "max": 4}}, "method": "random", "run_cap": 2}, "expected a list of seeds"),
    ],
)
def test_what_a_sweep_cannot_be_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_sweep(written(tmp_path / "s.yaml", **changes))


def test_values_become_overrides_as_recipes_read_them() -> None:
    assert overrides({"a.b": True, "c.d": 1e-7, "e.f": "x y", "g.h": None, "i.j": 3}) == [
        "a.b=true",
        "c.d=1e-07",
        "e.f=x y",
        "g.h=null",
        "i.j=3",
    ]


def test_a_grid_is_run_once_with_its_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAKE_TRAIN", f"count={starts}")
    file, folder = written(tmp_path / "s.yaml"), tmp_path / "out"
    rows = run(file, folder, workers=2, devices=["0,1", "2,3"], extra=["training.max_steps=3"])
    assert [row["params"]["credit.alpha"] for row in rows] == [10, 10, 0, 0] and len(rows) == 4
    best = rows[0]
    # Seeds 0 and 1 have 0.00 and 0.01; before training all have -1.
    assert best["by_seed"] == pytest.approx({"0": 0.0, "1": 0.01})
    assert best["score"] == pytest.approx(0.005) and best["gain"] == pytest.approx(1.005)
    assert best["ci95"][0] < 0.005 < best["ci95"][1]
    assert (folder / "best").resolve() == (folder / best["trial"] / "seed-1" / "best").resolve()
    lines = sorted(line.split() for line in starts.read_text().splitlines())
    assert len(lines) == 8 and {line[1] for line in lines} == {"0,1", "2,3"}
    assert {(line[1], line[2]) for line in lines} == {("0,1", "29500"), ("2,3", "29600")}
    again = run(file, folder, extra=["training.max_steps=3"])
    assert again == rows == json.loads((folder / "table.json").read_text()) and len(starts.read_text().splitlines()) == 8
    with pytest.raises(OutputError, match="another sweep .overrides differ"):
        run(file, folder)


def test_a_sweep_of_equal_trials_announces_no_best(tmp_path: Path, ctcgrpo: Command) -> None:
    row = {"params": {}, "state": "done", "reason": "", "ci95": [0.0, 0.1], "gain": 0.1}
    rows = [{**row, "trial": f"trial-000{k}", "score": 0.05, "by_seed": {"3": 0.05}} for k in range(2)]
    apart = [rows[0], {**rows[1], "score": 0.04}]
    assert all_equal(rows) and not all_equal(apart) and not all_equal(rows[:1])
    assert not all_equal([rows[0], {**rows[1], "score": None}])
    for trial in ("trial-0000", "trial-0001"):
        made(tmp_path / "alphas" / trial / "seed-3", [episode(0, k, 0.1, [(45, 55)]) for k in range(2)])
    _link_best(tmp_path / "alphas", apart)
    assert (tmp_path / "alphas" / "best").resolve().parent.parent.name == "trial-0000"
    _link_best(tmp_path / "alphas", rows)
    assert not (tmp_path / "alphas" / "best").is_symlink()
    (tmp_path / "alphas" / "table.json").write_text(json.dumps(rows))
    code, out, err = ctcgrpo("report", str(tmp_path / "alphas"))
    assert code == 0 and str(tmp_path / "alphas" / "report.html") in out, err
    assert "sweep alphas: trial-0000, seed-3" in (tmp_path / "alphas" / "report.html").read_text()


def test_a_sweep_that_was_killed_goes_on_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAKE_TRAIN", f"count={starts},slow=0.1")
    file, folder = written(tmp_path / "s.yaml"), tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from ctcgrpo.experiments.spec import load_sweep; "
        "from ctcgrpo.experiments.coordinator import run_sweep; "
        f"run_sweep(*load_sweep(Path({str(file)!r})), Path({str(folder)!r}), train=(sys.executable, '-m', 'tests.fake_train'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not starts.exists() or len(starts.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = starts.read_text().splitlines()
    time.sleep(1.5)  # whoever it had started is told to stop
    finished = {f"{f.parent.parent.parent.name}/{f.parent.parent.name}" for f in folder.glob("trial-*/seed-*/final/COMPLETE")}
    assert 2 <= len(finished) < 8
    rows = run(file, folder)
    after = [line.split()[0] for line in starts.read_text().splitlines()[len(before) :]]
    assert not finished & set(after) and len(finished) + len(after) == 8
    assert len(rows) == 4 and all(row["state"] == "done" and len(row["by_seed"]) == 2 for row in rows)
    assert {path.name for path in folder.glob("trial-*")} == {row["trial"] for row in rows}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["ask", "tell", "enqueue_trial"])
def test_a_coordinator_killed_while_it_asks_again_loses_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    """One is killed with a trial under way, the next before or after the first such call; the third runs the whole grid."""
    file, folder = written(tmp_path / "s.yaml", parameters={"credit.alpha": {"values": [0, 10]}}), tmp_path / "out"

    class Killed(BaseException):
        pass

    def killed(name: str, after: bool) -> None:
        plain = getattr(optuna.Study, name)

        def dies(self: optuna.Study, *arguments: Any, **options: Any) -> None:
            if after:
                plain(self, *arguments, **options)
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(optuna.Study, name, dies)
            run(file, folder)

    killed("ask", after=True)  # the trial is under way, and nothing of it has been chosen
    killed(method, after)
    rows = run(file, folder)
    assert sorted(row["params"]["credit.alpha"] for row in rows) == [0, 10]
    assert [row["state"] for row in rows] == ["done", "done"]


def test_runs_that_fail_are_told_with_their_reason_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAKE_TRAIN", f"fail=0,count={starts}")
    file = written(tmp_path / "s.yaml")
    rows = run(file, tmp_path / "out")
    assert [row["state"] for row in rows] == ["done", "done", "failed", "failed"]
    assert rows[2]["score"] is None and rows[2]["reason"] == "error: policy.model 'x' cannot be loaded"
    assert run(file, tmp_path / "out") == rows, "they failed again"
    before = len(starts.read_text().splitlines())
    monkeypatch.setenv("FAKE_TRAIN", f"count={starts}")
    mended = run(file, tmp_path / "out")
    assert [row["state"] for row in mended] == ["done"] * 4 and {row["trial"] for row in mended} == {r["trial"] for r in rows}
    assert len(starts.read_text().splitlines()) - before == 4, "and what was finished did not"


def test_a_spent_budget_pauses_the_sweep_and_the_same_command_resumes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    file = written(tmp_path / "s.yaml", parameters={"credit.alpha": {"values": [0, 5, 10]}, "run.seed": {"values": [1]}})
    monkeypatch.setenv("FAKE_TRAIN", f"poor=5,count={starts}")
    with pytest.raises(BudgetSpent, match=r"trial-0001: the budget of 1 USD is spent. Saved checkpoint-1. The sweep pauses"):
        run(file, tmp_path / "out")
    assert len(starts.read_text().splitlines()) == 2  # alpha 10 was not tried
    monkeypatch.setenv("FAKE_TRAIN", f"fail=10,count={starts}")
    states = {row["params"]["credit.alpha"]: row["state"] for row in run(file, tmp_path / "out")}
    assert states == {0: "done", 5: "done", 10: "failed"} and len(starts.read_text().splitlines()) == 4


def test_a_search_ends_at_its_cap_also_where_trials_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAIN", "fail=1")
    parameters = {"credit.alpha": {"values": [1, 2]}, "credit.std_min": {"min": 0.1, "max": 0.2}}
    file = written(tmp_path / "s.yaml", method="random", run_cap=5, parameters=parameters)
    rows = run(file, tmp_path / "out")
    assert len(rows) == 5 and {row["state"] for row in rows} == {"done", "failed"}
    assert {row["trial"] for row in run(file, tmp_path / "out")} == {row["trial"] for row in rows}


def test_the_command_fails_where_a_trial_did(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAIN", "fail=0")
    monkeypatch.setattr(coordinator, "run_sweep", partial(run_sweep, train=TRAIN))
    code, out, err = ctcgrpo("sweep", str(written(tmp_path / "s.yaml")), "--out", str(tmp_path), "--name", "x")
    assert code == RunFailed.exit_code and "2 of 4 trials failed (trial-0000, trial-0001)" in err and "policy.model 'x'" in out


def test_a_changed_recipe_is_another_sweep(tmp_path: Path) -> None:
    program = tmp_path / "r.yaml"
    program.write_text((ROOT / "recipes" / "smollm2.yaml").read_text())
    file = written(tmp_path / "s.yaml", program=str(program), parameters={"credit.alpha": {"values": [0, 10]}})
    rows = run(file, tmp_path / "out")
    program.write_text(load_recipe(program, ["rollout.temperature=0.5"]).to_yaml())
    with pytest.raises(OutputError, match="another sweep .program differ"):
        run(file, tmp_path / "out")
    program.write_text((ROOT / "recipes" / "smollm2.yaml").read_text())
    assert run(file, tmp_path / "out") == rows


_ENDS = '{{"before": {0}, "after": {0}, "improvement": {{"overall": 0.0, "ci95": null, "n": 2}}}}'


def summary(overall: str) -> str:
    """summary.json with this score before and after."""
    return _ENDS.format(f'{{{overall}"scenes": {{}}, "n": 2, "step": 0}}')


VALIDATION = {"step": 0, "outcomes": {"a": [0.1], "b": [0.3]}, "scenes": {"a": "charm", "b": "charm"}, "failed": 0}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("summary.json", '{"after":', "summary.json cannot be read"),
        ("summary.json", "", "summary.json cannot be read"),
        ("summary.json", "[]", "summary.json: "),
        ("summary.json", summary(""), "before.overall is missing"),
        ("summary.json", summary('"overall": NaN, '), "before.overall = nan"),
        ("summary.json", summary('"overall": null, '), "after.overall = None"),
        ("summary.json", summary('"overall": "0.9", '), "before.overall = '0.9'"),
        ("summary.json", summary('"overall": true, '), "before.overall = True"),
        ("summary.json", None, "no summary.json"),
        ("validation.jsonl", "{bad\n", "validation.jsonl, line 1"),
        ("validation.jsonl", "", "has no validation"),
        ("validation.jsonl", '{"step": 1}\n', "outcomes is missing"),
        ("validation.jsonl", json.dumps({**VALIDATION, "outcomes": {"a": []}}), "no valid episode after step 0"),
        ("validation.jsonl", json.dumps(VALIDATION) + "\n" + json.dumps(VALIDATION) + "\n", "duplicate step 0"),
        ("validation.jsonl", None, "has no validation"),
    ],
)
def test_a_run_with_damaged_files_has_no_score(name: str, text: str | None, problem: str, tmp_path: Path) -> None:
    finished_run(tmp_path)
    assert score_of(RunFolder(tmp_path)) == 0.2
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match=re.escape(problem)):
        score_of(RunFolder(tmp_path))


def finished_run(folder: Path) -> None:
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    (folder / "summary.json").write_text(summary('"overall": 0.2, '))
    (folder / "validation.jsonl").write_text(json.dumps(VALIDATION) + "\n")
    mark_complete(folder / "final")


def test_a_run_with_damaged_files_fails_its_trial_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAIN", f"count={tmp_path / 'starts'}")
    folder = tmp_path / "out"
    for trial in range(4):
        for seed in (0, 1):
            finished_run(folder / f"trial-{trial:04d}" / f"seed-{seed}")
    (folder / "trial-0001" / "seed-0" / "summary.json").write_text('{"after":')
    (folder / "trial-0000" / "seed-1" / "validation.jsonl").write_text("{bad\n")
    said: list[str] = []
    sweep, recipe = load_sweep(written(tmp_path / "s.yaml"))
    rows = run_sweep(sweep, recipe, folder, train=TRAIN, log_line=said.append)
    assert [row["trial"] for row in rows] == ["trial-0002", "trial-0003", "trial-0000", "trial-0001"]
    assert [row["state"] for row in rows] == ["done", "done", "failed", "failed"]
    assert [row["score"] for row in rows] == [pytest.approx(0.2)] * 2 + [None] * 2
    assert "validation.jsonl, line 1" in rows[2]["reason"] and "summary.json cannot be read" in rows[3]["reason"]
    assert any("trial-0001: failed" in line and "summary.json" in line for line in said)
    assert not (tmp_path / "starts").exists()
    # Damaged after its trial ended: the table is made all the same, and says so.
    other = folder / "trial-0002" / "seed-1" / "validation.jsonl"
    other.write_text(json.dumps({**VALIDATION, "outcomes": {"a": [0.9], "b": [0.9]}}) + "\n")
    (folder / "trial-0003" / "seed-1" / "validation.jsonl").write_text("{\n")
    found = {row["trial"]: row for row in run_sweep(sweep, recipe, folder, train=TRAIN)}
    assert "+0.200 in summary.json: one is damaged" in found["trial-0002"]["reason"]
    assert found["trial-0003"]["score"] is None and "validation.jsonl, line 1" in found["trial-0003"]["reason"]


@pytest.mark.parametrize(
    ("name", "text"), [("study.db", "x" * 5000), ("study.db", ""), ("sweep.json", "{"), ("sweep.json", "[]")]
)
def test_damaged_files_of_a_sweep_are_named(name: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text(text)
    sweep, recipe = load_sweep(written(tmp_path / "s.yaml"))
    with pytest.raises(OutputError, match=f"{name}[: ]|another sweep"):
        run_sweep(sweep, recipe, folder, train=TRAIN)


def test_a_search_stops_what_falls_behind_and_ends_at_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAIN", "slow=0.6")
    file = written(
        tmp_path / "s.yaml",
        method="bayes",
        run_cap=6,
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2},
        parameters={"credit.alpha": {"min": 1.0, "max": 60.0, "distribution": "log_uniform_values"}},
    )
    rows = run(file, tmp_path / "out", workers=3)
    states = [row["state"] for row in rows]
    assert len(rows) == 6 and set(states) == {"done", "stopped early"}
    assert all(1 <= row["params"]["credit.alpha"] <= 60 for row in rows)
    done = [row["score"] for row in rows if row["score"] is not None]
    assert done == sorted(done, reverse=True)
    assert run(file, tmp_path / "out", workers=3) == rows


def test_one_coordinator_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code = "import sys, time; from pathlib import Path; from ctcgrpo.util.workers import lock_folder\n"
    code += f"with lock_folder(Path({str(folder)!r})): print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "locked\n"
            with pytest.raises(OutputError, match=rf"locked by another process \(process {other.pid} on .+\)"):
                run(written(tmp_path / "s.yaml"), folder)
            said: list[str] = []
            with pytest.raises(OutputError), lock_folder(folder, patience=1, log_line=said.append):
                raise AssertionError("two processes have the folder")
            assert len(said) == 1 and "waiting up to 1 s" in said[0]
        finally:
            other.kill()
    with lock_folder(folder, patience=30):  # a killed process leaves its file, and no lock
        pass


def test_the_interval_over_seeds_and_scenarios_is_wider_than_over_either() -> None:
    runs = [{f"s{k}": 0.1 * j + 0.05 * k for k in range(8)} for j in range(4)]
    low, high = crossed(runs)
    mean = sum(sum(r.values()) for r in runs) / 32
    assert low < mean < high
    same_runs, same_scenarios = crossed([runs[0]] * 4), crossed([dict.fromkeys(r, r["s0"]) for r in runs])
    assert high - low > same_runs[1] - same_runs[0] and high - low > same_scenarios[1] - same_scenarios[0]


def test_the_command_says_what_is_wrong(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    file = written(tmp_path / "s.yaml")
    for arguments, code, problem in [
        ((str(tmp_path / "no.yaml"),), 2, "did you mean"),
        ((str(file), "--workers", "2", "--devices", "0"), 2, "1 sets for 2 workers"),
        ((str(file), "--wandb", "--name", "x"), 2, "sends the file as it is"),
        ((str(file), "--wandb"), 2, "WANDB_API_KEY"),
    ]:
        status, _, err = ctcgrpo("sweep", *arguments)
        assert status == code and problem in err and "Traceback" not in err, (arguments, err)


def test_the_hand_over_to_wandb_up_to_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[Any] = []
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb, "sweep", lambda config, **where: asked.append((config, where)) or "abc123")
    assert hand_over(written(tmp_path / "s.yaml", project="p", entity="e")) == "wandb agent e/p/abc123"
    config, where = asked[0]
    assert where == {"project": "p", "entity": "e"} and config["command"] == list(AGENT)
    Sweep.model_validate(config)

    def refuse(*_: Any, **__: Any) -> str:
        raise wandb.errors.CommError("HTTP 403")

    monkeypatch.setattr(wandb, "sweep", refuse)
    with pytest.raises(RecipeError, match="W&B refused the sweep: .*403"):
        hand_over(written(tmp_path / "s.yaml"))
