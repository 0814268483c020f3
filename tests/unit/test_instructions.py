"""The instructions behind a policy's role: the same in training, validation, evaluation and chat, and named beside every score."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ctcgrpo.environments.eibench import opening_messages
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import OutputError, PolicyError, RecipeError
from ctcgrpo.evaluation.compare import compared
from ctcgrpo.evaluation.eibench import INSTRUCTIONS, eibench
from ctcgrpo.evaluation.run import Evaluation, evaluate
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.instructions import Instructions, load_instructions
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.settings import briefing
from ctcgrpo.simulator.llm.official import OfficialPolicyPrompts
from tests import inspect_models
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY

ENGLISH, CHINESE = ({s.scene: s for s in load_scenarios(f"{pack}/test", "test")} for pack in ("english", "chinese"))
EIBENCH = load_instructions("eibench")


def system(scenario: Scenario, told: Briefing) -> str:
    return opening_messages(scenario, told)[0]["content"]


def test_the_shipped_instructions_are_on_by_default_and_fit_the_policy() -> None:
    told = briefing(load_recipe("recipes/qwen3_8b.yaml"))
    assert told.instructions == EIBENCH and told.reasons
    for pack, first, second in ((ENGLISH, "Think first", "Say only"), (CHINESE, "先在", "只写你当面")):
        for scenario in pack.values():
            reasoned, plain = (system(scenario, Briefing(None, EIBENCH, reasons)) for reasons in (True, False))
            role = scenario.policy_persona
            assert reasoned.startswith(role + "\n\n### ") and plain.startswith(role + "\n\n### ")
            assert f"1. {first}" in reasoned and f"2. {second}" in reasoned and reasoned.count("</think>") == 3
            assert f"1. {second}" in plain and "think>" not in plain and first not in plain
            assert system(scenario, Briefing()) == role


def test_instructions_are_named_by_their_words(tmp_path: Path) -> None:
    assert re.fullmatch(r"eibench \([0-9a-f]{8}\)", EIBENCH.name) and load_instructions("none").name == "none"
    (file := tmp_path / "mine.j2").write_text("Be kind.")
    first = load_instructions(str(file))
    assert first.text("en", True) == first.text("sw", False) == "Be kind."
    file.write_text("Be brief.")
    assert load_instructions(str(file)).name != first.name
    (tmp_path / "by_language").mkdir()
    (tmp_path / "by_language" / "zh.j2").write_text("{% if reasons %}先想。{% endif %}说人话。")
    by_language = load_instructions(str(tmp_path / "by_language"))
    assert by_language.text("zh", True) == "先想。说人话。"
    with pytest.raises(PolicyError, match=r"scenario 'support-test-.*no text for language 'en', only zh; name a file"):
        system(ENGLISH["support"], Briefing(None, by_language))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "'eibnch': no such file or folder; did you mean 'eibench'"),
        ("", "gives an empty text with reasons=False; set none"),
        ("{% if reasons %}Think.{% endif %}", "gives an empty text with reasons=False"),
        ("Be kind.\n{% if reasons %}", "line 2: .*a template knows one variable, reasons"),
        ("Be {{ kind }}.", "'kind' is undefined; a template knows one variable, reasons"),
        (b"\xff\xfe\xfa", "cannot be read"),
    ],
)
def test_instructions_that_cannot_serve_are_refused(tmp_path: Path, text: Any, problem: str) -> None:
    file = tmp_path / "mine.j2"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError, match=problem):
        load_instructions("eibnch" if text is None else str(file))
    with pytest.raises(PolicyError, match=r"expected LANGUAGE\.j2 files"):
        load_instructions(str((tmp_path / "empty").mkdir() or tmp_path / "empty"))


def test_tags_in_instructions_are_tokens_and_those_in_a_role_are_not(tiny: Path) -> None:
    """What the template renders of a role with instructions, id by id: the model meets in training what it meets when deployed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    told = Briefing(None, EIBENCH, reasons=True)
    contexts = ContextBuilder(tokenizer, stop_ids={tokenizer.eos_token_id}, max_prompt_tokens=4000)
    tag = tokenizer.convert_tokens_to_ids("<think>")
    for scenario in (ENGLISH["support"], ENGLISH["charm"]):
        contexts.check({scenario.id: opening_messages(scenario, told)})
        ids, _ = contexts.prompt(contexts.start(opening_messages(scenario, told)))
        messages = [{"role": "system", "content": system(scenario, told)}]
        messages += [{"role": "user", "content": scenario.opening_line}] if scenario.opening_line else []
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert list(ids) == tokenizer.encode(rendered, add_special_tokens=False) and ids.count(tag) == 2
    role = Briefing(None, Instructions())
    plain = ContextBuilder(tokenizer, stop_ids={tokenizer.eos_token_id}, max_prompt_tokens=4000)
    forged = replace(ENGLISH["support"], policy_persona=system(ENGLISH["support"], told))
    assert plain.prompt(plain.start(opening_messages(forged, role)))[0].count(tag) == 0


def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """What a model is sent from here on."""
    calls: list[list[tuple[str, str]]] = []

    def listening(messages: Any, config: Any) -> str:
        calls.append([(m.role, m.text) for m in messages])
        return "I hear you."

    monkeypatch.setitem(inspect_models.ANSWERS, "talker", listening)
    return calls


def play(folder: Path, **task: Any) -> dict[str, Any]:
    roles = {} if "simulator" in task else {"simulator": "scripted/user"}
    return evaluate(Evaluation("eibench", "scripted/talker", task={"rounds": 2, **task}, roles=roles), folder, display="none")


def test_evaluation_tells_the_model_what_training_does_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctcgrpo: Command
) -> None:
    calls = heard(monkeypatch)
    summary = play(tmp_path / "with", simulator="scripted")
    wanted = {system(s, Briefing(None, EIBENCH)) for s in load_scenarios("english/test", "test")}
    assert {call[0][1] for call in calls} == wanted
    assert summary["instructions"] == EIBENCH.name
    calls.clear()
    other = play(tmp_path / "without", simulator="scripted", instructions="none", persona_sections=["Core goal"])
    assert other["instructions"] == "none" and all(call[0][1].startswith("### Core goal\n") for call in calls)
    with pytest.raises(OutputError, match=r"instructions eibench \(.*instructions none.*--mixed"):
        compared([tmp_path / "with", tmp_path / "without"])
    _, out, _ = ctcgrpo("leaderboard", str(tmp_path))
    told = " ".join(out.split())
    assert f"instructions {EIBENCH.name}" in told and "instructions none" in told


def test_a_run_and_its_evaluation_tell_its_policy_the_same(
    tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with instructions and sections of its own: its summary names them, its resume refuses others, its evaluation takes
    them without being asked."""
    (file := tmp_path / "mine.j2").write_text("Be kind.{% if reasons %} <think> first.{% endif %}")
    own = [f"policy.instructions={file}", "policy.reasons=true", "policy.persona_sections=[Core goal]"]
    own += ["validation.scenarios=english/test", "validation.every=1", f"run.output_dir={tmp_path}"]
    code, _, err = ctcgrpo("train", TINY, *FAST, *own)
    assert code == 0, err
    settings = json.loads((tmp_path / "tiny" / "summary.json").read_text())["settings"]
    assert settings["instructions"] == load_instructions(str(file)).name

    monkeypatch.chdir(tmp_path)
    asked = ["--simulator", "scripted", "--display", "none", "--limit", "2", "--rounds", "1"]
    code, out, err = ctcgrpo("evaluate", "eibench", "--model", "tiny/final", *asked)
    assert code == 0, err
    [folder] = (tmp_path / "checkpoints" / "evaluations" / "eibench").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["instructions"] == settings["instructions"] and summary["task"]["reasons"] is True
    assert summary["task"]["persona_sections"] == ["Core goal"] and "instructions" not in str(summary["unlike_trained"])

    code, out, err = ctcgrpo("evaluate", "eibench", "--model", "tiny/final", *asked, "--instructions", "none", "--out", "b")
    assert code == 0 and f"instructions none (the run: {file})" in out, err
    file.write_text("Be brief.")
    code, _, err = ctcgrpo("train", TINY, *FAST, *own, "training.max_steps=3")
    assert code == 6 and "policy.instructions: 1 altered" in err, err


def test_a_person_who_chats_reads_them_too(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    code, out, _ = ctcgrpo("chat", "--scenario", "support-test-01")
    assert code == 0 and "How you reply" in out
    code, out, _ = ctcgrpo("chat", "--scenario", "support-test-01", "--instructions", "none")
    assert code == 0 and "How you reply" not in out


AUTHORS = """
import requests
def _build_simulator_system_prompt(profile, history, anger, trust, round_idx, max_rounds, scene_tag,
                                   include_history=True, stop_prompt_extra=""):
    return "simulator"
def _build_simulator_messages(system_prompt, history, scene_tag="Repair"):
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": "go on"}]
def _build_defender_messages(profile, history, scene_tag=""):
    said = [{"role": "system", "content": profile["defender_profile"]["system_prompt"] + "|their instructions"}, *history]
    if len(said) == 1 and scene_tag != "Charm":
        said.append({"role": "user", "content": "not in charm"})
    return said
"""
ROUTER = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src"))
import requests
import simulator_v2
def _call_openai_compatible(history, model, api_key, base_url, temperature=0.7, max_retry=3, max_tokens=8192, timeout=300):
    raise SystemExit("a call would be made")
def _router(history, model, temperature=0.7):
    if not any(m["role"] == "user" for m in history):
        history = list(history) + [{"role": "user", "content": "you begin"}]
    return _call_openai_compatible(history, model=model, temperature=temperature, api_key="k", base_url="u")
simulator_v2._call_llm_router = _router
"""


def authors(folder: Path, **files: str) -> Path:
    for name, text in {"src/simulator_v2": AUTHORS, "evaluation/run_eval": ROUTER}.items():
        file = folder / "EIBench" / "code" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(files.get(file.stem, text))
    return folder


def test_the_official_mode_tells_the_model_what_the_authors_evaluation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = list(sys.path)
    folder = authors(tmp_path / "theirs")
    calls = heard(monkeypatch)
    summary = play(tmp_path / "out", official=str(folder))
    assert summary["failed"] == 0 and summary["instructions"].startswith("official/")
    assert all(call[0][1].endswith("|their instructions") and "How you reply" not in call[0][1] for call in calls)
    charm = [call for call in calls if call[0][1].startswith(ENGLISH["charm"].policy_persona)]
    first, second = sorted(charm, key=len)
    assert first[1:] == [("user", "you begin")] and [role for role, _ in second[1:]] == ["assistant", "user"]
    assert not any(("user", "not in charm") in call for call in calls)
    assert sys.path == path and "simulator_v2" not in sys.modules
    for option in ({"instructions": "none"}, {"opener": "Hi"}, {"reasons": True}):
        with pytest.raises(RecipeError, match="leave out instructions, reasons, persona_sections and opener"):
            play(tmp_path / f"no-{min(option)}", official=str(folder), **option)


def test_an_official_copy_without_its_evaluation_is_refused(tmp_path: Path) -> None:
    (authors(tmp_path) / "EIBench" / "code" / "evaluation" / "run_eval.py").unlink()
    with pytest.raises(RecipeError, match=r"expected a folder with EIBench/code/evaluation/run_eval\.py"):
        OfficialPolicyPrompts(tmp_path)
    with pytest.raises(RecipeError, match="has no function _router"):
        OfficialPolicyPrompts(authors(tmp_path, run_eval="x = 1"))


def test_the_system_message_says_where_its_instructions_begin() -> None:
    """For policies in folders, whose tokenizer turns the tags of instructions, and only those, into tokens."""
    task = eibench(simulator="scripted", reasons=True)
    for sample in task.dataset:
        system = sample.input[0]  # type: ignore[index]
        assert system.text.endswith("\n\n" + system.metadata[INSTRUCTIONS]) and "<think>" in system.metadata[INSTRUCTIONS]  # type: ignore[union-attr]
