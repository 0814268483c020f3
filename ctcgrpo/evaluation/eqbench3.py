"""EQ-Bench 3, rubric part, as a task of Inspect: the rules are in eqbench3_protocol, all texts in the user's copy of its data.

    inspect eval ctcgrpo/eqbench3 --model PROVIDER/MODEL --model-role judge=PROVIDER/MODEL -T data=FOLDER

The judge reads the model's answers as they were given; the authors' code puts their sections together anew first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, Model
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from ctcgrpo.environments.eibench.scenarios import data_home
from ctcgrpo.errors import JudgeReplyError
from ctcgrpo.evaluation.eqbench3_protocol import EqBench, EqScenario, Unreadable, load_eqbench, read_scores, task_score
from ctcgrpo.evaluation.generation import Unset, config_of, names_of
from ctcgrpo.evaluation.record import Record
from ctcgrpo.evaluation.speaking import played_by, say, temperature_of
from ctcgrpo.rollout.engine import request_seed

_ATTEMPTS = 3
_TEMPERATURE, _OF_DEBRIEF, _OF_JUDGE = 0.7, 0.5, 0.0
_JUDGE_TOKENS = 8000


@task
def eqbench3(data: str | None = None, repeats: int = 1, seed: int = 0, unset: Unset = "") -> Task:
    """EQ-Bench 3, rubric: 45 scenarios, scored from 0 to 100 by a judge, without whose name a score means nothing.

    Args:
      data: your copy of the folder data of EQ-bench/eqbench3; by default $CTCGRPO_DATA/eqbench3.
      repeats: times that each scenario is played; it counts with their mean.
      seed: of what is sampled, where providers heed it.
      unset: settings that are not sent, where providers refuse them: temperature,top_p,max_tokens,seed; judge.NAME for those of
        the judge.
    """
    bench = load_eqbench(data_home() / "eqbench3" if data is None else Path(data).expanduser())
    judge, left_out = played_by("judge"), names_of(unset)
    samples = [
        Sample(id=s.id, input=bench.asked(s)[0], metadata={"group": s.kind, "title": s.title, "category": s.category})
        for s in bench.scenarios
    ]
    by_id = {s.id: s for s in bench.scenarios}
    return Task(
        name="eqbench3",
        dataset=MemoryDataset(samples, name="eqbench3"),
        solver=_answering(bench, by_id, judge, seed, left_out),
        scorer=_judging(bench, by_id, judge, seed, left_out),
        config=config_of("model", left_out, temperature=_TEMPERATURE, max_tokens=12000),
        epochs=Epochs(repeats, "mean"),
        fail_on_error=False,
    )


def _answering(
    bench: EqBench, scenarios: Mapping[str, EqScenario], judge: Model, seed: int, left_out: frozenset[str]
) -> Solver:
    """The user's lines are canned: the model answers each, whatever it said before."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        scenario, record = scenarios[str(state.sample_id)], state.store_as(Record)
        record.about = {
            "models": [str(judge)],
            "prompts": f"eqbench3/{bench.digest}",
            "temperature": None if "judge.temperature" in left_out else temperature_of(judge, _OF_JUDGE),
        }
        state.messages = []
        asked = bench.asked(scenario)
        for turn, line in enumerate(asked):
            debrief = scenario.kind != "analysis" and turn == len(asked) - 1
            state.messages.append(ChatMessageUser(content=line))
            record.user_said(line)
            config = config_of(
                "model",
                left_out,
                seed=request_seed("eqbench3", seed, scenario.id, state.epoch, turn),
                temperature=_OF_DEBRIEF if debrief else None,
            )
            said = await say(state.messages, role="model", config=config)
            state.messages.append(said.message)
            record.model_said(said)
        record.over = True
        return state

    return solver(name="answer")(lambda: solve)()


def _judging(
    bench: EqBench, scenarios: Mapping[str, EqScenario], judge: Model, seed: int, left_out: frozenset[str]
) -> Scorer:
    """The judge's verdict. An answer that cannot be read is asked for again; without one, the sample fails."""

    async def score(state: TaskState, target: Target) -> Score:
        scenario, record = scenarios[str(state.sample_id)], state.store_as(Record)
        if not record.over:
            raise RuntimeError("the answers were cut off by a limit; what there is cannot be judged")
        said = {who: [line["text"] for line in record.lines if line["speaker"] == who] for who in ("user", "model")}
        prompt = bench.judged(scenario, said["user"], said["model"])
        problem = ""
        for attempt in range(_ATTEMPTS):
            config = config_of(
                "judge",
                left_out,
                seed=request_seed("judge", seed, scenario.id, state.epoch, attempt),
                temperature=temperature_of(judge, _OF_JUDGE),
                max_tokens=_JUDGE_TOKENS,
            )
            verdict = await say([ChatMessageUser(content=prompt)], role="judge", model=judge, config=config)
            record.spend("judge", verdict.tokens)
            try:
                if verdict.cut:
                    raise Unreadable("cut off by max_tokens")
                found = read_scores(verdict.text, scenario.kind)
                return Score(value=task_score(found, scenario.kind), explanation=verdict.text, metadata=found)
            except Unreadable as error:
                problem = str(error)
        raise JudgeReplyError(f"{judge} gave no usable verdict, asked {_ATTEMPTS} times (last problem: {problem})")

    return scorer(metrics=[grouped(mean(), "group", all_label="all")], name="rubric")(lambda: score)()
