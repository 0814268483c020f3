"""A person talks with a policy: the prompts are those of training, each policy has its own history, and text stays text."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctcgrpo.chat.conversation import Conversation, Reply, add_replies, dialogue_of, say_line, shown
from ctcgrpo.chat.opening import Choice, Talk, open_talk
from ctcgrpo.chat.speaker import converse
from ctcgrpo.chat.terminal import talk_in_terminal
from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.settings import briefing
from ctcgrpo.types import Completion
from ctcgrpo.util.files import mark_complete
from ctcgrpo.util.terminal import Terminal
from tests.browsing import shows, watched, with_browser
from tests.conftest import ROOT, Command
from tests.served import Served, serving
from tests.unit.test_report import HOSTILE
from tests.unit.test_terminal import EVIL, harmless

SCENARIOS = {s.id: s for s in load_scenarios("english/test", "test")}
SUPPORT, CHARM = "support-test-01", "charm-test-01"


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose base and trained policies differ in all weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(tiny, folder / "base")
    build_tiny(folder / "final", (s.user_persona for s in load_scenarios("english/train")), seed=1)
    for name in ("base", "final"):
        mark_complete(folder / name)
    recipe = {
        "run": {"name": "run"},
        "policy": {"model": "builtin/tiny", "instructions": "short"},
        "scenarios": {"train": "english/train"},
        "rollout": {"temperature": 0.9, "top_k": 50, "max_new_tokens": 12, "max_prompt_tokens": 900},
        "validation": {"scenarios": "english/test"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def opened(policy: Path | str, **options: Any) -> Talk:
    return open_talk(Choice(str(policy), **options), lambda text: None)


def talked(talk: Talk, *lines: str, seed: int = 0) -> Conversation:
    async def all_lines() -> Conversation:
        conversation = talk.start
        for line in lines:
            conversation = await converse(conversation, line, talk.speakers, seed)
        return conversation

    try:
        return asyncio.run(all_lines())
    finally:
        talk.close()


def texts(conversation: Conversation, place: int = 0) -> list[str]:
    return [replies[place].text for replies in conversation.replies]


def reply(text: str = "", *ids: int) -> Reply:
    return Reply(text, None, (), Completion(ids, (0.0,) * len(ids), "stop"))


# --- the record ----------------------------------------------------------------------------------------------------------------


def test_a_conversation_by_hand() -> None:
    start = Conversation(("base", "trained"))
    asked = say_line(start, " Hello. \n")
    done = add_replies(asked, [reply("A"), reply("B")])
    assert start.lines == () and asked.lines == ("Hello.",) and texts(done) == ["A"] and texts(done, 1) == ["B"]
    assert [r["text"] for r in shown(done)["turns"][0]["replies"]] == ["A", "B"]
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="the line is empty"):
            say_line(start, empty)
    with pytest.raises(AssertionError):
        say_line(asked, "Hello?")
    opens = Conversation(("p",), ({"role": "system", "content": "You open."},), policy_opens=True)
    assert say_line(opens, "").lines == ("",)
    with pytest.raises(ValueError):
        say_line(add_replies(say_line(opens, ""), [reply("Hi")]), "")


@pytest.mark.parametrize("name", [SUPPORT, CHARM])
def test_prompts_and_sampling_are_those_of_training(run: Path, name: str) -> None:
    """Against the environment that training plays, and the contexts that it makes."""
    talk = opened(run / "final", scenario=name)
    speaker, scenario = talk.speakers[0], SCENARIOS[name]
    assert speaker.sampling == Sampling(0.9, 1.0, 50, 12) and talk.start.policy_opens == (not scenario.opening_line)
    environment = EIBench(briefing=briefing(resolved_recipe(run / "recipe.yaml")))
    messages = asyncio.run(environment.reset(task_of(scenario).data, seed=0))
    lines = [scenario.opening_line, "And then?", "Go on."]
    found = talked(talk, *lines)
    contexts = speaker._contexts
    dialogue = contexts.start(messages)
    for replies, line in zip(found.replies, [*lines[1:], "The end."], strict=True):
        dialogue = contexts.extend(dialogue, replies[0].completion, line)
    asked = say_line(found, "The end.")
    assert contexts.prompt(dialogue_of(asked, 0, contexts)) == contexts.prompt(dialogue)
    assert all(1 <= len(r[0].completion.token_ids) <= 12 for r in found.replies)


def test_a_seed_repeats_replies_and_options_override_the_run(run: Path) -> None:
    lines = ("Hello.", "And you?")
    one, same, other = (talked(opened(run / "final"), *lines, seed=seed) for seed in (1, 1, 2))
    assert texts(one) == texts(same) != texts(other)
    greedy = [talked(opened(run / "final", temperature=0.0, max_new_tokens=5), *lines, seed=seed) for seed in (1, 2)]
    assert texts(greedy[0]) == texts(greedy[1]) and len(greedy[0].replies[0][0].completion.token_ids) <= 5


def test_compared_policies_each_have_their_own_history(run: Path) -> None:
    lines = ("Hello.", "And you?", "Well.")
    talk = opened(run / "final", compare=True, scenario=SUPPORT)
    assert talk.start.policies == ("base", "trained")
    both = talked(talk, *lines, seed=3)
    alone = talked(opened(run / "final", scenario=SUPPORT), *lines, seed=3)
    assert texts(both, 1) == texts(alone) != texts(both, 0)
    assert texts(both, 0) == texts(talked(opened(run / "base", scenario=SUPPORT), *lines, seed=3))


def test_roles(run: Path, tiny: Path) -> None:
    def role(policy: Path, **options: Any) -> str:
        talk = opened(policy, **options)
        talk.close()
        return talk.start.role[0]["content"] if talk.start.role else ""

    persona = SCENARIOS[SUPPORT].policy_persona.strip()
    assert role(run / "final").startswith("### How you reply") and role(run / "final", instructions="none") == ""
    assert role(tiny) == "" and role(tiny, scenario=SUPPORT).startswith(persona)
    short = role(run / "final", scenario=SUPPORT)
    assert short.startswith(persona) and short == role(tiny, scenario=SUPPORT, instructions="short") != role(
        tiny, scenario=SUPPORT
    )


# --- in the terminal -----------------------------------------------------------------------------------------------------------


def test_a_person_talks_in_the_terminal(run: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("chat", "--policy", str(run / "final"), "--scenario", SUPPORT, "--compare", "--seed", "3")
    said = []
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\nAnd you?\n\n"))
        code, out, err = ctcgrpo(*command)
        assert code == 0 and "loading the weights of" in err, err
        assert f"You: {SCENARIOS[SUPPORT].opening_line[:30]}" in out and "temperature 0.9, at most 12 tokens, top-k 50" in out
        said.append([line for line in out.splitlines() if re.search(r"\bbase: ", line)])
        assert len(said[-1]) == 2
    assert not any("trained: " in line for line in said[0]) and all("trained: " in line for line in said[1])


def test_rounds_end_a_conversation(tiny: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One.\nTwo.\nThree.\n"))
    code, out, _ = ctcgrpo("chat", "--policy", str(tiny), "--rounds", "2", "--max-new-tokens", "4")
    assert code == 0 and out.count(f"{tiny}: ") == 2 and "The policy has no role" in out


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--compare"], 2, "--compare: needs --policy"),
        (["--web"], 2, "--web: needs --policy"),
        (["--temperature", "0"], 2, "--temperature: needs --policy"),
        (["--policy", "TINY", "--url", "http://127.0.0.1:1"], 2, "--url: with --policy you are the user"),
        (["--policy", "TINY", "--base", "TINY"], 2, "needs --compare"),
        (["--policy", "TINY", "--compare"], 2, "name the other policy with --base MODEL"),
        (["--policy", "TINY", "--web", "--rounds", "3"], 2, "--rounds 3: --web has no limit"),
        (["--policy", "RUN"], 4, "it is a run folder; its trained policy is RUN/final"),
        (["--policy", "RUN/fina"], 4, "did you mean 'RUN/final'?"),
        (["--policy", "builtin/tiny"], 4, "each run builds it"),
        (["--policy", "RUN/final", "--scenario", "support-test-1"], 3, "did you mean 'support-test-"),
        (["--policy", "RUN/final", "--instructions", "shrt"], 4, "did you mean 'short'?"),
    ],
)
def test_mistakes_are_named(run: Path, tiny: Path, ctcgrpo: Command, options: list[str], code: int, message: str) -> None:
    def there(text: str) -> str:
        return text.replace("RUN", str(run)).replace("TINY", str(tiny))

    found, _, err = ctcgrpo("chat", *map(there, options))
    assert found == code and there(message) in err and "Traceback" not in err, err


class _Speaks:
    """A policy of somebody else's, who writes to the terminal of whoever reads it."""

    name = f"evil{EVIL}"
    sampling = Sampling()

    async def reply(self, conversation: Conversation, place: int, seed: int) -> Reply:
        return Reply(EVIL, EVIL, (), Completion((1,), (0.0,), "stop"))


@pytest.mark.parametrize("width", [60, 120])
def test_what_a_policy_says_is_printed_as_text(width: int) -> None:
    out, speakers = io.StringIO(), (_Speaks(), _Speaks())
    talk = Talk(speakers, Conversation(tuple(s.name for s in speakers)), None, Sampling())  # type: ignore[arg-type]
    lines = iter(["Hello.", ""])
    asyncio.run(talk_in_terminal(talk, Terminal(width, file=out), lambda: next(lines), seed=0, reasoning=True))
    assert out.getvalue().count("RED") >= 6 and harmless(out.getvalue())


def test_ctrl_c_ends_without_a_traceback(tiny: Path) -> None:
    command = [sys.executable, "-m", "ctcgrpo", "chat", "--policy", str(tiny)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)  # type: ignore[call-overload]
    head = b""
    while b"You: " not in head:
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, process.communicate()
        head += byte
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and b"Traceback" not in err and b"last checkpoint" not in err, err


# --- on a page -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    with serving() as start:
        yield lambda policy, *options, **variables: start(*["chat", "--policy", str(policy), "--web", *options], **variables)


def post(url: str, content: Any, **headers: str) -> tuple[int, Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    origin = "/".join(url.split("/")[:3])
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", "Origin": origin, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def test_a_page_answers_for_each_tab_and_stays_responsive(run: Path, serve: Callable[..., Served]) -> None:
    served = serve(run / "final", "--compare", "--seed", "3", "--max-new-tokens", "300")
    say_url, start = f"{served.url}/say", f"{served.url}/start"
    (_, one), (_, two) = post(start, {}), post(start, {})
    assert one["id"] != two["id"] and one["turns"] == []
    slow = threading.Thread(target=post, args=(say_url, {"id": one["id"], "line": "Hello."}))
    slow.start()
    waited = []
    while slow.is_alive():  # sampling keeps nobody else waiting
        began = time.perf_counter()
        with urllib.request.urlopen(served.url, timeout=30) as answer:
            assert answer.status == 200
        waited.append(time.perf_counter() - began)
    status, found = post(say_url, {"id": one["id"], "line": "And you?"})
    assert status == 200 and [turn["line"] for turn in found["turns"]] == ["Hello.", "And you?"] and len(waited) > 1
    status, other = post(say_url, {"id": two["id"], "line": "Hello."})
    assert [r["text"] for r in other["turns"][0]["replies"]] == [r["text"] for r in found["turns"][0]["replies"]]
    assert len(other["turns"]) == 1 and other["policies"] == ["base", "trained"]
    long = {"id": two["id"], "line": "word " * 3000}
    for content, code, message in (
        ({"id": "x", "line": "Hello."}, 404, "start again"),
        ({"id": two["id"], "line": " "}, 400, "expected"),
        ({"id": [], "line": "x"}, 400, "expected"),
        (b"{", 400, "expected"),
        (b"[" * 50_000, 400, "expected"),
        (b" " * 200_000, 400, "expected"),
        (long, 422, "system prompt and latest user line take"),
    ):
        status, answer = post(say_url, content)
        assert status == code and message in answer["error"], answer
    assert len(post(say_url, {"id": two["id"], "line": "Still there?"})[1]["turns"]) == 2
    for origin in ("https://evil.example", "null", ""):
        assert post(start, {}, Origin=origin)[0] == 403
    ended = served.end()
    assert "Traceback" not in ended and served.process.returncode == 0, ended


@with_browser
def test_a_person_talks_in_a_browser(browser: Any, run: Path, serve: Callable[..., Served]) -> None:
    served = serve(run / "final", "--compare", "--scenario", SUPPORT)
    shots = os.environ.get("CTCGRPO_TEST_SCREENSHOTS")
    hostile = HOSTILE.replace("\x07", "")
    for width, dark in ((1280, False), (390, True)):
        page, wrong = watched(browser, served.url, width, dark)
        page.wait_for_selector("body[data-ready=yes]")
        assert page.input_value("#line") == SCENARIOS[SUPPORT].opening_line
        page.press("#line", "Enter")
        shows(page, "#turns", " tokens, ")
        page.fill("#line", hostile)
        page.click("#send")
        page.wait_for_selector(".replies >> nth=1")
        assert hostile.split("\u2028")[0].strip() in page.inner_text("#turns") and page.locator("img").count() == 0
        boxes = [page.locator(".reply").nth(k).bounding_box() for k in range(2)]
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)  # side by side where there is room
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        answer = {"text": f"\u202e{HOSTILE}", "reasoning": HOSTILE, "note": HOSTILE}
        found = {"id": "x", "policies": [HOSTILE, "b"], "turns": [{"line": HOSTILE, "replies": [answer, answer]}] * 3}
        page.route("**/say", lambda route, request, found=found: route.fulfill(json=found))
        page.fill("#line", "Well.")
        page.click("#send")
        page.wait_for_selector(".replies >> nth=2")
        assert "<script>document.title='owned'" in page.inner_text("#turns") and page.locator("#turns img").count() == 0
        assert page.title() == "base and trained: chat" and wrong == [] and "\u202e" not in page.inner_text("#turns")
        if shots:
            page.screenshot(path=f"{shots}/chat-{width}.png")
        page.close()
    page, wrong = watched(browser, served.url)
    page.wait_for_selector("body[data-ready=yes]")
    served.end(signal.SIGKILL)
    page.click("#send")
    shows(page, "#status", "No connection to ctcgrpo chat")
    assert page.input_value("#line") == SCENARIOS[SUPPORT].opening_line  # what was typed is not lost
    serve(run / "final", "--compare", "--scenario", SUPPORT, "--port", served.port)
    page.click("#send")
    shows(page, "#status", "this conversation is not known any more; start again")
    page.click("#again")
    page.wait_for_selector("#send:enabled")
    page.click("#send")
    page.wait_for_selector(".replies")


def test_a_policy_that_opens_speaks_first(run: Path, serve: Callable[..., Served]) -> None:
    status, found = post(f"{serve(run / 'final', '--scenario', CHARM).url}/start", {})
    assert status == 200 and [(turn["line"], len(turn["replies"])) for turn in found["turns"]] == [("", 1)]
