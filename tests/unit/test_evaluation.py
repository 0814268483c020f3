"""Evaluation: protocols by hand and on real files, benchmarks played with models of a table, comparison and ranking."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessageUser, ModelOutput
from matplotlib.image import imread

from ctcgrpo.environments import sage_protocol as sage
from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios
from ctcgrpo.environments.eibench.scoring import outcome_score
from ctcgrpo.errors import OutputError, ScenarioError
from ctcgrpo.evaluation import eqbench3_protocol as eq
from ctcgrpo.evaluation import rescoring
from ctcgrpo.evaluation.benches import EIBENCH
from ctcgrpo.evaluation.compare import compared, most_changed, ranked
from ctcgrpo.evaluation.forest import write_comparison
from ctcgrpo.evaluation.reasons import reason_of
from ctcgrpo.evaluation.results import Line, Result, figures, read_results, reasons, summarise, write_results
from ctcgrpo.evaluation.run import Evaluation, evaluate
from ctcgrpo.util.intervals import share_interval
from tests import inspect_models
from tests.browsing import CHROMIUM
from tests.conftest import SHARED_DATA, Command
from tests.fake_llm import FakeLlm, answered
from tests.unit.test_llm_user import configuration
from tests.unit.test_run import FAST, TINY

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
REAL_SAGE, REAL_EQ = SHARED_DATA / "sage", SHARED_DATA / "eqbench3"
needs_sage = pytest.mark.skipif(not REAL_SAGE.is_dir(), reason=f"SAGE's files are not in {REAL_SAGE}")
needs_eq = pytest.mark.skipif(not REAL_EQ.is_dir(), reason=f"EQ-Bench 3's files are not in {REAL_EQ}")


def play(folder: Path, bench: str = "eibench", model: str = "talker", **options: Any) -> dict[str, Any]:
    return evaluate(Evaluation(bench, f"scripted/{model}", **options), folder, display="none")


# --- SAGE ----------------------------------------------------------------------------------------------------------------------


@needs_sage
@pytest.mark.parametrize(
    ("model", "score", "successes", "failures"), [("gpt-4.1", 68.15, 35, 13), ("llama3.3-70b", 33.25, 7, 47)]
)
def test_released_results_of_sage_are_rescored(
    model: str, score: float, successes: int, failures: int, ctcgrpo: Command, tmp_path: Path
) -> None:
    file = REAL_SAGE / f"{model}_result.jsonl"
    code, out, err = ctcgrpo(
        "evaluate", "sage", "--rescore", str(file), "--simulator", "DeepSeek-V3-1227", "--out", str(tmp_path)
    )
    assert (code, err) == (0, "")
    assert f"{score:.2f}" in out and f"emotion 100: {successes} of 100" in out and f"below 10: {failures} of 100" in out
    assert "DeepSeek-V3-1227" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    low, high = summary["score"]["ci95"]
    assert summary["score"]["mean"] == pytest.approx(score) and low < score < high and 6 < high - low < 16
    assert summary["measures"]["success"]["count"] == successes and summary["measures"]["failure"]["count"] == failures
    assert len(read_results(tmp_path)) == 100 and summary["groups"]["负面型"]["n"] == 41


def test_plans_and_lines_are_read_as_models_write_them() -> None:
    for text, change in {
        "Content: a\nChange: +5": 5,
        "**Change**：-3（有点失望）": -3,
        "[Change]: −7": -7,
        "Analyse: it fell by 30\nChange:\n  +40 at least": 10,
        "Change: -99\nNote: x": -10,
        "Change: 0": 0,
        "Change: 7（满意）": 7,
        "Change: 情绪从40上升到45，+5": 5,
        "Thinking: a\nChange: - 4": -4,
    }.items():
        assert sage.planned_change(text) == change, text
    for text in ("", "nothing", "Change: none", "The change is +3", "Change: from 40 to 45", "Change: 40 到 45"):
        with pytest.raises(sage.Unreadable):
            sage.planned_change(text)
    assert sage.response_text("Thinking: x\nChange: y\nResponse: “好吧。\n再说。”") == "好吧。\n再说。"
    assert sage.response_text("Response: 好吧。\nPS：明天见。") == "好吧。\nPS：明天见。"
    with pytest.raises(sage.Unreadable):
        sage.response_text("Thinking: x\nResponse:  ")
    assert [sage.letter(e) for e in (100, 99, 70, 69, 40, 39, 10, 9, 0)] == list("SAABBCCFF")
    assert sage.is_over(100, "") and sage.is_over(9, "") and not sage.is_over(10, "嗯") and sage.is_over(50, "好，再见！")


@given(st.text())
def test_reading_sage_raises_nothing_else(text: str) -> None:
    for read in (sage.planned_change, sage.response_text):
        try:
            read(text)
        except sage.Unreadable:
            continue


def profile(**changes: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "player": "小云",
        "scene": "加班",
        "main_cha": "被动型",
        "task": "倾听",
        "first_talk": "好累。",
    } | changes


def test_a_dialogue_of_sage_by_hand(tmp_path: Path) -> None:
    """40, and 8 more after each reply: 100 (clamped) after the eighth change, with the user's ninth line. The profiles are where
    they are in a clone of their repository."""
    file = tmp_path / "SAGE" / "profile" / sage.PROFILES
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(profile(), ensure_ascii=False) + "\n" + json.dumps(profile(id="b", main_cha="回避型")) + "\n")
    summary = play(tmp_path / "out", "sage", task={"data": str(tmp_path)}, roles={"simulator": "scripted/confidant"})
    assert summary["score"] == {"mean": 100.0, "ci95": [100.0, 100.0], "n": 2} and summary["failed"] == 0
    assert list(summary["groups"]) == ["被动型", "回避型"] and summary["measures"]["turns"]["mean"] == 9
    assert summary["other"]["models"] == ["scripted/confidant"] and summary["other"]["prompts"].startswith("ctcgrpo-sage/")
    found = read_results(tmp_path / "out")[0]
    assert [line.state["emotion"] for line in found.lines if line.speaker == "user"] == [40, 48, 56, 64, 72, 80, 88, 96, 100]
    assert found.lines[2].text == "嗯，你说得对。" and found.lines[2].why == "觉得被理解了"
    assert found.tokens["simulator"][1] > 0


def test_a_configured_llm_plays_sages_user(tmp_path: Path, ctcgrpo: Command) -> None:
    (tmp_path / sage.PROFILES).write_text("".join(json.dumps(profile(id=name)) + "\n" for name in "ab"))

    def said(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, answered(body, inspect_models.confidant([ChatMessageUser(content=body["messages"][-1]["content"])], None))

    file, price = tmp_path / "user.yaml", {"prompt": 1.0, "completion": 5.0}
    played = ("evaluate", "sage", "--model", "scripted/talker", "--data", str(tmp_path), "--display", "none")
    with provider(said) as llm:
        endpoint = {"url": llm.url, "model": "m", "price": price}
        file.write_text(yaml.safe_dump({"backend": "llm", "llm": {"endpoints": [endpoint], "temperature": 0.4}}))
        code, out, err = ctcgrpo(*played, "--simulator", str(file), "--out", str(tmp_path / "out"))
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["score"]["mean"] == 100.0 and summary["failed"] == 0 and len(llm.requests) == 2 * 2 * 8
    assert {body["temperature"] for body in llm.requests} == {0.4} and "response_format" not in llm.requests[0]
    assert summary["other"]["models"] == ["m"] and summary["tokens"]["simulator"]["output"] > 0
    assert summary["cost"]["simulator"]["money"] > 0 and "simulator: m, prompts ctcgrpo-sage/" in " ".join(out.split())
    for other in ("scripted", "http://127.0.0.1:1"):
        code, _, err = ctcgrpo(*played, "--simulator", other, "--out", str(tmp_path / "none"))
        assert code == 2 and f"simulator = {other!r}: an LLM plays SAGE's user" in err and not (tmp_path / "none").exists()


def test_an_evaluation_that_fails_at_its_start_leaves_nothing(tmp_path: Path, ctcgrpo: Command) -> None:
    out = tmp_path / "out"
    asked = ("evaluate", "eibench", "--model", "scripted/talker", "--simulator", "scripted", "--rounds", "1", "--limit", "2")
    asked += ("--display", "none", "--out", str(out))
    for wrong, hint in ((("-M", "foo=1"), ""), (("--model", "nope/x"), "openai-api/SERVICE/NAME"), (("--tries", "2"), "")):
        code, _, err = ctcgrpo(*asked, *wrong)
        assert code == 2 and not out.exists() and hint in err, err
    with provider(lambda body: (400, "no such model")) as llm:
        file = tmp_path / "user.yaml"
        file.write_text(yaml.safe_dump({"backend": "llm", "llm": {"endpoints": [{"url": llm.url, "model": "m"}]}}))
        code, told, err = ctcgrpo(*asked, "--simulator", str(file))
    assert code == 7 and "no such model" in told, err
    before = (out / "evaluation.json").read_text()
    assert ctcgrpo(*asked, "-M", "foo=1")[0] == 2 and (out / "evaluation.json").read_text() == before
    code, _, err = ctcgrpo(*asked)  # with a user that works: nothing was scored with the other
    assert code == 0 and len(read_results(out)) == 2, err
    code, _, err = ctcgrpo(*asked, "--rounds", "2")
    assert code == 6 and "contains another evaluation (task.rounds: 1 -> 2)" in err


def test_profiles_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="profile.*not found.*--data.*Tencent/digitalhuman"):
        sage.load_profiles(tmp_path)
    file = tmp_path / "p.jsonl"
    for text, problem in {
        "": "no profiles",
        "{": "line 1: not valid JSON",
        "[]": "line 1: expected a JSON object",
        json.dumps(profile(task="")): "line 1: task is missing",
        json.dumps(profile()) + "\n" + json.dumps(profile()): "duplicate id 'a'",
    }.items():
        file.write_text(text)
        with pytest.raises(ScenarioError, match=problem):
            sage.load_profiles(file)
    said = [{"role": "user", "content": "x", "emotion-point": 40}]
    for record, problem in [
        (
            {"id": "a", "character": "c", "emo_point": 50, "history": said},
            "line 1: emo_point = 50; expected 40, the last of its history",
        ),
        ({"character": "c", "emo_point": 40, "history": said}, "line 1: id = None; expected a text"),
        ({"id": "a", "emo_point": 40, "history": said}, "line 1: character = None; expected a text"),
        ({"id": "a", "character": "c", "emo_point": 140, "history": said}, "line 1: emo_point = 140"),
    ]:
        file.write_text(json.dumps(record))
        with pytest.raises(ScenarioError, match=problem):
            rescoring.read_sage(file)


# --- EQ-Bench 3 ----------------------------------------------------------------------------------------------------------------


def eq_folder(folder: Path) -> Path:
    """One scenario of each kind, in the layout of the benchmark's data, with texts of our own."""
    texts = {
        "scenario_prompts.txt": "######## 1 | Work | A desk\n####### Prompt1\nYour desk is gone.\n# not a heading\n"
        "####### Prompt2\nIt is back.\n\n######## 208 | Friend | A note\n####### Prompt1\nWrite to her.\n\n"
        "######## 401 | Analytical Interpretation | A quarrel\n####### Prompt1\nA: {b}\n######## 9 | Work | Nothing yet\n",
        "scenario_master_prompt.txt": "Play: {scenario_prompt}\n# I'm thinking",
        "scenario_master_prompt_message_drafting.txt": "{scenario_prompt}\n# Draft brainstorming",
        "scenario_master_prompt_analysis.txt": "Read: {scenario_prompt}",
        "debrief_prompt.txt": "How did it go?\n",
        "rubric_scoring_criteria.txt": "\n".join(inspect_models.NAMES),
        "rubric_scoring_criteria_analysis.txt": "\n".join(inspect_models.OF_ANALYSES),
        "rubric_scoring_prompt.txt": "Judge {transcript} and {debrief} as {output_format}",
        "rubric_scoring_prompt_analysis.txt": "Judge {transcript} as {output_format}",
    }
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@needs_eq
def test_the_real_files_of_eqbench3() -> None:
    bench = eq.load_eqbench(REAL_EQ)
    kinds = [s.kind for s in bench.scenarios]
    assert len(kinds) == 45 and sum(len(s.lines) for s in bench.scenarios) == 92
    assert [kinds.count(k) for k in ("role-play", "drafting", "analysis")] == [25, 1, 19]
    assert sum(bench.debrief in bench.user_messages(s) for s in bench.scenarios) == 26
    for s in bench.scenarios:
        messages = bench.user_messages(s)
        prompt = bench.judge_prompt(s, messages, [f"answer-{k}" for k in range(len(messages))])
        assert "{transcript}" not in prompt and "{debrief}" not in prompt and "{output_format}" not in prompt
        assert all(prompt.count(f"answer-{k}") == 1 for k in range(len(messages)))
        assert all(f'"{name}": 0-20' in prompt for name in eq.COUNTED[s.kind])


@pytest.mark.parametrize("folder", [None, pytest.param(REAL_EQ, marks=needs_eq)])
def test_one_scenario_of_each_kind_scores_as_by_hand(folder: Path | None, tmp_path: Path) -> None:
    data = folder or eq_folder(tmp_path / "data")
    if folder:  # one of each kind out of the real ones
        chosen = {s.kind: s for s in eq.load_eqbench(data).scenarios}
        shutil.copytree(data, tmp_path / "data", copy_function=shutil.copyfile)
        data = tmp_path / "data"
        blocks = (
            f"######## {s.id} | {s.category} | {s.title}\n"
            + "".join(f"####### Prompt{k}\n{line}\n" for k, line in enumerate(s.lines, 1))
            for s in chosen.values()
        )
        (data / "scenario_prompts.txt").write_text("\n".join(blocks))
    summary = play(tmp_path / "out", "eqbench3", task={"data": str(data)}, roles={"judge": "scripted/judge"})
    # role-play and drafting: 5 x (12 + 10 + 9 + 11 + 10 + 8) / 6 = 50; analysis: 5 x (10 + 12 + 14 + 8 + 6 + 10) / 6 = 50.
    assert {name: found["mean"] for name, found in summary["groups"].items()} == {
        "role-play": 50,
        "drafting": 50,
        "analysis": 50,
    }
    assert summary["score"]["mean"] == 50 and summary["score"]["n"] == 3 and summary["failed"] == 0
    assert summary["measures"]["demonstrated_empathy"]["mean"] == 12 and summary["measures"]["correctness"]["mean"] == 10
    assert summary["other"]["models"] == ["scripted/judge"] and summary["tokens"]["judge"]["input"] > 0


def test_a_judge_that_answers_nonsense_costs_its_item_only(tmp_path: Path, ctcgrpo: Command) -> None:
    data = eq_folder(tmp_path / "data")
    summary = play(tmp_path / "out", "eqbench3", task={"data": str(data)}, roles={"judge": "scripted/confused_judge"})
    assert summary["score"]["n"] == 2 and summary["score"]["mean"] == 50
    assert (summary["results"], summary["failed"], summary["failures"]) == (3, 1, {"judge": 1})
    failed = next(r for r in read_results(tmp_path / "out") if r.failure)
    assert (
        failed.group == "drafting" and "no valid verdict in 3 tries" in failed.failure[1] and failed.lines[1].speaker == "model"
    )


def test_judgements_are_read_without_guessing() -> None:
    whole = dict.fromkeys(eq.COUNTED["analysis"], 7)
    assert eq.read_scores("x " + json.dumps({**whole, "style": 3}) + " y", "analysis") == {**whole, "style": 3}
    assert eq.read_scores("```json\n{" + ", ".join(f'"{k}": "7/20"' for k in whole) + "}\n```", "analysis") == whole
    for change in (
        {"correctness": 21},
        {"correctness": -1},
        {"correctness": True},
        {"correctness": "about 7"},
        {"correctness": None},
    ):
        with pytest.raises(eq.InvalidVerdict, match="correctness"):
            eq.read_scores(json.dumps({**whole, **change}), "analysis")
    cut = json.dumps(whole)[:-1]  # nobody knows whether a last score of 7 was to be 7
    for text in ("", "18", "[]", "{}", "{" * 50, cut):
        with pytest.raises(eq.InvalidVerdict):
            eq.read_scores(text, "analysis")


def test_existing_judgements_are_rescored(tmp_path: Path, ctcgrpo: Command) -> None:
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    task = {"conversation_history": said, "debrief_prompt": "d", "debrief_response": "r", "status": "rubric_scored"}
    run = {
        "model_name": "m1",
        "rubric_judge_model": "j",
        "scenario_tasks": {
            "1": {
                "1": {**task, "rubric_scores": dict.fromkeys(eq.COUNTED["role-play"], 10)},
                "208": {**task, "rubric_scores": dict.fromkeys(eq.COUNTED["drafting"], 14)},
                "401": {**task, "debrief_prompt": None, "rubric_scores": dict.fromkeys(eq.COUNTED["analysis"], 18)},
                "2": {**task, "rubric_scores": None, "error": "could not be parsed"},
            }
        },
    }
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"k1": run, "k2": {**run, "model_name": "m2"}, "__metadata__": {}}))
    code, out, _ = ctcgrpo("evaluate", "eqbench3", "--rescore", str(file), "--run", "m1")
    assert code == 0 and "70.00" in out and "judge: j" in out and "1 of 4 (1 judge)" in out  # (50 + 70 + 90) / 3
    code, _, err = ctcgrpo("evaluate", "eqbench3", "--rescore", str(file))
    assert code == 3 and "has 2 runs; choose one with --run: k1, k2" in err
    code, _, err = ctcgrpo("evaluate", "eibench", "--rescore", str(file))
    assert code == 2 and "--rescore cannot be used with eibench; expected one of sage, eqbench3" in err
    for unused in (("--limit", "2"), ("--model", "x/y"), ("--judge", "x/y")):
        code, _, err = ctcgrpo("evaluate", "eqbench3", "--rescore", str(file), *unused)
        assert code == 2 and f"{unused[0]} cannot be combined with --rescore of eqbench3" in err


def test_files_of_eqbench3_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"scenario_prompts.txt not found.*EQ-bench/eqbench3"):
        eq.load_eqbench(tmp_path)
    for name, text, problem in [
        ("scenario_prompts.txt", "nothing", "no scenarios; expected headings"),
        ("scenario_prompts.txt", "######## 1 | only two\n", "heading = "),
        ("rubric_scoring_prompt.txt", "{transcript} {output_format}", "rubric_scoring_prompt.txt: {debrief} is missing"),
        ("rubric_scoring_criteria.txt", "warmth", "demonstrated_empathy.* missing; the score needs these criteria"),
    ]:
        folder = eq_folder(tmp_path / "data")
        (folder / name).write_text(text)
        with pytest.raises(ScenarioError, match=problem):
            eq.load_eqbench(folder)


# --- EIBench -------------------------------------------------------------------------------------------------------------------


def test_eibench_scores_what_the_dialogues_come_to(tmp_path: Path) -> None:
    summary = play(tmp_path, task={"simulator": "scripted", "rounds": 3, "repeats": 2})
    scenarios = {s.id: s for s in load_scenarios("english/test", "test")}
    results = read_results(tmp_path)
    assert len(results) == 32 and [r.scenario for r in results[:3:2]] == list(scenarios)[:2] and summary["failed"] == 0
    for r in results:
        anchors = scenarios[r.scenario].anchors
        states = [line.state for line in r.lines if line.speaker == "user"]
        final = type(anchors.initial)(**states[-1])
        assert r.score == outcome_score(final, anchors, "evaluation") and r.measures["escalated"] == (r.score < 0)
        assert len([line for line in r.lines if line.speaker == "model"]) <= 3 and "<think>" not in str(r.lines)
        assert (r.lines[0].speaker == "model") == (not scenarios[r.scenario].opening_line)
    means = {name: sum(r.score or 0 for r in results if r.scenario == name) / 2 for name in scenarios}
    assert summary["scenarios"] == pytest.approx(means)
    assert summary["score"]["mean"] == pytest.approx(sum(means.values()) / 16) and summary["score"]["n"] == 16
    assert set(summary["groups"]) == set(SCENES) and all(found["n"] == 4 for found in summary["groups"].values())
    assert summary["task"]["variant"] == "evaluation" and summary["generation"]["temperature"] == 0.6
    assert summary["versions"]["inspect_ai"] and summary["tokens"]["model"]["output"] > 0
    assert summary["measures"]["escalated"]["count"] == sum(r.measures["escalated"] for r in results)


def test_a_model_plays_the_user_and_fails_at_times(tmp_path: Path) -> None:
    """A user who for a fifth of the turns cannot be had: what fails is counted by its reason and enters nothing."""
    options: dict[str, Any] = {"task": {"rounds": 2}}
    steady = play(tmp_path / "a", **options, roles={"simulator": "scripted/user"})
    assert steady["failed"] == 0 and steady["other"]["prompts"].startswith("ctcgrpo/")
    assert steady["other"]["models"] == ["scripted/user"] and steady["tokens"]["simulator"]["input"] > 10_000
    unsteady = play(tmp_path / "b", **options, roles={"simulator": "scripted/unsteady_user"})
    assert 2 <= unsteady["failed"] <= 12 and unsteady["failures"] == {"simulator_reply": unsteady["failed"]}
    failed = [r for r in read_results(tmp_path / "b") if r.failure]
    assert all(r.score is None and "no valid answer in 3 tries" in r.failure[1] and r.lines for r in failed if r.failure)
    kept = {name: steady["scenarios"][name] for name in unsteady["scenarios"]}
    assert unsteady["scenarios"] == kept and unsteady["score"]["n"] == 16 - unsteady["failed"]


def test_a_model_that_says_nothing_is_scored_for_it(tmp_path: Path) -> None:
    summary = play(tmp_path, model="silent", task={"simulator": "scripted", "rounds": 2}, limit=4)
    assert summary["failed"] == 0 and summary["score"]["mean"] < 0 and summary["score"]["n"] == 4
    assert summary["measures"]["empty"]["count"] == 4 and summary["measures"]["cut"]["count"] == 0
    assert all(line.text == "" for r in read_results(tmp_path) for line in r.lines if line.speaker == "model")


def test_the_same_command_again_plays_what_failed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CTCGRPO_TEST_CALLS", str(calls))
    options: dict[str, Any] = {"model": "talker", "task": {"simulator": "scripted", "rounds": 2}, "limit": 6}

    def broken(messages: Any, config: Any) -> str:
        if "Odhiambo" in messages[0].text or len(messages[0].text) % 2:
            raise ConnectionError("the provider is down")
        return inspect_models.talker(messages, config)

    monkeypatch.setitem(inspect_models.ANSWERS, "talker", broken)
    first = play(tmp_path / "out", **options)
    assert 0 < first["failed"] < 6 and first["failures"] == {"policy_engine": first["failed"]}
    monkeypatch.undo()
    monkeypatch.setenv("CTCGRPO_TEST_CALLS", str(calls))
    before = calls.stat().st_size
    second = play(tmp_path / "out", **options)
    of_results = sum(r.tokens["model"][0] for r in read_results(tmp_path / "out"))
    assert second["tokens"]["model"]["input"] >= of_results > first["tokens"].get("model", {"input": 0})["input"]
    assert second["failed"] == 0 and calls.stat().st_size - before <= 2 * first["failed"]
    assert {name: second["scenarios"][name] for name in first["scenarios"]} == first["scenarios"]
    before = calls.stat().st_size
    assert play(tmp_path / "out", **options)["scenarios"] == second["scenarios"] and calls.stat().st_size == before
    with pytest.raises(OutputError, match="another evaluation.*task.rounds: 2 -> 3"):
        play(tmp_path / "out", **{**options, "task": {"simulator": "scripted", "rounds": 3}})


# --- what providers say, and what is sent to them --------------------------------------------------------------------------------


def chat(body: dict[str, Any], content: str | None = "I hear you.", **message: Any) -> dict[str, Any]:
    found = answered(body, content)
    found["choices"][0]["message"] |= message
    return found


@contextmanager
def provider(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[FakeLlm]:
    """An OpenAI-compatible provider."""

    async def handle(request: web.Request) -> web.Response:
        body = await request.json()
        fake.requests.append(body)
        status, said = answer(body)
        return web.Response(text=said, status=status) if isinstance(said, str) else web.json_response(said, status=status)

    fake = FakeLlm()
    fake.handle = handle  # type: ignore[method-assign]
    with fake.serving():
        yield fake


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, ctcgrpo: Command, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`evaluate eibench` of model m at an URL: exit code, standard output and error. AT in an option is its provider."""

    def run(url: str, *options: str) -> tuple[int, str, str]:
        service = f"at{urlsplit(url).port}"  # Inspect keeps what it made, by its name
        monkeypatch.setenv(f"{service.upper()}_API_KEY", "key")
        monkeypatch.setenv(f"{service.upper()}_BASE_URL", url)
        named = [option.replace("AT/", f"openai-api/{service}/") for option in ("--model", "AT/m", *options)]
        asked = ("--rounds", "1", "--limit", "2", "--display", "none", "-G", "timeout=10")
        return ctcgrpo("evaluate", "eibench", *asked, "--out", str(tmp_path / "out"), *named)

    return run


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (
            400,
            {"error": {"message": "Unsupported parameter: use 'max_completion_tokens'."}},
            "/m: HTTP 400: Unsupported parameter: use 'max_completion_tokens'. (set it with -G",
        ),
        (400, {"detail": "temperature is odd"}, "HTTP 400: temperature is odd (to leave it out: -G temperature=null)"),
        (400, "Bad request: no such thing", "HTTP 400: Bad request: no such thing"),
        (
            200,
            {"error": {"message": "Insufficient credits", "code": 402}},
            "HTTP 402: Insufficient credits (no quota is left)",
        ),
        (429, {"error": {"message": "No plan.", "code": "insufficient_quota"}}, "HTTP 429: No plan. (no quota is left)"),
        (200, {"id": "x", "model": "m", "choices": []}, "expected a chat completion, got {"),
        (403, {"error": {"message": "It was flagged.", "code": 403}}, "HTTP 403: It was flagged."),
    ],
    ids=["parameter", "detail", "text", "error in 200", "quota", "no choices", "moderation"],
)
def test_an_evaluation_says_why_it_failed(
    status: int, said: Any, reason: str, tested: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """In the provider's words, once for each reason, and without retries for what none mends."""
    with provider(lambda body: (status, said)) as llm:
        code, out, err = tested(llm.url, "--simulator", "scripted")
        assert len(llm.requests) <= 6  # the client of openai itself repeats a 429 twice
    assert "2 x policy_engine: " in out
    assert code == 7 and reason in out and "Traceback" not in err
    assert out.count("policy_engine: ") == 1
    results = read_results(tmp_path / "out")
    assert all(r.failure is not None and reason.split(": ", 1)[-1] in r.failure[1] for r in results)


def test_a_served_model_is_named_by_its_url_and_every_call_is_paid_for(ctcgrpo: Command, tmp_path: Path) -> None:
    """With provider vllm, which isn't installed here; the second turn of the first try fails."""
    asked = ("evaluate", "eibench", "--model", "vllm/m", "--simulator", "scripted", "--rounds", "2", "--limit", "1")
    asked += ("--scenarios", "english/test", "--display", "none", "--price", "2", "10", "--out", str(tmp_path))
    refused = [False, True, False, False]
    with provider(lambda body: (400, "no") if refused.pop(0) else (200, chat(body))) as llm:
        for code in (7, 0):
            found, out, err = ctcgrpo(*asked, "-M", f"base_url={llm.url}")
            assert found == code, (out, err)
    assert read_results(tmp_path)[0].tokens["model"] == (2000, 200)
    assert f"results: {tmp_path}" in out and "cost of the model: 0.009 USD" in out  # three answers of 1,000 and 100 tokens


def test_a_package_that_is_missing_is_named_without_markup() -> None:
    error = PrerequisiteError("[bold]ERROR[/bold]: install with: [bold]pip install vllm[/bold]")
    assert reason_of(error) == "PrerequisiteError: install with: pip install vllm"


def test_a_long_reason_keeps_its_end() -> None:
    told = reason_of(ValueError(f"the request was {'x' * 5000} and the answer: no"))
    assert told.endswith("and the answer: no") and len(told) < 700
    results = [Result("a", k, "g", None, failure=("policy_engine", f"HTTP 500: {k} broke")) for k in range(3)]
    results.append(Result("b", 1, "g", None, failure=("simulator_reply", "empty")))
    found = reasons(results)
    assert [(r["count"], r["kind"]) for r in found] == [(3, "policy_engine"), (1, "simulator_reply")]


def test_settings_that_a_provider_refuses_are_left_out(tested: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    with provider(lambda body: (200, chat(body))) as llm:
        code, _, err = tested(llm.url, "--simulator", "scripted")
        assert code == 0, err
        assert llm.requests[0]["temperature"] == 0.6 and llm.requests[0]["max_tokens"] == 8192 and "seed" in llm.requests[0]
        left = ("-G", "temperature=null", "-G", "top_p=null", "-G", "seed=null", "-G", "max_completion_tokens=300")
        code, _, err = tested(llm.url, "--simulator", "scripted", *left, "--out", str(tmp_path / "left"))
    assert code == 0, err
    sent = llm.requests[-1]
    assert sent["max_completion_tokens"] == 300 and not {"temperature", "top_p", "seed", "max_tokens"} & set(sent)


def test_settings_of_the_simulator_are_left_out_too(tested: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    user = {"reflection": "", "anger_delta": 1, "trust_delta": 1, "reply": "Well.", "continue": "no", "stop_reason": "done"}
    asked = ("--simulator", "AT/user", "-G", "simulator.temperature=null", "-G", "simulator.seed=null")
    with provider(lambda body: (200, chat(body, json.dumps(user) if body["model"] == "user" else "I hear you."))) as llm:
        code, _, err = tested(llm.url, *asked, "-G", "simulator.response_schema=null", "-G", "simulator.top_p=0.5")
    assert code == 0, err
    of_user = next(body for body in llm.requests if body["model"] == "user")
    assert of_user["top_p"] == 0.5 and not {"temperature", "seed", "response_format"} & set(of_user)
    assert "seed" in next(body for body in llm.requests if body["model"] == "m")


def test_an_answer_in_the_reasoning_alone_is_named(
    tested: Callable[..., tuple[int, str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with provider(lambda body: (200, chat(body, None, reasoning_content="I hear you."))) as llm:
        code, out, _ = tested(llm.url, "--simulator", "scripted")
        assert code == 0 and "dialogues with an empty reply: 2 of 2" in out
        code, out, _ = tested(llm.url, "--simulator", "AT/m", "--out", str(tmp_path / "user"))
    assert code == 7 and "content is empty: the text is in reasoning_content" in out


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("temprature=1", "did you mean 'temperature'"),
        ("stop_seqs=null", "-G stop_seqs=null: not sent by default; expected one of temperature"),
        ("judge.temperature=1", "no model has the role judge"),
        ("temperature", "'temperature'; expected NAME=VALUE"),
    ],
)
def test_settings_that_are_none_are_refused(option: str, problem: str, tested: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = tested("http://127.0.0.1:1", "--simulator", "scripted", "-G", option)
    assert code == 2 and problem in err


def test_mistakes_are_named_and_no_traceback(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = ("--out", str(tmp_path / "out"))
    for arguments, code, problem in [
        (("eibenc", "--model", "a/b"), 2, "did you mean 'eibench'?"),
        (("eibench",), 2, "--model is missing"),
        (("eibench", "--model", "a/b"), 2, "--simulator is missing"),
        (("eibench", "--model", "gpt", "--simulator", "scripted"), 4, "expected a folder with a model .* or PROVIDER/NAME"),
        (("eibench", "--model", "nope/x", "--simulator", "scripted"), 2, "nope"),
        (("eibench", "--model", "nope[/b]/x", "--simulator", "scripted"), 2, "nope"),
        (
            ("eibench", "--model", "tests/nothing/there", "--simulator", "scripted"),
            4,
            "tests/nothing/there' .*no such folder",
        ),
        (
            ("eibench", "--model", "a/b", "--simulator", "qwen"),
            4,
            "--simulator 'qwen': expected scripted, a file of configs/simulator, .* or PROVIDER/NAME",
        ),
        (("eibench", "--model", "scripted/talker", "--simulator", "scripted", "-M", "foo=1"), 2, "-M: .*foo"),
        (
            ("eibench", "--model", "a/b", "--simulator", "scripted", "--run", "x"),
            2,
            "--run cannot be used with eibench; expected one of eqbench3",
        ),
        (("eqbench3", "--model", "a/b", "--judge", "a/b", "--run", "x"), 2, "--run needs --rescore"),
        (("eibench", "--model", "a/b", "--simulater", "scripted"), 2, "No such option: --simulater"),
        (("eibench", "--model", "openai/x", "--simulator", "scripted"), 2, "OPENAI_API_KEY"),
        (("eibench", "--model", "scripted/talker", "--simulator", "no.yaml"), 2, "'no.yaml' not found"),
        (("eibench", "--model", "scripted/talker", "--simulator", "scripted", "--scenarios", "no"), 3, "'no' not found"),
        (
            ("eibench", "--model", "scripted/talker", "--simulator", "scripted", "--data", "x"),
            2,
            "--data cannot be used with eibench",
        ),
        (("eibench", "--model", "scripted/talker", "--judge", "a/b"), 2, "--judge cannot be used with eibench"),
        (("sage", "--model", "scripted/talker", "--simulator", "scripted/user", "--data", "no"), 3, "no not found"),
        (
            ("eqbench3", "--model", "scripted/talker", "--judge", "scripted/judge", "--data", "no"),
            3,
            "no/scenario_prompts.txt not",
        ),
        (("eibench", "--model", "scripted/talker", "--simulator", "scripted", "-M", "x"), 2, "'x'; expected NAME=VALUE"),
        ((str(tmp_path),), 6, ": expected a run folder; it has no recipe.yaml"),
        (("run", str(tmp_path)), 6, ": expected a run folder; it has no recipe.yaml"),
        ((str(tmp_path), "--model", "a/b"), 2, "--model cannot be used with run; expected one of eibench, sage, eqbench3"),
        (("foo",), 2, r"expected a benchmark .eibench, sage, eqbench3. or the folder of a run"),
        (("checkpoints/foo",), 6, "checkpoints/foo: no such folder"),
    ]:
        status, _, err = ctcgrpo("evaluate", *arguments, *out)
        assert status == code, (arguments, status, err)
        assert re.search(problem, err), (arguments, err)
        assert "Traceback" not in err


def test_a_gate_fails_below_its_score(tmp_path: Path, ctcgrpo: Command) -> None:
    asked = ("evaluate", "eibench", "--model", "scripted/silent", "--simulator", "scripted", "--rounds", "1", "--limit", "4")
    asked = (*asked, "--display", "none", "--out", str(tmp_path / "out"))
    code, out, err = ctcgrpo(*asked, "--fail-under", "0.5")
    assert code == 9 and "expected at least +0.500" in err and "escalat" not in err and "95 % interval" in out
    assert ctcgrpo(*asked, "--fail-under", "-1")[0] == 0


# --- summaries, comparison, ranking ----------------------------------------------------------------------------------------------


def made(folder: Path, scores: dict[str, list[float]], model: str = "m/a", **facts: Any) -> Path:
    """An evaluation with these scores by scenario."""
    results = [
        Result(
            name,
            k + 1,
            name[0],
            None if math.isnan(score) else score,
            {"escalated": float(score < 0)},
            ("x", "y") if math.isnan(score) else None,
            (Line("user", "<script>alert(1)</script>"), Line("model", f"reply {score}")),
        )
        for name, of_name in scores.items()
        for k, score in enumerate(of_name)
    ]
    known = {
        "model": model,
        "other": {"backend": "scripted"},
        "task": {"rounds": 8},
        "generation": {},
        "limit": None,
        "cost": None,
    }
    write_results(folder, results, summarise(EIBENCH, results, known | facts))
    return folder


def test_a_summary_by_hand(tmp_path: Path) -> None:
    folder = made(tmp_path, {"a1": [0.2, 0.4], "a2": [-0.5], "b1": [math.nan], "b2": [math.nan, 0.8]})
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scenarios"] == pytest.approx({"a1": 0.3, "a2": -0.5, "b2": 0.8})
    assert summary["score"]["mean"] == pytest.approx(0.2) and summary["score"]["n"] == 3
    assert summary["groups"]["a"]["mean"] == pytest.approx(-0.1) and summary["groups"]["b"]["n"] == 1
    assert (summary["results"], summary["failed"], summary["failures"]) == (6, 2, {"x": 2})
    # Means over scenarios: 0, 1, 0; of dialogues one.
    assert summary["measures"]["escalated"]["mean"] == pytest.approx(1 / 3) and summary["measures"]["escalated"]["count"] == 1
    assert figures([]) == {"mean": None, "ci95": None, "n": 0}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_comparison_is_paired_and_shown(tmp_path: Path, ctcgrpo: Command) -> None:
    before = {f"{g}{k}": [0.1 * k - 0.5] for g in "ab" for k in range(5)}
    after = {name: [score[0] + (0.2 if name < "b" else -0.1) + 0.01 * int(name[1])] for name, score in before.items()}
    a, b = made(tmp_path / "a", before), made(tmp_path / "b", after, "m/<b>")
    c = made(tmp_path / "c", {"a0": [0.0]}, "m/c", task={"rounds": 4, "variant": "training"})
    with pytest.raises(OutputError, match="different rounds and scoring variant: .* --mixed"):
        compared([a, b, c])
    found = compared([a, b, c], mixed=True)
    first, other = found["others"]
    assert first["difference"] == pytest.approx(0.05 + 0.02) and first["n"] == 10
    assert first["groups"]["a"]["difference"] == pytest.approx(0.22) and first["groups"]["a"]["ci95"][0] > 0
    assert first["groups"]["b"]["ci95"][1] < 0
    assert other["n"] == 1 and other["difference"] == pytest.approx(0.5) and other["ci95"] is None
    assert any("rounds differs" in w for w in found["warnings"]) and any("score for them: 9" in w for w in found["warnings"])
    changed = most_changed(compared([a, b]), 2)
    assert [item["scenario"] for item in changed] == ["a4", "a3", "b0", "b1"]
    code, out, err = ctcgrpo("compare", str(a), str(b))
    assert (code, err) == (0, "") and "+0.070" in out and "+0.220" in out
    page = (b / "comparison.html").read_text()
    assert (b / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "m/&lt;b&gt;" in page
        and "http" not in page.replace("http-equiv", "")
    )
    sage_like = tmp_path / "s"
    sage_like.mkdir()
    known = json.loads((a / "summary.json").read_text())
    (sage_like / "summary.json").write_text(json.dumps({**known, "bench": "sage"}))
    lacking = tmp_path / "l"
    lacking.mkdir()
    (lacking / "summary.json").write_text(json.dumps({"bench": "sage", "model": "x"}))
    for folders, problem in [
        ((a,), "at least two"),
        ((a, tmp_path), "no summary.json"),
        ((a, sage_like), "expected evaluations of one benchmark"),
        ((a, lacking), "it lacks other"),
    ]:
        code, _, err = ctcgrpo("compare", *map(str, folders))
        assert code == 6 and problem in err
    made(tmp_path / "d", {"z9": [0.0]})
    assert "no scored scenario in common" in ctcgrpo("compare", str(a), str(tmp_path / "d"))[2]


def test_a_comparisons_picture_holds_its_caption(tmp_path: Path) -> None:
    """A long name moves the plot to the right; the caption with all settings stays within the picture."""
    scores = {name: [0.1] for name in ("a1", "a2")}
    a = made(tmp_path / "a", scores, f"m/{'long-' * 8}a", task={"rounds": 4, "variant": "training"})
    b = made(tmp_path / "b", scores, f"m/{'long-' * 8}b")
    picture, _ = write_comparison(compared([a, b], mixed=True), [], tmp_path)
    assert (imread(picture)[:, [0, -1]] == 1).all()


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("summary.json", lambda text: text[:200], "cannot be read"),
        ("summary.json", lambda text: "[]", "expected the summary of an evaluation"),
        ("summary.json", lambda text: text.replace('"bench": "eibench"', '"bench": {}'), "expected the summary of an evaluation"),
        ("summary.json", lambda text: "[" * 9000, "cannot be read"),
        ("summary.json", lambda text: text.replace('"mean": -0.3', '"mean": 0.3', 1), "score.mean = 0.3"),
        ("summary.json", lambda text: text.replace('"mean": -0.3', '"mean": NaN, "x": -0.3', 1), "score.mean = nan"),
        ("summary.json", lambda text: text.replace('"a1": "a"', '"a2": "a"'), "group_of lacks scenario 'a1'"),
        ("summary.json", lambda text: text.replace('"a1": -0.4', '"a1": -0.1'), "the mean of its 2 scenarios is -0.15"),
        (
            "summary.json",
            lambda text: text.replace("      -0.4,", "      -1.4,", 1),
            "score.ci95 = (-1.4, -0.2); expected (-0.4, -0.2)",
        ),
        (
            "summary.json",
            lambda text: text.replace('\n  "failed": 0', '\n  "failed": 7'),
            "failed = 7; the sum of failures is 0",
        ),
        ("summary.json", lambda text: text.replace('"task": {', '"task": 3, "x": {'), "task = 3"),
        ("summary.json", lambda text: text.replace('"generation": {', '"generation": 3, "x": {'), "generation = 3"),
        ("summary.json", lambda text: text.replace('"generation": {', '"x": {'), "it lacks generation"),
        ("summary.json", lambda text: text.replace('"task": {', '"task": {}, "task": {'), "duplicate key 'task'"),
        ("results.jsonl", lambda text: text[:-30], "results.jsonl, line 2: not valid JSON"),
        ("results.jsonl", lambda text: "[]\n" + text, "line 1: expected a JSON object, got a list"),
        (
            "results.jsonl",
            lambda text: text.replace('"lines": [', '"lines": ["x", ', 1),
            "line 1: invalid result",
        ),
        ("results.jsonl", lambda text: text.replace('"scenario": "a0"', '"scenario": []', 1), "scenario = []"),
        ("results.jsonl", lambda text: text.replace('"repeat": 1', '"repeat": {}', 1), "repeat = {}"),
        ("results.jsonl", lambda text: text.replace('"measures": {', '"measures": [1], "x": {', 1), "measures = [1]"),
        ("results.jsonl", lambda text: text.replace('"text": "reply', '"x": "reply', 1), "lines.1.text is missing"),
        ("results.jsonl", lambda text: text.replace('"group": ', '"groups": ', 1), "group is missing"),
        ("results.jsonl", lambda text: text.replace('"score": -0.2', '"score": NaN', 1), "expected a finite number"),
        ("results.jsonl", lambda text: text.replace('"score": -0.2', '"score": null', 1), "either a score or a failure"),
        ("results.jsonl", lambda text: text.replace('"a0"', '"a1"'), "duplicate dialogue of scenario 'a1'"),
        ("results.jsonl", lambda text: text.replace('"a0"', '"a9"'), "has no scored dialogue of 'a0'"),
    ],
)
def test_damaged_evaluations_are_named_and_never_a_traceback(
    tmp_path: Path, ctcgrpo: Command, name: str, change: Any, problem: str
) -> None:
    made(tmp_path / "a", {"a0": [-0.1], "a1": [-0.1]})
    folder = made(tmp_path / "b", {"a0": [-0.2], "a1": [-0.4]}, "m/b")
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    code, _, err = ctcgrpo("compare", str(tmp_path / "a"), str(folder))
    assert code == 6 and problem in err and name in err, err
    code, _, err = ctcgrpo("leaderboard", str(tmp_path))
    assert code == (6 if name == "summary.json" else 0) and (name == "results.jsonl" or problem in err), err


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_a_comparison_is_whole_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    before = {f"{g}{k}": [0.1 * k - 0.5] for g in "ab" for k in range(5)}
    after = {name: [score[0] + (0.2 if name < "b" else -0.1) + 0.01 * int(name[1])] for name, score in before.items()}
    folders = [
        made(tmp_path / "a", before, "provider/" + "long-name-" * 8),
        made(tmp_path / "b", after, "m/" + "x" * 90),
        made(tmp_path / "c", {"a0": [0.0]}, "m/c"),
    ]
    found = compared(folders)
    write_comparison(found, most_changed(found, 1), tmp_path)

    def brightness(color: str) -> float:
        red, green, blue = map(int, re.findall(r"\d+", color)[:3])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto((tmp_path / "comparison.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            intervals = page.locator("td", has_text=" to ")
            rows = [row for other in found["others"] for row in (other, *other["groups"].values()) if row["ci95"]]
            assert intervals.all_inner_texts() == [f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}" for row in rows]
            for k in range(len(rows)):
                box = intervals.nth(k).bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width
            # The plot has no ground of its own, and its marks stand out from the page's.
            assert page.locator("img").count() == 0
            ground = brightness(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert (ground < 60) == (scheme == "dark")
            circles = page.locator(".plot circle")
            assert circles.count() == 5
            colors = [circles.nth(k).evaluate("e => getComputedStyle(e).fill") for k in range(5)]
            assert len(set(colors)) == 3 and all(abs(brightness(color) - ground) > 60 for color in colors)
            # Marks stand where their values are: the groups on both sides of zero.
            zero = page.locator(".plot .zero").first.bounding_box()["x"]
            places = [box["x"] + box["width"] / 2 for box in (circles.nth(k).bounding_box() for k in range(5))]
            assert places[1] > zero > places[2]
            page.close()
        browser.close()


def test_evaluations_inside_runs_are_found(tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "checkpoints" / "r"
    made(tmp_path / "checkpoints" / "evaluations" / "eibench" / "m", {"a": [0.1]}, "m/alone")
    made(run / "evaluations" / "eibench-final", {"a": [0.3]}, "m/in-a-run")
    (run / "summary.json").write_text('{"before": 1}')
    monkeypatch.chdir(tmp_path)
    code, out, _ = ctcgrpo("leaderboard")
    assert code == 0 and out.index("m/in-a-run") < out.index("m/alone")
    code, _, err = ctcgrpo("compare", "checkpoints/r", "checkpoints/evaluations/eibench/m")
    assert code == 6 and "it holds the evaluations checkpoints/r/evaluations/eibench-final" in err
    code, _, err = ctcgrpo("compare", "checkpoints/rr", "checkpoints/evaluations/eibench/m")
    assert code == 6 and "checkpoints/rr: no such folder; did you mean 'checkpoints/r'?" in err


def test_mock_models_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail("the table of tokens is downloaded"))
    file = tmp_path / sage.PROFILES
    file.write_text(json.dumps(profile()) + "\n")
    of = {
        "eibench": ({"rounds": 1, "simulator": "scripted"}, {}),
        "eqbench3": ({"data": str(eq_folder(tmp_path / "data"))}, {"judge": "mockllm/model"}),
        "sage": ({"data": str(tmp_path)}, {"simulator": "mockllm/model"}),
    }
    for bench, (task, roles) in of.items():
        wanted = Evaluation(bench, "mockllm/model", task=task, roles=roles, limit=1)
        evaluate(wanted, tmp_path / bench, display="none")
        for result in read_results(tmp_path / bench):
            # What a mock says is no verdict and no user's line; it was asked, and nothing else failed.
            said = "no valid verdict in 3 tries" if bench == "eqbench3" else "no valid answer in 3 tries"
            assert result.failure is None or said in result.failure[1], result.failure


def test_a_leaderboard_keeps_apart_what_cannot_be_compared(tmp_path: Path, ctcgrpo: Command) -> None:
    for k, score in enumerate((0.1, 0.5, -0.2)):
        made(tmp_path / f"e{k}", {"a": [score], "b": [score]}, f"m/{k}")
    made(tmp_path / "deep" / "other", {"a": [0.9]}, "m/9", other={"models": ["x/judge-like"]})
    (tmp_path / "summary.json").write_text('{"before": 1}')  # a run's
    boards = ranked(tmp_path)
    assert [[entry["model"] for entry in board["entries"]] for board in boards] == [["m/1", "m/0", "m/2"], ["m/9"]]
    code, out, _ = ctcgrpo("leaderboard", str(tmp_path))
    assert code == 0 and out.index("m/1") < out.index("m/0") < out.index("m/2") and "x/judge-like" in out
    code, _, err = ctcgrpo("leaderboard", str(tmp_path / "deep" / "nothing"))
    assert code == 6 and "no such folder" in err
    (tmp_path / "empty").mkdir()
    assert "no evaluation in it" in ctcgrpo("leaderboard", str(tmp_path / "empty"))[2]


def test_a_run_is_evaluated_as_it_was_validated(tmp_path: Path, ctcgrpo: Command) -> None:
    """Base and final through Inspect say what they said in the run's validations, but where another composition of batches makes
    floating-point numbers, and with them a token, differ; scores and improvement are those of the run's summary."""
    held_out = ["validation.scenarios=english/test", "validation.every=1", "validation.samples=2", "rollout.top_p=0.9"]
    code, _, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", *held_out)
    assert code == 0, err
    run = tmp_path / "tiny"
    code, out, err = ctcgrpo("evaluate", str(run), "--display", "none")
    assert code == 0, err
    trained = json.loads((run / "summary.json").read_text())
    for which, when in (("base", "before"), ("final", "after")):
        traces = (run / "traces" / f"validation-{trained[when]['step']:06d}.rank-0.jsonl").read_text().splitlines()
        episodes = {(e["task"], e["rollout"] + 1): e for e in map(json.loads, traces)}
        results = read_results(run / "evaluations" / f"eibench-{which}")
        assert len(results) == len(episodes) == 32
        same = [
            r
            for r in results
            if [line.text for line in r.lines if line.speaker == "model"]
            == [turn["reply"] for turn in episodes[r.scenario, r.repeat]["turns"]]
        ]
        assert len(same) >= 29  # one token in 1,536 differed on the machine that this was written on
        assert all(r.score == pytest.approx(episodes[r.scenario, r.repeat]["outcome"]) for r in same)
        summary = json.loads((run / "evaluations" / f"eibench-{which}" / "summary.json").read_text())
        assert summary["score"]["mean"] == pytest.approx(trained[when]["overall"], abs=0.02)
        assert summary["task"]["variant"] == "training"
    found = compared([run / "evaluations" / f"eibench-{which}" for which in ("base", "final")])
    gain = trained["improvement"]
    assert found["others"][0]["difference"] == pytest.approx(gain["overall"], abs=0.04)
    assert "difference" in out
    assert (run / "evaluations" / "comparison.html").exists()
    few = ("--max-tokens", "8", "--limit", "2", "--display", "none")
    code, out, err = ctcgrpo("evaluate", str(run), "--preset", "published", *few)
    assert code == 0 and out.count("preset: published, but max tokens 8 (published: 8192)") == 3, err
    summary = json.loads((run / "evaluations" / "eibench-final-published" / "summary.json").read_text())
    assert summary["settings"]["variant"] == "evaluation" and summary["settings"]["top_p"] is None


def test_a_configured_llm_plays_the_user_and_is_paid_for(tmp_path: Path) -> None:
    """The simulator of training, with its retries and its prices, from the file that describes it."""
    with FakeLlm(rates={"fences": 0.3, "429": 0.1}, seed=3).serving() as llm:
        file = tmp_path / "user.yaml"
        file.write_text(yaml.safe_dump(configuration(llm).model_dump(mode="json", exclude_none=True)))
        summary = play(tmp_path / "out", task={"simulator": str(file), "rounds": 2}, limit=4)
    assert summary["failed"] == 0 and summary["score"]["n"] == 4
    assert summary["other"]["models"] == ["fake-0"] and summary["other"]["prompts"].startswith("ctcgrpo/")
    tokens = summary["tokens"]["simulator"]
    assert tokens["input"] > 1000
    money = (tokens["input"] * 1.0 + tokens["output"] * 5.0) / 1e6
    assert summary["cost"] == {"simulator": {"money": pytest.approx(money), "currency": "USD"}}


@pytest.mark.parametrize("ended", ["model_length", "content_filter", "error"])
def test_what_a_provider_could_not_deliver_is_no_reply(ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers hand over their own words in the model's place; those are no outcome."""

    def refused(messages: Any, config: Any) -> ModelOutput | str:
        if len(messages) < 3:
            return inspect_models.talker(messages, config)
        output = ModelOutput.from_content("talker", "This request is too long.")
        if ended == "error":
            output.error = "HTTP 400"
        else:
            output.choices[0].stop_reason = ended  # type: ignore[assignment]
        return output

    monkeypatch.setitem(inspect_models.ANSWERS, "talker", refused)
    summary = play(tmp_path, task={"simulator": "scripted", "rounds": 2}, limit=5)
    assert (summary["failed"], summary["failures"], summary["score"]["mean"]) == (5, {"policy_engine": 5}, None)
    assert "too long" not in str([r.lines for r in read_results(tmp_path)])


def test_a_simulator_that_is_down_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any) -> str:
        raise ConnectionError("refused")

    monkeypatch.setitem(inspect_models.ANSWERS, "user", down)
    summary = play(tmp_path, task={"rounds": 1}, roles={"simulator": "scripted/user"}, limit=2)
    assert summary["failures"] == {"simulator_transport": 2}
    assert all("ConnectionError: refused" in r.failure[1] for r in read_results(tmp_path) if r.failure)


def test_figures_of_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = (PACKS / "english" / "test" / "support_final.jsonl").read_text().splitlines()
    file.write_text(lines[0] + "\n")
    options: dict[str, Any] = {"task": {"simulator": "scripted", "rounds": 1, "scenarios": str(file)}}
    play(tmp_path / "out", **options)
    file.write_text(lines[1] + "\n")
    with pytest.raises(OutputError, match="another evaluation .of.data: "):
        play(tmp_path / "out", **options)


def test_invalid_records_are_left_out_of_an_evaluation_and_named_with_its_score(
    tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (PACKS / "english" / "test" / "support_final.jsonl").read_text().splitlines()
    file = Path("mine.jsonl")
    file.write_text("\n".join(lines))
    bad = json.loads(lines[1])
    bad["rub_goals"]["target_trust"] = 0
    asked = ("evaluate", "eibench", "--model", "scripted/talker", "--simulator", "scripted", "--rounds", "1")
    asked = (*asked, "--scenarios", str(file), "--display", "none")
    assert ctcgrpo(*asked, "--out", str(tmp_path / "whole"))[0] == 0
    file.write_text("\n".join([lines[0], json.dumps(bad), *lines[2:]]))
    code, _, err = ctcgrpo(*asked, "--out", str(tmp_path / "refused"), "--invalid", "refuse")
    assert code == 3 and f"{file}, line 2: scenario '{bad['id']}': trust (worst, initial, target)" in err
    code, out, err = ctcgrpo(*asked, "--out", str(tmp_path / "part"))
    title = f"eibench task on {file}, without 1 invalid of its 4 records"
    assert code == 0 and title in " ".join(out.split()), err
    summary = json.loads((tmp_path / "part" / "summary.json").read_text())
    assert (summary["skipped"]["count"], summary["skipped"]["records"], summary["score"]["n"]) == (1, 4, 3)
    assert "line 2" in summary["skipped"]["faults"][0]
    found = compared([tmp_path / "whole", tmp_path / "part"])
    assert title in found["title"] and any("data differs" in warning for warning in found["warnings"])
    assert len(ranked(tmp_path)) == 2


def test_a_log_that_cannot_be_read_does_not_block_its_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": {"simulator": "scripted", "rounds": 1}, "limit": 2}
    first = play(tmp_path, **options)
    log = next((tmp_path / "logs").glob("*.eval"))
    (tmp_path / "logs" / "9999-broken.eval").write_bytes(log.read_bytes()[:400])
    heard: list[str] = []
    wanted = Evaluation("eibench", "scripted/talker", **options)
    assert evaluate(wanted, tmp_path, display="none", log_line=heard.append)["scenarios"] == first["scenarios"]
    assert "9999-broken.eval cannot be read" in heard[0] and "nothing to play" in heard[1]


def test_names_from_outside_are_text_and_prices_are_reckoned(
    tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # in a narrow terminal names are cut
    results = [Result(k, 1, "x[/y] $\\frac$", 0.1, tokens={"model": (1_000_000, 500_000)}) for k in "ab"]
    facts = {
        "model": "m/[red]a[/b]",
        "other": {"models": ["j[/x]"]},
        "task": {},
        "generation": {},
        "limit": None,
        "data": None,
    }
    prices = {"model": {"input": 2.0, "output": 10.0, "currency": "USD"}}
    for name in "ab":
        write_results(tmp_path / name, results, summarise(EIBENCH, results, {**facts, "prices": prices}))
    code, out, err = ctcgrpo("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (code, err) == (0, "") and "x[/y] $" in out and "j[/x]" in out
    code, out, _ = ctcgrpo("leaderboard", str(tmp_path))
    assert code == 0 and "m/[red]a[/b]" in out
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["cost"] == {"model": {"money": 14.0, "currency": "USD"}}


def test_a_single_scenario_and_a_share_without_spread_are_no_certainty() -> None:
    assert figures([("a", 0.4)]) == {"mean": 0.4, "ci95": None, "n": 1}
    low, high = share_interval(3, 3)
    assert low == pytest.approx(0.4385, abs=1e-3) and high == 1.0  # Wilson's, by hand: 3 / (3 + 1.96^2)
    assert share_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
