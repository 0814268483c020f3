"""SAGE as an environment: a user whose emotion, from 0 to 100, changes with each reply. The rules are in sage_protocol, the user's
prompts (our own words) in prompts/sage.

The reward of a turn is the change of the emotion / 100; the outcome is the final emotion / 100 (RLVER trains on it). The reply to
the user's tenth line ends the episode and is not scored, since no user turn follows. A task is a record of SAGE's profiles:

    environment: {factory: ctcgrpo.environments.sage:SageEpisodes, options: {simulator: configs/simulator/qwen3_max.yaml},
                  tasks: ../digitalhuman/SAGE/simulator_profile_withfirsttalk.jsonl}
    rollout: {max_turns: 10}
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jinja2

from ctcgrpo.environments import sage_protocol as rules
from ctcgrpo.environments.sage_protocol import START, USER_TURNS, Unreadable, profile_of
from ctcgrpo.errors import RecipeError, SimulatorReplyError
from ctcgrpo.llm_client.account import Account
from ctcgrpo.llm_client.calls import ChatCompletion
from ctcgrpo.llm_client.endpoints import Deadline, EndpointPool
from ctcgrpo.llm_client.store import Store
from ctcgrpo.rollout.engine import request_seed
from ctcgrpo.simulator.config import load_simulator_config
from ctcgrpo.types import Environment, Message, Step

ATTEMPTS = 3  # limit on calls to the simulator until its answer is valid
_FOLDER = files("ctcgrpo.environments") / "prompts" / "sage"
_T = TypeVar("_T")


class Answers(Protocol):
    """Whoever plays the user."""

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        """An answer to `prompt`. Raises Unreadable for one that was cut off, and the simulator's errors where none came."""
        ...


@lru_cache
def prompt(name: str) -> str:
    """model (the policy's prompt), plan or reply."""
    return (_FOLDER / f"{name}.j2").read_text(encoding="utf-8")


def prompts_name() -> str:
    """A name that changes with the prompts' text."""
    text = "".join(prompt(name) for name in ("model", "plan", "reply"))
    return f"ctcgrpo-sage/{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Sage(Environment):
    """One dialogue with the user that `answers` plays. `name_of_user`: the user's name in errors."""

    def __init__(self, answers: Answers, name_of_user: str = "the simulator") -> None:
        self._answers, self._user = answers, name_of_user

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Sequence[Message]:
        self._profile, self._seed = profile_of(task, f"task {task.get('id')!r}"), seed
        self._lines = [("人物", self._profile.first_talk)]
        self.emotion = START
        self.info = {"emotion": START}
        line: Message = {"role": "user", "content": self._profile.first_talk}
        return [{"role": "system", "content": prompt("model").strip()}, line]

    async def step(self, reply: str) -> Step:
        """Raises SimulatorReplyError where none of three answers could be read."""
        self._lines.append(("对方", reply))
        turn = len(self._lines) // 2
        if turn == USER_TURNS:
            return Step(None, done=True, info={"emotion": self.emotion})
        before = self.emotion
        plan, change = await self._ask(turn, "plan", rules.planned_change, emotion=before)
        self.emotion = max(0, min(100, before + change))
        why = rules.analysis(plan)
        _, line = await self._ask(turn, "reply", rules.response_text, feeling=why, letter=rules.letter(self.emotion))
        self._lines.append(("人物", line))
        return Step(
            line,
            reward=(self.emotion - before) / 100,
            done=rules.is_over(self.emotion, line),
            info={"emotion": self.emotion, "change": change, "why": why},
        )

    def branch(self, *, seed: int) -> Sage:
        made = copy.copy(self)
        made._seed, made._lines = seed, list(self._lines)
        return made

    def outcome(self) -> float:
        return self.emotion / 100

    async def _ask(self, turn: int, name: str, read: Callable[[str], _T], **facts: Any) -> tuple[str, _T]:
        dialogue = "\n".join(f"{who}：{text}" for who, text in self._lines)
        template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(prompt(name))
        asked = template.render(profile=self._profile, dialogue=dialogue, **facts)
        problem = ""
        for attempt in range(ATTEMPTS):
            seed = request_seed(self._seed, turn, name, attempt)
            try:
                text = await self._answers.ask(asked, dialogue=self._profile.id, seed=seed)
                return text, read(text)
            except Unreadable as error:
                problem = str(error)
        raise SimulatorReplyError(f"{self._user}: no valid answer in {ATTEMPTS} tries; last problem: {problem}")


class SageEpisodes(contextlib.AbstractAsyncContextManager["SageEpisodes"]):
    """Makes the environment of each episode. All call the endpoints of a simulator's configuration (configs/simulator/*.yaml,
    backend llm), which are open while a batch is played; several may enter it at once. Answers are plain text, whatever `output`
    the endpoints have for EIBench. Raises RecipeError for a configuration without an LLM."""

    def __init__(self, simulator: str) -> None:
        config = load_simulator_config(Path(simulator).expanduser())
        if config.llm is None:
            raise RecipeError(f"{simulator}: backend = {config.backend!r}; expected 'llm', whose endpoints play SAGE's user")
        endpoints = tuple(endpoint.model_copy(update={"output": "text"}) for endpoint in config.llm.endpoints)
        self._llm = config.llm.model_copy(update={"endpoints": endpoints})
        self._account = Account(config.budget, None if config.store is None else Store(config.store))
        self.models = sorted({endpoint.model for endpoint in endpoints})
        self._pool: EndpointPool | None = None
        self._entered = 0

    def __call__(self) -> Sage:
        return Sage(self, ", ".join(self.models))

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        return readable(await self.complete(prompt, dialogue=dialogue, seed=seed))

    async def complete(self, prompt: str, *, dialogue: str, seed: int) -> ChatCompletion:
        assert self._pool is not None, "within `async with`"
        message: Message = {"role": "user", "content": prompt}
        deadline = Deadline(self._llm.deadline)
        return await self._pool.complete([message], dialogue=dialogue, seed=seed, schema={}, deadline=deadline)

    async def __aenter__(self) -> SageEpisodes:
        self._entered += 1
        self._pool = self._pool or EndpointPool(self._llm, self._account)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._entered -= 1
        if not self._entered and self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.close()


def readable(answer: ChatCompletion) -> str:
    """The text of an answer. Raises Unreadable for one that was cut off, and for one without a text."""
    if answer.ended == "length":
        raise Unreadable("cut off by llm.max_tokens")
    if not answer.text:
        raise Unreadable(answer.note or "empty")
    return answer.text
