"""EIBench: the model talks to a simulated user for some rounds, and is scored by the user's final state.

    inspect eval ctcgrpo/eibench --model PROVIDER/MODEL --model-role simulator=PROVIDER/MODEL
    inspect eval ctcgrpo/eibench --model PROVIDER/MODEL -T simulator=scripted

Prompts, parsing, states, scores and seeds are those of training and its validation. With the same seed and settings, episode k of
a scenario draws the same samples here and there. Source: EIBench (arXiv 2606.15532).
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import transcript
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, get_model
from inspect_ai.scorer import Score
from inspect_ai.solver import TaskState
from inspect_ai.util import span

from ctcgrpo.environments.eibench import EIBench, opening_messages, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario, UserState
from ctcgrpo.environments.eibench.scenarios import Invalid, load_set
from ctcgrpo.environments.eibench.scoring import Variant, outcome_score
from ctcgrpo.errors import PolicyEngineError, RecipeError
from ctcgrpo.evaluation.generation import SAMPLING, Unset, config_of, names_of
from ctcgrpo.evaluation.model_calls import generate_reply
from ctcgrpo.evaluation.record import Record, recorded_task
from ctcgrpo.evaluation.users import MESSAGES, chosen_user
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS, load_instructions
from ctcgrpo.rollout.engine import request_seed
from ctcgrpo.simulator.llm.official import OfficialPolicyPrompts

INSTRUCTIONS = "instructions"
"""The key in a system message's metadata for the instructions at its end, the only part where control tokens are tokens."""
_NEED_A_USER = ("anthropic/", "google/")  # providers that refuse messages without a user message
Reasoning = Literal["strip", "keep"]
_HISTORY: Mapping[Reasoning, Literal["none", "all"]] = {"strip": "none", "keep": "all"}
"""As Inspect names it: which providers are sent, and policies in folders heed."""
_log = logging.getLogger(__name__)


@task
def eibench(
    scenarios: str = "english/test",
    simulator: str | None = None,
    rounds: int = 8,
    variant: Variant = "evaluation",
    repeats: int = 1,
    seed: int = 0,
    official: str | None = None,
    opener: str | None = None,
    instructions: str | None = None,
    reasons: bool = False,
    persona_sections: Sequence[str] | None = None,
    unset: Unset = "",
    invalid: Invalid = "skip",
    tries: int | None = None,
    reasoning: Reasoning | None = None,
) -> Task:
    """The task of EIBench on a set of scenarios; EIBench's own are eibench/test.

    Args:
      scenarios: a path, a bundled pack (english/test), a dataset under $CTCGRPO_DATA (eibench/test: the 213 published ones), or
        a data set on the Hub (hf://datasets/OWNER/NAME).
      simulator: the user: absent for the model with the role `simulator`; scripted; a configuration's file; a server's URL.
      rounds: limit on the model's replies.
      variant: scoring of the final state: evaluation (as published) or training.
      repeats: dialogues per scenario; a scenario counts with their mean.
      seed: seed of the samples, where providers support it.
      official: a folder with the authors' code (it is executed), to use its prompts for simulator and model.
      opener: a user's message where the model speaks first (charm): some providers (anthropic, google) need one, and published
        figures have one.
      instructions: how to reply, after the model's role: eibench (default), short, none, a template, or a folder of LANGUAGE.j2.
      reasons: whether they are for a model that reasons between <think> and </think> before it replies.
      persona_sections: the sections of its role (### headings) in the model's prompt; absent: all.
      unset: settings to leave out, where providers refuse them: temperature,top_p,max_tokens,seed; simulator.NAME for those
        of the simulator.
      invalid: invalid records are left out with a warning (skip), or raise an error (refuse).
      tries: calls to the user's LLM per turn at most, until its answer is valid; absent: 3, or the configuration's value.
      reasoning: whether the model's reasoning of earlier turns stays in its messages: keep or strip (default); for a policy in a
        run's folder the recipe's value.
    """
    loaded = load_set(scenarios, "test", invalid)
    for line in loaded.report():
        _log.warning("%s", line)
    left_out = names_of(unset)
    folder = None if official is None else Path(official).expanduser()
    user = chosen_user(simulator, folder, left_out, tries)
    if folder is not None and (instructions, reasons, persona_sections, opener) != (None, False, None, None):
        raise RecipeError("official has its own prompts; leave out instructions, reasons, persona_sections and opener")
    sections = None if persona_sections is None else tuple(persona_sections)
    briefing = Briefing(sections, load_instructions(instructions or DEFAULT_INSTRUCTIONS), reasons)
    prompts = None if folder is None else OfficialPolicyPrompts(folder)
    if rounds < 1 or repeats < 1:
        raise RecipeError(f"rounds = {rounds}, repeats = {repeats}; expected at least 1")
    by_id = {scenario.id: scenario for scenario in loaded.scenarios}

    async def converse(state: TaskState, record: Record) -> None:
        """Play turns until the user leaves or the rounds are over."""
        scenario = by_id[str(state.sample_id)]
        record.about = await user.about()
        place = (0, state.metadata["position"], scenario.id, state.epoch - 1)
        environment = EIBench(user, briefing=briefing, max_turns=rounds)
        environment.name = "/".join(map(str, (seed, *place)))
        await environment.reset(task_of(scenario).data, seed=request_seed("user", seed, *place))
        if prompts is None and len(state.messages) == 1 and str(get_model()).startswith(_NEED_A_USER):
            raise PolicyEngineError(f"{get_model()} refuses a dialogue that the model opens; set opener=TEXT (the user's line)")
        if scenario.opening_line:
            record.add_user_message(scenario.opening_line, environment.state._asdict())
        for round in range(1, rounds + 1):
            async with span(f"turn {round}", type="turn"):
                config = config_of(
                    "model",
                    left_out,
                    seed=request_seed(seed, *place, round - 1),
                    reasoning_history=None if reasoning is None else _HISTORY[reasoning],
                )
                messages = state.messages if prompts is None else _official_messages(prompts, scenario, state.messages)
                reply = await generate_reply(messages, role="model", config=config, keep_reasoning=reasoning == "keep")
                state.messages.append(reply.message)
                record.add_reply(reply)
                before = environment.state._asdict()
                await environment.step(reply.text)
                answer, after = environment.answer, environment.state._asdict()
                change = {"before": before, "after": after, "why": answer.why, "goes_on": answer.goes_on}
                state.messages.append(ChatMessageUser(content=answer.reply, metadata=change))
                transcript().info(change, source="simulator")
                record.add_user_message(answer.reply, after, answer.why)
                record.add_tokens("simulator", (answer.usage.prompt_tokens, answer.usage.completion_tokens))
            if not answer.goes_on:
                break

    async def outcome(state: TaskState, record: Record) -> Score:
        """The score of the user's final state."""
        scenario = by_id[str(state.sample_id)]
        states = [UserState(**line["state"]) for line in record.lines if line["speaker"] == "user"]
        found = measured(states if scenario.opening_line else [scenario.anchors.initial, *states], scenario, variant)
        return Score(value=found.pop("outcome"), metadata=found)

    samples = [
        Sample(id=s.id, input=_opening(s, briefing, opener), metadata={"group": s.scene, "title": s.title, "position": k})
        for k, s in enumerate(loaded.scenarios)
    ]
    return recorded_task(
        "eibench",
        MemoryDataset(samples, name=scenarios),
        converse,
        outcome,
        measure="outcome",
        config=config_of("model", left_out, **SAMPLING.model_dump(exclude_none=True)),
        repeats=repeats,
    )


def _opening(scenario: Scenario, briefing: Briefing, opener: str | None) -> list[ChatMessage]:
    first, *messages = opening_messages(scenario, briefing)
    system = ChatMessageSystem(content=first["content"], metadata={INSTRUCTIONS: first["instructions"]})
    line = messages[0]["content"] if messages else opener
    return [system, *([ChatMessageUser(content=line)] if line else [])]


def _official_messages(prompts: OfficialPolicyPrompts, scenario: Scenario, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The authors' messages in place of `messages`; unchanged messages stay the same objects."""
    dialogue = messages[1:]
    system, *official = prompts.messages(scenario, [(m.role, m.text) for m in dialogue])

    chat: list[ChatMessage] = [ChatMessageSystem(content=system["content"])]
    for old, new in zip_longest(dialogue[: len(official)], official):
        unchanged = old is not None and (old.role, old.text) == (new["role"], new["content"])
        chat.append(old if unchanged else MESSAGES[new["role"]](content=new["content"]))
    return chat


def measured(states: Sequence[UserState], scenario: Scenario, variant: Variant) -> dict[str, float]:
    """Outcome and measures of a dialogue from its states, the initial one first."""
    outcomes = [outcome_score(state, scenario.anchors, variant) for state in states]
    turn = next((k for k, value in enumerate(outcomes) if k and value >= 1.0), None)
    found = {"outcome": outcomes[-1], "escalated": float(outcomes[-1] < 0), "reached": float(turn is not None)}
    return found if turn is None else {**found, "turns_to_target": float(turn)}
