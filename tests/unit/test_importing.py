"""Objects named as `module:attribute`: where they are looked for, and what a mistake says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.importing import load_object, source_of
from tests.conftest import Command


def test_an_object_is_found_beside_the_recipe_and_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        folder.mkdir()
    (recipes / "beside_recipe_m.py").write_text(
        "def later():\n    import neighbour_m\n    return neighbour_m.VALUE\nclass A:\n    class B: pass\n"
    )
    (recipes / "neighbour_m.py").write_text("VALUE = 7\n")
    (here / "in_cwd_m.py").write_text("def f(): return 2\n")
    monkeypatch.chdir(here)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    assert load_object("beside_recipe_m:later", "x", recipes)() == 7  # neighbours are found after the import too
    assert load_object("beside_recipe_m:A.B", "x", recipes).__name__ == "B"
    assert load_object("in_cwd_m:f", "x", recipes)() == 2
    assert load_object("json:dumps", "x")({}) == "{}"
    assert source_of("in_cwd_m:f") == here / "in_cwd_m.py" and source_of("sys:exit") is None
    assert sys.path[: len(before)] == before  # nothing that is installed is hidden


def test_a_module_of_ones_own_goes_before_an_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    (tmp_path / "this.py").write_text("def mine(): return 1\n")
    assert load_object("this:mine", "x", tmp_path)() == 1
    del sys.modules["this"]


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("nothing", "expected module:attribute, for example my_module:my_function"),
        ("a b:c", "expected module:attribute"),
        (":f", "expected module:attribute"),
        ("broken_m:", "expected module:attribute"),
        ("absent_m:f", r"there is no module 'absent_m' in .*put absent_m.py there, or set PYTHONPATH"),
        (
            "needs_m:f",
            r"importing needs_m failed: ModuleNotFoundError: No module named 'absent_lib' \(.*needs_m.py, line 2\)",
        ),
        ("broken_m:f", r"importing broken_m failed: SyntaxError: .*broken_m.py, line 1"),
        ("raises_m:f", r"importing raises_m failed: ZeroDivisionError: division by zero \(.*raises_m.py, line 1\)"),
        ("good_m:functon", r"good_m \(.*good_m.py\) has no 'functon'; did you mean 'function'\?"),
        ("good_m:number", "number of good_m .* is a int; expected a function or a class"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, text: str) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "needs_m.py").write_text("\nimport absent_lib\n")
    (tmp_path / "broken_m.py").write_text("def f(:\n")
    (tmp_path / "raises_m.py").write_text("1 / 0\n")
    (tmp_path / "good_m.py").write_text("def function(): ...\nnumber = 3\n")
    with pytest.raises(RecipeError, match=text) as raised:
        load_object(reference, "credit.centering", tmp_path)
    assert f"credit.centering = {reference!r}" in str(raised.value)
    for name in ("needs_m", "broken_m", "raises_m", "good_m"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["ctcgrpo.environments.openenv", "ctcgrpo.simulator.openenv"])
def test_openenv_that_is_not_installed_is_named_with_its_extra(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openenv"]:
        monkeypatch.delitem(sys.modules, name)
    for name in (module, "ctcgrpo.environments.openenv_server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "openenv", None)
    if module == "ctcgrpo.simulator.openenv":
        code, _, err = ctcgrpo("serve", "--openenv")
        assert code == 2 and "--openenv needs the extra openenv: pip install '.[openenv]'" in err
    else:
        with pytest.raises(RecipeError, match=r"OpenEnv needs the extra openenv: pip install '.\[openenv\]'"):
            load_object(f"{module}:OpenEnv", "environment.factory")
