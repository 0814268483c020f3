"""The noise of a simulator's state changes, measured by replaying the same turns with different seeds.

An LLM's change of state is one sample. Its variance within a turn is noise; the variance between turns is the signal of credit:

    reliability = between / (between + within)

of one sample; of a mean over k samples (llm.samples) `within` shrinks to within / k.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import MAX_DELTA, Scenario, UserState, in_order
from ctcgrpo.environments.eibench.scoring import turn_score
from ctcgrpo.errors import EPISODE_ERRORS, OutputError
from ctcgrpo.run.run_records import read_traces
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import State, TurnReply, TurnRequest
from ctcgrpo.util.files import explained


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one scene: standard deviations of the changes of anger and trust between replays of a turn, of the turn score r
    within and between turns, and the reliability of one sample. NaN with fewer than two replays of a turn, or two turns."""

    turns: int
    replays: int
    failed: int
    anger: float
    trust: float
    within: float
    between: float

    @property
    def reliability(self) -> float:
        return self.of_mean(1)

    def of_mean(self, k: int) -> float:
        """Reliability of a mean over k samples."""
        total = self.between**2 + self.within**2 / k
        return self.between**2 / total if total > 0 else float("nan")


def recorded_turns(
    files: Iterable[Path],
    scenarios: Sequence[Scenario],
    *,
    dialogues: int,
    max_rounds: int,
    seed: int = 0,
    warn: Callable[[str], None] = lambda text: None,
) -> list[TurnRequest]:
    """Requests for the turns of recorded dialogues, the same number of dialogues of each scene. `warn` gets a message for each
    invalid line, which is left out. Raises OutputError without any dialogue."""
    known = {s.id: s for s in scenarios}
    traces: dict[str, list[Mapping[str, Any]]] = {scene: [] for scene in in_order(s.scene for s in scenarios)}
    unreadable: list[str] = []
    for file in files:
        found, problems = read_traces([file])
        unreadable += problems
        for trace in found:
            if trace["failure"] is None and trace["task"] in known:
                try:
                    for part in (trace, *trace["turns"]):
                        _state(part["info"])
                except ValidationError as error:
                    unreadable.append(f"{file.name}: invalid state in {trace['task']}: {explained(error)}")
                else:
                    traces[known[trace["task"]].scene].append(trace)
    for problem in unreadable:
        warn(problem)
    if not any(traces.values()):
        why = f" ({unreadable[0]})" if unreadable else ""
        raise OutputError(f"no recorded dialogues of these scenarios to replay{why}")
    rng = random.Random(seed)
    chosen = [t for of_scene in traces.values() for t in rng.sample(of_scene, min(dialogues, len(of_scene)))]
    return [turn for trace in chosen for turn in asyncio.run(_turns(trace, known[trace["task"]], max_rounds))]


def _state(info: Mapping[str, Any]) -> State:
    return State.model_validate({name: info.get(name) for name in ("anger", "trust")})


class _Recording:
    """A user that answers as recorded, and keeps the requests."""

    def __init__(self, turns: Sequence[Mapping[str, Any]]) -> None:
        self._turns = turns
        self.asked: list[TurnRequest] = []

    async def turn(self, request: TurnRequest) -> TurnReply:
        turn = self._turns[len(self.asked)]
        self.asked.append(request)
        state, before, why = _state(turn["info"]), request.state, str(turn["info"].get("why", ""))
        anger, trust = np.clip([state.anger - before.anger, state.trust - before.trust], -MAX_DELTA, MAX_DELTA).tolist()
        deltas = {"anger_delta": anger, "trust_delta": trust}
        return TurnReply(reply=turn["message"], **deltas, state=state, goes_on=True, why=why, reflection=why)


async def _turns(trace: Mapping[str, Any], scenario: Scenario, max_rounds: int) -> Sequence[TurnRequest]:
    user, turns = _Recording(trace["turns"]), trace["turns"]
    dialogue = EIBench(user, briefing=Briefing(), max_turns=max(max_rounds, len(turns)))
    dialogue.name = f"noise/{trace['task']}/{trace['rollout']}"
    await dialogue.reset(task_of(scenario).data, seed=0)
    for turn in turns:
        await dialogue.step(turn["reply"])
    return user.asked


async def measure(turns: Sequence[TurnRequest], simulator: SimulatorClient, *, replays: int) -> dict[str, Noise]:
    """The noise by scene. A failed replay is counted and left out."""

    async def ask(turn: TurnRequest, k: int) -> tuple[int, int] | None:
        again = turn.model_copy(update={"seed": 1_000_003 * (k + 1), "request_id": f"{turn.request_id}/{k}"})
        try:
            reply = await simulator.turn(again)
        except EPISODE_ERRORS:
            return None
        return reply.anger_delta, reply.trust_delta

    async with simulator:
        answers = await asyncio.gather(*(ask(turn, k) for turn in turns for k in range(replays)))
    by_turn = [answers[k * replays : (k + 1) * replays] for k in range(len(turns))]
    return {
        scene: _noise([(t, a) for t, a in zip(turns, by_turn, strict=True) if t.scenario.scene == scene], replays)
        for scene in in_order(t.scenario.scene for t in turns)
    }


def _noise(turns: Sequence[tuple[TurnRequest, Sequence[tuple[int, int] | None]]], replays: int) -> Noise:
    changes = [[a for a in answers if a is not None] for _, answers in turns]
    scores = []
    for (turn, _), deltas in zip(turns, changes, strict=True):
        before = UserState(turn.state.anger, turn.state.trust)
        scores.append([turn_score(before, before.plus(*d)) for d in deltas])
    within = _pooled_variance(scores)
    means = [np.mean(s) for s in scores if s]
    counts = [len(s) for s in scores if s]
    # The variance of means includes a share of the noise within turns.
    spread = float(np.var(means, ddof=1)) - within / float(np.mean(counts)) if len(means) > 1 else float("nan")
    return Noise(
        turns=len(turns),
        replays=replays,
        failed=sum(a is None for _, answers in turns for a in answers),
        anger=_pooled_variance([[a for a, _ in deltas] for deltas in changes]) ** 0.5,
        trust=_pooled_variance([[t for _, t in deltas] for deltas in changes]) ** 0.5,
        within=within**0.5,
        between=max(0.0, spread) ** 0.5 if spread == spread else spread,
    )


def _pooled_variance(groups: Sequence[Sequence[float]]) -> float:
    """The variance within groups, each around its own mean."""
    several = [np.asarray(g, dtype=float) for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in several)
    return float(sum(((g - g.mean()) ** 2).sum() for g in several) / freedom) if freedom else float("nan")


def noise_table(noise: Mapping[str, Noise], title: str) -> Table:
    table = Table("scene", title=Text(title))
    deviations = ("SD anger", "SD trust", "SD score", "SD between")
    for name in ("turns", "failed", *deviations, "reliability", "of a mean of 4"):
        table.add_column(name, justify="right")
    for scene, n in noise.items():
        spread = (f"{n.anger:.2f}", f"{n.trust:.2f}", f"{n.within:.4f}", f"{n.between:.4f}")
        shares = (f"{n.reliability:.2f}", f"{n.of_mean(4):.2f}")
        table.add_row(scene, f"{n.turns} x {n.replays}", str(n.failed), *spread, *shares)
    return table
