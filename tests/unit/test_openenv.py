"""An OpenEnv server as an environment of ours: training on one, and what happens where it fails."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openenv", reason="needs the extra openenv")

from openenv.core.env_server import Action, Observation, State, create_fastapi_app
from openenv.core.env_server import Environment as ServerSide
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer
from ctcgrpo.environments.openenv import OpenEnv, observation_text
from ctcgrpo.errors import EnvironmentFailed, RecipeError
from ctcgrpo.rollout.session import Session
from tests.conftest import Command
from tests.openenv_serving import eventually, serving


class Answer(Action):  # type: ignore[misc]
    answer: str


class Seen(Observation):  # type: ignore[misc]
    question: str = ""
    score: float = 0.0


class Quiz(ServerSide):  # type: ignore[misc]
    """Two turns. Answers with commands: raise, slow, none, nan."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    sessions: set[Quiz] = set()
    most = 0

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0

    def reset(self, seed: int | None = None, topic: str = "rain", done: bool = False) -> Seen:
        Quiz.sessions.add(self)
        Quiz.most = max(Quiz.most, len(Quiz.sessions))
        self.turns = 0
        return Seen(question=f"{topic} {seed}", done=done, metadata={"level": 3, "who": "host", "more": {"a": 1}})

    def step(self, action: Answer) -> Seen:
        self.turns += 1
        if action.answer == "raise":
            raise ValueError("no such answer")
        if action.answer == "slow":
            time.sleep(1.0)
        done = self.turns == 2
        reward = {"none": None, "nan": float("nan")}.get(action.answer, len(action.answer) / 10)
        return Seen(question="" if done else "And?", reward=reward, done=done, score=0.75, metadata={"turn": self.turns})

    @property
    def state(self) -> State:
        return State(step_count=self.turns)

    def close(self) -> None:
        Quiz.sessions.discard(self)


def quiz(most: int = 32) -> Any:
    Quiz.sessions, Quiz.most = set(), 0
    return create_fastapi_app(Quiz, Answer, Seen, most)


@pytest.fixture
def url() -> Iterator[str]:
    with serving(quiz()) as at:
        yield at


def answering(reply: str) -> dict[str, str]:
    return {"answer": reply}


def asked(observation: Any) -> str:
    return f"Question: {observation['question']}"


def session(url: str, **options: Any) -> Session:
    return Session(lambda: OpenEnv(url, **{"action": "answer", "observation": "question"} | options), "test")


async def failure(url: str, reply: str = "a", task: Any = None, **options: Any) -> str:
    """The reason of an episode that fails, and whether its connection is closed in the end."""
    played = session(url, **options)
    try:
        with pytest.raises(EnvironmentFailed) as raised:
            await played.reset(task or {}, seed=1)
            await played.step(reply)
        return str(raised.value)
    finally:
        await played.close_or_fail()


# --- training on the server that `openenv init` makes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaffold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """It echoes, pays a tenth a character up to 1, never ends, and has one session."""
    from openenv.cli.commands.init import init

    folder = tmp_path_factory.mktemp("scaffold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # or uv resolves its dependencies
        init("parrot", str(folder))
        patch.syspath_prepend(str(folder))
        from parrot.server.app import app  # type: ignore[import-not-found]

        with serving(app) as url:
            yield url
    for name in [name for name in sys.modules if name.partition(".")[0] == "parrot"]:
        del sys.modules[name]


RECIPE = """
run: {{name: parrot, output_dir: {folder}}}
policy: {{model: builtin/tiny}}
environment:
  factory: ctcgrpo.environments.openenv:OpenEnv
  options: {{url: "{url}", observation: echoed_message}}
  tasks: {folder}/tasks.jsonl
  per_step: 1
rollout: {{group_size: 4, max_turns: 2, max_new_tokens: 4, max_prompt_tokens: 200}}
credit: {{alpha: 1.0}}
training: {{max_steps: 1, save_every: 1, learning_rate: 1.0e-3}}
"""


def said(table: str) -> str:
    """The text of a printed table in one line."""
    return " ".join(table.replace("│", " ").split())


def recipe(folder: Path, url: str) -> Path:
    (folder / "tasks.jsonl").write_text('{"id": "one"}\n')
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(folder=folder, url=url))
    return file


def check_traces(folder: Path) -> None:
    """Four episodes of two turns, whose messages and rewards are the server's."""
    episodes = [json.loads(line) for line in (folder / "traces" / "step-000001.rank-0.jsonl").read_text().splitlines()]
    assert len(episodes) == 4 and all(len(episode["turns"]) == 2 for episode in episodes), episodes
    for episode in episodes:
        assert episode["failure"] is None and "environment ready" in episode["opening"]
        assert episode["outcome"] == pytest.approx(sum(turn["reward"] for turn in episode["turns"]))
        for turn in episode["turns"]:
            assert turn["reward"] == pytest.approx(min(len(turn["reply"]) / 10, 1.0))
            assert turn["info"]["original_message"] == turn["reply"]


def test_a_recipe_trains_on_it(ctcgrpo: Command, scaffold: str, tmp_path: Path) -> None:
    """The episodes of a step share its one session, one after the other."""
    code, _, err = ctcgrpo("train", str(recipe(tmp_path, scaffold)))
    assert code == 0, err
    check_traces(tmp_path / "parrot")


def test_a_trainer_in_python_trains_on_it(scaffold: str, tmp_path: Path) -> None:
    args = CTCGRPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        max_turns=2,
        max_completion_length=4,
        max_steps=1,
        learning_rate=1e-3,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CTCGRPOTrainer("builtin/tiny", args, lambda: OpenEnv(scaffold, observation="echoed_message"), [{"id": "one"}])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))
    check_traces(tmp_path)


def test_check_plays_an_episode_on_it(ctcgrpo: Command, scaffold: str, tmp_path: Path) -> None:
    """With a function in a file beside the recipe."""
    (tmp_path / "parrot_words.py").write_text("def twice(reply):\n    return {'message': reply[:2] * 2}\n")
    chosen = "environment.options.action=parrot_words:twice"
    code, out, err = ctcgrpo("check", str(recipe(tmp_path, scaffold)), chosen)
    assert code == 0 and "rewards +0.400, +0.400" in said(out), out + err


def test_check_of_an_unreachable_server_says_so(ctcgrpo: Command, tmp_path: Path) -> None:
    code, out, _ = ctcgrpo("check", str(recipe(tmp_path, "http://127.0.0.1:9")))
    assert code == 2 and "OpenEnv server http://127.0.0.1:9: cannot connect" in said(out), out
    assert "start the server there, or correct environment.options.url" in said(out)


# --- observations, actions, rewards ----------------------------------------------------------------------------------------


async def test_the_row_goes_to_reset_and_what_comes_back_is_the_episode(url: str) -> None:
    played = session(url)
    messages = await played.reset({"topic": "sun", "unknown": [1]}, seed=2**62)
    assert messages == ({"role": "user", "content": f"sun {2**62}"},) and played.info == {"level": 3, "who": "host"}
    first, last = await played.step("abc"), await played.step("none")
    assert (first.reward, first.done, first.info) == (0.3, False, {"turn": 1}) and first.messages[0]["content"] == "And?"
    assert (last.reward, last.done, last.messages) == (None, True, ())
    assert await played.outcome() == pytest.approx(0.3)  # the sum of the rewards
    await played.close_or_fail()
    await eventually(lambda: not Quiz.sessions)  # the server's session is over too


async def test_a_seed_of_the_row_replaces_the_episode_s(url: str) -> None:
    for given, seed in ((7, 7), (None, 1)):  # a data set fills what a row lacks with None
        played = session(url)
        assert (await played.reset({"seed": given, "topic": None}, seed=1))[0]["content"] == f"rain {seed}"
        await played.close_or_fail()


async def test_functions_make_actions_and_texts(url: str) -> None:
    for options in (
        {"action": answering, "observation": asked},
        {"action": f"{__name__}:answering", "observation": f"{__name__}:asked"},
    ):
        played = session(url, **options, system="Be brief.", outcome="score")
        messages = await played.reset({}, seed=1)
        assert messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question: rain 1"})
        await played.step("a")
        await played.step("a")
        assert await played.outcome() == 0.75
        await played.close_or_fail()


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"prompt": "Guess.", "text": "", "n": 1}, "Guess."),
        ({"message": "Hi.", "text": "no"}, "Hi."),
        ({"message": "", "messages": []}, ""),
        ({"messages": [{"role": "user", "content": "Hi."}], "message": "no"}, [{"role": "user", "content": "Hi."}]),
        ({"messages": [{"role": "user", "content": "Hi.", "more": 1}]}, [{"role": "user", "content": "Hi."}]),
        ({"messages": [{"sender_id": 0, "content": "Hi."}], "prompt": "Play."}, "Play."),
        ({"messages": [{"role": "assistant", "content": "mine"}], "metadata": {"a": 1}},
         '{"messages": [{"role": "assistant", "content": "mine"}]}'),
        ({"board": ["ä", 1], "metadata": {"a": 1}}, '{"board": ["ä", 1]}'),
        ({"metadata": {}}, ""),
    ],
)  # fmt: skip
def test_the_text_of_an_observation(observation: Any, text: Any) -> None:
    assert observation_text(observation) == text


async def test_episodes_are_played_in_parallel(url: str) -> None:
    every = [session(url) for _ in range(8)]
    await asyncio.gather(*(played.reset({}, seed=1) for played in every))
    assert Quiz.most == 8
    started = time.monotonic()
    await asyncio.gather(*(played.step("slow") for played in every))
    assert time.monotonic() - started < 6  # seconds; each takes 1
    await asyncio.gather(*(played.close_or_fail() for played in every))


# --- failures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "options", "reason"),
    [
        ("raise", {}, r"step: Server error: no such answer \(code: EXECUTION_ERROR\)"),
        ("slow", {"timeout": 0.2}, r"step: no answer within 0.2 s \(options.timeout\)"),
        ("a", {"action": "text"}, r"step: .*VALIDATION_ERROR.*; expected the action's fields of http.*/schema; set options.action"),
        ("none", {"scored": True}, r"step: no reward; expected a finite number \(options.scored\)"),
        ("nan", {"scored": True}, r"step: no reward"),  # OpenEnv's server sends null for it
        ("a", {"observation": "board"}, r"options.observation = 'board': the observation has metadata, question, score"),
    ],
)  # fmt: skip
async def test_what_the_server_does_wrong_fails_the_episode(url: str, reply: str, options: Any, reason: str) -> None:
    found = await failure(url, reply, **options)
    assert found.startswith(f"OpenEnv server {url}: ") and re.search(reason, found), found


async def test_an_episode_that_is_over_at_once_fails(url: str) -> None:
    assert "the first observation has done = true" in await failure(url, task={"done": True})


async def test_a_row_that_is_no_json_fails_the_episode(url: str) -> None:
    assert "reset: TypeError: Object of type set is not JSON serializable" in await failure(url, task={"topic": {1}})


async def test_an_outcome_that_did_not_come_is_no_sum_of_rewards(url: str) -> None:
    played = session(url, outcome="score")
    await played.reset({}, seed=1)
    await played.step("a")  # and the recipe's limit of turns is 1
    with pytest.raises(EnvironmentFailed, match="the server did not end the episode.*larger rollout.max_turns"):
        await played.outcome()
    await played.close_or_fail()


async def test_a_restarted_server_does_not_continue_the_episode() -> None:
    """openenv's client would connect again, to a session that was not reset."""
    with serving(quiz()) as url:
        played = session(url)
        await played.reset({}, seed=1)
        await played.step("a")
    await asyncio.sleep(0.2)
    with serving(quiz(), port=int(url.rpartition(":")[2])):
        with pytest.raises(EnvironmentFailed, match=f"OpenEnv server {url}: step: the connection was lost, and the episode"):
            await played.step("a")
        await played.close_or_fail()
        assert not Quiz.most


async def test_a_server_that_is_killed_during_a_step() -> None:
    with serving(quiz()) as url:
        played = session(url)
        await played.reset({}, seed=1)
        step = asyncio.create_task(played.step("slow"))
        await asyncio.sleep(0.2)
    with pytest.raises(EnvironmentFailed, match=f"OpenEnv server {url}: step: the server closed the connection"):
        await step
    await played.close_or_fail()


async def test_a_full_server_is_waited_for() -> None:
    with serving(quiz(most=1)) as url:

        async def play() -> float:
            played = session(url)
            await played.reset({}, seed=1)
            await played.step("a")
            await played.step("a")
            try:
                return await played.outcome()
            finally:
                await played.close_or_fail()

        assert await asyncio.gather(*(play() for _ in range(5))) == [pytest.approx(0.2)] * 5 and Quiz.most == 1
        holding = session(url)
        await holding.reset({}, seed=1)
        found = await failure(url, patience=0.3)
        assert "1/1 sessions active" in found and "waited 0.3 s (options.patience)" in found
        await holding.close_or_fail()


SENT = {
    "a NaN": ('{"type": "observation", "data": {"observation": {"message": "x"}, "reward": NaN, "done": false}}',
              "step: reward = nan; expected a finite number or null"),
    "a text": ('{"type": "observation", "data": {"observation": {}, "reward": "much", "done": false}}',
               "step: reward = 'much'; expected a finite number or null"),
    "done": ('{"type": "observation", "data": {"observation": {}, "reward": 1, "done": "no"}}',
             "step: done = 'no'; expected true or false"),
    "no JSON": ("<html>", "step: JSONDecodeError"),
    "a list": ("[1]", "step: AttributeError"),
    "observation": ('{"type": "observation", "data": {"observation": 3}}', "step: observation = 3; expected an object"),
    "close": ("", "step: the server closed the connection"),
}  # fmt: skip


@pytest.mark.parametrize("what", SENT)
async def test_a_server_that_sends_anything(what: str) -> None:
    """OpenEnv's own server sends null for NaN; others may not."""
    sent, reason = SENT[what]

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()
        await socket.send_text('{"type": "observation", "data": {"observation": {"message": "Hi."}}}')
        await socket.receive_text()
        if sent:
            await socket.send_text(sent)
            await socket.receive_text()

    with serving(Starlette(routes=[WebSocketRoute("/ws", talk)])) as url:
        found = await failure(url, action="message", observation=None)
    assert reason in found and found.startswith(f"OpenEnv server {url}: "), found


async def test_a_server_that_is_none_of_openenv() -> None:
    with serving(Starlette()) as url:
        assert "cannot connect: server rejected WebSocket connection: HTTP 403" in await failure(url)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"url": "127.0.0.1:8000"}, "environment.options.url = '127.0.0.1:8000'; expected the URL of an OpenEnv server"),
        ({"url": 3}, "environment.options.url = 3; expected"),
        ({"url": "http://me:word@host"}, "environment.options.url: the URL holds a name, a password or a query"),
        ({"action": 3}, "environment.options.action = 3; expected the name of a field, or module:function"),
        ({"observation": "nothing_m:f"}, "environment.options.observation = 'nothing_m:f': there is no module"),
        ({"token_env": "OPENAI_API_KEY"}, "environment.options.token_env = 'OPENAI_API_KEY'; expected .* begins with CTCGRPO_"),
        ({"token_env": "CTCGRPO_NO_TOKEN"}, "environment.options.token_env = 'CTCGRPO_NO_TOKEN': ?.*blank or not set"),
    ],
)
def test_a_wrong_option_is_named(options: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        OpenEnv(**{"url": "http://127.0.0.1:9"} | options)
