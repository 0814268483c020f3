"""YAML of hostile size is refused in a moment, with a message that somebody can read; messages cut the values that they quote."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios
from ctcgrpo.errors import CtcGrpoError, RecipeError
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.util.naming import cut, did_you_mean, quoted
from ctcgrpo.util.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, load_yaml
from tests.conftest import ROOT

TINY = ROOT / "recipes" / "tiny.yaml"


def laughs(levels: int = 9, form: str = "[{}]") -> str:
    """Ten times as many values with each level."""
    lines = ["l0: &l0 [x]" if form == "[{}]" else "l0: &l0 {k: 1}"]
    lines += [f"l{k}: &l{k} " + form.format(",".join([f"*l{k - 1}"] * 10)) for k in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases": laughs(),
    "aliases in mappings": laughs(form="{{a: [{}]}}"),
    "merged aliases": laughs(form="{{<<: [{}]}}"),
    "its own anchor": "a: &a {b: *a}",
    "its own anchor in a list": "a: &a [[*a]]",
    "deep lists": "a: " + "[" * 60 + "]" * 60,
    "deep mappings": "a: " + "{a: " * 60 + "1" + "}" * 60,
    "very deep": "a: " + "[" * 5_000,
    "deep by aliases": "a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 30 + "*a" + "]" * 30,
    "too long": "a: " + "x" * MAX_CHARACTERS,
    "a long key twice": f"{'k' * 900}: 1\n{'k' * 900}: 2",
    "a long alias": "a: *" + "x" * 10_000,
    "a long tag": "a: !" + "x" * 10_000 + " 1",
    "a number of many digits": "a: " + "9" * 5000,
    "a number of many bits": "a: 0x" + "f" * 50_000,
    "a list as a key": "? [a]\n: 1",
    "keys twice among many": "".join(f"k{k}: 1\n" for k in range(8000)) + "k0: 1\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_a_moment(text: str, tmp_path: Path) -> None:
    started = time.process_time()
    with pytest.raises(yaml.YAMLError) as refused:
        load_yaml(text)
    assert 0 < len(str(refused.value)) < 900 and time.process_time() - started < 4
    file = tmp_path / "file.yaml"
    file.write_text(text)
    for load in (load_recipe, load_sweep):
        with pytest.raises(RecipeError, match=r"file.yaml: not valid YAML: ") as said:
            load(file)
        assert len(str(said.value)) < 1200
    if "\n" not in text:
        with pytest.raises(RecipeError, match="the value is not valid YAML: ") as said:
            load_recipe(TINY, [f"policy.model={{{text}}}"])
        assert len(str(said.value)) < 1200


def test_honest_yaml_is_read() -> None:
    assert load_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert load_yaml("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)) is not None
    assert load_yaml(f"a: {2**63}\nb: 0x1F\nc: 1_000\n") == {"a": 2**63, "b": 31, "c": 1000}
    assert load_yaml("") is None
    for file in (*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "configs").rglob("*.yaml")):
        assert load_yaml(file.read_text(encoding="utf-8")) is not None


def test_time_grows_with_the_number_of_keys_and_no_faster() -> None:
    def seconds(keys: int) -> float:
        text = "".join(f"k{k}: 1\n" for k in range(keys))
        started = time.process_time()
        assert len(load_yaml(text)) == keys
        return time.process_time() - started

    seconds(100)
    assert min(seconds(8000) for _ in range(2)) < 3 * 8 * min(seconds(1000) for _ in range(3))


@pytest.mark.parametrize(
    "override",
    [
        "policy.model=[" + ",".join(["x"] * 20_000) + "]",
        "policy.model={" + ",".join(f"k{k}: {k}" for k in range(5_000)) + "}",
        "credit.centering=" + "x" * 100_000,
        "credit.alpha=" + "x" * 100_000,
        "credit={" + "x" * 100 + ": 1}",
        "x" * 100_000 + "=1",
        "credit." + "x" * 100_000 + "=1",
        "run.name." + "x" * 100_000 + "=1",
        "x" * 100_000,
        "rollout.vllm.urls=[" + "x" * 100_000 + "]",
        "scenarios.scenes=[" + ",".join(["x"] * 20_000) + "]",
        "scoring.turn_weights={" + "x" * 100_000 + ": [1, 1]}",
        "simulator.url=ftp://" + "x" * 100_000,
    ],
    ids=lambda text: text[:24],
)
def test_messages_quote_no_more_than_somebody_reads(override: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError) as refused:
        load_recipe(TINY, [override])
    assert 20 < len(str(refused.value)) < 1200 and time.process_time() - started < 5


def test_messages_about_scenarios_are_cut(tmp_path: Path) -> None:
    record = json.loads((PACKS / "english" / "test" / "charm_final.jsonl").read_text().split("\n")[0])
    for change in (
        {"scene_tag": "x" * 100_000},
        {"title": ["x"] * 50_000},
        {"id": "x" * 100_000, "goal_one_liner": 3},
        {"success_criteria": {str(k): 1 for k in range(20_000)}},
    ):
        (tmp_path / "s.jsonl").write_text(json.dumps({**record, **change}))
        with pytest.raises(CtcGrpoError) as refused:
            load_scenarios(tmp_path / "s.jsonl")
        assert str(tmp_path) in str(refused.value) and len(str(refused.value)) < 1200


def test_cutting_says_so() -> None:
    assert cut("short") == "short" and quoted("it's") == '"it\'s"'
    assert cut("x" * 1000) == "x" * 200 + "... (1000 characters)"
    assert did_you_mean("alpa", ["alpha", "gamma"]) == "did you mean 'alpha'?"
    assert did_you_mean("zzz", [f"name-{k:03}" for k in range(400)]).endswith("name-029, and 370 more")
    assert did_you_mean("zzz", ["a", "b"]) == "known: a, b"
