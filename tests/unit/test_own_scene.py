"""A scene of one's own is data: a set with it is validated, counted, checked, trained on and reported; near-misses are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario, in_order
from ctcgrpo.environments.eibench.scenario_format import check_record
from ctcgrpo.environments.eibench.scenarios import load_scenarios, load_scenes, read_records
from ctcgrpo.factory.anchors import anchor_problems
from ctcgrpo.reference.metrics import entry_of
from ctcgrpo.report.page import figures_of
from ctcgrpo.report.reading import read_run
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from tests.conftest import Command
from tests.dialogue import converse
from tests.unit.test_run import FAST, TINY
from tests.unit.test_simulator_prompts import request

NAME = "negotiation"


def records(count: int = 4) -> list[dict[str, Any]]:
    found = [record for _, record in read_records("english/train", "train") if record["scene_tag"] == "support"]
    return [{**record, "id": f"n-{k}", "scene_tag": NAME} for k, record in enumerate(found[:count])]


def written(folder: Path, found: list[dict[str, Any]]) -> Path:
    file = folder / f"{NAME}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in found))
    return file


def test_a_set_with_a_scene_of_ones_own_is_validated_counted_and_split(tmp_path: Path, ctcgrpo: Command) -> None:
    file = written(tmp_path, records())
    code, out, err = ctcgrpo("scenarios", "validate", str(file))
    assert code == 0, err
    assert f"4 {NAME}" in out and f"note: {NAME}: not a published scene (support, defense, repair, charm)" in out
    code, out, err = ctcgrpo("scenarios", "stats", str(file), "--picture", str(tmp_path / "p.png"))
    assert code == 0 and f"{NAME} (4)" in out and (tmp_path / "p.png").exists(), err
    code, _, err = ctcgrpo("scenarios", "split", str(file), str(tmp_path / "split"), "--share", "0.5")
    assert code == 0 and (tmp_path / "split" / "test" / f"{NAME}_final.jsonl").exists(), err
    code, _, err = ctcgrpo("scenarios", "new", str(tmp_path / "new.jsonl"), "--scene", NAME)
    assert code == 0, err
    (scenario,) = load_scenarios(tmp_path / "new.jsonl")
    assert (scenario.scene, scenario.id) == (NAME, f"my-{NAME}-01")


def test_it_is_checked_trained_on_and_reported(tmp_path: Path, ctcgrpo: Command) -> None:
    file = written(tmp_path, records())
    held = written(
        tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path,
        [{**record, "id": f"h{record['id']}"} for record in records(2)],
    )
    mine = [f"scenarios.train={file}", f"scenarios.scenes=[{NAME}]", "scenarios.per_step=2", f"run.output_dir={tmp_path}"]
    mine += [f"scoring.turn_weights={{{NAME}: [0.2, 0.8]}}", f"validation.scenarios={held}", "validation.every=1"]
    code, out, err = ctcgrpo("check", TINY, *FAST, *mine)
    assert code == 0, out + err
    code, _, err = ctcgrpo("train", TINY, *FAST, *mine)
    assert code == 0, err
    logged = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert any(f"outcome/{NAME}" in line for line in logged)
    code, _, err = ctcgrpo("report", str(tmp_path / "tiny"))
    assert code == 0, err
    figures = figures_of(read_run(tmp_path / "tiny"))
    assert figures["tags"] == [NAME] and NAME in figures["training"][0] and NAME in figures["validations"][0]["scores"]


def test_a_recipe_of_the_published_scenes_names_what_it_leaves_out(tmp_path: Path) -> None:
    whole = [record for _, record in read_records("english/train", "train")] + records()
    file = written(tmp_path, whole)
    found = load_scenes(file, SCENES)
    assert len(found.scenarios) == 64
    assert found.report() == [f"{file}: 4 {NAME} left out; scenarios.scenes names the scenes that are trained on"]
    assert load_scenes(file, [NAME]).report() == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("scenarios.scenes=[suport]", "asks for suport, which english/train has none of; it has 16 charm"),
        ("scenarios.scenes=[suport]", "; try 'scenarios.scenes=[charm,defense,repair,support]'"),
        (
            "scoring.turn_weights={suport: [0.5, 0.5]}",
            "turn_weights: 'suport' is not in scenarios.scenes; did you mean 'support'",
        ),
    ],
)
def test_scenes_that_a_recipe_misspells_are_named(override: str, problem: str, ctcgrpo: Command, tmp_path: Path) -> None:
    code, _, err = ctcgrpo("train", TINY, "scenarios.per_step=4", f"run.output_dir={tmp_path}", override)
    assert code in (2, 3) and problem in err


@pytest.mark.parametrize(
    ("tag", "problem"),
    [
        ("suport", "did you mean 'support'"),
        ("", "a name of your own"),
        ("../x", "a name of your own"),
        ("a b", "a name of your own"),
    ],
)
def test_names_that_no_scene_can_have_are_faults(tag: str, problem: str) -> None:
    scenario, faults = check_record({**records(1)[0], "scene_tag": tag}, "f, line 1")
    assert scenario is None and problem in str(faults[0])


def test_who_opens_and_whether_anger_may_rise_are_data() -> None:
    (record,) = records(1)
    silent = {**record, "aggressor_profile": {**record["aggressor_profile"], "opening_line": ""}}
    scenario, faults = check_record(silent, "f, line 1")
    assert scenario is not None and not scenario.opening_line and not faults
    scenario, faults = check_record({**silent, "scene_tag": "support"}, "f, line 1")
    assert scenario is None and "in support the user speaks first" in str(faults[0])
    risen = {
        **record,
        "rub_goals": {**record["rub_goals"], "target_anger": record["initial_calibration"]["initial_anger"] + 5},
    }
    assert list(anchor_problems(risen, NAME)) == list(anchor_problems(risen, "defense")) == []
    assert list(anchor_problems(risen, "support"))
    assert in_order([NAME, "charm", "support"]) == ["support", "charm", NAME]
    assert entry_of(f"outcome/{NAME}") is not None and entry_of("eval/episodes/failed") is not None


def test_both_users_play_it() -> None:
    record = records(1)[0]
    own, published = (
        Scenario(**{**_fields(scenario), "id": "same"})
        for scenario in (check_record({**record, "scene_tag": scene}, "f")[0] for scene in (NAME, "support"))
        if scenario is not None
    )
    replies = ["Tell me what happened.", "That must have been hard."]
    assert converse(own, replies) == converse(published, replies)
    system, _ = TemplatePrompts().messages(request("Hello.", scenario=own))
    assert f"# The scene: {NAME}" in system["content"]
    assert NAME not in SCENES


def _fields(scenario: Scenario) -> dict[str, Any]:
    return {name: getattr(scenario, name) for name in Scenario.__dataclass_fields__}
