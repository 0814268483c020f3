"""Writing scenarios with a model: an endpoint over loopback that answers as models do, killed half-way, and paid for once."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenario_format import read_record
from ctcgrpo.environments.eibench.scenarios import load_scenarios, read_records
from ctcgrpo.errors import RecipeError, ScenarioError
from ctcgrpo.factory.cleaning import by_rule, unkept
from ctcgrpo.factory.config import load_factory_config
from ctcgrpo.factory.drafts import read_draft, schema, shown
from ctcgrpo.factory.gate import gate
from ctcgrpo.factory.generate import generate, messages
from ctcgrpo.factory.layout import layouts
from ctcgrpo.factory.rules import problems
from ctcgrpo.factory.sampling import Seed, Wanted, pools, wanted
from ctcgrpo.factory.storage import write_layout
from tests.conftest import ROOT, Command
from tests.fake_writer import FakeWriter

MISTAKES = {"fenced": 0.1, "missing": 0.1, "ranges": 0.1, "refusal": 0.04, "copy": 0.04, "truncated": 0.05}
CONCURRENCY = 8


def written(tmp_path: Path, url: str, **changes: Any) -> Path:
    file = tmp_path / "factory.yaml"
    endpoint = {"url": url, "model": "writer", "concurrency": CONCURRENCY, "seed": True}
    endpoint |= {"price": {"prompt": 1.0, "completion": 2.0}}
    settings = {
        "writer": {"endpoints": [endpoint], "deadline": 20.0},
        "store": str(tmp_path / "store"),
        "language": "en",
        "examples": "english/train",
        "shots": 1,
        "prefix": "new",
        "licence": "CC0-1.0",
        "source": "test-set",
    }
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def lines(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["requests"]
    return found


def test_two_hundred_are_asked_for_killed_half_way_and_each_ends_as_something(tmp_path: Path, ctcgrpo: Command) -> None:
    fake = FakeWriter(mistakes=MISTAKES, rates={"429": 0.03, "500": 0.03}, delay=0.02, retry_after="0.05")
    with fake.serving():
        file = written(tmp_path, fake.url)
        out = tmp_path / "out"
        command = [sys.executable, "-m", "ctcgrpo", "scenarios", "generate", str(file), str(out), "--count", "200"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
        deadline = time.monotonic() + 120
        while len(fake.told) < 100 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        paid_before = len(fake.requests) - sum(fake.faults.values())
        assert 100 <= paid_before < 250 and not (out / "report.json").exists()
        code, said, problem = ctcgrpo("scenarios", "generate", str(file), str(out), "--count", "200")
        assert code == 0, problem
        answered = Counter(json.dumps([body["messages"], body["seed"]]) for body in fake.requests)
        again = sum(answered.values()) - sum(fake.faults.values()) - len(answered)
        assert again <= CONCURRENCY, "only what was under way when it was killed is asked for again"

        report = lines(out)
        states = Counter(line["status"] for line in report)
        assert len(report) == 200 and set(states) == {"valid", "repaired", "rejected"} and states.total() == 200
        by_mistake = {name: [k for k, v in fake.told.items() if v == name] for name in (*MISTAKES, "")}
        assert states["repaired"] == len(by_mistake["ranges"]) and all(
            line["repairs"] for line in report if line["status"] == "repaired"
        )
        copies = len(by_mistake["copy"])
        rejected = [line for line in report if line["status"] == "rejected"]
        assert all(line["reasons"] for line in rejected)
        refused = [line for line in rejected if "holds no JSON object, but says" in line["reasons"][0]]
        alike = [line for line in rejected if "is like new-" in line["reasons"][0]]
        assert len(refused) == len(by_mistake["refusal"]) and all(line["attempts"] == 3 for line in refused)
        assert 0 < len(alike) < copies and len(rejected) == len(refused) + len(alike)
        assert {f"{line['scene']}" for line in report} == set(SCENES)
        assert f"200 requested: {states['rejected']} rejected, {states['repaired']} repaired, {states['valid']} valid" in said
        assert f"{report[0]['id']}" == "new-support-0001"
        for line in report:
            for told in (*line["repairs"], *line["reasons"]):
                assert f"{line['id']}: {line['status']}: {told}" in said
        # What was charged for is on the account: all answers but those that were under way when it was killed.
        [spent] = re.findall(r"(\d+) calls, (\d+) \+ (\d+) tokens, ([\d.]+) USD", said)
        assert abs(int(spent[0]) - (len(fake.requests) - sum(fake.faults.values()))) <= CONCURRENCY

        records = list(read_records(out))
        assert len(records) == 200 - len(rejected) and list(problems(records)) == []
        assert all(r["licence"] == "CC0-1.0" and r["data_source"] == "test-set" for _, r in records)
        seeds = [tuple(line["seed"][k] for k in ("theme", "keyword", "relationship", "place")) for line in report]
        assert len(set(seeds)) == 200
        before, files = len(fake.requests), {f.name: f.read_bytes() for f in out.iterdir()}
        assert ctcgrpo("scenarios", "generate", str(file), str(out), "--count", "200")[0] == 0
        assert len(fake.requests) == before, "everything is paid for"
        assert {f.name: f.read_bytes() for f in out.iterdir()} == files, "and comes out alike"


def test_held_out_sets_dead_endpoints_and_budgets(tmp_path: Path, ctcgrpo: Command) -> None:
    fake = FakeWriter()
    with fake.serving():
        file = written(tmp_path, fake.url)
        outcomes, _ = generate(load_factory_config(file), count=4, log_line=lambda text: None)
        records = [outcome.record or {} for outcome in outcomes]
        assert [o.status for o in outcomes] == ["valid"] * 4
        held, _ = generate(load_factory_config(file), count=4, held_out=records[:1], log_line=lambda text: None)
        assert [o.status for o in held] == ["rejected", "valid", "valid", "valid"]
        assert "is like new-support-0001 of a held-out set (copy, 1.00)" in held[0].reasons[0]
        fake.down = True
        more = written(tmp_path, fake.url, seed=1, writer={**yaml.safe_load(file.read_text())["writer"], "deadline": 1.0})
        code, said, problem = ctcgrpo("scenarios", "generate", str(more), str(tmp_path / "none"), "--count", "2")
        assert code == 10 and "2 unanswered" in said and "2 requests got no answer; the same command re-runs them" in problem
        fake.down = False
        assert ctcgrpo("scenarios", "generate", str(more), str(tmp_path / "none"), "--count", "2")[0] == 0
        poor = written(tmp_path, fake.url, seed=2, store=str(tmp_path / "other"), budget={"tokens": 30_000})
        code, said, problem = ctcgrpo("scenarios", "generate", str(poor), str(tmp_path / "poor"), "--count", "40")
        assert code == 8 and "budget of 30000 tokens is spent" in problem


def test_a_folder_of_somebody_else_is_left_alone_before_anything_is_paid_for(tmp_path: Path, ctcgrpo: Command) -> None:
    fake = FakeWriter()
    with fake.serving():
        file = written(tmp_path, fake.url)
        mine = tmp_path / "mine"
        write_layout([r for _, r in read_records("english", "test")], mine)
        before = {f.name: f.read_bytes() for f in mine.iterdir()}
        for _ in range(2):
            code, _, problem = ctcgrpo("scenarios", "generate", str(file), str(mine), "--count", "4")
            assert code == 6 and "already exists" in problem and not fake.requests
        assert {f.name: f.read_bytes() for f in mine.iterdir()} == before
        (tmp_path / "file").write_text("x")
        code, _, problem = ctcgrpo("scenarios", "generate", str(file), str(tmp_path / "file"), "--count", "4")
        assert code == 6 and not fake.requests
        ours = str(tmp_path / "ours")
        assert ctcgrpo("scenarios", "generate", str(file), ours, "--count", "4")[0] == 0
        other = written(tmp_path, fake.url, prefix="other")
        code, _, problem = ctcgrpo("scenarios", "generate", str(other), ours, "--count", "4")
        assert code == 6 and "ours contains a set of another configuration; choose another folder" in problem
        (tmp_path / "ours" / "notes.txt").write_text("x")
        code, _, problem = ctcgrpo("scenarios", "generate", str(written(tmp_path, fake.url)), ours, "--count", "8")
        assert code == 6 and "notes.txt, which is not of this set" in problem
        (tmp_path / "ours" / "notes.txt").unlink()
        assert ctcgrpo("scenarios", "generate", str(file), ours, "--count", "8")[0] == 0
        assert len(load_scenarios(ours)) == 8


def test_examples_that_show_nothing_are_said_so(tmp_path: Path) -> None:
    plain = [{k: v for k, v in r.items() if k != "script"} for _, r in read_records("english", "test")]
    write_layout(plain, tmp_path / "plain")
    file = written(tmp_path, "http://127.0.0.1:1/v1", examples=str(tmp_path / "plain"))
    with pytest.raises(ScenarioError, match="holds no scenario of support, defense, repair, charm in 'en' with a script"):
        generate(load_factory_config(file), count=1)


def asked(scene: Any = "support") -> Wanted:
    return Wanted("x-1", scene, Seed("t", "k", "r", "p", "high", "dry"), ())


def as_draft(scene: str) -> dict[str, Any]:
    record = next(r for _, r in read_records("english", "train") if r["scene_tag"] == scene)
    draft: dict[str, Any] = json.loads(shown(record, read_record(record, "here")))
    return draft


def read(draft: Any, scene: str = "support") -> Any:
    text = draft if isinstance(draft, str) else json.dumps(draft)
    return read_draft(text, asked(scene), language="en", licence="L", source="S")


@pytest.mark.parametrize("scene", SCENES)
def test_an_example_is_a_draft_and_becomes_the_record_that_it_was(scene: str) -> None:
    record = next(r for _, r in read_records("english", "train") if r["scene_tag"] == scene)
    found = read(as_draft(scene), scene)
    assert found.faults == [] and found.moves == []
    for field in ("title", "aggressor_profile", "defender_profile", "goal_one_liner", "rub_goals", "prompt", "script"):
        assert found.record[field] == record[field], field
    assert found.record["seed"]["keyword"] == "k" and found.record["licence"] == "L"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "no", "<think>{}</think>", '{"title": 3', "null", "{}" * 50, "\u0000{", "{" * 5000]
)
def test_whatever_an_answer_is_it_raises_nothing(text: str) -> None:
    found = read(text)
    assert found.record is None and found.faults


def test_what_is_wrong_with_a_draft_is_told_to_its_writer() -> None:
    draft = as_draft("support")
    del draft["goal"]
    draft["anchors"]["initial_anger"] = "a lot"
    assert sorted(read(draft).faults) == [
        "anchors.initial_anger: input should be a valid number, unable to parse string as a number",
        "goal: field required",
    ]
    draft = as_draft("support")
    draft["details"][2]["words"] = ["elsewhere", "nowhere"]
    draft["title"] = "[name] at the door"
    assert read(draft).faults == [
        "details.2.words: none of them is in the line",
        "title: contains a placeholder ('[name]')",
    ]
    assert "opening_line: the policy speaks first" in read(as_draft("support"), "charm").faults[0]
    assert any("limit: at least four words" in fault for fault in read(as_draft("support"), "defense").faults)
    assert any("aggressor_profile.opening_line" in fault for fault in read(as_draft("charm"), "support").faults)
    draft = as_draft("support")
    draft["anchors"] |= {"worst_anger": 1e400, "target_trust": float("nan")}
    assert read(draft).faults
    fenced = f"<think>let me see {{}}</think>Sure!\n```json\n{json.dumps(as_draft('support'), indent=1)}\n```\nDone."
    assert read(fenced).faults == []


def test_the_schema_is_one_that_endpoints_take() -> None:
    told = schema()
    parts = [told, *told["$defs"].values()]
    assert all(part["additionalProperties"] is False and part["required"] == list(part["properties"]) for part in parts)
    assert "default" not in json.dumps(told)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_seeds_are_drawn_evenly_alike_and_never_twice(language: str) -> None:
    found = pools(language)
    assert set(found.themes) == set(found.relationships) == set(SCENES)
    examples: dict[Any, list[str]] = {scene: ["a", "b", "c"] for scene in SCENES}
    drawn = wanted(found, count=800, examples=examples, prefix="x")
    assert drawn == wanted(found, count=800, examples=examples, prefix="x")
    assert drawn[:100] == wanted(found, count=100, examples=examples, prefix="x")
    assert drawn != wanted(found, count=800, examples=examples, prefix="x", seed=1)
    core = [(w.scene, w.seed.theme, w.seed.keyword, w.seed.relationship, w.seed.place) for w in drawn]
    assert len(set(core)) == 800 and len({w.id for w in drawn}) == 800
    themes = Counter((w.scene, w.seed.theme) for w in drawn)
    assert set(themes.values()) == {25}, "200 a scene over 8 themes"
    assert all(len(w.examples) == 2 for w in drawn)


def test_seeds_that_do_not_reach(tmp_path: Path) -> None:
    file = tmp_path / "seeds.yaml"
    few = {
        "themes": {"support": {"a": ["b"]}},
        "relationships": {"support": ["c", "d"]},
        "places": ["e"],
        "intensity": ["f"],
    }
    file.write_text(yaml.safe_dump(few))
    with pytest.raises(RecipeError, match="seeds.yaml: personalities is missing"):
        pools(file)
    for changes, problem in [
        ({"places": ["e", "e"]}, r"places is \['e', 'e'\]; duplicate 'e'"),
        ({"themes": {"support": {"a": []}}}, r"themes.support.a is \[\]; tuple should have at least 1 item"),
        ({"themes": {"support": {}}}, "themes.support: Dictionary should have at least 1 item"),
        ({"colours": ["red"]}, "unknown field colours"),
    ]:
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(few | {"personalities": ["g"]} | changes))
        with pytest.raises(RecipeError, match=problem):
            pools(tmp_path / "bad.yaml")
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(few | {"personalities": ["g"]}))
    assert len(wanted(pools(file), count=2, scenes=("support",), examples={}, prefix="x")) == 2
    with pytest.raises(ScenarioError, match="fewer combinations of seeds than requested"):
        wanted(pools(file), count=3, scenes=("support",), examples={}, prefix="x")
    with pytest.raises(ScenarioError, match="no themes or relationships for scene 'charm'"):
        wanted(pools(file), count=3, scenes=("charm",), examples={}, prefix="x")
    with pytest.raises(RecipeError, match="seeds 'e' not found"):
        pools("e")


def test_a_writer_that_is_unavailable_is_waited_for(tmp_path: Path) -> None:
    """Beyond its deadline, and with a word about it."""
    said: list[str] = []
    llm = FakeWriter()
    plain = llm.handle

    async def first_full(request: web.Request) -> web.StreamResponse:
        if llm.requests:
            return await plain(request)
        llm.requests.append({})
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "2"})

    llm.handle = first_full  # type: ignore[method-assign]
    with llm.serving():
        file = written(tmp_path, llm.url)
        settings = yaml.safe_load(file.read_text())
        settings["writer"] |= {"deadline": 1.0, "patience": 20.0}
        settings["writer"]["endpoints"][0]["concurrency"] = 1
        file.write_text(yaml.safe_dump(settings))
        outcomes, _ = generate(load_factory_config(file), count=2, log_line=said.append)
    assert {outcome.status for outcome in outcomes} == {"valid"}
    assert any("every LLM endpoint is unavailable" in text and "slow down" in text for text in said)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "factory").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_configurations(file: Path) -> None:
    config = load_factory_config(file)
    assert config.language in layouts() and "~" not in str(config.store)
    for scene in config.scenes:
        one = wanted(pools(config.language), count=1, scenes=(scene,), examples={}, prefix="x")[0]
        system, user = messages(config, one, ["EXAMPLE"])
        assert one.seed.keyword in user["content"] and "EXAMPLE" in user["content"] and "====" not in system["content"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"language": "fr"}, "language: known: en, zh"),
        ({"examples": None}, "shots is 1, but examples names no set"),
        ({"prefix": "a b"}, "prefix is 'a b'"),
        ({"budget": {"money": 3.0}, "writer": {"endpoints": [{"url": "http://x/v1", "model": "m"}]}}, "needs the price"),
        ({"writers": 1}, "unknown field writers; did you mean 'writer'"),
    ],
)
def test_what_is_wrong_with_a_configuration(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_factory_config(written(tmp_path, "http://127.0.0.1:1/v1", **changes))


# --- the gate and cleaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["english", "chinese"])
def test_the_bundled_packs_pass_the_gate(name: str, ctcgrpo: Command) -> None:
    for split in ("train", "test"):
        code, out, problem = ctcgrpo("scenarios", "gate", name, "--split", split)
        assert code == 0 and "scenarios pass; mean outcomes: good +" in out, problem


def test_what_does_not_pass_the_gate_is_reported(tmp_path: Path, ctcgrpo: Command) -> None:
    records = [copy.deepcopy(r) for _, r in read_records("english", "train") if r["scene_tag"] == "support"][:3]
    del records[0]["script"]
    for detail in records[1]["script"]["details"]:  # nothing that anybody could find
        detail |= {"words": ["the"], "sense": ["and", "of"], "line": "The."}
    write_layout(records, tmp_path / "set")
    code, out, problem = ctcgrpo("scenarios", "gate", str(tmp_path / "set"))
    assert code == 3 and "2 of 3 scenarios" in problem
    assert (
        "support-train-01: its record has no script" in out
        and "nan" not in out
        and "support-train-02: the good policy is not 0.3 ahead" in out
    )
    french = load_scenarios(tmp_path / "set")[2]
    from dataclasses import replace

    assert "no canned policies in 'fr'" in gate(replace(french, language="fr")).problem


def test_cleaning_by_rule_and_by_model(tmp_path: Path, ctcgrpo: Command) -> None:
    records = [copy.deepcopy(r) for _, r in read_records("english", "train") if r["scene_tag"] == "support"][:4]
    whole = copy.deepcopy(records)
    records[0]["rub_goals"]["target_anger"] = 77
    system = records[1]["defender_profile"]["system_prompt"]
    marked = re.sub(r"^### (.+)$", r"**\1**", system, flags=re.M)
    records[1]["defender_profile"]["system_prompt"] = records[1]["prompt"][0]["content"] = marked
    for k in (2, 3):  # no titles at all
        user = records[k]["aggressor_profile"]
        user["system_prompt"] = "\n".join(line for line in user["system_prompt"].splitlines() if not line.startswith("#"))
        user["system_prompt"] = re.sub(r"^\d\. ", "", user["system_prompt"], flags=re.M)
    records[3]["aggressor_profile"]["system_prompt"] += "\nUNFAITHFUL"
    write_layout(records, tmp_path / "set")
    code, out, problem = ctcgrpo("scenarios", "clean", str(tmp_path / "set"), str(tmp_path / "by_rule"))
    assert code == 3 and "2 left, 2 mended" in out and "2 records" in problem
    lines = [json.dumps(r | {"scene_tag": "x/"} if k == 1 else r) for k, r in enumerate(whole[:2])]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines) + "\n")
    code, told, problem = ctcgrpo("scenarios", "clean", str(tmp_path / "odd.jsonl"), str(tmp_path / "odd"))
    assert code == 3 and "1 clean, 1 no scenario; 1 records are in" in told and "odd.jsonl, line 2: " in told
    assert "support-train-02: defender_profile: -**Background**" in out and "+### Background" in out
    assert "support-train-01: rub_goals.target_anger: 77 -> 70" in out
    repaired, mended = [r for _, r in read_records(tmp_path / "by_rule")][:2]
    assert mended == whole[1], "the prompt follows its profile"
    assert list(problems([("x", repaired)])) == [] and repaired["aggressor_profile"] == whole[0]["aggressor_profile"]
    fake = FakeWriter()
    with fake.serving():
        file = written(tmp_path, fake.url)
        arguments = ("scenarios", "clean", str(tmp_path / "set"), str(tmp_path / "by_model"), "--config", str(file))
        code, out, problem = ctcgrpo(*arguments)
        assert code == 3 and "1 laid out again, 1 left, 2 mended" in out
        assert len(fake.requests) == 2, "only what a rule could not mend"
        assert "support-train-04: left: aggressor_profile: 'A different person altogether" in out and "comes in" in out
        found = [r for _, r in read_records(tmp_path / "by_model")]
        assert found[3] == records[3], "an answer that says something else is not taken"
        body = found[2]["aggressor_profile"]["system_prompt"]
        assert [p for p in problems([("x", found[2])]) if p.rule == "layout"] == []
        words = re.findall(r"[A-Za-z]+", "".join(line for line in body.splitlines(True) if not line.startswith("#")))
        assert words == re.findall(r"[A-Za-z]+", records[2]["aggressor_profile"]["system_prompt"])


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("You owe 700 euros since 2019.", "You owe 7 euros since 1999.", "'You owe 700 euros since 2019.' is lost"),
        ("You did not hit her. You ran.", "You did hit her. You ran.", "comes in"),
        ("You owe Ann.", "Ann owe You.", "is lost"),
        ("You are Ann.\n### Secret: you stole it.\nYou hide.", "You are Ann.\nYou hide.", "'Secret: you stole it.' is lost"),
        ("Ты Анна. Ты боишься.", "Ты Анна.", "is lost"),
        ("你叫葛桂枝。你做豆腐。", "你叫葛桂枝。", "is lost"),
        ("- You are Ann.\n- You sing.", "### Background\n1. You sing.\n2. You are Ann.", ""),
        ("**Background**\nYou are Ann. You sing.", "### Background\nYou sing.\n\n### Aim\nYou are Ann.", ""),
    ],
)
def test_what_a_new_layout_may_do_to_a_text(before: str, after: str, problem: str) -> None:
    found = unkept(before, after, "zh" if "葛" in before else "en")
    assert (problem in " ".join(found)) if problem else not found, found


def test_numbers_that_open_a_line_are_no_marks() -> None:
    draft = as_draft("support")
    draft["user"]["facts"][0] = "3.5 million is owed."
    assert "1. 3.5 million is owed." in read(draft).record["aggressor_profile"]["system_prompt"]
    persona = "### Known facts\n08:15 the train leaves\n3.5 million is owed\n- You sing."
    record = copy.deepcopy(next(r for _, r in read_records("english", "train")))
    record["aggressor_profile"]["system_prompt"] = persona
    cleaned = by_rule(record, "here")
    assert cleaned.record["aggressor_profile"]["system_prompt"] == persona and cleaned.status == "left"
    broken = by_rule(record | {"scene_tag": "x/"}, "a, line 3")
    assert broken.status == "no scenario" and "a, line 3" in broken.reasons[0]
    for prompt in ("hello", None, ["a"], [{"role": "system"}], [{"role": "system", "content": None}]):
        assert by_rule(record | {"prompt": prompt}, "here").status == "left"
    record["initial_calibration"] = {"initial_anger": float("nan"), "initial_trust": 10**400}
    assert "initial_anger is missing, or not a number near [0, 100]" in " ".join(by_rule(record, "here").reasons)
