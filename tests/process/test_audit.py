"""The credit audit from the command line: of a recipe, of a run with an adapter, and on the way of training."""

import json
from pathlib import Path

import pytest
import yaml

from ctcgrpo.audit.record import read_audit, read_steps
from ctcgrpo.cli import train_here
from ctcgrpo.report.page import figures_of
from ctcgrpo.report.reading import read_run
from ctcgrpo.run.recipe_file import load_recipe
from tests.conftest import ROOT, Command

GUESS = ROOT / "recipes" / "examples" / "guess.yaml"
SMALL = ["environment.per_step=4", "rollout.group_size=4"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def test_of_a_recipe(ctcgrpo: Command, tmp_path: Path) -> None:
    written, picture = tmp_path / "audit.json", tmp_path / "audit.svg"
    options = ("--groups", "9", "--continuations", "2", "--json", str(written), "--picture", str(picture))
    code, out, err = ctcgrpo("audit", str(GUESS), *SMALL, "credit.center_weights=token", *options)
    assert code == 0, err
    found = read_audit(written)
    assert (found.groups, found.episodes, found.turns, found.batch) == (12, 48, 4 * 48, 4)  # whole steps
    assert {"grpo", "rollout", "reward_to_go_scene", "vine", "shuffled", "recipe"} <= set(found.credits)
    assert all(name in out for name in found.credits) and "gain relative to grpo" in out
    assert found.agreement is not None and found.tags["all"].groups == 12
    # A turn's reward in this game is its effect on the outcome.
    assert (found.tags["all"].correlation.low or 0) > 0.5 and "correlation" in out
    assert picture.read_text().startswith("<?xml") and "batch 3 of 3" in out
    assert not (tmp_path / "checkpoints").exists()


def test_of_a_run_and_on_the_way(ctcgrpo: Command, tmp_path: Path) -> None:
    quick = ["training.max_steps=4", "training.save_every=4", "validation.every=4", "validation.samples=1"]
    lora = ["policy.lora.rank=4", "policy.lora.target_modules=[q_proj, v_proj]", "training.audit_every=2"]
    train_here(load_recipe(GUESS, [*SMALL, *quick, *lora, f"run.output_dir={tmp_path}"]))
    run = tmp_path / "guess"
    steps, problems = read_steps(run / "audit.jsonl")
    assert [step.step for step in steps] == [2, 4] and not problems and all(step.groups == 4 for step in steps)
    assert "scene" not in steps[0].credits and "vine" not in steps[0].credits
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "seconds/audit" in m] == [2, 4]

    code, out, err = ctcgrpo("audit", str(run), "--groups", "8", "--continuations", "0", "--baseline", "rollout")
    assert code == 0, err
    assert read_audit(run / "audit.json").baseline == "rollout" and "gain relative to rollout" in out
    assert "vine" not in out and read_audit(run / "audit.json").continuations == 0
    of_policy, on_the_way = figures_of(read_run(run))["audits"]
    assert of_policy["caption"].startswith("8 groups, 32 episodes") and on_the_way["caption"].startswith("8 groups of 2 steps")
    with (run / "audit.jsonl").open("a") as file:
        file.write('{"step": 9}\n')
    (run / "audit.json").write_text("{}")
    assert [p.partition(" ")[0] for p in read_run(run).problems] == ["audit.jsonl,", str(run / "audit.json:")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((str(GUESS), "--which", "best", "--groups", "2"), "'--groups'"),
        (("recipes",), "expected a run folder; it has no recipe.yaml"),
        ((str(GUESS), "--baseline", "rolout"), "--baseline 'rolout'; did you mean 'rollout'?"),
        ((str(GUESS), "--credits", "none.yaml"), "list of kinds of credit 'none.yaml' not found"),
    ],
)
def test_what_cannot_be_audited(ctcgrpo: Command, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = ctcgrpo("audit", *arguments)
    assert code != 0 and message in err


def test_several_processes_are_refused(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = ctcgrpo("audit", str(GUESS))
    assert code == 2 and "ctcgrpo audit runs in one process" in err


def test_outcomes_that_do_not_vary(ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("audit", str(GUESS), *SMALL, "rollout.max_new_tokens=1", "rollout.temperature=0.001", "--groups", "3")
    assert code == 10 and "the outcomes of the 4 groups do not vary" in err


def test_an_environment_that_cannot_be_branched(ctcgrpo: Command, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text("from guess import *\n\nclass Alone(Guess):\n    branch = Guess.__mro__[1].branch\n")
    (tmp_path / "guess.py").write_text(GUESS.with_suffix(".py").read_text())
    own = {"extends": str(GUESS), "environment": {"factory": "alone:Alone", "tasks": "alone:train_tasks"}, "validation": None}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(own))
    code, _, err = ctcgrpo("audit", str(tmp_path / "alone.yaml"), *SMALL, "--groups", "4")
    assert code == 2 and "needs Alone.branch" in err and "or pass --continuations 0" in err
    assert ctcgrpo("audit", str(tmp_path / "alone.yaml"), *SMALL, "--groups", "4", "--continuations", "0")[0] == 0
