"""Studies: the file, the figures by hand, and real runs of a tiny policy, several a process, killed and taken up again."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.files import mark_complete, read_json_lines
from ctcgrpo.intervals import student
from ctcgrpo.recipe import load_recipe
from ctcgrpo.study.commands import printed
from ctcgrpo.study.figures import Curves, curves_of, reached, table_of
from ctcgrpo.study.picture import drawn
from ctcgrpo.study.runs import found_curves, run_study
from ctcgrpo.study.spec import load_study
from tests.conftest import ROOT, Command

STUDY = {
    "program": "recipes/study.yaml",
    "seeds": [1, 2],
    "baseline": "outcome_only",
    "seconds": 5,
    "environments": {"prompt": {}},
    "variants": {"outcome_only": {"credit.alpha": 0}, "rollout": {}},
}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def written(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump(STUDY | changes))
    return file


def test_the_shipped_study_is_what_it_says() -> None:
    study, recipe = load_study(ROOT / "configs" / "studies" / "credit.yaml")
    assert len(study.runs()) == 2 * 8 * 5 and study.primary == "area"
    recipes = {run: run.recipe(study, Path("out"), policy="base") for run in study.runs()}
    assert len({r.folder for r in recipes.values()}) == 80 and all(r.policy.model == "base" for r in recipes.values())
    assert {r.run.seed for r in recipes.values()} == {1, 2, 3, 4, 5}
    by_variant = {(run.environment, run.variant): r for run, r in recipes.items()}
    assert by_variant["prompt", "outcome_only"].credit.alpha == 0
    assert by_variant["reluctant", "shuffled"].credit.shuffle == "turn_scores"
    assert str(by_variant["reluctant", "rollout"].simulator.config).endswith("reluctant.yaml")
    assert by_variant["prompt", "rollout"].credit == recipe.credit, "the published credit is the recipe's own"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"seeds": [1, 1]}, "duplicate seed"),
        ({"baseline": "outcome"}, "did you mean 'outcome_only'"),
        ({"primary": "last"}, "primary is 'last'"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"run.seed": 4}}}, "run.seed is the study's own"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "../b": {}}}, "no name for a folder"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"credit.centring": "group"}}}, "prompt with b.*centering"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"credit.alpha": 0.0}}}, "the same recipe as"),
        ({"program": "recipes/qwen3.yaml"}, "did you mean"),
        ({"workers": 3}, "unknown field workers"),
        ({"seeds": [-1, 2]}, "seeds.0 is -1"),
        ({"seeds": [True, False]}, "seeds"),
        (
            {"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"validation.every": 1}}},
            "validation.every is the same for all",
        ),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"validation": None}}}, "'validation' is a whole section"),
        (
            {"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"training.max_steps": 9}}},
            "training.max_steps is the same",
        ),
        ({"environments": {"prompt": {"policy": {"model": "x"}}}}, "'policy' is a whole section"),
        ({"environments": {"x" * 300: {}}}, "no name for a folder"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_study(written(tmp_path / "s.yaml", **changes))


BASE = Curves((1, 2), np.array([0.0, 10.0, 20.0]), np.array([[-0.5, -0.4, -0.3], [-0.5, -0.5, -0.3]]))
GOOD = Curves((1, 2), np.array([0.0, 10.0, 20.0]), np.array([[-0.5, -0.2, -0.2], [-0.5, -0.3, -0.2]]))
BAD = Curves((1, 2), np.array([0.0, 10.0, 20.0]), np.array([[-0.5, -0.5, -0.6], [-0.5, -0.6, -0.6]]))


def test_areas_and_gains_by_hand() -> None:
    # Trapezoids over 10 steps each, by the 20 steps of training: (-0.9 / 2 - 0.7 / 2) / 2 = -0.4, 0.1 above the start.
    assert BASE.area == pytest.approx([0.1, 0.05]) and BASE.final == pytest.approx([0.2, 0.2])
    rows = table_of({"base": BASE, "good": GOOD, "bad": BAD}, "base")
    assert rows["good"]["area"]["mean"] == pytest.approx((0.225 + 0.175) / 2)
    against = rows["good"]["area"]["against"]
    assert against["mean"] == pytest.approx(0.125) and against["ci95"] == pytest.approx([0.125, 0.125])
    assert rows["base"]["area"]["against"] is None
    # Two values 0.225 and 0.175: std sqrt(2) * 0.025, so +-12.706 * 0.025.
    assert rows["good"]["area"]["ci95"] == pytest.approx([0.2 - 12.706 * 0.025, 0.2 + 12.706 * 0.025])


def test_steps_to_a_score_by_hand() -> None:
    # The baseline ends at -0.3; the mean of GOOD goes from -0.5 to -0.25 in 10 steps and is at -0.3 after 8 of them.
    found = reached(GOOD, BASE)
    assert found is not None and found["steps"] == pytest.approx(8)
    # Seed 1 alone: -0.5 to -0.2 in 10 steps, 6 2/3; seed 2 alone: exactly 10. Drawn seeds lie between them.
    assert found["ci95"] == pytest.approx([20 / 3, 10])
    own = reached(BASE, BASE)
    assert own is not None and own["steps"] == pytest.approx(20)
    assert reached(BAD, BASE) == {"steps": None, "ci95": [None, None]}
    assert reached(GOOD, BAD) is None, "where the baseline loses, everything has its score from the start"
    steps, fell = np.array([0.0, 9.0]), np.array([[-0.5, -0.7]] * 2)
    mixed = Curves((1, 2, 3), steps, np.array([[-0.5, 1.5], [-0.5, -0.7], [-0.5, -0.7]]))
    assert reached(Curves((2, 3), steps, fell), mixed) is None, "on the seeds that both have it gained nothing"
    assert reached(mixed, mixed) is None, "it may well have gained nothing"
    with pytest.raises(ValueError, match="seed 1 was validated after steps .0, 3., seed 2 after .0, 4."):
        curves_of({1: [(0, 0.0), (3, 1.0)], 2: [(0, 0.0), (4, 1.0)]})


def test_a_seed_that_is_missing_pairs_with_nothing() -> None:
    one = Curves((2,), GOOD.steps, GOOD.scores[1:])
    row = table_of({"base": BASE, "one": one}, "base")["one"]
    assert row["area"]["mean"] == pytest.approx(0.175) and row["area"]["ci95"] is None
    assert row["area"]["against"] is None and row["reach"] is None and row["seeds"] == [2]


def test_the_interval_over_a_few_seeds_is_students() -> None:
    low, high = student([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert (low, high) == pytest.approx((3 - half, 3 + half))


def test_the_picture_holds_every_line_and_names_it() -> None:
    svg = drawn({"prompt": {"base": BASE, "good": GOOD}, "reluctant": {"base": BASE, "good": BAD}}, "base").decode()
    assert svg.count(">good<") == 1 and svg.count(">base<") == 1 and ">prompt<" in svg and ">reluctant<" in svg
    assert svg == drawn({"prompt": {"base": BASE, "good": GOOD}, "reluctant": {"base": BASE, "good": BAD}}, "base").decode()


def test_the_table_goes_from_the_best_to_the_worst() -> None:
    rows = table_of({"base": BASE, "bad": BAD, "good": GOOD}, "base")
    table = printed(rows, "prompt", "area", "base")
    assert list(table.columns[0].cells) == ["good", "base", "bad"]
    assert list(table.columns[-1].cells) == ["8.0 (6.7 to 10.0)", "20.0 (20.0 to 20.0)", "never (never to never)"]


def test_a_study_is_killed_and_goes_on(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs, in one process one after the other, are those that each would be in a process of its own, bit by bit."""
    program = tmp_path / "tiny.yaml"
    changes = ["training.save_every=100", "validation.scenarios=english/test", "validation.every=1"]
    program.write_text(load_recipe("recipes/tiny.yaml", changes).to_yaml())
    file = written(tmp_path / "s.yaml", program=str(program))
    out = tmp_path / "studies"
    command = [sys.executable, "-m", "ctcgrpo", "study", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times = out / "s" / "times.json"
    deadline = time.monotonic() + 300
    while not times.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    said = process.communicate(timeout=60)[0]  # ends when no worker is left that could write there
    runs = "4 runs (1 environments x 2 variants x 2 seeds)"
    assert said.startswith(f"{runs}, 4 to go, 1 at a time: 0 minutes at 5 s a run (by the file)")
    first = list(json.loads(times.read_text()))
    assert 1 <= len(first) < 4
    finished = {name: (out / "s" / "runs" / name / "final" / "model.safetensors").stat().st_mtime_ns for name in first}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{runs}, {4 - len(first)} to go" in done.stdout
    assert "95 % intervals over seeds; primary: area" in done.stdout and "curves.svg" in done.stdout
    assert len(json.loads(times.read_text())) == 4
    for name, when in finished.items():
        assert (out / "s" / "runs" / name / "final" / "model.safetensors").stat().st_mtime_ns == when, (
            "a finished run ran again"
        )

    kept = {path.name for path in (out / "s" / "runs" / "prompt" / "rollout" / "seed-1").iterdir() if path.is_dir()}
    assert kept == {"final", "traces"}, "a study keeps no weights but the last ones"

    study, as_it_stands = load_study(file)
    curves = found_curves(study, out / "s")["prompt"]
    assert set(curves) == {"outcome_only", "rollout"} and curves["rollout"].steps.tolist() == [0, 1, 2]
    assert curves["rollout"].scores[:, 0] == pytest.approx(curves["outcome_only"].scores[:, 0]), "all begin alike"
    assert run_study(study, as_it_stands, out / "s") == {}, "nothing is left to do"
    monkeypatch.setenv("COLUMNS", "240")  # no header is wrapped, however wide the intervals are
    code, told, _ = ctcgrpo("study", str(file), "--out", str(out), "--against", "rollout")
    assert code == 0 and "4 runs (1 environments x 2 variants x 2 seeds), 0 to go" in told and "against rollout" in told
    code, _, problem = ctcgrpo("study", str(file), "--out", str(out), "--against", "rollouts")
    assert code == 2 and "did you mean 'rollout'" in problem

    alone = tmp_path / "alone"
    given = [f"policy.model={out / 's' / 'base'}", f"run.output_dir={alone}", "run.name=seed-2", "run.seed=2"]
    code, _, problem = ctcgrpo("train", str(program), *given)
    assert code == 0, problem
    ours = (out / "s" / "runs" / "prompt" / "rollout" / "seed-2" / "final" / "model.safetensors").read_bytes()
    assert ours == (alone / "seed-2" / "final" / "model.safetensors").read_bytes(), "runs of a process leak into each other"

    simulator = out / "s" / "runs" / "prompt" / "rollout" / "seed-2" / "simulator.json"
    said = simulator.read_text()
    simulator.write_text(said.replace("scripted", "somebody"))
    with pytest.raises(OutputError, match="prompt/rollout/seed-2 met another simulator than prompt/outcome_only/seed-1"):
        found_curves(study, out / "s")
    simulator.write_text(said)
    (out / "s" / "runs" / "prompt" / "rollout" / "seed-1" / "final" / "COMPLETE").unlink()
    shutil.rmtree(out / "s" / "base")
    (out / "s" / "base").mkdir()
    (out / "s" / "base" / "notes.txt").write_text("no model")
    mark_complete(out / "s" / "base")
    failed = run_study(study, as_it_stands, out / "s")
    assert list(failed) == ["prompt/rollout/seed-1"]
    log = (out / "s" / "runs" / "prompt" / "rollout" / "seed-1.log").read_text()
    assert "Traceback" in log and failed["prompt/rollout/seed-1"] in log
    with pytest.raises(OutputError, match="holds another study .seeds differ"):
        run_study(*load_study(written(tmp_path / "s.yaml", program=str(program), seeds=[1, 2, 3])), out / "s")
    rollout = out / "s" / "runs" / "prompt" / "rollout"
    (rollout / "seed-2" / "recipe.yaml").write_text((rollout / "seed-1" / "recipe.yaml").read_text())
    with pytest.raises(OutputError, match="is of another recipe .run.seed: 1 -> 2"):
        run_study(study, as_it_stands, out / "s")
    assert all(
        record for _, record in read_json_lines(out / "s" / "runs" / "prompt" / "rollout" / "seed-1" / "validation.jsonl")
    )
    assert curves_of({1: [(0, 0.0), (1, 1.0)]}).scores.shape == (1, 2)
    assert process.returncode == -signal.SIGKILL
