"""SAGE as a task of Inspect: dialogues with the environment that a policy can be trained in too (ctcgrpo/environments/sage.py).

inspect eval ctcgrpo/sage --model PROVIDER/MODEL --model-role simulator=PROVIDER/MODEL -T data=FOLDER
inspect eval ctcgrpo/sage --model PROVIDER/MODEL -T simulator=configs/simulator/qwen3_max.yaml -T data=FOLDER
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import transcript
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, Model
from inspect_ai.scorer import Score
from inspect_ai.solver import TaskState
from inspect_ai.util import span

from ctcgrpo.environments.sage import Answers, Sage, SageEpisodes, prompt, prompts_name, readable
from ctcgrpo.environments.sage_protocol import Unreadable, load_profiles, measures
from ctcgrpo.errors import RecipeError
from ctcgrpo.evaluation.benches import data_folder
from ctcgrpo.evaluation.generation import SAMPLING, Unset, config_of, names_of
from ctcgrpo.evaluation.model_calls import generate_reply, model_of_role, temperature_of
from ctcgrpo.evaluation.record import Record, recorded_task
from ctcgrpo.evaluation.users import priced
from ctcgrpo.rollout.engine import request_seed
from ctcgrpo.simulator.choice import named_simulator

_TEMPERATURE = 0.7


@task
def sage(data: str | None = None, simulator: str | None = None, repeats: int = 1, seed: int = 0, unset: Unset = "") -> Task:
    """SAGE: 100 Chinese users; the score is the mean final emotion, from 0 to 100.

    Args:
      data: your copy of the profiles: the file, or its folder; by default $CTCGRPO_DATA/sage.
      simulator: the user: absent for the model with the role `simulator`; a configuration's file with backend llm.
      repeats: dialogues per profile; a profile counts with their mean.
      seed: seed of the samples, where providers support it.
      unset: settings to leave out, where providers refuse them: temperature,top_p,max_tokens,seed; simulator.NAME for those
        of the simulator.
    """
    profiles = {profile.id: profile for profile in load_profiles(data_folder("sage", data))}
    left_out = names_of(unset)
    about: dict[str, Any] = {"prompts": prompts_name()}
    answers: Callable[[Record], Answers]
    resource: AbstractAsyncContextManager[object] = nullcontext()
    if simulator is None:
        model = model_of_role("simulator")
        temperature = None if "simulator.temperature" in left_out else temperature_of(model, _TEMPERATURE)
        about |= {"models": [str(model)], "temperature": temperature}
        answers = partial(_Simulator, model, left_out)
    else:
        config = named_simulator(simulator).config
        if config.llm is None:
            raise RecipeError(
                f"simulator = {simulator!r}: an LLM plays SAGE's user; expected a configuration with backend llm "
                "(configs/simulator/qwen3_max.yaml) or PROVIDER/NAME"
            )
        resource = episodes = SageEpisodes(simulator)
        about |= {"models": episodes.models, "temperature": config.llm.temperature, **priced(config)}
        answers = partial(_Configured, episodes)

    async def converse(state: TaskState, record: Record) -> None:
        record.about = about
        async with resource:
            await play(state, record)

    async def play(state: TaskState, record: Record) -> None:
        where = ("sage", seed, str(state.sample_id), state.epoch)
        user = Sage(answers(record), ", ".join(about["models"]))
        opening = await user.reset(profiles[str(state.sample_id)]._asdict(), seed=request_seed(*where))
        record.add_user_message(opening[-1]["content"], {"emotion": user.emotion})
        for turn in count(1):
            async with span(f"turn {turn}", type="turn"):
                config = config_of("model", left_out, seed=request_seed(*where, turn))
                reply = await generate_reply(state.messages, role="model", config=config)
                state.messages.append(reply.message)
                record.add_reply(reply)
                step = await user.step(reply.text)
                if isinstance(step.message, str):
                    transcript().info(dict(step.info), source="simulator")
                    state.messages.append(ChatMessageUser(content=step.message, metadata=dict(step.info)))
                    record.add_user_message(step.message, {"emotion": user.emotion}, str(step.info["why"]))
            if step.done:
                break

    async def emotion(state: TaskState, record: Record) -> Score:
        points = [line["state"]["emotion"] for line in record.lines if line["speaker"] == "user"]
        return Score(value=points[-1], metadata=measures(points[-1], len(points)))

    samples = [
        Sample(
            id=id,
            input=[ChatMessageSystem(content=prompt("model").strip()), ChatMessageUser(content=profile.first_talk)],
            metadata={"group": profile.main_cha},
        )
        for id, profile in profiles.items()
    ]
    return recorded_task(
        "sage",
        MemoryDataset(samples, name="sage"),
        converse,
        emotion,
        measure="emotion",
        config=config_of("model", left_out, **SAMPLING.model_dump(exclude_none=True)),
        repeats=repeats,
    )


@dataclass(frozen=True)
class _Simulator:
    """The model in the role of SAGE's user; its tokens are added to `record`."""

    model: Model
    left_out: frozenset[str]
    record: Record

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        temperature = temperature_of(self.model, _TEMPERATURE)
        config = config_of("simulator", self.left_out, seed=seed % 2**31, temperature=temperature)
        reply = await generate_reply([ChatMessageUser(content=prompt)], role="simulator", model=self.model, config=config)
        self.record.add_tokens("simulator", reply.tokens)
        if reply.cut:
            raise Unreadable("cut off by max_tokens")
        return reply.text


@dataclass(frozen=True)
class _Configured:
    """The LLM of a simulator's configuration; its tokens are added to `record`."""

    episodes: SageEpisodes
    record: Record

    async def ask(self, prompt: str, *, dialogue: str, seed: int) -> str:
        answer = await self.episodes.complete(prompt, dialogue=dialogue, seed=seed)
        self.record.add_tokens("simulator", (answer.prompt_tokens, answer.completion_tokens))
        return readable(answer)
