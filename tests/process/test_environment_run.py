"""One real run in an environment of one's own: every command that reads a run works on it, or says what it is for; a run resumes in
the same environment alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from ctcgrpo.cli import train_here
from ctcgrpo.report.page import figures_of
from ctcgrpo.report.reading import read_run
from ctcgrpo.run.recipe_file import load_recipe, resolved_recipe
from tests.conftest import ROOT, Command

GUESS = ROOT / "recipes" / "examples" / "guess.yaml"
MODULE = '''
from ctcgrpo import Environment, Step

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters(Environment):
    """Guess a letter: a turn earns by how much closer its guess is."""

    def __init__(self, question="Which letter?"):
        self.question = question

    async def reset(self, task, *, seed):
        self.letter, self.closeness = LETTERS.index(task["letter"]), 0.0
        self.info = {"closeness": 0.0}
        return self.question

    async def step(self, reply):
        guess, before = LETTERS.find(reply[:1].lower()), self.closeness
        self.closeness = 1 - abs(guess - self.letter) / len(LETTERS)
        hint = "earlier" if guess > self.letter else "later" if guess < self.letter else None
        info = {"closeness": self.closeness, "said": reply}
        return Step(hint, reward=self.closeness - before, done=hint is None, info=info)


def tasks():
    return [{"letter": letter} for letter in LETTERS]


def tagged():
    return [{"id": letter, "letter": letter, "tag": "vowel" if letter in "aeiou" else "consonant"} for letter in LETTERS]
'''
QUICK = ["training.max_steps=2", "training.save_every=1", "validation.every=2", "rollout.group_size=2"]


def write_recipe(folder: Path, name: str) -> Path:
    """The module under this name (Python imports a name once), and the example's recipe with it."""
    (folder / f"{name}.py").write_text(MODULE)
    own = {
        "extends": str(GUESS),
        "environment": {"factory": f"{name}:Letters", "tasks": f"{name}:tagged"},
        "validation": {"tasks": f"{name}:tagged", "samples": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("environment"), "letters")


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> Path:
    train_here(load_recipe(recipe_file, [*QUICK, f"run.output_dir={recipe_file.parent}"]))
    return recipe_file.parent / "guess"


def test_its_recipe_is_saved_whole_and_read_again(finished: Path, recipe_file: Path) -> None:
    written = load_recipe(recipe_file, [*QUICK, f"run.output_dir={finished.parent}"])
    assert resolved_recipe(finished / "recipe.yaml") == written
    saved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert saved["environment"]["timeout"] == 1800 and not {"simulator", "scoring"} & set(saved)
    assert not (finished / "simulator.json").exists()


def test_show(finished: Path, ctcgrpo: Command) -> None:
    code, out, err = ctcgrpo("show", str(finished), "--scenario", "q")
    assert code == 0 and "held-out tasks, before and after 2 steps" in out, err
    assert "(outcome of letters:Letters, mean over 26 tasks; paired bootstrap over tasks)" in " ".join(out.split())
    assert "vowel" in out and "closeness" in out and "warning" not in out
    assert "scenario" not in out.replace("--scenario ID", "") and "[-1, 1]" not in out


def test_report(finished: Path, ctcgrpo: Command) -> None:
    code, out, err = ctcgrpo("report", str(finished))
    assert code == 0 and "warning" not in out, (out, err)
    assert "A group is one task" in (finished / "report.html").read_text()
    figures = figures_of(read_run(finished))
    assert figures["tags"] == ["consonant", "vowel"] and figures["words"]["task"] == "task" and not figures["problems"]
    assert figures["facts"]["environment"] == "letters:Letters" and figures["facts"]["trained on"] == "letters:tagged"
    assert "simulated user" not in figures["facts"]
    assert set(figures["validations"][0]["scores"]) == {"overall", "consonant", "vowel"}
    assert figures["training"][0]["vowel"] is not None and len(figures["states"][0]["tags"]["vowel"]["closeness"]) == 5


def test_export_has_a_card_that_is_true(finished: Path, ctcgrpo: Command, tmp_path: Path) -> None:
    code, _, err = ctcgrpo("export", str(finished), "--out", str(tmp_path / "export"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert code == 0 and "in the environment\n`letters:Letters`: the final policy" in card, err
    assert "2 steps of 8 tasks x 2 rollouts" in card and "| vowel |" in card and "| overall (26) |" in card
    assert "These are the tasks that it was trained on." in card and "held-out" not in card
    for untrue in ("emotion", "Simulated user", "scenario", "[-1, 1]", "EIBench"):
        assert untrue not in card


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["noise"], "ctcgrpo noise needs a recipe with the section scenarios (EIBench's task)"),
        (["evaluate"], "evaluating a run as it validated needs a recipe with the section scenarios (EIBench's task)"),
        (
            ["evaluate", "eibench", "--simulator", "scripted", "--as-trained", "--model"],
            "expected a policy in the folder of a run on scenarios",
        ),
    ],
)
def test_what_is_for_eibench_says_so(arguments: list[str], reason: str, finished: Path, ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo(*arguments, str(finished / "final" if "--model" in arguments else finished))
    assert code == 2 and reason in err and "Traceback" not in err


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "guess")


def test_it_resumes_wherever_its_recipe_lies(run: Path, tmp_path: Path, ctcgrpo: Command) -> None:
    """Another path to the same module is the same environment, and the run may be given more steps."""
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    again = [f"run.output_dir={tmp_path}", "training.max_steps=3"]
    code, out, err = ctcgrpo("train", str(run / "recipe.yaml"), *again, f"environment.folder={tmp_path / 'elsewhere'}")
    assert code == 0 and (run / "final-after-2-steps").exists(), out + err
    assert "resuming with training.max_steps 2 -> 3" in out + err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3 and saved["training"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("environment.options={question: 'Guess.'}", "environment.options.question: None -> Guess."),
        ("environment.tasks=letters:tasks", "environment.tasks: letters:tagged -> letters:tasks"),
        ("environment.per_step=4", "environment.per_step: 8 -> 4"),
    ],
)
def test_another_environment_is_refused_by_name(change: str, reason: str, run: Path, recipe_file: Path, ctcgrpo: Command) -> None:
    again = [*QUICK, f"run.output_dir={run.parent}", "training.max_steps=3", change]
    for command in ("train", "check"):
        code, out, err = ctcgrpo(command, str(recipe_file), *again)
        assert code in (2, 6) and reason in " ".join((out + err).replace("│", " ").split()), out + err


def test_another_module_or_other_tasks_are_refused_by_name(run: Path, recipe_file: Path, ctcgrpo: Command) -> None:
    again = [*QUICK, f"run.output_dir={run.parent}", "training.max_steps=3"]
    module = recipe_file.with_suffix(".py")
    written = module.read_text()
    try:
        module.write_text(written + "# A remark.\n")
        code, _, err = ctcgrpo("train", str(recipe_file), *again)
        assert code == 6 and "data changed since the run began (environment.factory: 1 altered (letters.py))" in err
    finally:
        module.write_text(written)
    (run / "tasks.jsonl").write_text('{"id": "a", "letter": "a"}\n')
    code, _, err = ctcgrpo("train", str(recipe_file), *again, f"validation.tasks={run / 'tasks.jsonl'}")
    assert code == 6 and "validation.tasks: letters:tagged -> " in err


def test_a_sweep_of_it(tmp_path: Path, ctcgrpo: Command) -> None:
    write_recipe(tmp_path, "swept")
    few = {"training.max_steps": 1, "validation.every": 1, "rollout.group_size": 2}
    sweep = {
        "program": str(tmp_path / "swept.yaml"),
        "method": "grid",
        "metric": {"name": "eval/outcome/all", "goal": "maximize"},
        "parameters": {
            "credit.alpha": {"values": [0, 3]},
            **{name: {"value": value} for name, value in few.items()},
        },
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, out, err = ctcgrpo("sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "sweeps"))
    assert code == 0 and "trial-0001: held-out score +0." in out and "credit.alpha" in out, out + err
    code, out, err = ctcgrpo("report", str(tmp_path / "sweeps" / "sweep"))
    assert code == 0, err
