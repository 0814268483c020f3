"""`extends` in a recipe: the fields of another one, under its own; what is wrong is named with the file that says it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.run.recipe_file import load_recipe, resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.util.files import mark_complete
from ctcgrpo.util.naming import differences
from tests.conftest import ROOT, Command

OPENING, CLOSING = "'''': CTC-GRPO recipe\n", "# '''; from ctcgrpo.cli import run_recipe; run_recipe(__file__)\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    return Path(shutil.copy(ROOT / "recipes" / "tiny.yaml", tmp_path / "base.yaml"))


def write(file: Path, **sections: Any) -> Path:
    file.write_text(OPENING + yaml.safe_dump(sections, sort_keys=False) + CLOSING)
    return file


def test_sections_are_merged_field_by_field_and_lists_whole(base: Path) -> None:
    write(base.parent / "middle.yaml", extends="base.yaml", rollout={"vllm": {"gpu_memory": 0.5}}, credit={"alpha": 3})
    top = write(
        base.parent / "below" / "top.yaml",
        extends="../middle.yaml",
        run={"name": "top"},
        scenarios={"scenes": ["charm", "repair"]},
        rollout={"vllm": {"timeout": 9}},
        policy={"lora": {"rank": 2}},
    )
    changed = differences(load_recipe(base).model_dump(mode="json"), load_recipe(top).model_dump(mode="json"))
    assert changed == [
        "run.name: tiny -> top",
        "policy.lora: None -> {'rank': 2, 'alpha': 32, 'target_modules': 'all-linear'}",
        "scenarios.scenes: ['support', 'defense', 'repair', 'charm'] -> ['charm', 'repair']",
        "rollout.vllm.gpu_memory: 0.35 -> 0.5",
        "rollout.vllm.timeout: 600.0 -> 9.0",
        "credit.alpha: 15.0 -> 3.0",
    ]
    without = write(base.parent / "without.yaml", extends="below/top.yaml", policy={"lora": None})
    assert load_recipe(without).policy.lora is None
    recipe = load_recipe(top, ["rollout.vllm.timeout=7", "credit.alpha=1"])
    assert (recipe.rollout.vllm.timeout, recipe.rollout.vllm.gpu_memory, recipe.credit.alpha) == (7, 0.5, 1)


def test_what_is_wrong_is_named_with_its_file(base: Path) -> None:
    def refused(file: Path, *overrides: str) -> str:
        with pytest.raises(RecipeError) as error:
            load_recipe(file, overrides)
        return str(error.value).replace(f"{base.parent}/", "")

    folder = base.parent
    child = write(folder / "child.yaml", extends="base.yml")
    assert refused(child) == "child.yaml: extends = 'base.yml': no such file base.yml; did you mean 'base.yaml'?"
    for wrong in (3, ["base.yaml"], {"recipe": "base.yaml"}):
        assert "child.yaml: extends = " in refused(write(child, extends=wrong))
        assert "expected a recipe file, relative to this one" in refused(child)
    assert refused(write(child, extends="child.yaml")) == (
        "child.yaml: extends: child.yaml -> child.yaml; expected a recipe that does not extend this one"
    )
    write(folder / "other.yaml", extends="below/../child.yaml")
    assert refused(write(child, extends="other.yaml")) == (
        "other.yaml: extends: child.yaml -> other.yaml -> below/../child.yaml; expected a recipe that does not extend this one"
    )
    write(child, extends="other.yaml", rollout={"top_p": 0.5})
    write(folder / "other.yaml", extends="base.yaml", credit={"alpah": 3})
    assert refused(child).startswith("other.yaml: unknown field credit.alpah; did you mean 'alpha'?")
    write(folder / "other.yaml", extends="base.yaml", credit={"alpha": "much"})
    assert refused(child).startswith("other.yaml: credit.alpha is 'much'")
    assert refused(child, "credit.alpha=more").startswith("child.yaml: credit.alpha is 'more'")
    write(child, extends="other.yaml", rollout={"top_p": 5}, credit={"alpha": 1})
    assert refused(child).startswith("child.yaml: rollout.top_p is 5")
    assert load_recipe(child, ["rollout.top_p=1"]).credit.alpha == 1
    (folder / "other.yaml").write_text("run: [")
    assert refused(child).startswith("other.yaml: not valid YAML")
    write(folder / "other.yaml", extends="base.yaml", simulator={"token_env": "AWS_SECRET_ACCESS_KEY"})
    assert refused(write(child, extends="other.yaml")).startswith(
        "other.yaml: simulator.token_env = 'AWS_SECRET_ACCESS_KEY'; expected a name that begins with CTCGRPO_"
    )


def test_modules_are_looked_for_beside_the_recipe_that_names_them(base: Path) -> None:
    folder = base.parent
    (folder / "beside_base.py").write_text(
        "from ctcgrpo import Environment\n\nclass Mine(Environment):\n    pass\n\n"
        "def flat(outcomes, turn_scores):\n    return turn_scores\n"
    )
    own = {"factory": "beside_base:Mine", "tasks": "tasks.jsonl"}
    write(folder / "own.yaml", run={"name": "own"}, policy={"model": "builtin/tiny"}, environment=own)
    write(folder / "credited.yaml", extends="own.yaml", credit={"credit": "beside_base:flat"})
    child = write(folder / "below" / "child.yaml", extends="../credited.yaml", environment={"per_step": 2})
    recipe = load_recipe(child)
    assert recipe.environment is not None and recipe.environment.per_step == 2
    assert recipe.environment.folder is not None and recipe.environment.folder.resolve() == folder
    write(child, extends="../credited.yaml", credit={"credit": "beside_child:flat"})
    with pytest.raises(RecipeError, match=r"child.yaml: credit.credit = 'beside_child:flat': there is no module"):
        load_recipe(child)


def test_a_run_does_not_depend_on_how_its_recipe_was_written(base: Path) -> None:
    """What is saved is whole: it needs no other file, and a recipe that says the same resumes it."""
    child = write(base.parent / "child.yaml", extends="base.yaml", credit={"alpha": 3})
    here = f"run.output_dir={base.parent}"
    recipe = load_recipe(child, [here])
    folder = RunFolder(recipe.folder)
    checkpoint = folder.path / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    mark_complete(checkpoint)
    folder.recipe_file.write_text(recipe.to_yaml())
    assert "extends" not in folder.recipe_file.read_text()
    plain = load_recipe(base, [here, "credit.alpha=3"])
    assert plain == recipe and folder.open(plain) == checkpoint
    base.unlink()
    assert resolved_recipe(folder.recipe_file) == recipe == load_recipe(folder.recipe_file)


def test_commands_take_it(base: Path, ctcgrpo: Command) -> None:
    child = write(
        base.parent / "child.yaml", extends="base.yaml", run={"name": "child"}, validation={"scenarios": "english/test"}
    )
    code, out, err = ctcgrpo("check", str(child), f"run.output_dir={base.parent}")
    assert code == 0 and "check of child" in out and "ready to run" in out, out + err
    sweep = write(
        base.parent / "sweep.yaml",
        program=str(child),
        method="grid",
        metric={"name": "eval/outcome/all"},
        parameters={"credit.alpha": {"values": [0, 3]}},
    )
    sweep.write_text(sweep.read_text().removeprefix(OPENING).removesuffix(CLOSING))
    _, recipe = load_sweep(sweep)
    assert recipe == load_recipe(child)


def test_python_runs_it(base: Path) -> None:
    """For Python the file is one string and a call, whatever it extends."""
    child = write(base.parent / "child.yaml", extends="base.yaml", credit={"alpha": "much"})
    done = subprocess.run(
        [sys.executable, "-W", "error", str(child)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "") and f"error: {child}: credit.alpha is 'much'" in done.stderr


@pytest.mark.parametrize(
    ("name", "extended", "fields"),
    [
        ("quickstart", "smollm2", 4), ("study", "smollm2", 8), ("qwen3_8b_group", "qwen3_8b", 2),
        ("qwen3_8b_local", "qwen3_8b", 5), ("qwen3_8b_lora", "qwen3_8b", 7), ("qwen3_1.7b_24gb", "qwen3_8b_lora", 11),
    ],
)  # fmt: skip
def test_a_shipped_variant_says_what_differs_and_no_more(name: str, extended: str, fields: int) -> None:
    file = ROOT / "recipes" / f"{name}.yaml"
    own = yaml.safe_load(file.read_text())
    del own["'"]
    assert own.pop("extends") == f"{extended}.yaml"
    base, recipe = (load_recipe(ROOT / "recipes" / f"{n}.yaml").model_dump(mode="json") for n in (extended, name))
    changed = {text.partition(":")[0] for text in differences(base, recipe)}
    assert len(changed) == fields
    written = {f"{section}.{field}" for section, values in own.items() for field in values}
    assert written == {".".join(field.split(".")[:2]) for field in changed}


def test_the_folder_of_a_trainer_made_in_python_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", [f"run.output_dir={tmp_path}", "run.name=polite"])
    checkpoint = tmp_path / "polite" / "checkpoint-6"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    mark_complete(checkpoint)
    with pytest.raises(
        OutputError, match=r"polite holds checkpoint-6 and no recipe.yaml: .* made in Python; choose another run.name"
    ):
        RunFolder(tmp_path / "polite").open(recipe)
