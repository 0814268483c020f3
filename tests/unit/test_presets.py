"""Settings of an evaluation: the published ones by name, what differs from them, and replies that a limit on tokens cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
)

from ctcgrpo.evaluation.compare import compared, ranked
from ctcgrpo.evaluation.local_policy import LocalPolicy
from ctcgrpo.evaluation.presets import preset_differences
from ctcgrpo.evaluation.run import Evaluation, evaluations_of, settings_before, with_defaults
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.types import Completion
from ctcgrpo.util.files import mark_complete
from tests.conftest import Command
from tests.fake_llm import FakeLlm
from tests.unit import test_evaluation
from tests.unit.test_evaluation import chat, made, provider
from tests.unit.test_llm_user import configuration
from tests.unit.test_run import TINY

tested = test_evaluation.tested
"""The fixture."""
Tested = Callable[..., tuple[int, str, str]]
USER = {"reflection": "", "anger_delta": 1, "trust_delta": 1, "reply": "Well.", "continue": "yes", "stop_reason": ""}


def of_fixture(summary: dict[str, Any]) -> list[str]:
    """What the fixture does differently beside its settings."""
    return [
        "data the bundled pack english/test (published: EIBench (eibench/test))",
        "the first 2 scenarios (published: all)",
        f"user {summary['roles']['simulator']} (published: qwen3-max)",
        "prompts of ctcgrpo (published: the authors', --official FOLDER)",
    ]


def both(body: dict[str, Any]) -> tuple[int, Any]:
    """The model, and the user where that is asked."""
    return 200, chat(body, json.dumps(USER) if body["model"] == "user" else "I hear you.")


def of(bodies: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [body for body in bodies if body["model"] == model]


def summary_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_published_preset_decides_what_is_sent(tested: Tested, tmp_path: Path) -> None:
    with provider(both) as llm:
        code, out, err = tested(llm.url, "--simulator", "AT/user", "--preset", "published")
    assert code == 0, err
    sent, user = of(llm.requests, "m")[0], of(llm.requests, "user")[0]
    assert (sent["temperature"], sent["max_tokens"], user["temperature"]) == (0.7, 8192, 0.7)
    assert "top_p" not in sent and not {"top_p", "seed"} & set(user)
    summary = summary_in(tmp_path / "out")
    assert summary["preset"] == {
        "name": "published",
        "differs": ["rounds 1 (published: 8)", *of_fixture(summary)],
    }  # the fixture's rounds
    assert summary["settings"] == {
        "rounds": 1,
        "variant": "evaluation",
        "reasoning": "strip",
        "tries": 3,
        "instructions": load_instructions("eibench").name,
        "reasons": True,
        "opener": "You speak first.",
        "temperature": 0.7,
        "top_p": None,
        "top_k": None,
        "max_tokens": 8192,
        "limit": 2,
    }
    told = " ".join(out.split())
    assert (
        told.count(f"preset: published, but rounds 1 (published: 8), {', '.join(of_fixture(summary))}") == 2
    )  # first, and in the summary
    assert "earlier reasoning stripped, tries of the user's LLM 3, opener You speak first., instructions eibench (" in told
    assert "instructed to reason: yes, temperature 0.7, top-p not set" in told


def test_options_win_over_a_preset_and_are_named(tested: Tested, tmp_path: Path) -> None:
    others = ("--temperature", "0.2", "--top-p", "0.9", "--tries", "5", "--reasoning", "keep", "--variant", "training")
    unset = ("-G", "max_completion_tokens=300", "-G", "simulator.temperature=0.1")
    with provider(both) as llm:
        code, _, err = tested(llm.url, "--simulator", "AT/user", "--preset", "published", *others, *unset)
    assert code == 0, err
    sent, user = of(llm.requests, "m")[0], of(llm.requests, "user")[0]
    assert (sent["temperature"], sent["top_p"], sent["max_completion_tokens"]) == (0.2, 0.9, 300)
    assert "max_tokens" not in sent and user["temperature"] == 0.1
    summary = summary_in(tmp_path / "out")
    assert summary["preset"]["differs"] == [
        "rounds 1 (published: 8)",
        "scoring variant training (published: evaluation)",
        "earlier reasoning kept (published: stripped)",
        "temperature 0.2 (published: 0.7)",
        "top-p 0.9 (published: not set)",
        "max tokens not set (published: 8192)",
        "tries of the user's LLM 5 (published: 3)",
        "the user's temperature 0.1 (published: 0.7)",
        *of_fixture(summary),
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("sage", "--simulator", "a/b", "--preset", "published"), "--preset cannot be used with sage"),
        (
            ("eibench", "--simulator", "scripted", "--preset", "published", "--as-trained"),
            "--preset and --as-trained: both given",
        ),
        (("eibench", "--simulator", "scripted", "--preset", "publishd"), "published"),
        (("eibench", "--simulator", "scripted", "--tries", "2"), "tries = 2: 'scripted' calls no LLM"),
        (("eqbench3", "--judge", "a/b", "--reasoning", "keep"), "--reasoning cannot be used with eqbench3"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    arguments: tuple[str, ...], problem: str, ctcgrpo: Command, tmp_path: Path
) -> None:
    code, _, err = ctcgrpo("evaluate", *arguments, "--model", "mockllm/model", "--out", str(tmp_path / "out"))
    assert code == 2 and problem in err


def test_tries_are_those_of_the_option_the_preset_or_the_configuration(tested: Tested, tmp_path: Path) -> None:
    with provider(lambda body: (200, chat(body, "No." if body["model"] == "user" else "I hear you."))) as llm:
        code, out, _ = tested(llm.url, "--simulator", "AT/user", "--tries", "2")
    assert code == 7 and "no valid answer in 2 tries" in out and len(of(llm.requests, "user")) == 4
    with FakeLlm(rates={"empty": 1.0}).serving() as users, provider(both) as llm:
        settings = configuration(users).model_dump(mode="json", exclude_none=True)
        file = tmp_path / "user.yaml"
        file.write_text(yaml.safe_dump({**settings, "llm": {**settings["llm"], "tries": 8}}))
        for tries, options in ((8, ()), (3, ("--preset", "published"))):
            code, out, _ = tested(llm.url, "--simulator", str(file), "--out", str(tmp_path / str(tries)), *options)
            assert code == 7 and f"in {tries} tries" in out
            assert summary_in(tmp_path / str(tries))["settings"]["tries"] == tries


@pytest.mark.parametrize("form", ["reasoning_content", "inline"])
@pytest.mark.parametrize("reasoning", [None, "strip", "keep"])
def test_earlier_reasoning_is_stripped_or_kept(
    form: str,
    reasoning: str | None,
    tested: Tested,
    tmp_path: Path,
) -> None:
    def thinks(body: dict[str, Any]) -> tuple[int, Any]:
        if form == "inline":
            return 200, chat(body, "<think>She is sad.</think>I hear you.")
        return 200, chat(body, "I hear you.", reasoning_content="She is sad.")

    with provider(thinks) as llm:
        options = () if reasoning is None else ("--reasoning", reasoning)
        code, _, err = tested(llm.url, "--simulator", "scripted", "--rounds", "3", *options)
    assert code == 0, err
    later = max((body["messages"] for body in llm.requests), key=len)
    earlier = [message for message in later if message["role"] == "assistant"]
    assert len(earlier) == 2
    for message in earlier:
        if reasoning != "keep":
            assert message == {"role": "assistant", "content": "I hear you."}
        else:
            thought = message["content"] if form == "inline" else message["reasoning_content"]
            assert "She is sad." in thought and message["content"].strip().endswith("I hear you.")
            assert form == "inline" or "sad" not in message["content"]
    summary = summary_in(tmp_path / "out")
    assert summary["settings"]["reasoning"] == (reasoning or "strip")
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert "She is sad." not in lines and "I hear you." in lines


@pytest.mark.parametrize("form", ["reasoning_content", "inline"])
def test_replies_that_are_empty_because_they_were_cut_are_counted_and_said(
    form: str,
    tested: Tested,
    tmp_path: Path,
) -> None:
    """As with a model that reasons for some thousand tokens, under a limit of 1,024; by default the limit is 8,192."""

    def reasons(body: dict[str, Any]) -> tuple[int, Any]:
        cut = body["max_tokens"] < 4000
        thought, reply = "She is sad. " * 300, "" if cut else "I hear you."
        if form == "inline":
            found = chat(body, f"<think>{thought}" if cut else f"<think>{thought}</think>{reply}")
        else:
            found = chat(body, reply or None, reasoning_content=thought)
        found["choices"][0]["finish_reason"] = "length" if cut else "stop"
        return 200, found

    with provider(reasons) as llm:
        code, out, err = tested(llm.url, "--simulator", "scripted")
        assert code == 0 and llm.requests[-1]["max_tokens"] == 8192, err
        assert summary_in(tmp_path / "out")["measures"]["empty_cut"]["count"] == 0 and "empty because" not in out
        code, out, err = tested(llm.url, "--simulator", "scripted", "--max-tokens", "1024", "--out", str(tmp_path / "cut"))
    assert code == 0, err
    assert "dialogues with a reply that is empty because max_tokens cut it off: 2 of 2" in out
    assert "warning: some replies are empty since max_tokens cut off the reasoning; raise --max-tokens" in out


async def test_a_policy_in_a_folder_heeds_what_becomes_of_reasoning_and_ends_within_its_positions(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    policy = LocalPolicy(str(tmp_path / "model"))
    ids = tuple(policy._parts.tokenizer.encode("<think>She is sad.</think>I hear you.", add_special_tokens=False))
    reply = ChatMessageAssistant(content="I hear you.")
    policy._store(reply, Completion(ids, (0.0,) * len(ids), "stop"))
    messages: list[ChatMessage] = [ChatMessageSystem(content="You are Tom."), ChatMessageUser(content="Hello.")]
    messages += [reply, ChatMessageUser(content="Well.")]
    read = {}
    for history in (None, "none", "all"):
        config = GenerateConfig(max_tokens=1, reasoning_history=history)  # type: ignore[arg-type]
        usage = (await policy.generate(messages, [], "auto", config)).usage
        assert usage is not None
        read[history] = usage.input_tokens
    assert read[None] == read["none"] < read["all"]
    policy.close()
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 2 * read["none"] + 2}))
    short = LocalPolicy(str(tmp_path / "model"))
    output = await short.generate(messages, [], "auto", GenerateConfig(max_tokens=8192, seed=1))
    assert output.usage is not None and output.usage.total_tokens <= 2 * read["none"] + 2
    short.close()


def run_folder(folder: Path, *overrides: str) -> RunFolder:
    for name in ("final", "best"):
        (folder / name).mkdir(parents=True)
    (folder / "final" / "x").touch()
    mark_complete(folder / "final")
    (folder / "recipe.yaml").write_text(load_recipe(TINY, ["validation.scenarios=english/test", *overrides]).to_yaml())
    return RunFolder(folder)


def test_defaults_depend_on_who_is_evaluated(tmp_path: Path) -> None:
    """A policy that does not reason has room for 1,024 tokens, as in training; what reasons has 8,192."""
    run_folder(tmp_path / "plain")
    run_folder(tmp_path / "reasons", "policy.reasons=true", "policy.reasoning_context=keep")
    for model, tokens, reasoning in (
        (f"ctcgrpo/{tmp_path}/plain/best", 1024, "strip"),
        (f"ctcgrpo/{tmp_path}/reasons/best", 8192, "keep"),
        ("openai/gpt-4o", 8192, "strip"),
    ):
        wanted = Evaluation("eibench", model, task={"simulator": "scripted"})
        found = settings_before(wanted)
        assert (found["max_tokens"], found["reasoning"], "tries" in found) == (tokens, reasoning, False), model
        assert with_defaults(with_defaults(wanted)) == with_defaults(wanted)
        assert settings_before(Evaluation("eibench", model, {"simulator": "scripted"}, {"max_tokens": 7}))["max_tokens"] == 7
    assert with_defaults(Evaluation("sage", f"ctcgrpo/{tmp_path}/plain/best")).generation == {"max_tokens": 1024}
    assert with_defaults(Evaluation("eqbench3", f"ctcgrpo/{tmp_path}/plain/best")).generation == {}


def test_base_and_final_of_a_run_are_evaluated_by_a_preset(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "rollout.top_k=5", "policy.reasoning_context=keep")
    run.base.mkdir()
    (run.base / "config.json").write_text("{}")
    mark_complete(run.base)
    found = evaluations_of(run, {}, {"temperature": 0.1}, {}, limit=2, preset="published")
    assert set(found) == {"base", "final"}
    for wanted in found.values():
        assert wanted.generation == {"temperature": 0.1, "max_tokens": 8192}
        assert wanted.task["rounds"] == 8 and wanted.task["variant"] == "evaluation" and wanted.task["reasoning"] == "strip"
        assert wanted.task["scenarios"] == "english/test" and wanted.task["simulator"] == "scripted"
        differing = preset_differences("published", settings_before(wanted))
        assert differing[0] == "temperature 0.1 (published: 0.7)" and differing[3] == "user scripted (published: qwen3-max)"


def test_the_published_data_user_and_prompts_are_no_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[2] / "configs" / "simulator" / "qwen3_max.yaml"
    played = {"scenarios": "eibench/test", "simulator": str(file), "official": "code", "limit": None}
    assert [text for text in preset_differences("published", played) if text.startswith(("data", "user", "prompts", "the"))] == []
    other = preset_differences("published", {**played, "simulator": "http://127.0.0.1:8765", "scenarios": "eibench/train"})
    assert other[-2:] == [
        "data EIBench (eibench/train) (published: EIBench (eibench/test))",
        "user http://127.0.0.1:8765 (published: qwen3-max)",
    ]


def test_other_settings_are_kept_apart(tmp_path: Path) -> None:
    facts = {"task": {"rounds": 8, "tries": 3, "reasoning": "strip"}, "data": "d"}
    a = made(tmp_path / "a", {"a": [0.1], "b": [0.1]}, "m/a", **facts)
    b = made(tmp_path / "b", {"a": [0.3], "b": [0.2]}, "m/b", **{**facts, "task": {**facts["task"], "reasoning": "keep"}})  # type: ignore[dict-item]
    made(tmp_path / "c", {"a": [0.3], "b": [0.2]}, "m/c", **{**facts, "task": {**facts["task"], "tries": 8}})  # type: ignore[dict-item]
    assert "earlier reasoning differs: m/a has stripped, m/b kept" in compared([a, b])["warnings"]
    assert len(ranked(tmp_path)) == 3
