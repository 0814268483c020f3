"""The scenario factory: every rule is broken once and named, anchors move as little as they can, planted leaks are found."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenarios import PACKS as PACK_FOLDER
from ctcgrpo.environments.eibench.scenarios import load_scenarios, read_records
from ctcgrpo.errors import OutputError, RecipeError, ScenarioError
from ctcgrpo.factory.anchors import anchor_problems, nearest_levels, repaired
from ctcgrpo.factory.duplicates import clusters, duplicates, held_out, text_of, to_drop
from ctcgrpo.factory.example import write_example
from ctcgrpo.factory.gate import gate
from ctcgrpo.factory.layout import layout_problems, mended, sections
from ctcgrpo.factory.rules import problems
from ctcgrpo.factory.stats import effective, stats_of, tables_of, write_picture
from ctcgrpo.factory.storage import from_dataset, load_splits, save_dataset, to_dataset, with_origin, write_layout
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning
from tests.conftest import SHARED_DATA, Command

Record = dict[str, Any]
PACKS = ("english", "chinese")


def pack(name: str, *splits: str) -> list[Record]:
    return [record for split in splits or ("train", "test") for _, record in read_records(name, split)]  # type: ignore[arg-type]


@pytest.fixture
def record() -> Record:
    return copy.deepcopy(of_support()[0])


def of_support() -> list[Record]:
    return [record for record in pack("english", "train") if record["scene_tag"] == "support"]


# --- rules -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_packs_keep_every_rule(name: str, split: Any) -> None:
    records = list(read_records(name, split))
    assert list(problems(records)) == []
    assert len(records) == {"english": {"train": 64, "test": 16}, "chinese": {"train": 32, "test": 8}}[name][split]
    by_scene = [record["scene_tag"] for _, record in records]
    assert {by_scene.count(scene) for scene in SCENES} == {len(records) // 4}
    assert all(record["licence"] == "Apache-2.0" and record["data_source"] == f"ctcgrpo-{name}" for _, record in records)


@pytest.mark.parametrize("name", PACKS)
def test_a_card_comes_with_each_pack(name: str) -> None:
    card = (PACK_FOLDER / name / "CARD.md").read_text(encoding="utf-8")
    for part in ("What they are", "How they were made", "Checked", "Licence**: Apache-2.0", "Limits"):
        assert part in card


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the EIBench example record is not part of this project")
def test_a_real_eibench_record_keeps_every_rule() -> None:
    assert list(problems(read_records(SHARED_DATA / "eibench" / "test_support_example.jsonl", "test"))) == []


BROKEN: list[tuple[Callable[[Record], Any], str, str, str]] = [
    (lambda r: r.update(scene_tag="suport"), "format", "scene_tag", "is 'suport'"),
    (
        lambda r: r["initial_calibration"].update(initial_anger=72),
        "anchors",
        "initial_calibration.initial_anger",
        "multiple of 5",
    ),
    (lambda r: r["rub_goals"].update(target_anger=90), "anchors", "anger", "target < initial < worst"),
    (lambda r: r["worst_case"].pop("worst_trust_min"), "anchors", "worst_case.worst_trust_min", "is missing"),
    (lambda r: r.update(title=" "), "whole", "title", "missing or empty"),
    (lambda r: r.update(must_avoid=[]), "whole", "must_avoid", "missing or empty"),
    (lambda r: r.pop("data_source"), "whole", "data_source", "missing or empty"),
    (
        lambda r: r["defender_profile"].update(system_prompt="Be kind."),
        "length",
        "defender_profile.system_prompt",
        "8 characters",
    ),
    (lambda r: r["prompt"].pop(), "prompt", "prompt", "has the roles ['system']"),
    (lambda r: r["prompt"][1].update(content="Hello."), "prompt", "prompt", "its user message"),
    (lambda r: r.update(goal_one_liner="Comfort [name] well."), "written", "goal_one_liner", "placeholder ('[name]')"),
    (lambda r: r["must_avoid"].append("```json"), "written", "must_avoid.3", "markup"),
    (lambda r: r["must_avoid"].append("As an AI I have no feelings"), "written", "must_avoid.3", "refusal"),
    (lambda r: r.update(goal_one_liner="陪她把这个早晨熬过去，不要急着下结论"), "language", "goal_one_liner", "not in 'en'"),
    (lambda r: r["script"]["details"][0].pop("words"), "script", "script.details.0.words", "field required"),
    (lambda r: r["script"].update(detials=[]), "script", "script.detials", "did you mean 'details'?"),
]


@pytest.mark.parametrize(("break_it", "rule", "field", "message"), BROKEN, ids=lambda x: x if isinstance(x, str) else "")
def test_each_broken_rule_is_named_with_file_line_and_field(
    record: Record, break_it: Callable[[Record], Any], rule: str, field: str, message: str
) -> None:
    break_it(record)
    found = [p for p in problems([("a.jsonl, line 3", record)]) if p.rule == rule]
    assert found and all(p.place == "a.jsonl, line 3" and p.id == record["id"] for p in found)
    assert any(p.field == field and message in p.message for p in found), [str(p) for p in found]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scene", SCENES)
def test_an_example_keeps_every_rule_and_its_notes_name_every_field(tmp_path: Path, scene: str, language: str) -> None:
    file, notes = write_example(tmp_path / "new" / "mine.jsonl", scene, language)
    assert list(problems(read_records(file))) == []
    (scenario,) = load_scenarios(file)
    assert (scenario.scene, scenario.language) == (scene, language) and not gate(scenario).problem
    assert unscripted_warning([scenario], "training scenarios") is None
    text = notes.read_text(encoding="utf-8")

    def leaves(value: Any, path: str) -> set[str]:
        if isinstance(value, dict) and path not in ("script.lines", "script.boundary", "script.repair"):
            return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}".strip("."))}
        return leaves(value[0], f"{path}[]") if path == "script.details" else {path}

    (record,) = (r for _, r in read_records(file))
    told = {field for field in leaves(record, "") if f"| `{field}` |" in text}
    assert leaves(record, "") - told == {"worst_case.reason"}  # kept, and read by nobody
    for kept in (file, notes):
        before = kept.read_bytes()
        with pytest.raises(OutputError, match="exists already"):
            write_example(tmp_path / "new" / "mine.jsonl", scene, language)
        assert kept.read_bytes() == before
    with pytest.raises(RecipeError, match=r"expected a name that ends in .jsonl; try .*mine.jsonl"):
        write_example(tmp_path / "mine.json", scene, language)


def test_scenarios_without_a_script_are_warned_of() -> None:
    scenarios = load_scenarios("english/train")
    assert unscripted_warning(scenarios, "training scenarios") is None
    bare = [dataclasses.replace(s, script={"lines": {}}) for s in scenarios[:5]]
    warning = unscripted_warning([*bare, *scenarios[5:]], "training scenarios") or ""
    assert warning.startswith(f"5 of {len(scenarios)} training scenarios have no script.details ({bare[0].id}, {bare[1].id}, ")
    assert "ctcgrpo scenarios new" in warning and "simulator.config" in warning


def test_an_id_that_is_used_twice_names_both_places(record: Record) -> None:
    (found,) = problems([("a, line 1", record), ("b, line 2", record)])
    assert str(found) == f"b, line 2: {record['id']}: id: is used at a, line 1 already [unique]"


def test_layouts_are_broken_and_mended() -> None:
    persona = pack("english", "train")[0]["aggressor_profile"]["system_prompt"]
    assert list(layout_problems(persona, "user", "en")) == []
    titles = [title for title, _ in sections(persona)]
    messy = "\n".join(
        f"**{line.removeprefix('### ')}:**" if line.startswith("### ") else re.sub(r"^(\d)\. ", r"- ", line)
        for line in persona.splitlines()
    )
    assert len(list(layout_problems(messy, "user", "en"))) >= len(titles)
    assert mended(messy, "user", "en") == persona, "nothing but its form had changed"
    parts = persona.split("### ")
    assert "out of order" in " ".join(layout_problems("### ".join(["", *reversed(parts[1:])]), "user", "en"))
    assert (
        list(layout_problems(mended("### ".join(["", *(p + "\n\n" for p in reversed(parts[1:]))]), "user", "en"), "user", "en"))
        == []
    )
    assert list(layout_problems(persona.replace("### Aim", "### Aims"), "user", "en")) == [
        "section 'Aim' is missing ('Aims' is there)",
        "section 'Aims' is unknown",
    ]
    assert "text before the first section ('Hello.')" in list(layout_problems("Hello.\n" + persona, "user", "en"))
    assert "duplicate section 'Aim'" in list(layout_problems(persona + "\n\n### Aim\nx", "user", "en"))
    assert "not a numbered list" in " ".join(layout_problems(re.sub(r"^1\. ", "", persona, flags=re.M), "user", "en"))
    assert mended(persona + "\n\n### Secrets\nx", "user", "en").endswith("### Secrets\nx"), "what is unknown stays"
    assert list(layout_problems("anything", "user", "fr")) == []


# --- anchors ---------------------------------------------------------------------------------------------------------------------


@given(
    axis=st.sampled_from(["anger", "trust"]),
    scene=st.sampled_from(SCENES),
    values=st.tuples(*[st.integers(-20, 130)] * 3),
)
def test_anchors_move_no_further_than_they_must(axis: str, scene: str, values: tuple[int, int, int]) -> None:
    a, b, c = nearest_levels(axis, scene, values)
    assert all(x % 5 == 0 and 0 <= x <= 100 for x in (a, b, c))
    if axis == "trust":
        assert c < a < b
    elif scene == "defense":
        assert a < c and b < c
    else:
        assert b < a < c
    moved = sum(abs(x - y) for x, y in zip((a, b, c), values, strict=True))
    levels = range(0, 101, 5)
    initial, target, worst = values
    # No single level could be moved back towards what was given without breaking a rule: checked against all triples by hand.
    best = min(
        abs(x - initial) + abs(y - target) + abs(z - worst)
        for x in levels
        for y in levels
        for z in levels
        if (z < x < y if axis == "trust" else (x < z and y < z) if scene == "defense" else y < x < z)
    )
    assert moved == best


def test_repairs_are_told_and_leave_the_rest_alone(record: Record) -> None:
    record["initial_calibration"] = {"initial_anger": 73, "initial_trust": 40, "note": "kept"}
    record["rub_goals"]["target_trust"] = 40
    after, moves = repaired(record, "support")
    assert {m.field: (m.before, m.after) for m in moves} == {
        "initial_calibration.initial_anger": (73, 75),
        "rub_goals.target_trust": (40, 45),
    }
    assert after["initial_calibration"] == {"initial_anger": 75, "initial_trust": 40, "note": "kept"}
    assert list(anchor_problems(after, "support")) == [] and record["rub_goals"]["target_trust"] == 40
    assert repaired(after, "support") == (after, [])
    del record["worst_case"]["worst_anger_min"]
    with pytest.raises(ValueError, match=r"worst_case.worst_anger_min is missing"):
        repaired(record, "support")


# --- duplicates ------------------------------------------------------------------------------------------------------------------

SYNONYMS = dict(
    pair.split("=")
    for pair in """
afraid=scared; angry=furious; ask=inquire; asks=inquires; bad=awful; because=since; begin=start; big=large;
boss=manager; brother=sibling; buy=purchase; child=kid; children=kids; doctor=physician; father=dad; fear=dread;
friend=mate; get=obtain; good=fine; help=assist; home=house; job=post; know=realise; little=small; look=glance;
man=fellow; money=cash; mother=mum; much=plenty; never=not once; night=evening; old=aged; only=merely; people=folk;
quick=fast; quiet=silent; road=lane; room=chamber; sad=unhappy; say=remark; says=remarks; see=notice; shop=store;
short=brief; sister=sibling; speak=talk; street=lane; talk=chat; tell=inform; think=believe; tired=weary;
told=informed; want=wish; woman=lady; work=labour; years=seasons; you=yourself
""".replace("\n", " ")
    .strip()
    .split("; ")
)


def paraphrased(record: Record, rng: random.Random, *, share: float) -> Record:
    """Sentences in another order, synonyms, and a share of all other long words exchanged for strangers."""
    vocabulary = sorted(set(re.findall(r"[a-z]{4,}", " ".join(map(text_of, pack("english"))).lower())))
    told = copy.deepcopy(record)
    for profile in ("aggressor_profile", "defender_profile"):
        lines = []
        for line in told[profile]["system_prompt"].splitlines():
            if line.startswith("###"):
                lines.append(line)
                continue
            parts = re.split(r"(?<=[.!?])\s+", line)
            rng.shuffle(parts)
            lines.append(" ".join(re.sub(r"[A-Za-z']+", lambda m: _other(m[0], vocabulary, rng, share), part) for part in parts))
        told[profile]["system_prompt"] = "\n".join(lines)
    told |= {"id": "leak", "title": "Another title", "goal_one_liner": "Another goal."}
    return told


def _other(word: str, vocabulary: list[str], rng: random.Random, share: float) -> str:
    if word.lower() in SYNONYMS:
        return SYNONYMS[word.lower()]
    return rng.choice(vocabulary) if len(word) > 3 and rng.random() < share else word


def paraphrased_in_chinese(record: Record, rng: random.Random) -> Record:
    """Sentences in another order, and one clause in six left out or said with other words."""
    told = copy.deepcopy(record)
    for profile in ("aggressor_profile", "defender_profile"):
        lines = []
        for line in told[profile]["system_prompt"].splitlines():
            parts = re.split(r"(?<=[。！？])", line)
            if not line.startswith("###"):
                rng.shuffle(parts)
                parts = [re.sub(r"[^，。]+", lambda m: "另外一种说法" if rng.random() < 1 / 6 else m[0], part) for part in parts]
            lines.append("".join(parts))
        told[profile]["system_prompt"] = "\n".join(lines)
    return told | {"id": "leak", "title": "换一个题目", "goal_one_liner": "换一个目标"}


def test_planted_leaks_are_found_and_nothing_else() -> None:
    rng = random.Random(0)
    held = pack("english")
    leaks = [paraphrased(record, rng, share=0.2) for record in held]
    found = {(p.a, p.b) for p in duplicates(leaks, held)}
    recall = sum((k, k) in found for k in range(len(held))) / len(held)
    assert recall >= 0.95 and all(a == b for a, b in found), recall
    chinese = pack("chinese")
    leaks = [paraphrased_in_chinese(record, rng) for record in chinese]
    found = {(p.a, p.b) for p in duplicates(leaks, chinese)}
    assert sum((k, k) in found for k in range(len(chinese))) >= 0.95 * len(chinese) and all(a == b for a, b in found)


@pytest.mark.parametrize("name", PACKS)
def test_no_two_of_a_bundled_pack_are_alike(name: str) -> None:
    records = pack(name)
    assert duplicates(records) == [], "within, over both splits"
    assert duplicates(pack(name, "train"), pack(name, "test")) == []
    assert duplicates(records, threshold=0.25) == [], "and by a wide margin"


def test_copies_levels_and_seeds(record: Record) -> None:
    others = of_support()[1:4]
    same = copy.deepcopy(record) | {"id": "other"}
    seeded = {"seed": {"theme": "loss", "keyword": "Key", "relationship": "friends", "place": "car"}}
    a, b = (
        others[0] | seeded,
        others[1] | {"seed": {**seeded["seed"], "keyword": " key"}, "scene_tag": others[0]["scene_tag"]},
    )
    found = duplicates([record, a, same, b])
    assert [(p.a, p.b, p.level) for p in found] == [(0, 2, "copy"), (1, 3, "same seeds")]
    assert found[0].similarity == pytest.approx(1) and duplicates([record, others[0]]) == []
    assert clusters(found, 4) == [0, 1, 0, 1]
    against = duplicates([a, same], [record, b])
    assert [(p.a, p.b, p.level) for p in against] == [(1, 0, "copy"), (0, 1, "same seeds")]


def test_a_split_is_stratified_and_leaks_nothing() -> None:
    rng = random.Random(1)
    records = pack("english", "train")
    records = [*records, *(paraphrased(r, rng, share=0.1) | {"id": f"p{k}"} for k, r in enumerate(records[::2]))]
    chosen = held_out(records, share=0.2, threshold=0.5)
    train = [r for r, test in zip(records, chosen, strict=True) if not test]
    test = [r for r, test in zip(records, chosen, strict=True) if test]
    assert duplicates(train, test) == []
    for scene in SCENES:
        share = sum(r["scene_tag"] == scene for r in test) / sum(r["scene_tag"] == scene for r in records)
        assert 0.15 < share < 0.25
    assert held_out(records, share=0.2, threshold=0.5) == chosen and held_out(records, share=0.2, threshold=0.5, seed=1) != chosen
    assert not any(held_out(records, share=0.0, threshold=0.5))


@pytest.mark.parametrize(
    ("sizes", "share", "wanted"),
    [
        ([2] * 5, 0.1, 2),
        ([3] * 4, 0.1, 3),
        ([1, 4], 0.8, 4),
        ([1, 3, 3], 0.45, 3),
        ([1] * 10, 0.3, 3),
        ([5], 0.5, 0),
        ([1, 9], 0.9, 9),
    ],
)
def test_the_nearest_share_that_whole_groups_allow(sizes: list[int], share: float, wanted: int) -> None:
    base = of_support()
    records = [copy.deepcopy(base[g]) | {"id": f"{g}-{k}"} for g, size in enumerate(sizes) for k in range(size)]
    assert sum(held_out(records, share=share, threshold=0.5)) == wanted


def test_what_went_takes_nothing_with_it() -> None:
    rng = random.Random(3)
    a, b = of_support()[:2]
    middle = copy.deepcopy(a)
    for profile in ("aggressor_profile", "defender_profile"):  # half a, half b: like both, which are not alike
        middle[profile]["system_prompt"] += b[profile]["system_prompt"]
    a, middle, b = a | {"id": "a"}, middle | {"id": "middle"}, b | {"id": "b"}
    pairs = {(p.a, p.b) for p in duplicates([a, middle, b])}
    assert pairs == {(0, 1), (1, 2)}, rng
    assert set(to_drop([a, middle, b], duplicates([a, middle, b]))) == {1}
    assert set(to_drop([middle, b], duplicates([middle, b]), [a], duplicates([middle, b], [a]))) == {0}


@pytest.mark.parametrize(
    "text", ["Ты Анна, медсестра, и ты боишься утра.", "あなたは看護師のアンナです。朝が怖い。", "당신은 간호사 안나입니다."]
)
def test_copies_are_found_in_any_script(text: str) -> None:
    records = [{"id": k, "scene_tag": "support", "aggressor_profile": {"system_prompt": text}} for k in "ab"]
    assert [p.level for p in duplicates(records)] == ["copy"]


def test_how_alike_two_are_hardly_depends_on_the_others() -> None:
    a, b = of_support()[0], paraphrased(of_support()[0], random.Random(2), share=0.3)
    alone, among = duplicates([a, b])[0].similarity, duplicates([a, b, *of_support()[1:], *pack("chinese")])[0].similarity
    assert alone == pytest.approx(among, abs=0.03)
    assert duplicates(of_support()[:2], threshold=0.25) == []


# --- stats, storage, commands ----------------------------------------------------------------------------------------------------


def test_stats_say_what_there_is(tmp_path: Path) -> None:
    found = stats_of(load_scenarios("chinese", "train"))
    assert found.scenes == dict.fromkeys(SCENES, 8) and found.languages == {"zh": 32} and found.unit == "characters"
    assert sum(found.seeds["place"].values()) == 32 and len(found.lengths["opening line"]["charm"]) == 0
    assert all(d > 0 for by_scene in found.distances.values() for values in by_scene.values() for d in values)
    assert stats_of(load_scenarios("english/train"), lambda text: 7).lengths["user persona"]["support"] == [7] * 16
    assert [len(t.rows) for t in tables_of(found, "t")] == [7, 5]
    assert effective({"a": 5, "b": 5}) == pytest.approx(2) and effective({"a": 9}) == pytest.approx(1)
    write_picture(found, tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_every_value_survives_a_dataset_there_and_back(tmp_path: Path) -> None:
    awkward = {
        "weight": 1.0,
        "count": 1,
        "none": None,
        "deep": {"a": [1, "x", None, {"b": []}]},
        "text": "\u2028\x00é\U0001f600",
    }
    records = [of_support()[0] | {"extra": awkward}, pack("chinese", "test")[0], pack("english", "test")[9]]
    if SHARED_DATA.exists():
        real = [r for _, r in read_records(SHARED_DATA / "eibench" / "test_support_example.jsonl", "test")]
        records += [with_origin(r, licence="CC BY-NC 4.0", source=None) for r in real]
        assert {k: v for k, v in records[-1].items() if k != "licence"} == real[0]
    save_dataset({"train": records[:2], "test": records[2:]}, str(tmp_path / "arrow"))
    back = load_splits(str(tmp_path / "arrow"))
    told = json.dumps([*back["train"], *back["test"]], ensure_ascii=False)
    assert told == json.dumps(records, ensure_ascii=False), "and every key in its place"
    row = to_dataset(records)[0]
    assert (row["id"], row["scene"], row["licence"]) == (records[0]["id"], "support", "Apache-2.0")
    assert [m["role"] for m in row["prompt"]] == ["system", "user"]
    files = write_layout(back["train"], tmp_path / "layout")
    assert sorted(f.name for f in files) == ["support_final.jsonl"] or len(files) == 2
    assert sorted(r["id"] for _, r in read_records(tmp_path / "layout")) == sorted(r["id"] for r in records[:2])
    with pytest.raises(OutputError, match="already exists"):
        write_layout(back["train"], tmp_path / "layout")
    with pytest.raises(OutputError, match="already exists"):
        save_dataset({"train": records}, str(tmp_path / "arrow"))
    with pytest.raises(ScenarioError, match="row 1: no column 'record'"):
        from_dataset([{"id": "x"}], "here")
    with pytest.raises(ScenarioError, match="cannot be read as a dataset"):
        load_splits(str(tmp_path / "layout"))
    with pytest.raises(ScenarioError, match="scene_tag is '../evil'; expected support, defense"):
        write_layout([records[0] | {"scene_tag": "../evil"}], tmp_path / "x")
    with pytest.raises(ScenarioError, match="here, row 1: its record is not valid JSON"):
        from_dataset([{"record": "not json"}], "here")
    with pytest.raises(ScenarioError, match="here, row 1: .*scene_tag"):
        from_dataset([{"record": '{"id": "x"}'}], "here")
    odd = records[0] | {"title": "half a pair \ud800"}
    write_layout([odd], tmp_path / "odd")
    assert [r for _, r in read_records(tmp_path / "odd")] == [odd]
    with pytest.raises(ScenarioError, match="has no licence; set --licence"):
        with_origin({"id": "x", "data_source": "y"}, licence=None, source=None)


def test_the_commands(tmp_path: Path, ctcgrpo: Command) -> None:
    code, out, _ = ctcgrpo("scenarios", "validate", "chinese", "--split", "test")
    assert code == 0 and "8 scenarios (2 charm, 2 defense, 2 repair, 2 support); every rule holds" in out
    records = of_support()
    broken = copy.deepcopy(records[0])
    broken["rub_goals"]["target_anger"], broken["title"] = 74, ""
    write_layout([broken, *records[1:3]], tmp_path / "broken")
    code, out, err = ctcgrpo("scenarios", "validate", str(tmp_path / "broken"))
    assert code == 3 and "support_final.jsonl, line 1: support-train-01: rub_goals.target_anger: is 74" in out
    assert "2 problems in 1 of 3 records" in err and "a run plays them all (--loose " in err
    assert ctcgrpo("scenarios", "validate", str(tmp_path / "broken"), "--loose")[0] == 0
    broken["worst_case"]["worst_anger_min"] = 0
    write_layout([*records[1:3], broken], tmp_path / "invalid")
    told = f"{tmp_path / 'invalid'}: 1 of 3 records are invalid and left out"
    code, out, err = ctcgrpo("scenarios", "validate", str(tmp_path / "invalid"), "--loose")
    assert code == 3 and "a run with scenarios.invalid=skip leaves out 1, and trains on 2" in err
    code, out, err = ctcgrpo("scenarios", "stats", str(tmp_path / "invalid"))
    assert code == 0 and told in err and "2 scenarios" in out
    code, out, err = ctcgrpo("scenarios", "gate", str(tmp_path / "invalid"))
    assert code == 0 and told in err and "2 scenarios pass" in out
    code, _, err = ctcgrpo("scenarios", "split", str(tmp_path / "invalid"), str(tmp_path / "no"))
    assert code == 3 and "line 3: scenario 'support-train-01'" in err  # what is written anew leaves nothing out

    rng = random.Random(0)
    leak = paraphrased(pack("english", "test")[0], rng, share=0.1) | {"id": "leaked"}
    twin = copy.deepcopy(records[1]) | {"id": "twin"}
    write_layout([*records[:8], leak, twin], tmp_path / "dirty")
    code, out, err = ctcgrpo("scenarios", "dedup", str(tmp_path / "dirty"), "--against", "english")
    assert code == 3 and "leaked" in out and "twin" in out and "2 of 10 records are duplicates (1 pairs within, 1 leaks)" in out
    assert "--out FOLDER writes the set without them" in err
    code, out, _ = ctcgrpo(
        "scenarios", "dedup", str(tmp_path / "dirty"), "--against", "english", "--out", str(tmp_path / "clean")
    )
    assert code == 0
    assert [r["id"] for _, r in read_records(tmp_path / "clean")] == [r["id"] for r in records[:8]]
    assert ctcgrpo("scenarios", "dedup", str(tmp_path / "clean"), "--against", "english")[0] == 0

    code, out, _ = ctcgrpo("scenarios", "stats", "chinese", "--picture", str(tmp_path / "s.png"))
    assert code == 0 and "32 scenarios (32 zh)" in out and (tmp_path / "s.png").exists()
    code, out, _ = ctcgrpo("scenarios", "split", "chinese", str(tmp_path / "split"), "--share", "0.25")
    assert code == 0 and "24 records" in out and "8 records" in out
    code, out, _ = ctcgrpo("scenarios", "convert", str(tmp_path / "split"), str(tmp_path / "arrow"))
    assert code == 0 and "24 train, 8 test" in out
    code, out, _ = ctcgrpo("scenarios", "convert", str(tmp_path / "arrow"), str(tmp_path / "back"))
    assert code == 0
    for split in ("train", "test"):
        names = [f"{scene}_final.jsonl" for scene in sorted(SCENES)]
        assert [(tmp_path / "back" / split / n).read_bytes() for n in names] == [
            (tmp_path / "split" / split / n).read_bytes() for n in names
        ]
    for arguments in (("split", "chinese"), ("clean", "chinese"), ("convert", str(tmp_path / "arrow"))):
        code, _, err = ctcgrpo("scenarios", *arguments, str(tmp_path / "split"))
        assert code == 6 and "already exists" in err
    code, _, err = ctcgrpo("scenarios", "stats", "chinese", "--picture", str(tmp_path / "no" / "s.png"))
    assert code == 6 and "cannot write to" in err
    write_layout(
        [records[0] | {"id": "[bold]x[/nope]", "seed": {"theme": "[/x]"}}, records[0] | {"id": "y"}], tmp_path / "markup"
    )
    code, out, err = ctcgrpo("scenarios", "dedup", str(tmp_path / "markup"))
    assert code == 3 and "[bold]x[/nope]" in out
    assert "[/x] 1" in ctcgrpo("scenarios", "stats", str(tmp_path / "markup"))[1]
    write_layout([{**records[0], "prompt": None}, {**records[1], "prompt": 5}], tmp_path / "nulls")
    assert "prompt: is None; expected a list of chat messages" in ctcgrpo("scenarios", "validate", str(tmp_path / "nulls"))[1]
    (tmp_path / "bad.jsonl").write_text("{\n" + json.dumps(records[0] | {"scene_tag": "../war", "title": 5}) + "\n[]\n")
    for how in ((), ("--loose",)):
        code, out, err = ctcgrpo("scenarios", "validate", str(tmp_path / "bad.jsonl"), *how)
        assert code == 3 and "4 problems in 3 of 3 records" in err
        for told in (
            "line 1: not valid JSON",
            f"line 2: {records[0]['id']}: title: is 5; ",
            "line 3: expected a JSON object",
        ):
            assert f"bad.jsonl, {told}" in out
    bare = {key: value for key, value in records[0].items() if key != "script"}
    (tmp_path / "bare.jsonl").write_text(json.dumps(bare) + "\n")
    code, out, _ = ctcgrpo("scenarios", "validate", str(tmp_path / "bare.jsonl"))
    assert code == 0 and f"note: 1 of 1 scenarios have no script.details ({bare['id']})" in out
    code, out, _ = ctcgrpo("scenarios", "new", str(tmp_path / "mine.jsonl"), "--scene", "charm", "--language", "zh")
    assert code == 0 and "mine.jsonl: one complete charm scenario" in out and (tmp_path / "mine.md").exists()
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    code, out, _ = ctcgrpo("scenarios", "validate", str(tmp_path / "deep.jsonl"))
    assert code == 3 and "deep.jsonl, line 1: not " in out
    code, _, err = ctcgrpo("scenarios", "convert", "hf://datasets/a/b", "hf://datasets/c/d")
    assert code == 2 and "source and target are both datasets" in err
