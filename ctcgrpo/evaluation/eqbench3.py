"""EQ-Bench 3, rubric part, as a task of Inspect: the rules are in eqbench3_protocol, all texts in the user's copy of its data.

    inspect eval ctcgrpo/eqbench3 --model PROVIDER/MODEL --model-role judge=PROVIDER/MODEL -T data=FOLDER

The judge reads the model's answers unchanged; the authors' code first rearranges their sections.
"""

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser
from inspect_ai.scorer import Score
from inspect_ai.solver import TaskState

from ctcgrpo.errors import JudgeReplyError
from ctcgrpo.evaluation.benches import data_folder
from ctcgrpo.evaluation.eqbench3_protocol import InvalidVerdict, load_eqbench, read_scores, task_score
from ctcgrpo.evaluation.generation import Unset, config_of, names_of
from ctcgrpo.evaluation.model_calls import generate_reply, model_of_role, temperature_of
from ctcgrpo.evaluation.record import Record, recorded_task
from ctcgrpo.rollout.engine import request_seed

_ATTEMPTS = 3
_TEMPERATURE, _DEBRIEF_TEMPERATURE, _JUDGE_TEMPERATURE = 0.7, 0.5, 0.0
_JUDGE_TOKENS = 8000


@task
def eqbench3(data: str | None = None, repeats: int = 1, seed: int = 0, unset: Unset = "") -> Task:
    """EQ-Bench 3, rubric: 45 scenarios, scored from 0 to 100 by a judge. Always report the judge with the score.

    Args:
      data: your copy of the folder data of EQ-bench/eqbench3; by default $CTCGRPO_DATA/eqbench3.
      repeats: dialogues per scenario; a scenario counts with their mean.
      seed: seed of the samples, where providers support it.
      unset: settings to leave out, where providers refuse them: temperature,top_p,max_tokens,seed; judge.NAME for those of
        the judge.
    """
    bench = load_eqbench(data_folder("eqbench3", data))
    judge, left_out = model_of_role("judge"), names_of(unset)
    temperature = temperature_of(judge, _JUDGE_TEMPERATURE)
    about = {
        "models": [str(judge)],
        "prompts": f"eqbench3/{bench.digest}",
        "temperature": None if "judge.temperature" in left_out else temperature,
    }
    scenarios = {scenario.id: scenario for scenario in bench.scenarios}

    async def play(state: TaskState, record: Record) -> None:
        """The model answers each of the user's fixed messages."""
        scenario = scenarios[str(state.sample_id)]
        record.about = about
        state.messages = []
        messages = bench.user_messages(scenario)
        for turn, message in enumerate(messages):
            debrief = scenario.kind != "analysis" and turn == len(messages) - 1
            state.messages.append(ChatMessageUser(content=message))
            record.add_user_message(message)
            config = config_of(
                "model",
                left_out,
                seed=request_seed("eqbench3", seed, scenario.id, state.epoch, turn),
                temperature=_DEBRIEF_TEMPERATURE if debrief else None,
            )
            reply = await generate_reply(state.messages, role="model", config=config)
            state.messages.append(reply.message)
            record.add_reply(reply)

    async def verdict(state: TaskState, record: Record) -> Score:
        """The judge's score. An invalid verdict is requested again; without a valid one, the sample fails."""
        scenario = scenarios[str(state.sample_id)]
        lines = {who: [line["text"] for line in record.lines if line["speaker"] == who] for who in ("user", "model")}
        prompt = bench.judge_prompt(scenario, lines["user"], lines["model"])
        problem = ""
        for attempt in range(_ATTEMPTS):
            config = config_of(
                "judge",
                left_out,
                seed=request_seed("judge", seed, scenario.id, state.epoch, attempt),
                temperature=temperature,
                max_tokens=_JUDGE_TOKENS,
            )
            reply = await generate_reply([ChatMessageUser(content=prompt)], role="judge", model=judge, config=config)
            record.add_tokens("judge", reply.tokens)
            try:
                if reply.cut:
                    raise InvalidVerdict("cut off by max_tokens")
                found = read_scores(reply.text, scenario.kind)
                return Score(value=task_score(found, scenario.kind), explanation=reply.text, metadata=found)
            except InvalidVerdict as error:
                problem = str(error)
        raise JudgeReplyError(f"{judge}: no valid verdict in {_ATTEMPTS} tries; last problem: {problem}")

    samples = [
        Sample(id=s.id, input=bench.user_messages(s)[0], metadata={"group": s.kind, "title": s.title, "category": s.category})
        for s in bench.scenarios
    ]
    return recorded_task(
        "eqbench3",
        MemoryDataset(samples, name="eqbench3"),
        play,
        verdict,
        measure="rubric",
        config=config_of("model", left_out, temperature=_TEMPERATURE, max_tokens=12000),
        repeats=repeats,
    )
