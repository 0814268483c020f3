"""SAGE as a task of Inspect: the rules are in sage_protocol, the simulator's prompts (our own words) in prompts/sage.

inspect eval ctcgrpo/sage --model PROVIDER/MODEL --model-role simulator=PROVIDER/MODEL -T data=FOLDER
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import transcript
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, Model
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import span

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.evaluation.generation import SAMPLING, Unset, config_of, names_of
from ctcgrpo.evaluation.record import Record
from ctcgrpo.evaluation.sage_protocol import (
    START,
    USER_TURNS,
    Profile,
    Unreadable,
    analysis,
    is_over,
    letter,
    load_profiles,
    measures,
    planned_change,
    spoken,
)
from ctcgrpo.evaluation.speaking import Said, played_by, say, temperature_of
from ctcgrpo.rollout.engine import request_seed
from ctcgrpo.scenarios import data_home

_FOLDER = files("ctcgrpo.evaluation") / "prompts" / "sage"
_ATTEMPTS = 3
"""How often the simulator is asked for an answer that can be read."""
_TEMPERATURE = 0.7
_T = TypeVar("_T")


@task
def sage(data: str | None = None, repeats: int = 1, seed: int = 0, unset: Unset = "") -> Task:
    """SAGE: 100 Chinese users; the score is the mean final emotion, from 0 to 100.

    Args:
      data: your copy of the profiles: the file, or its folder; by default $CTCGRPO_DATA/sage.
      repeats: dialogues a profile; a profile counts with their mean.
      seed: of what is sampled, where providers heed it.
      unset: settings that are not sent, where providers refuse them: temperature,top_p,max_tokens,seed; simulator.NAME for those
        of the simulator.
    """
    profiles = load_profiles(data_home() / "sage" if data is None else Path(data).expanduser())
    simulator, left_out = played_by("simulator"), names_of(unset)
    prompts = {name: (_FOLDER / f"{name}.j2").read_text(encoding="utf-8") for name in ("model", "plan", "reply")}
    samples = [
        Sample(
            id=p.id,
            input=[ChatMessageSystem(content=prompts["model"].strip()), ChatMessageUser(content=p.first_talk)],
            metadata={"group": p.character},
        )
        for p in profiles
    ]
    return Task(
        name="sage",
        dataset=MemoryDataset(samples, name="sage"),
        solver=_conversing({p.id: p for p in profiles}, simulator, prompts, seed, left_out),
        scorer=_judging(),
        config=config_of("model", left_out, **SAMPLING.model_dump(exclude_none=True)),
        epochs=Epochs(repeats, "mean"),
        fail_on_error=False,
    )


def _conversing(
    profiles: Mapping[str, Profile], simulator: Model, prompts: Mapping[str, str], seed: int, left_out: frozenset[str]
) -> Solver:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    plan_prompt, reply_prompt = (environment.from_string(prompts[name]) for name in ("plan", "reply"))
    about = {
        "models": [str(simulator)],
        "prompts": f"ctcgrpo-sage/{hashlib.sha256(''.join(prompts.values()).encode()).hexdigest()[:8]}",
        "temperature": None if "simulator.temperature" in left_out else temperature_of(simulator, _TEMPERATURE),
    }

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        profile, record = profiles[str(state.sample_id)], state.store_as(Record)
        record.about = about
        emotion = START
        record.user_said(profile.first_talk, {"emotion": emotion})

        def seeded(*where: object) -> int:
            return request_seed("sage", seed, profile.id, state.epoch, *where)

        for turn in range(1, USER_TURNS + 1):
            async with span(f"turn {turn}", type="turn"):
                said = await say(state.messages, role="model", config=config_of("model", left_out, seed=seeded(turn)))
                state.messages.append(said.message)
                record.model_said(said)
                if turn == USER_TURNS:
                    break
                told = {"profile": profile, "dialogue": _dialogue(record)}
                plan, change = await _asked(
                    simulator,
                    plan_prompt.render(**told, emotion=emotion),
                    planned_change,
                    record,
                    seeded(turn, "plan"),
                    left_out,
                )
                emotion = max(0, min(100, emotion + change))
                feeling = analysis(plan.text)
                _, line = await _asked(
                    simulator,
                    reply_prompt.render(**told, feeling=feeling, letter=letter(emotion)),
                    spoken,
                    record,
                    seeded(turn, "reply"),
                    left_out,
                )
                moved: dict[str, Any] = {"emotion": emotion, "change": change, "why": feeling}
                transcript().info(moved, source="simulator")
                state.messages.append(ChatMessageUser(content=line, metadata=moved))
                record.user_said(line, {"emotion": emotion}, feeling)
                if is_over(emotion, line):
                    break
        record.over = True
        return state

    return solver(name="converse")(lambda: solve)()


async def _asked(
    simulator: Model, prompt: str, read: Callable[[str], _T], record: Record, seed: int, left_out: frozenset[str]
) -> tuple[Said, _T]:
    """An answer of the simulator, and what was read in it. Raises SimulatorReplyError where none of three could be read."""
    problem = ""
    for attempt in range(_ATTEMPTS):
        config = config_of(
            "simulator",
            left_out,
            seed=(seed + attempt) % 2**31,
            temperature=temperature_of(simulator, _TEMPERATURE),
        )
        said = await say([ChatMessageUser(content=prompt)], role="simulator", model=simulator, config=config)
        record.spend("simulator", said.tokens)
        try:
            if said.cut:
                raise Unreadable("cut off by max_tokens")
            return said, read(said.text)
        except Unreadable as error:
            problem = str(error)
    raise SimulatorReplyError(f"{simulator} gave no usable answer, asked {_ATTEMPTS} times (last problem: {problem})")


def _dialogue(record: Record) -> str:
    names = {"user": "人物", "model": "对方"}
    return "\n".join(f"{names[line['speaker']]}：{line['text']}" for line in record.lines)


def _judging() -> Scorer:
    """The emotion that the user is left with."""

    async def score(state: TaskState, target: Target) -> Score:
        record = state.store_as(Record)
        if not record.over:
            raise RuntimeError("the dialogue was cut off by a limit; what it had come to is no result")
        points = [line["state"]["emotion"] for line in record.lines if line["speaker"] == "user"]
        return Score(value=points[-1], metadata=measures(points[-1], len(points)))

    return scorer(metrics=[grouped(mean(), "group", all_label="all")], name="emotion")(lambda: score)()
