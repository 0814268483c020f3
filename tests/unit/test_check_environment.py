"""`ctcgrpo check` of a recipe with an environment of one's own: an episode is played before the run, and what goes wrong in it is
named with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ctcgrpo.preflight.check import findings
from ctcgrpo.preflight.subject import Finding
from ctcgrpo.run.recipe_file import load_recipe
from tests.conftest import ROOT, Command

GUESS = ROOT / "recipes" / "examples" / "guess.yaml"
MODULE = '''import time

from ctcgrpo import Environment, Step


class Count(Environment):
    """Counts down from the task's number."""

    def __init__(self, broken=""):
        self.broken = broken
        if broken == "constructor":
            raise OSError("no display")

    def reset(self, task, *, seed):
        self.left = task["n"]
        return f"{self.left} left" if self.broken != "long" else "word " * 500

    def step(self, reply):
        if self.broken == "step":
            return helper(reply)
        if self.broken == "empty" and not reply:
            raise ValueError("nothing to read")
        if self.broken == "nan":
            return Step("on", reward=float("nan"))
        self.left -= 1
        return Step(f"{self.left} left" if self.left else None, reward=None, done=not self.left)

    def outcome(self):
        return "much" if self.broken == "outcome" else 0.0 if self.broken == "nothing" else 1.0

    def close(self):
        if self.broken == "close":
            raise RuntimeError("it is stuck")


def helper(reply):
    return {}[reply]


class Blocking(Count):
    async def step(self, reply):
        time.sleep(1.2)
        return Count.step(self, reply)


class Slow(Blocking):
    def step(self, reply):
        time.sleep(1.2)
        return Count.step(self, reply)


def tasks():
    return [{"id": f"t{n}", "n": n, "tag": "odd" if n % 2 else "even"} for n in (2, 3, 4)]


def same_content():
    return [{"id": "another", "n": 2, "tag": "even"}]


def same_id():
    return [{"id": "t3", "n": 30}]


def others():
    return [{"n": 9}]


def broken_tasks():
    return [][0]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module is: Python imports it once."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "count_down.py").write_text(MODULE)
    return folder


def look(folder: Path, *overrides: str) -> dict[str, list[Finding]]:
    given = [
        "environment.factory=count_down:Count",
        "environment.tasks=count_down:tasks",
        "validation.tasks=count_down:others",
        f"environment.folder={folder}",
        f"run.output_dir={folder}",
    ]
    found, _ = findings(load_recipe(GUESS, [*given, *overrides]), {}, folder / "none.yaml")
    by_name: dict[str, list[Finding]] = {}
    for finding in found:
        by_name.setdefault(finding.about, []).append(finding)
    return by_name


def at(text: str) -> str:
    """Where the module has it, as an error says."""
    return f"({{file}}, line {MODULE[: MODULE.index(text)].count(chr(10)) + 1})"


def test_the_example_is_ready(ctcgrpo: Command, tmp_path: Path) -> None:
    code, out, err = ctcgrpo("check", str(GUESS), f"run.output_dir={tmp_path}")
    out = " ".join(out.replace("│", " ").split())
    assert code == 0 and "ready to run" in out, (out, err)
    # 40 steps of 64 episodes of 4 turns; 4 held-out tasks with 32 episodes each, before and after
    assert "12 training tasks" in out and "4 held-out tasks" in out and "up to 256 per step, 11,264 in total" in out
    assert "task '0' with the reply 'I see.': 4 turns (done)" in out
    assert "(LLM calls, services)" in out and "simulator" not in out


def test_an_episode_is_played_and_its_prompts_are_measured(folder: Path) -> None:
    found = look(folder)
    assert not [f for many in found.values() for f in many if f.level != "ok"]
    assert found["tasks"][0].text == "3 training tasks of 2 tags" and found["validation"][0].text == "1 held-out tasks"
    assert found["episode"][0].text == (
        "task 't2' with the reply 'I see.': 2 turns (done), rewards not scored, not scored, outcome +1.000"
    )
    assert "prompt of turn 4, the last: at most" in found["context"][0].text


@pytest.mark.parametrize(
    ("overrides", "about", "reason"),
    [
        (["environment.factory=count_down:Nothing"], "environment", "has no 'Nothing'"),
        (["environment.tasks=nowhere.jsonl"], "tasks", "environment.tasks = 'nowhere.jsonl': no such file"),
        (["environment.tasks=count_down:broken_tasks"], "tasks",
         f"raised IndexError: list index out of range {at('return [][0]')}"),
        (["environment.per_step=7"], "tasks", "environment.per_step = 7; expected a multiple of 2, the number of tags in"),
        (["environment.options={borken: 1}"], "episode", "task 't2': the environment's constructor raised TypeError"),
        (["environment.options={broken: constructor}"], "episode", f"raised OSError: no display {at('raise OSError')}"),
        (["environment.options={broken: step}"], "episode",
         f"task 't2': step raised KeyError: 'I see.' {at('return {}[reply]')}"),
        (["environment.options={broken: nan}"], "episode", "step returned a reward of nan; expected a finite number or None"),
        (["environment.options={broken: outcome}"], "episode", "outcome returned 'much' (str); expected a finite number"),
        (["environment.options={broken: close}"], "episode", f"close raised RuntimeError: it is stuck {at('raise RuntimeError')}"),
        (["environment.options={broken: long}"], "context", "task 't2': system prompt and latest user line take"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_its_line(overrides: list[str], about: str, reason: str, folder: Path) -> None:
    failed = {name: f.text for name, many in look(folder, *overrides).items() for f in many if f.level == "failed"}
    assert reason.format(file=folder / "count_down.py") in failed.pop(about)
    assert not failed


@pytest.mark.parametrize(
    ("overrides", "about", "reason"),
    [
        (["validation.tasks=count_down:same_content"], "validation", "1 of 1 held-out tasks (validation.tasks) are also"),
        (["validation.tasks=count_down:same_id"], "validation", "for example 't3'"),
        (["validation=null"], "validation", "none: the run will not measure improvement"),
        (
            ["environment.options={broken: empty}"], "replies",
            f"an empty reply fails the episode: count_down:Count, task 't2': step raised ValueError: nothing to read "
            f"{at('raise ValueError')}",
        ),
        (["environment.options={broken: nothing}"], "episode", "no turn is scored and the outcome is 0, so there is"),
        (["environment.factory=count_down:Blocking"], "episode", "an async method blocks for 1.2 s, in which all other episodes"),
        (["rollout.max_prompt_tokens=60"], "context", "of the tasks drop exchanges by then"),
    ],
)  # fmt: skip
def test_what_is_to_mind(overrides: list[str], about: str, reason: str, folder: Path) -> None:
    found = look(folder, *overrides)
    bad = {f.about: f for many in found.values() for f in many if f.level != "ok"}
    assert bad[about].level == "warning" and reason.format(file=folder / "count_down.py") in bad.pop(about).text
    assert not bad


def test_a_plain_method_blocks_no_other_episode(folder: Path) -> None:
    [found] = look(folder, "environment.factory=count_down:Slow")["episode"]
    assert found.level == "ok" and re.search(r"2 turns \(done\) in \d+ s, rewards", found.text), found
