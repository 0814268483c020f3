"""SAGE as a task of Inspect: dialogues with the environment that a policy can be trained in too (ctcgrpo/environments/sage.py).

inspect eval ctcgrpo/sage --model PROVIDER/MODEL --model-role simulator=PROVIDER/MODEL -T data=FOLDER
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import transcript
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, Model
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import span

from ctcgrpo.environments.eibench.scenarios import data_home
from ctcgrpo.environments.sage import Sage, prompt, prompts_name
from ctcgrpo.environments.sage_protocol import Unreadable, load_profiles, measures
from ctcgrpo.evaluation.generation import SAMPLING, Unset, config_of, names_of
from ctcgrpo.evaluation.record import Record
from ctcgrpo.evaluation.speaking import played_by, say, temperature_of
from ctcgrpo.rollout.engine import request_seed

_TEMPERATURE = 0.7


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
    samples = [
        Sample(
            id=p.id,
            input=[ChatMessageSystem(content=prompt("model").strip()), ChatMessageUser(content=p.first_talk)],
            metadata={"group": p.main_cha},
        )
        for p in profiles
    ]
    return Task(
        name="sage",
        dataset=MemoryDataset(samples, name="sage"),
        solver=_conversing({p.id: p._asdict() for p in profiles}, simulator, seed, left_out),
        scorer=_judging(),
        config=config_of("model", left_out, **SAMPLING.model_dump(exclude_none=True)),
        epochs=Epochs(repeats, "mean"),
        fail_on_error=False,
    )


class _Simulator:
    """The model in the role of SAGE's user; what it costs goes into `record`."""

    def __init__(self, model: Model, record: Record, left_out: frozenset[str]) -> None:
        self._model, self._record, self._left_out = model, record, left_out

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        temperature = temperature_of(self._model, _TEMPERATURE)
        config = config_of("simulator", self._left_out, seed=seed % 2**31, temperature=temperature)
        said = await say([ChatMessageUser(content=prompt)], role="simulator", model=self._model, config=config)
        self._record.spend("simulator", said.tokens)
        if said.cut:
            raise Unreadable("cut off by max_tokens")
        return said.text


def _conversing(profiles: Mapping[str, Mapping[str, Any]], simulator: Model, seed: int, left_out: frozenset[str]) -> Solver:
    about = {
        "models": [str(simulator)],
        "prompts": prompts_name(),
        "temperature": None if "simulator.temperature" in left_out else temperature_of(simulator, _TEMPERATURE),
    }

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        record = state.store_as(Record)
        record.about = about
        where = ("sage", seed, str(state.sample_id), state.epoch)
        user = Sage(_Simulator(simulator, record, left_out), str(simulator))
        opening = await user.reset(profiles[str(state.sample_id)], seed=request_seed(*where))
        record.user_said(opening[-1]["content"], {"emotion": user.emotion})
        done, turn = False, 0
        while not done:
            turn += 1
            async with span(f"turn {turn}", type="turn"):
                config = config_of("model", left_out, seed=request_seed(*where, turn))
                said = await say(state.messages, role="model", config=config)
                state.messages.append(said.message)
                record.model_said(said)
                step = await user.step(said.text)
                done = step.done
                if isinstance(step.message, str):
                    transcript().info(dict(step.info), source="simulator")
                    state.messages.append(ChatMessageUser(content=step.message, metadata=dict(step.info)))
                    record.user_said(step.message, {"emotion": user.emotion}, str(step.info["why"]))
        record.over = True
        return state

    return solver(name="converse")(lambda: solve)()


def _judging() -> Scorer:
    """The emotion that the user is left with."""

    async def score(state: TaskState, target: Target) -> Score:
        record = state.store_as(Record)
        if not record.over:
            raise RuntimeError("the dialogue was cut off by a limit; what it had come to is no result")
        points = [line["state"]["emotion"] for line in record.lines if line["speaker"] == "user"]
        return Score(value=points[-1], metadata=measures(points[-1], len(points)))

    return scorer(metrics=[grouped(mean(), "group", all_label="all")], name="emotion")(lambda: score)()
