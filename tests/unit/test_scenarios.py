"""Reading scenarios: the bundled pack is sound, the EIBench format is understood, and every mistake is named."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario, UserState
from ctcgrpo.environments.eibench.scenario_format import read_record
from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios, load_scenes, load_set, read_scenarios
from ctcgrpo.errors import ScenarioError
from ctcgrpo.simulator.protocol import ScenarioCard
from tests.conftest import SHARED_DATA

USER_SECTIONS = ["Background", "Role and stance", "Speaking style", "Known facts", "Behaviour and preferences", "Aim"]
POLICY_SECTIONS = ["Background", "Role and stance", "Known facts", "Core goal"]

FROZEN = {
    "charm": "c72ae6f5b008ab04e43fb847da96099110e8f6dddcf3a3e0caf92f9c9b5bf6b5",
    "defense": "8e31dd6a2c056b2c60a0b6c299535e22400f63602b972ce905dc3bca6ce768fc",
    "repair": "25a003a1710d8542847ba16c417e4f1795122c7d70903c9a229182cd03774251",
    "support": "44cdcae7230a0cb65f5918af524b86f95e2501837662e8b400365b24be7871ea",
}


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "id": "support-1",
        "title": "A title",
        "scene_tag": "support",
        "aggressor_profile": {"system_prompt": "You are Ann.", "opening_line": "I lost it."},
        "defender_profile": {"system_prompt": "You are Bob."},
        "initial_calibration": {"initial_anger": 70, "initial_trust": 40},
        "rub_goals": {"target_anger": 20, "target_trust": 80, "note": "kept"},
        "worst_case": {"worst_anger_min": 90, "worst_trust_min": 10, "reason": "because"},
        "something_else": 7,
    }


def write(folder: Path, *records: Any, name: str = "support_final.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return file


def test_a_record_becomes_a_scenario(tmp_path: Path, record: dict[str, Any]) -> None:
    (scenario,) = load_scenarios(write(tmp_path, record))
    assert (scenario.id, scenario.scene, scenario.opening_line) == ("support-1", "support", "I lost it.")
    assert scenario.anchors == (UserState(70, 40), UserState(20, 80), UserState(90, 10))
    assert scenario.extras["something_else"] == 7
    assert scenario.language == "en" and scenario.opening_line


def test_records_may_be_wrapped_and_the_policy_opens_in_charm(tmp_path: Path, record: dict[str, Any]) -> None:
    record |= {"scene_tag": "Charm"}
    (scenario,) = load_scenarios(write(tmp_path, {"row": record}))
    assert scenario.scene == "charm" and not scenario.opening_line


def test_initial_values_may_stand_under_meta_config(record: dict[str, Any]) -> None:
    plain = read_record(record, "x")
    initial = record.pop("initial_calibration")
    moved = read_record({**record, "meta_config": {"initial_calibration": initial, "other": 1}}, "x")
    assert moved.anchors == plain.anchors and moved.extras["meta_config"]["other"] == 1
    assert read_record({**record, "meta_config": {"other": 1}}, "x").anchors.initial == (50, 50)
    both = {
        **record,
        "initial_calibration": {**initial, "initial_anger": 69},
        "meta_config": {"initial_calibration": initial},
    }
    with pytest.raises(
        ScenarioError, match=r"initial_calibration is .*69.*, and meta_config.initial_calibration is .*70.*; keep one"
    ):
        read_record(both, "x")


def test_missing_anchors_take_the_defaults_of_the_split(tmp_path: Path, record: dict[str, Any]) -> None:
    for key in ("rub_goals", "worst_case"):
        del record[key]
    file = write(tmp_path, record)
    assert load_scenarios(file, "train")[0].anchors == ((70, 40), (0, 100), (100, 0))
    assert load_scenarios(file, "test")[0].anchors == ((70, 40), (70, 40), (95, 20))
    del record["initial_calibration"]
    assert load_scenarios(write(tmp_path, record), "train")[0].anchors == ((50, 50), (0, 100), (100, 0))


def test_a_target_anger_above_the_initial_one_is_a_boundary_not_a_mistake(tmp_path: Path, record: dict[str, Any]) -> None:
    record["rub_goals"]["target_anger"] = 80
    assert load_scenarios(write(tmp_path, record))[0].anchors.target.anger == 80


def test_a_folder_with_both_splits(tmp_path: Path, record: dict[str, Any]) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split, record | {"id": split})
    assert [s.id for s in load_scenarios(tmp_path, "train")] == ["train"]
    assert [s.id for s in load_scenarios(tmp_path, "test")] == ["test"]


def test_datasets_are_found_under_the_data_home(tmp_path: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path))
    with pytest.raises(ScenarioError, match=r"'eibench/train' not found.*ctcgrpo scenarios fetch eibench"):
        load_scenarios("eibench/train")
    (tmp_path / "eibench" / "train").mkdir(parents=True)
    write(tmp_path / "eibench" / "train", record)
    assert len(load_scenarios("eibench/train")) == 1


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    *parents, last = path.split(".")
    target = record
    for parent in parents:
        target = target[parent]
    if value is None:
        target.pop(last)
    else:
        target[last] = value
    return record


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("scene_tag", "suport", r"line 2.*scene_tag is 'suport'; did you mean 'support'\?"),
        ("scene_tag", "suport", r"scene_tag is 'suport'; did you mean 'support'\?"),
        ("scene_tag", None, "scene_tag is missing"),
        ("aggressor_profile.system_prompt", "  ", "aggressor_profile.system_prompt is '  '; a persona cannot be empty"),
        ("defender_profile.system_prompt", "", "defender_profile.system_prompt is ''; a persona cannot be empty"),
        ("aggressor_profile.opening_line", "", "in support the user speaks first"),
        ("initial_calibration.initial_anger", 170, r"initial_anger is 170; it must lie in \[0, 100\]"),
        ("initial_calibration.initial_anger", "much", "initial_anger is 'much'; .*valid integer"),
        ("worst_case.worst_anger_min", 60, r"worst_anger_min is 60; it must not lie below the initial \(70\)"),
        ("rub_goals.target_trust", 30, r"trust \(worst, initial, target\) is \(10, 40, 30\); the three must not decrease"),
        ("worst_case.worst_trust_min", 45, r"is \(45, 40, 80\)"),
        ("rub_goals.target_angr", 30, "did you mean 'target_anger'"),
        ("id", " ", "an id cannot be empty"),
    ],
)
def test_mistakes_are_named_with_file_line_field_and_value(
    tmp_path: Path, record: dict[str, Any], path: str, value: Any, message: str
) -> None:
    broken = changed(changed(record, "id", "other"), path, value)
    if path == "rub_goals.target_angr":
        del broken["rub_goals"]["target_anger"]
    file = write(tmp_path, record, broken)
    with pytest.raises(ScenarioError, match=message) as error:
        load_scenarios(file)
    assert f"{file}, line 2" in str(error.value)


def test_a_misspelt_section_is_not_taken_for_an_extra_key(tmp_path: Path, record: dict[str, Any]) -> None:
    record["worst_cases"] = record.pop("worst_case")
    with pytest.raises(ScenarioError, match="worst_cases is unknown and worst_case is missing; did you mean 'worst_case'"):
        load_scenarios(write(tmp_path, record))


def test_broken_files(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match=r"line 3: not valid JSON: .* at column"):
        load_scenarios(write(tmp_path, record, "", '{"id": '))
    with pytest.raises(ScenarioError, match="line 1: expected a JSON object, got a list"):
        load_scenarios(write(tmp_path, [1]))
    with pytest.raises(ScenarioError, match="'nowhere.jsonl': no such file or folder"):
        load_scenarios("nowhere.jsonl")
    with pytest.raises(ScenarioError, match="holds no scenarios"):
        load_scenarios(write(tmp_path, ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScenarioError, match=r"no \*\.jsonl or \*\.json"):
        load_scenarios(tmp_path / "empty")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScenarioError, match="cannot be read as UTF-8"):
        load_scenarios(tmp_path / "binary.jsonl")


def test_lines_end_at_newlines_alone(tmp_path: Path, record: dict[str, Any]) -> None:
    odd = json.dumps(record | {"title": "a\u2028b\x85c"}, ensure_ascii=False)
    file = tmp_path / "odd.jsonl"
    file.write_text("\ufeff" + odd + "\n", encoding="utf-8")
    assert load_scenarios(file)[0].title == "a\u2028b\x85c"


def test_evaluation_defaults_beyond_the_scale_can_be_played(tmp_path: Path, record: dict[str, Any]) -> None:
    for key in ("rub_goals", "worst_case"):
        del record[key]
    record["initial_calibration"]["initial_anger"] = 85
    (scenario,) = load_scenarios(write(tmp_path, record), "test")
    assert scenario.anchors.worst.anger == 110
    assert tuple((anchor.anger, anchor.trust) for anchor in ScenarioCard.of(scenario).anchors) == scenario.anchors


def test_a_duplicate_id_names_both_places(tmp_path: Path, record: dict[str, Any]) -> None:
    file = write(tmp_path, record, record)
    with pytest.raises(ScenarioError, match=r"line 2: id 'support-1' is already used at .*line 1"):
        load_scenarios(file)


def test_a_duplicate_key_is_refused_at_any_depth(tmp_path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    for old, key in (('"title": "A title"', "title"), ('"initial_anger": 70', "initial_anger")):
        file = write(tmp_path, record, line.replace(old, f"{old}, {old}"))
        with pytest.raises(ScenarioError, match=rf"line 2: .*duplicate key '{key}'"):
            load_scenarios(file)


@pytest.mark.parametrize(
    "path",
    ["title", "id", "aggressor_profile.system_prompt", "defender_profile.system_prompt", "extra", "script.lines.flat"],
)
def test_a_lone_surrogate_is_refused_with_its_field(tmp_path: Path, record: dict[str, Any], path: str) -> None:
    record["script"] = {"lines": {"flat": "x"}}
    record["extra"] = "x"
    file = write(tmp_path, changed(record, path, "half of one: \ud83d."))
    with pytest.raises(ScenarioError) as error:
        load_scenarios(file)
    assert f"{file}, line 1" in str(error.value) and f"{path} holds a lone surrogate ('\\ud83d'" in str(error.value)
    str(error.value).encode()  # it can be printed
    whole = changed(record, path, "whole: \U0001f600")
    assert len(load_scenarios(write(tmp_path, whole))) == 1


def test_all_faults_of_all_records_are_found_at_once(tmp_path: Path, record: dict[str, Any]) -> None:
    first = changed(changed(record, "scene_tag", "suport"), "initial_calibration.initial_anger", 170)
    first["title"] = 5
    first["rub_goals"]["target_anger"] = "much"
    second = changed(changed(changed(record, "id", "b"), "aggressor_profile.opening_line", ""), "defender_profile", None)
    third = changed(changed(record, "id", "c"), "worst_case.worst_anger_min", 1)
    file = write(tmp_path, first, "{", second, third, changed(record, "id", "d"))
    found = read_scenarios(file)
    assert [s.id for s in found.scenarios] == ["d"] and (found.records, found.skipped) == (5, 4)
    assert [(f.place.rpartition(" ")[2], f.field) for f in found.faults] == [
        ("1", "title"),
        ("1", "rub_goals.target_anger"),
        ("1", "scene_tag"),
        ("1", "initial_calibration.initial_anger"),
        ("2", ""),
        ("3", "defender_profile"),
        ("3", "aggressor_profile.opening_line"),
        ("4", "worst_case.worst_anger_min"),
    ]
    with pytest.raises(ScenarioError, match=rf"line 1: .*\(7 more; `ctcgrpo scenarios validate {file}` lists all\)"):
        load_scenarios(file)


def of_ids(record: dict[str, Any], ids: str) -> list[dict[str, Any]]:
    return [record | {"id": name} for name in ids]


def out_of_order(record: dict[str, Any], name: str) -> dict[str, Any]:
    return changed(record | {"id": name}, "rub_goals.target_trust", 30)


def test_a_record_out_of_order_is_left_out_and_reported_with_its_line(tmp_path: Path, record: dict[str, Any]) -> None:
    file = write(tmp_path, *of_ids(record, "abcd"), out_of_order(record, "e"), '{"id": ')
    found = load_set(file)
    assert [s.id for s in found.scenarios] == list("abcd") and (found.records, found.skipped) == (6, 2)
    told, first, second = found.report()
    assert told == f"{file}: 2 of 6 records are invalid and left out (skip; refuse stops instead)"
    assert first.startswith(f"  {file}, line 5: scenario 'e': trust (worst, initial, target) is (10, 40, 30)")
    assert second.startswith(f"  {file}, line 6: not valid JSON")
    with pytest.raises(ScenarioError, match=rf"line 5: scenario 'e': trust .*\(1 more; `ctcgrpo scenarios validate {file}`"):
        load_set(file, invalid="refuse")
    assert load_set(write(tmp_path, record)).report() == []


def test_a_long_report_ends_with_the_command_that_lists_all(tmp_path: Path, record: dict[str, Any]) -> None:
    bad = [out_of_order(record, f"bad-{k}") for k in range(25)]
    report = load_set(write(tmp_path, *of_ids(record, "abcdefghijklmnopqrstuvwxyz"), *bad)).report()
    assert len(report) == 22 and report[-1].startswith("  and 5 more; `ctcgrpo scenarios validate ")


def test_what_no_run_can_leave_out(tmp_path: Path, record: dict[str, Any]) -> None:
    """Two records with one id, the invalid one included; a file without a valid record; more than half of a set."""
    good = of_ids(record, "abcd")
    for other in (record | {"id": "a", "title": "Another"}, out_of_order(record, "a")):
        for records in ([*good, other], [other, *good]):
            with pytest.raises(ScenarioError, match=r"id 'a' is already used at .*ids must be unique"):
                load_set(write(tmp_path, *records))
    assert load_set(write(tmp_path, *good, good[0])).skipped == 1  # a repetition: there is no doubt which is meant
    half = [out_of_order(record, name) for name in "efgh"]
    assert len(load_set(write(tmp_path, *good, *half)).scenarios) == 4
    with pytest.raises(ScenarioError, match="5 of 9 records are invalid, more than half.*the first problem: .*line 5"):
        load_set(write(tmp_path, *good, *half, out_of_order(record, "i")))
    write(tmp_path, *good)
    file = write(tmp_path, "# no", "# JSON", name="notes.jsonl")
    with pytest.raises(ScenarioError, match=r"notes.jsonl: none of its 2 records is valid") as error:
        load_set(tmp_path)
    assert str(error.value).startswith(f"{file}, line 1: not valid JSON")


def test_a_scene_that_only_invalid_records_had_is_missed(tmp_path: Path, record: dict[str, Any]) -> None:
    file = write(tmp_path, *of_ids(record, "ab"), out_of_order(record | {"scene_tag": "repair"}, "c"))
    assert load_scenes(file, ["support"]).skipped == 1
    with pytest.raises(ScenarioError, match="asks for repair, which .* has none of; 1 invalid records are left out"):
        load_scenes(file, ["support", "repair"])


@pytest.mark.parametrize(
    "source, message",
    [
        ("english/trian", "did you mean 'english/train'?"),
        ("chinse", "did you mean 'chinese'?"),
        ("./english", "no such file or folder"),
        ("~/nothing/here", "no such file or folder"),
        ("checkpoints/set", "no such file or folder"),
        ("mine.jsonl", "no such file or folder"),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        load_scenarios(source)
    assert f"scenarios {source!r}" in str(error.value) and message in str(error.value)


def sections(persona: str) -> list[str]:
    return [line.removeprefix("### ") for line in persona.splitlines() if line.startswith("### ")]


def test_the_bundled_pack() -> None:
    train, test = load_scenarios("english/train", "train"), load_scenarios("english/test", "test")
    assert Counter(s.scene for s in train) == dict.fromkeys(SCENES, 16)
    assert Counter(s.scene for s in test) == dict.fromkeys(SCENES, 4)
    everything = [*train, *test]
    assert len({s.id for s in everything}) == len(everything) == len({s.title for s in everything})
    assert len({s.user_persona[:80] for s in everything}) == len(everything)
    for s in everything:
        assert sections(s.user_persona) == USER_SECTIONS, s.id
        assert sections(s.policy_persona) == POLICY_SECTIONS, s.id
        assert (not s.opening_line) == (s.scene == "charm"), s.id
        initial, target, worst = s.anchors
        assert target.anger + 20 <= initial.anger <= worst.anger - 15, s.id
        assert worst.trust + 15 <= initial.trust <= target.trust - 20, s.id
        assert len(s.script["details"]) == 6 and s.goal and s.success_criteria and s.must_avoid, s.id
        assert s.extras["licence"] == "Apache-2.0", s.id


def bundled() -> list[Scenario]:
    return [s for pack in ("english", "chinese") for split in ("train", "test") for s in load_scenarios(f"{pack}/{split}", split)]


def test_anger_of_the_bundled_users_is_as_far_from_the_target_as_in_eibench() -> None:
    for s in bundled():
        initial, target, worst = s.anchors
        assert target.anger < initial.anger <= worst.anger - 15 and worst.trust < initial.trust < target.trust, s.id
        if s.scene != "charm":
            assert 35 <= initial.anger - target.anger <= 60, s.id
        if s.scene == "defense":
            assert 70 <= initial.anger <= 85, s.id


@pytest.mark.parametrize(
    ("pack", "words", "scene"),
    [
        ("english", "You are drunk", "defense"),
        ("english", "You flirt", "defense"),
        ("english", "You flirt", "charm"),
        ("english", "You are in panic", "support"),
        ("chinese", "你喝醉了", "defense"),
        ("chinese", "你就说俏皮话", "defense"),
        ("chinese", "撩他两句", "charm"),
        ("chinese", "你慌得厉害", "support"),
    ],
)
def test_kinds_of_users_as_in_eibench(pack: str, words: str, scene: str) -> None:
    assert [s.id for s in load_scenarios(f"{pack}/train", "train") if s.scene == scene and words in s.user_persona]


def test_core_goals_of_the_bundled_policies_say_what_the_role_wants_and_not_how_to_get_it() -> None:
    """The way to it stands in the goal and the success criteria, which the policy is not told."""
    for s in bundled():
        goal = s.policy_persona.splitlines()[-1]
        assert len(re.findall(r"[.!?;。！？；]", goal)) == 1, s.id
        assert s.scene == "charm" or goal.startswith(("You want ", "你")), s.id


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the EIBench example record is not part of this project")
def test_a_real_eibench_record() -> None:
    (scenario,) = load_scenarios(SHARED_DATA / "eibench", "test")
    assert (scenario.id, scenario.scene, scenario.language) == ("scene_support_12", "support", "zh")
    assert scenario.anchors == ((75, 60), (25, 90), (90, 10))
    assert scenario.extras["strip_defender_strategy_ok"] is True
    assert scenario.extras["prompt"][1]["content"] == scenario.opening_line


def test_the_held_out_scenarios_are_frozen() -> None:
    """The bundled test split as it stands before any policy is tuned on this revision of the packs; tuning validates on scenarios
    13 to 16 of each scene of the training split, and trains on 1 to 12. Figures of earlier revisions name theirs."""
    files = {file.stem.removesuffix("_final"): file for file in (PACKS / "english" / "test").glob("*.jsonl")}
    assert {scene: hashlib.sha256(file.read_bytes()).hexdigest() for scene, file in files.items()} == FROZEN
