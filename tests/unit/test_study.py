"""Variants over environments and seeds: the file, the figures by hand, and real runs of a tiny policy, killed and resumed."""

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
from ctcgrpo.experiments.coordinator import open_study, run_sweep
from ctcgrpo.experiments.curves import Curves, compared, curves_of, reached
from ctcgrpo.experiments.picture import drawn
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.experiments.table import compare, printed, table_of
from ctcgrpo.run.recipe_file import load_recipe, overrides
from ctcgrpo.util.intervals import student
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
    study, recipe = load_sweep(ROOT / "configs" / "sweeps" / "credit_study.yaml")
    points = study.grid()
    assert len(points) == 2 * 12 and study.seeds_of(recipe) == [1, 2, 3, 4, 5] and study.primary == "area"
    by_variant = {
        (p["environment"], p["variant"]): load_recipe(study.program, changes=overrides(study.changes(p))) for p in points
    }
    assert by_variant["prompt", "outcome_only"].credit.alpha == 0
    assert by_variant["reluctant", "shuffled"].credit.shuffle == "turn_scores"
    assert str(by_variant["reluctant", "rollout"].simulator.config).endswith("reluctant.yaml")
    assert by_variant["prompt", "rollout"].credit == recipe.credit, "the published credit is the recipe's own"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seeds": [1]}, "at least two variants and two seeds for a comparison"),
        ({"seeds": [1, 1]}, "duplicate seed"),
        ({"variants": {"outcome_only": {}}}, "at least two variants and two seeds for a comparison"),
        ({"baseline": "outcome"}, "did you mean 'outcome_only'"),
        ({"primary": "last"}, "primary is 'last'"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"run.seed": 4}}}, "run.seed is set by the sweep"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "../b": {}}}, "variants: '../b'; expected letters, digits"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"credit.centring": "group"}}}, "prompt with b.*centering"),
        ({"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"credit.alpha": 0.0}}}, "the same recipe as"),
        ({"program": "recipes/qwen3.yaml"}, "did you mean"),
        ({"workers": 3}, "unknown field workers"),
        ({"method": "bayes"}, "expected grid, or none, with variants"),
        ({"run_cap": 3}, "run_cap cannot be combined with variants"),
        ({"seeds": [-1, 2]}, "seeds.0 is -1"),
        ({"seeds": [True, False]}, "seeds"),
        (
            {"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"validation.every": 1}}},
            "variants.b: validation.every must be the same for all variants; set it in the recipe",
        ),
        (
            {"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"validation": None}}},
            "variants.b: 'validation' is a section; expected a field",
        ),
        (
            {"variants": {"outcome_only": {"credit.alpha": 0}, "b": {"training.max_steps": 9}}},
            "variants.b: training.max_steps must be the same for all variants; set it in the recipe",
        ),
        (
            {"environments": {"prompt": {"policy": {"model": "x"}}}},
            "environments.prompt: 'policy' is a section; expected a field",
        ),
        ({"environments": {"x" * 300: {}}}, "environments: 'x+'; expected letters, digits, .*it names a folder"),
    ],
)
def test_what_is_wrong_with_variants_is_said(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_sweep(written(tmp_path / "s.yaml", **changes))


STEPS = np.array([0.0, 10.0, 20.0])
BASE = Curves(STEPS, np.array([[-0.5, -0.4, -0.3], [-0.5, -0.5, -0.3]]))
GOOD = Curves(STEPS, np.array([[-0.5, -0.2, -0.2], [-0.5, -0.3, -0.2]]))
BAD = Curves(STEPS, np.array([[-0.5, -0.5, -0.6], [-0.5, -0.6, -0.6]]))


def test_areas_and_gains_by_hand() -> None:
    # Trapezoids over 10 steps each, by the 20 steps of training: (-0.9 / 2 - 0.7 / 2) / 2 = -0.4, 0.1 above the start.
    assert BASE.area == pytest.approx([0.1, 0.05]) and BASE.final == pytest.approx([0.2, 0.2])
    good = compared(GOOD, BASE)
    assert good["area"]["mean"] == pytest.approx((0.225 + 0.175) / 2)
    against = good["area"]["against"]
    assert against["mean"] == pytest.approx(0.125) and against["ci95"] == pytest.approx([0.125, 0.125])
    assert compared(BASE, BASE)["area"]["against"] is None
    # Two values 0.225 and 0.175: std sqrt(2) * 0.025, so +-12.706 * 0.025.
    assert good["area"]["ci95"] == pytest.approx([0.2 - 12.706 * 0.025, 0.2 + 12.706 * 0.025], abs=1e-5)


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
    mixed = Curves(np.array([0.0, 9.0]), np.array([[-0.5, 1.5], [-0.5, -0.7], [-0.5, -0.7]]))
    assert reached(mixed, mixed) is None, "it may well have gained nothing"
    with pytest.raises(ValueError, match="seed 1 was validated after steps .0, 3., seed 2 after .0, 4."):
        curves_of({1: [(0, 0.0), (3, 1.0)], 2: [(0, 0.0), (4, 1.0)]})


def test_the_interval_over_a_few_seeds_is_students() -> None:
    low, high = student([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-3)


def test_the_picture_holds_every_line_and_names_it() -> None:
    svg = drawn({"prompt": {"base": BASE, "good": GOOD}, "reluctant": {"base": BASE, "good": BAD}}, "base").decode()
    assert svg.count(">good<") == 1 and svg.count(">base<") == 1 and ">prompt<" in svg and ">reluctant<" in svg
    assert svg == drawn({"prompt": {"base": BASE, "good": GOOD}, "reluctant": {"base": BASE, "good": BAD}}, "base").decode()


def test_the_table_shows_a_variant_that_failed_beside_the_others() -> None:
    done = {"state": "done", "reason": "", "score": 0.1, "by_seed": {"1": 0.1, "2": 0.1}}
    failed = {"state": "failed", "reason": "error: [/x]", "score": None, "by_seed": {}}
    rows = [
        {**how, "trial": f"runs/prompt/{name}", "params": {"environment": "prompt", "variant": name}}
        for name, how in (("good", done), ("base", done), ("bad", done), ("broken", failed))
    ]
    compare(rows, {"prompt": {"base": BASE, "bad": BAD, "good": GOOD}}, "base")
    table = printed(rows, "prompt", "area", "base")
    assert [str(cell) for cell in table.columns[0].cells] == ["good", "base", "bad", "broken"]
    reach = [str(cell) for cell in table.columns[-3].cells]
    assert reach == ["8.0 (6.7 to 10.0)", "20.0 (20.0 to 20.0)", "never (never to never)", "-"]
    assert [str(cell) for cell in table.columns[2].cells][:2] == ["+0.125 (+0.125 to +0.125)", "-"]
    assert str(list(table.columns[-1].cells)[-1]) == "failed: error: [/x]"


def test_a_study_is_killed_and_resumes(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs, which are those that each would be without a sweep, bit by bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = tmp_path / "tiny.yaml"
    changes = ["training.save_every=100", "validation.scenarios=english/test", "validation.every=1"]
    program.write_text(load_recipe("recipes/tiny.yaml", changes).to_yaml())
    file = written(tmp_path / "s.yaml", program=str(program))
    out = tmp_path / "sweeps" / "s"
    command = [sys.executable, "-m", "ctcgrpo", "sweep", str(file), "--out", str(out.parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    first = out / "runs" / "prompt" / "outcome_only" / "seed-1" / "final"
    while not (first / "COMPLETE").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert said.startswith("2 trials x 2 seeds to run, 1 at a time: about 0 minutes at 5 s per run (from the sweep file)")
    when = (first / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 unfinished trials run again" in done.stdout
    assert "95 % intervals over seeds; primary: area" in done.stdout and "curves.svg" in done.stdout
    assert (first / "model.safetensors").stat().st_mtime_ns == when, "a finished run ran again"
    kept = {path.name for path in (out / "runs" / "prompt" / "rollout" / "seed-1").iterdir() if path.is_dir()}
    assert kept == {"base", "final", "traces"}, "variants keep no weights but the first and the last ones"

    study, recipe = load_sweep(file)
    rows = {row["params"]["variant"]: row for row in json.loads((out / "table.json").read_text())}
    assert set(rows) == {"outcome_only", "rollout"} and set(rows["rollout"]["by_seed"]) == {"1", "2"}
    assert rows["rollout"]["final"]["mean"] == pytest.approx(rows["rollout"]["gain"])
    assert rows["outcome_only"]["area"]["against"] is None and rows["rollout"]["area"]["against"] is not None
    starts = [row["score"] - row["gain"] for row in rows.values()]
    assert starts[0] == pytest.approx(starts[1]), "all begin alike"
    assert run_sweep(study, recipe, out, train=("false",)) == list(rows.values()), "nothing is left to do"
    monkeypatch.setenv("COLUMNS", "240")  # no header is wrapped, however wide the intervals are
    code, told, _ = ctcgrpo("sweep", str(file), "--out", str(out.parent), "--against", "rollout")
    assert code == 0 and "0 trials x 2 seeds to run" in told and "against rollout" in told
    code, _, problem = ctcgrpo("sweep", str(file), "--out", str(out.parent), "--against", "rollouts")
    assert code == 2 and "did you mean 'rollout'" in problem
    code, told, problem = ctcgrpo("report", str(out))
    assert code == 0 and (out / "report.html").exists(), problem

    given = [f"run.output_dir={tmp_path / 'alone'}", "run.name=seed-2", "run.seed=2"]
    code, _, problem = ctcgrpo("train", str(program), *given)
    assert code == 0, problem
    ours = out / "runs" / "prompt" / "rollout" / "seed-2"
    theirs = tmp_path / "alone" / "seed-2" / "final" / "model.safetensors"
    assert (ours / "final" / "model.safetensors").read_bytes() == theirs.read_bytes()

    scenario = next(iter(json.loads((ours / "data.json").read_text())["validation.scenarios"].values()))
    for name, old, new in (("simulator.json", "scripted", "somebody"), ("data.json", scenario, "0" * 12)):
        text = (ours / name).read_text()
        (ours / name).write_text(text.replace(old, new))
        with pytest.raises(OutputError, match=rf"seed-2 cannot be compared with .*seed-1: .*{name} differ"):
            table_of(study, open_study(study, out), out)
        (ours / name).write_text(text)
    with pytest.raises(OutputError, match="contains another sweep .seeds differ"):
        run_sweep(*load_sweep(written(tmp_path / "s.yaml", program=str(program), seeds=[1, 2, 3])), out)
    shutil.rmtree(ours.parent / "seed-1" / "final")
    (out / "study.db").unlink()
    failed = {row["params"]["variant"]: row for row in run_sweep(study, recipe, out, train=("false",))}
    assert failed["rollout"]["state"] == "failed" and failed["outcome_only"]["score"] == rows["outcome_only"]["score"]
    assert process.returncode == -signal.SIGKILL
