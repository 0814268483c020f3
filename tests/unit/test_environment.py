"""The contract of an environment: what the runner does with one, whatever it does."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import AutoTokenizer

from ctcgrpo import types
from ctcgrpo.centering import make_centering
from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import BudgetSpent, PolicyEngineError
from ctcgrpo.options import CreditOptions
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.rollout.runner import Slot
from ctcgrpo.rollout.traces import add_credit, trace_record
from ctcgrpo.run.run_records import read_traces
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.samples import step_credit, summarise
from ctcgrpo.types import Completion, Environment, Episode, Info, Message, Step, Task, turn_rewards
from tests.unit.test_rollout import Parts


class Echo(Environment):
    """Counts down, and pays a tenth a turn. `broken` says what goes wrong, and where."""

    made: list[Echo] = []

    def __init__(self, broken: str = "") -> None:
        if broken == "constructor":
            raise OSError("no display")
        self.broken, self.closed, self.left = broken, 0, 2
        Echo.made.append(self)

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Any:
        if self.broken == "reset":
            raise KeyError("no such task")
        self.info = {"left": self.left, "who": "nobody"}
        messages: list[Message] = [{"role": "system", "content": task["role"]}, {"role": "user", "content": "Begin."}]
        odd = {
            "none": None,
            "empty": "",
            "order": [*messages, {"role": "assistant", "content": "Hm."}],
            "keys": [{"role": "user", "text": "Hm."}],
            "role": [{"role": "tool", "content": "Hm."}],
            "content": [{"role": "user", "content": 3}],
            "number": 7,
        }
        return odd.get(self.broken, messages)

    async def step(self, reply: str) -> Any:
        if self.broken == "step":
            raise ValueError("out of words")
        if self.broken == "budget":
            raise BudgetSpent("no money left")
        if self.broken == "hang":
            await asyncio.sleep(60)
        if self.broken == "own timeout":
            raise TimeoutError("the tool is slow")
        if self.broken == "cancelled":
            raise asyncio.CancelledError
        if self.broken == "exit":
            sys.exit("bye")
        self.left -= 1
        odd = {
            "tuple": ("Go on.", 0.1),
            "reward": Step("Go on.", math.nan),
            "kind of reward": Step("Go on.", "0.1"),  # type: ignore[arg-type]
            "done": Step("Go on.", 0.1, done="no"),  # type: ignore[arg-type]
            "silent": Step(None, 0.1),
            "speaks": Step([{"role": "assistant", "content": "I am the policy."}], 0.1),
            "info": Step("Go on.", 0.1, info={"left": math.inf}),
            "kind of info": Step("Go on.", 0.1, info={"left": [1]}),  # type: ignore[dict-item]
        }
        info: Info = {"left": self.left, "who": "nobody"}
        return odd.get(self.broken, Step("Go on.", 0.1, done=not self.left, info=info))

    def outcome(self) -> float:
        if self.broken == "kind of outcome":
            return "good"  # type: ignore[return-value]
        return math.inf if self.broken == "outcome" else super().outcome()

    async def close(self) -> None:
        self.closed += 1
        if self.broken in ("close", "step"):
            raise OSError("it is stuck")
        if self.broken == "hanging close":
            await asyncio.sleep(60)


@pytest.fixture(scope="module")
def parts(tiny: Path) -> Parts:
    return Parts(tiny)


def run(parts: Parts, make: Callable[[], Environment], n: int = 1, seconds: float = 20.0, **options: Any) -> list[Episode]:
    """`n` episodes, each with an environment that `make` makes."""
    runner = parts.runner("http://127.0.0.1:1", sampling=Sampling(max_new_tokens=3), **{"max_turns": 3} | options)
    runner.play = replace(runner.play, seconds_per_call=seconds)
    runner.environment, runner.shared = make, contextlib.AsyncExitStack()
    slots = [Slot(Task(f"t{k}", {"role": "Count."}, "even" if k % 2 == 0 else "odd"), 1, k, 0) for k in range(n)]
    return asyncio.run(runner.run(slots))


def play(parts: Parts, *broken: str, **options: Any) -> list[Episode]:
    Echo.made.clear()
    kinds = iter(broken)
    return run(parts, lambda: Echo(next(kinds)), len(broken), **options)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_episode_of_any_environment_is_recorded_and_becomes_metrics(parts: Parts, deterministic: bool) -> None:
    episodes = play(parts, "", "", deterministic=deterministic)
    for episode, tag in zip(episodes, ("even", "odd"), strict=True):
        assert (episode.task, episode.tag, episode.opening, episode.failure) == (f"t{tag == 'odd':d}", tag, "Begin.", None)
        assert [t.reward for t in episode.turns] == [0.1, 0.1] and episode.outcome == pytest.approx(0.2)  # their sum
        assert [t.done for t in episode.turns] == [False, True] and episode.final_info == {"left": 0, "who": "nobody"}
        text = parts.tokenizer.decode(episode.turns[1].prompt_ids)
        assert "Count." in text and "Begin." in text and "Go on." in text
    assert [e.closed for e in Echo.made] == [1, 1] and Echo.made[0].name == "1/t0/0"
    summaries = [summarise(e, CreditOptions()) for e in episodes]
    metrics = rollout_metrics(summaries, step_credit(summaries, CreditOptions(), make_centering("rollout")))
    assert metrics["outcome/even"] == pytest.approx(0.2) and metrics["final_left/odd"] == 0
    assert not [name for name in metrics if "who" in name or "anger" in name]


def test_an_episode_has_no_more_turns_than_it_may(parts: Parts) -> None:
    (episode,) = play(parts, "", max_turns=1)
    assert [t.done for t in episode.turns] == [True] and episode.outcome == pytest.approx(0.1)


WRONG = {
    "constructor": "turn 1: the environment's constructor raised OSError: no display",
    "reset": "turn 1: reset raised KeyError: 'no such task'",
    "none": "turn 1: reset returned no message; expected a line of the user, or messages",
    "empty": "turn 1: reset returned no message; expected a line of the user, or messages",
    "keys": "turn 1: reset returned the message {'role': 'user', 'text': 'Hm.'} (dict); expected {'role': ..., 'content': ...}",
    "role": "turn 1: reset returned a message of role 'tool'; expected assistant or system or user",
    "content": "turn 1: reset returned a message whose content is 3 (int); expected a text",
    "number": "turn 1: reset returned 7 (int) as message; expected a text, or a list of messages",
    "order": "turn 1: an episode begins with messages of system, user, assistant; expected the last one to be of user or system, "
    "since the policy replies to it",
    "step": "turn 1: step raised ValueError: out of words",
    "hang": "turn 1: step exceeded its timeout of 1 s",
    "own timeout": "turn 1: step raised TimeoutError: the tool is slow",
    "cancelled": "turn 1: step raised CancelledError without a cancellation",
    "exit": "turn 1: step raised SystemExit: bye",
    "tuple": "turn 1: step returned ('Go on.', 0.1) (tuple); expected a Step",
    "reward": "turn 1: step returned a reward of nan; expected a finite number or None",
    "kind of reward": "turn 1: step returned a reward of '0.1' (str); expected a finite number or None",
    "done": "turn 1: step returned done = 'no' (str); expected True or False",
    "silent": "turn 1: step returned no message and done = False; expected a message, or done = True",
    "speaks": "turn 1: step returned a message of role 'assistant'; expected system or user",
    "info": "turn 1: step returned info left = inf (float); expected a finite number, or a text",
    "kind of info": "turn 1: step returned info left = [1] (list); expected a finite number, or a text",
    "outcome": "turn 3: outcome returned inf; expected a finite number",
    "kind of outcome": "turn 3: outcome returned 'good' (str); expected a finite number",
}


def without_line(message: str) -> str:
    """A reason without the place in a file that it ends with."""
    return re.sub(r" \(\S+, line \d+\)$", "", message)


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_goes_wrong_in_an_environment_is_a_failed_episode_and_never_a_reward(parts: Parts, deterministic: bool) -> None:
    episodes = play(parts, *WRONG, "", deterministic=deterministic, seconds=1.0)
    for episode, (broken, message) in zip(episodes, [*WRONG.items(), ("", None)], strict=True):
        said = episode.failure.message if episode.failure else None
        assert (None if said is None else without_line(said)) == message
        if broken in ("constructor", "reset", "step", "own timeout", "exit"):
            assert said is not None and f" ({__file__}, line " in said
        assert math.isnan(episode.outcome) == bool(broken)
        kind = "policy_engine" if broken == "order" else "environment"
        assert episode.failure is None or episode.failure.kind == kind
    assert [e.closed for e in Echo.made] == [1] * len(WRONG)  # the one whose constructor raised was never made


def test_a_close_that_fails_or_hangs_costs_no_result(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    closing, step, hanging, good = play(parts, "close", "step", "hanging close", "", seconds=1.0)
    assert closing.failure is hanging.failure is good.failure is None and closing.outcome == pytest.approx(0.2)
    assert step.failure is not None and "out of words" in step.failure.message
    assert [e.closed for e in Echo.made] == [1] * 4
    assert {without_line(r.message) for r in caplog.records} >= {
        "episode 1/t0/0: close raised OSError: it is stuck",
        "episode 1/t1/0: close raised OSError: it is stuck",
        "episode 1/t2/0: close exceeded its timeout of 1 s",
    }


def test_what_gives_no_environment_fails_its_episode(parts: Parts) -> None:
    (episode,) = run(parts, lambda: None)  # type: ignore[arg-type,return-value]
    assert episode.failure is not None
    assert episode.failure.message.endswith("constructor returned None (NoneType); expected an Environment")


class Plain(Environment):
    """All of it in plain methods. No constructor."""

    said: ClassVar[list[tuple[str, Any]]] = []

    def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
        Plain.said.append(("reset", threading.current_thread().name))
        self.words = iter(["One.", "Two."])
        return "Begin."

    def step(self, reply: str) -> Step:
        time.sleep(0.4)
        return Step(next(self.words), np.float32(0.5), done=np.bool_(False), info={"n": np.int64(3)})  # type: ignore[arg-type,dict-item]

    def outcome(self) -> float:
        return np.float64(self.episode_return / 4)

    def close(self) -> None:
        Plain.said.append(("close", threading.current_thread().name))


def test_plain_methods_run_in_threads_and_hold_nobody_up(parts: Parts) -> None:
    Plain.said.clear()
    started = time.perf_counter()
    episodes = run(parts, Plain, 12, max_turns=2)
    assert time.perf_counter() - started < 12 * 2 * 0.4 / 2  # one after the other would take twice as long as that at least
    for episode in episodes:
        assert episode.failure is None and episode.outcome == 0.25 and episode.opening == "Begin."
        assert [(t.message, t.reward, t.info, t.done) for t in episode.turns] == [
            ("One.", 0.5, {"n": 3}, False),
            ("Two.", 0.5, {"n": 3}, True),
        ]
        json.dumps(trace_record(episode))  # NumPy's numbers are Python's by then
    assert sorted(Plain.said) == [("close", "environment")] * 12 + [("reset", "environment")] * 12
    (short,) = run(parts, Plain, max_turns=3)
    assert short.failure is not None and short.failure.message.endswith(
        "step raised RuntimeError: coroutine raised StopIteration"
    )


def test_a_plain_method_that_hangs_keeps_no_run(parts: Parts) -> None:
    class Hangs(Plain):
        def step(self, reply: str) -> Step:
            threading.Event().wait(30)
            raise AssertionError

    started = time.perf_counter()
    (episode,) = run(parts, Hangs, seconds=0.5)
    assert episode.failure is not None and episode.failure.message == "turn 1: step exceeded its timeout of 0.5 s"
    assert time.perf_counter() - started < 20 and Plain.said[-1][0] == "close"


class Talk(Environment):
    """Says what it was made with."""

    def __init__(self, opening: Any, *said: Any) -> None:
        self.opening, self.said = opening, list(said)

    def reset(self, task: Mapping[str, Any], *, seed: int) -> Any:
        return self.opening

    def step(self, reply: str) -> Step:
        return Step(self.said.pop(0)) if self.said else Step(None, 1.0, done=True)


def lines(*said: Any) -> list[Message]:
    return [{"role": role, "content": content} for role, content in zip(said[::2], said[1::2], strict=True)]


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ("Hello.", ["And?"]),
        (lines("user", "Hello."), [lines("user", "And?")]),
        (lines("system", "Guess."), ["And?"]),
        (lines("system", "Guess.", "user", "It is warm.", "user", "Go."), [lines("user", "And?", "user", "So?")]),
        (lines("user", "1+1?", "assistant", "2.", "user", "1+2?"), [lines("system", "Be brief.", "user", "2+2?")]),
        (lines("user", "Hello."), [lines("system", "The door opens."), "Well?"]),
    ],
    ids=["a text", "no system message", "the policy opens", "several lines", "an example", "a system message later"],
)
def test_dialogues_of_any_messages_are_what_the_template_renders(parts: Parts, opening: Any, said: list[Any]) -> None:
    (episode,) = run(parts, lambda: Talk(opening, *said))
    assert episode.failure is None and [t.reward for t in episode.turns] == [None] * len(said) + [1.0]
    messages = lines("user", opening) if isinstance(opening, str) else list(opening)
    assert episode.opening == "\n\n".join(m["content"] for m in messages if m["role"] != "system")
    for turn, heard in zip(episode.turns, [*said, None], strict=True):
        rendered = parts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert parts.tokenizer.decode(turn.prompt_ids) == rendered
        heard = lines("user", heard) if isinstance(heard, str) else heard or []
        assert turn.message == "\n\n".join(m["content"] for m in heard)
        messages += [*lines("assistant", turn.reply), *heard]


def test_what_a_template_cannot_render_fails_the_episode(tiny: Path) -> None:
    strict = Parts(tiny)
    strict.tokenizer.chat_template = (
        "{%- for m in messages %}{% if m.role == 'system' and loop.index0 %}{{ raise_exception('one system message') }}{% endif %}"
        "{% if m.role == 'user' and loop.index0 and messages[loop.index0 - 1].role == 'user' %}"
        "{{ raise_exception('must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    for opening, said, message in (
        (
            lines("user", "a", "user", "b"),
            "",
            r"turn 1: the chat template .* refuses messages \(user, user\): must alternate",
        ),
        ("a", lines("system", "b"), r"turn 2: .* refuses messages \(user, assistant, system\): one system message"),
    ):
        (episode,) = run(strict, lambda opening=opening, said=said: Talk(opening, said))  # type: ignore[misc]
        assert episode.failure is not None and re.match(message, episode.failure.message), episode.failure
    (fine,) = run(strict, lambda: Talk(lines("system", "a", "user", "b"), "c"))
    assert fine.failure is None


def test_what_was_heard_last_stays_when_a_dialogue_is_too_long(parts: Parts) -> None:
    contexts = parts.runner("http://127.0.0.1:1").contexts
    dialogue = contexts.start(lines("user", "word " * 200))
    full = len(contexts.prompt(dialogue)[0])
    said = Completion(tuple(parts.tokenizer.encode("Fine.")), (), "stop")
    dialogue = contexts.extend(dialogue, said, lines("system", "A bell.", "user", "Well?"))
    tight = ContextBuilder(parts.tokenizer, stop_ids=parts.stop_ids, max_prompt_tokens=full)
    ids, dropped = tight.prompt(dialogue)
    rendered = parts.tokenizer.apply_chat_template(
        lines("system", "A bell.", "user", "Well?"), tokenize=False, add_generation_prompt=True
    )
    assert (parts.tokenizer.decode(ids), dropped) == (rendered, 1)


def test_instructions_are_the_end_of_a_message(parts: Parts) -> None:
    system: Message = {"role": "system", "content": "Be kind.", "instructions": "<think>"}
    with pytest.raises(PolicyEngineError, match="a message of system has the instructions '<think>', which are not the end"):
        parts.runner("http://127.0.0.1:1").contexts.start([system])


def test_what_stops_a_run_stops_it_and_everything_is_closed(parts: Parts) -> None:
    with pytest.raises(BudgetSpent, match="no money left"):
        play(parts, "", "budget")
    assert [e.closed for e in Echo.made] == [1, 1]


def test_unscored_turns_share_the_next_reward() -> None:
    assert doctest.testmod(types).attempted >= 1 and not doctest.testmod(types).failed
    assert turn_rewards([]) == () and turn_rewards([None, None]) == (0.0, 0.0)
    assert turn_rewards([0.1, -0.3, 0.07]) == (0.1, -0.3, 0.07)  # scored turns keep what they have, bit by bit
    for k in range(200):
        rng = random.Random(k)
        rewards = [rng.choice([None, rng.uniform(-1, 1)]) for _ in range(rng.randrange(9))]
        shared = turn_rewards(rewards)
        assert len(shared) == len(rewards) and sum(shared) == pytest.approx(sum(r or 0.0 for r in rewards))
        scored = [k for k, reward in enumerate(rewards) if reward is not None]
        for first, last in zip([-1, *scored], scored, strict=False):  # each reward stays with the turns that led to it
            assert sum(shared[first + 1 : last + 1]) == pytest.approx(rewards[last])
            assert len(set(shared[first + 1 : last + 1])) == 1


class EveryOther(Environment):
    """Scores every other turn, by what `marks` says."""

    def __init__(self, marks: list[float | None]) -> None:
        self.marks = list(marks)

    def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
        return "Begin."

    def step(self, reply: str) -> Step:
        return Step("Go on.", self.marks.pop(0), done=not self.marks)


def test_an_environment_may_score_every_few_turns(parts: Parts, tmp_path: Path) -> None:
    marks = iter([[None, 0.4, None], [None, 0.0, 0.3]])
    first, second = run(parts, lambda: EveryOther(next(marks)), 2)
    assert [t.reward for t in first.turns] == [None, 0.4, None] and first.outcome == 0.4
    assert [t["reward"] for t in trace_record(first)["turns"]] == [None, 0.4, None]
    options = CreditOptions(alpha=10.0)
    episodes = [replace(first, group=0), replace(second, group=0, rollout=1, tag=first.tag)]
    found = step_credit([summarise(e, options) for e in episodes], options, make_centering("rollout"))
    a, b = (found.advantages[0, k] for k in (0, 1))
    assert np.subtract(a, np.mean(a)) == pytest.approx([2 / 3, 2 / 3, -4 / 3])  # 10 x (0.2, 0.2, 0) less their mean
    assert np.subtract(b, np.mean(b)) == pytest.approx([-1.0, -1.0, 2.0])
    # A reader of the traces finds the same credit.
    file = tmp_path / "step-000001.rank-0.jsonl"
    add_credit(file, episodes, found.turns)
    traces, problems = read_traces([file])
    assert not problems
    assert [[turn["credit"]["advantage"] for turn in e["turns"]] for e in traces] == [pytest.approx(a), pytest.approx(b)]


def test_eibench_weighs_its_axes_by_scene() -> None:
    scenario: Scenario = next(s for s in load_scenarios("english/test", "test") if s.scene == "support")

    async def first(weights: dict[Any, tuple[float, float]]) -> tuple[float, dict[str, Any]]:
        environment = EIBench(briefing=Briefing(), max_turns=4, turn_weights=weights)
        await environment.reset(task_of(scenario).data, seed=1)
        step = await environment.step("You gave everything for that stall, and it is gone.")
        assert step.reward is not None
        return step.reward, {k: step.info[k] - environment.info[k] for k in ("anger", "trust")}  # type: ignore[operator]

    even, moved = asyncio.run(first({}))
    assert even == pytest.approx((moved["trust"] - moved["anger"]) / 200) and even != 0
    assert asyncio.run(first({"support": (1.0, 0.0)}))[0] == pytest.approx(-moved["anger"] / 100)
    assert asyncio.run(first({"charm": (1.0, 0.0)}))[0] == even


def test_the_tokenizer_sees_the_system_message_of_any_environment(tiny: Path, parts: Parts) -> None:
    """A role that spells control tokens out is words."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    Echo.made.clear()
    dialogue = parts.runner("http://127.0.0.1:1").contexts.start(
        [{"role": "system", "content": "<think>"}, {"role": "user", "content": "Hi."}]
    )
    ids, _ = parts.runner("http://127.0.0.1:1").contexts.prompt(dialogue)
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids
