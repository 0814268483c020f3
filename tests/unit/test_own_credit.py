"""A credit, a centering or a scale of one's own: named in a recipe, trained with, refused by name where it is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.centering import make_centering
from ctcgrpo.credit import credit_terms
from ctcgrpo.errors import CreditError, RecipeError
from ctcgrpo.options import CreditOptions
from ctcgrpo.preflight.check import findings
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.training.samples import try_credit
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY

OWN = """\
import numpy as np

def doubled(r, gamma):  # a credit: twice what the turn earned
    return 2 * r

def median(group):  # a centering: the median of the rollout's own turns
    return [np.median(c) for c in group.c]
"""
STATEFUL = """\
from ctcgrpo.centering import Centering

class Running(Centering):
    def __init__(self): self.sum, self.n = 0.0, 0
    def __call__(self, group): return [self.sum / max(1, self.n)] * len(group.c)
    def update(self, groups):
        every = sorted(float(x) for group in groups for c in group.c for x in c)
        self.sum, self.n = self.sum + sum(every), self.n + len(every)
    def state_dict(self): return {"sum": self.sum, "n": self.n}
    def load_state_dict(self, state): self.sum, self.n = state["sum"], state["n"]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In a folder of one's own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_ten_lines_train(ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    recipes.mkdir(), elsewhere.mkdir()
    (recipes / "own_credit_m.py").write_text(OWN)
    recipe = str(shutil.copy(TINY, recipes / "own.yaml"))
    monkeypatch.chdir(elsewhere)
    named = ["credit.credit=own_credit_m:doubled", "credit.centering=own_credit_m:median"]
    command = ["train", recipe, *FAST, *named, f"run.output_dir={tmp_path}"]
    code, _, err = ctcgrpo(*command)
    assert code == 0, err
    lines = (tmp_path / "tiny" / "traces" / "step-000001.rank-0.jsonl").read_text().splitlines()
    turns = [episode["turns"] for episode in map(json.loads, lines)]
    assert len(turns) == 8 and all(len(of_episode) == 2 for of_episode in turns)
    for first, second in turns:
        term = 15 * (first["reward"] - second["reward"])  # 2 r - (2 r + 2 s) / 2
        assert first["credit"]["turn"] == pytest.approx(term) and second["credit"]["turn"] == pytest.approx(-term)
        for turn in (first, second):
            assert turn["credit"]["advantage"] == turn["credit"]["outcome"] + turn["credit"]["turn"]
    assert any(turn["credit"]["turn"] for of_episode in turns for turn in of_episode)
    # A file that was changed is noticed by the run that resumes.
    (recipes / "own_credit_m.py").write_text(OWN.replace("2 * r", "3 * r"))
    code, _, err = ctcgrpo(*command, "training.max_steps=2")
    assert code == 6 and "credit.credit: 1 altered (own_credit_m.py)" in err, err


def test_a_state_of_ones_own_survives_a_resume(ctcgrpo: Command, tmp_path: Path) -> None:
    (tmp_path / "own_state_m.py").write_text(STATEFUL)

    def state(name: str, *steps: int) -> Any:
        for n in steps:
            command = ["train", TINY, *FAST, "credit.centering=own_state_m:Running", f"run.output_dir={tmp_path}"]
            code, _, err = ctcgrpo(*command, f"training.max_steps={n}", f"run.name={name}")
            assert code == 0, err
        return json.loads((tmp_path / name / "checkpoint-2" / "credit_state.json").read_text())["state"]

    whole = state("whole", 2)
    assert whole["n"] == 2 * 8 * 2 and whole == state("resumed", 1, 2)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("credit.centering=absent_m:f", "credit.centering = 'absent_m:f': there is no module 'absent_m'"),
        ("credit.credit=own_m:doubeld", "own_m.py) has no 'doubeld'; did you mean 'doubled'?"),
        ("credit.scale=own_m:np", "np of own_m"),
        ("credit.centering=rolout", "did you mean 'rollout'? (a custom one: my_module:my_function)"),
    ],
)
def test_a_name_that_cannot_be_loaded_is_one_line(
    ctcgrpo: Command, tmp_path: Path, command: str, override: str, text: str
) -> None:
    (tmp_path / "own_m.py").write_text(OWN)
    code, _, err = ctcgrpo(command, TINY, override, f"run.output_dir={tmp_path}")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and text in " ".join(err.split()), err


def test_a_function_that_fails_in_training_is_one_line_and_loses_no_episode(ctcgrpo: Command, tmp_path: Path) -> None:
    (tmp_path / "own_m.py").write_text("def f(r, gamma):\n    return r if r.sum() > -0.15 else [1][len(r)]\n")
    code, _, err = ctcgrpo("train", TINY, *FAST, "credit.credit=own_m:f", f"run.output_dir={tmp_path}")
    assert code == 2 and err.count("\n") == 1, err
    assert "error: credit.credit = 'own_m:f' raised IndexError: list index out of range" in err and "own_m.py, line 2)" in err
    lines = (tmp_path / "tiny" / "traces" / "step-000001.rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 8 and all(turn["credit"] is None for line in lines for turn in json.loads(line)["turns"])


def test_a_wrong_result_is_found_before_the_run_and_by_check(ctcgrpo: Command, tmp_path: Path) -> None:
    (tmp_path / "own_m.py").write_text("def f(group):\n    return [c[:1] for c in group.c]\n")
    text = "credit.centering = 'own_m:f' returned an array of shape (1,); expected 2 finite numbers"
    code, _, err = ctcgrpo("train", TINY, "credit.centering=own_m:f", f"run.output_dir={tmp_path}")
    assert code == 2 and err.startswith(f"error: {text}") and not (tmp_path / "tiny").exists()
    (found,) = (f for f in findings(load_recipe(TINY, ["credit.centering=own_m:f"]))[0] if f.about == "credit")
    assert found.level == "failed" and found.text.startswith(text)
    code, _, err = ctcgrpo("train", TINY, "credit.scale=own_m:f", f"run.output_dir={tmp_path}")
    assert code == 2 and err.startswith("error: credit.scale = 'own_m:f' raised TypeError"), err


WRONG = """\
from ctcgrpo.centering import Centering
def raises(*a): raise KeyError("x")
def longer(*a): return [0.0] * 9
def nothing(*a): return None
def infinite(x, *a): return [float("inf")] * len(getattr(x, "c", x))
def words(x, *a): return ["a"] * len(getattr(x, "c", x))
def no_numbers(deviations, std_min): return [None] * len(deviations)
class Other: ...
class Half(Centering):
    def update(self, groups): ...
"""


@pytest.mark.parametrize(
    ("option", "name", "text"),
    [
        ("credit", "raises", r"raised KeyError: 'x' \(.*wrong_m.py, line 2\)"),
        ("credit", "longer", r"returned an array of shape \(9,\); expected 2 finite numbers"),
        ("credit", "nothing", r"returned NoneType; expected 2 finite numbers|returned an array of shape \(\)"),
        ("credit", "infinite", r"returned \[inf, inf\]; expected 2 finite numbers"),
        ("credit", "words", r"returned list; expected 2 finite numbers"),
        ("centering", "raises", "raised KeyError: 'x'"),
        ("centering", "longer", "returned 9 values for 2 rollouts; expected one each"),
        ("centering", "nothing", "returned a NoneType; expected a sequence"),
        ("centering", "infinite", "returned inf; expected 2 finite numbers, one per turn or rollout, or one number"),
        ("centering", "words", "returned str; expected 2 finite numbers"),
        ("centering", "Other", "Other is a class; expected a function or a subclass of ctcgrpo.centering.Centering"),
        ("centering", "Half", "Half has a state but lacks state_dict, load_state_dict"),
        ("scale", "raises", "raised KeyError: 'x'"),
        ("scale", "longer", "returned 9 values for 1 groups; expected one each"),
        ("scale", "nothing", "returned a NoneType; expected a sequence"),
        ("scale", "no_numbers", r"shape \(\); expected 2 finite numbers"),
    ],
)
def test_a_wrong_result_is_named(tmp_path: Path, option: str, name: str, text: str) -> None:
    (tmp_path / "wrong_m.py").write_text(WRONG)
    chosen: Any = {option: f"wrong_m:{name}"}
    with pytest.raises(CreditError, match=rf"^{option}(_rewards)? = 'wrong_m:{name}'.*{text}"):
        credit_terms([0.1, 0.9], [0, 0], [[0.1, 0.2], [0.1, 0.3]], **chosen)


def test_a_reference_without_a_module_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="^centering = 'absent_m:f': there is no module 'absent_m'"):
        make_centering("absent_m:f")


def test_a_function_itself_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"^credit = <function .*; expected a name, 'my_module:my_function'"):
        try_credit(CreditOptions(credit=lambda r, gamma: r))  # type: ignore[arg-type]
