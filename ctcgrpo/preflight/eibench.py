"""Checks of scenarios: the training set, a disjoint validation set, and one test turn with the simulated user."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ctcgrpo.environments.eibench import EIBench, User, task_of
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenes, load_set
from ctcgrpo.errors import RecipeError, SimulatorTransportError
from ctcgrpo.preflight.subject import NO_VALIDATION, Finding, Subject, failed, ok, warning
from ctcgrpo.run.users import VALIDATED_WITH, Player, other_of, refuse_unplayed, trained_on
from ctcgrpo.simulator.choice import SCRIPTED, check_timeout
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning

_PATIENCE = 20.0  # timeout of the test turn in seconds
_DEADLINE = 15.0  # and of the LLM's answer to it, after which the server names the endpoint's problem


def scenarios(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.eibench_scenarios()
    found = load_scenes(wanted.train, wanted.scenes, wanted.invalid)
    s.scenarios = found.scenarios
    if lines := found.report():
        yield warning("\n".join(lines))
    yield ok(f"{len(s.scenarios)} training scenarios")


def validation(s: Subject) -> Iterator[Finding]:
    if s.recipe.validation is None:
        yield NO_VALIDATION
        return
    found = load_set(s.recipe.validation_source(), "test", s.recipe.eibench_scenarios().invalid)
    s.held_out = found.scenarios
    if lines := found.report():
        yield warning("\n".join(lines))
    if both := {x.id for x in s.held_out} & {x.id for x in s.scenarios}:
        yield failed(f"validation.scenarios: {len(both)} scenarios are also in scenarios.train, such as {min(both)!r}")
    else:
        yield ok(f"{len(s.held_out)} held-out scenarios")


def simulator(s: Subject) -> Iterator[Finding]:
    """One test turn with each user of the run: it costs a call."""
    players, other = trained_on(s.recipe), other_of(s.recipe)
    s.players = players if other is None else (*players, other)
    refuse_unplayed(players, [*s.scenarios, *s.held_out])
    for player in s.players:
        yield from _answers(s, player)


def _answers(s: Subject, player: Player) -> Iterator[Finding]:
    settings, choice, about = s.recipe.simulator, player.choice, s.about("simulator", player)
    if not choice.urls and s.recipe.hardware.nodes > 1:
        problem = f"{player.field}.url = 'embedded' with hardware.nodes = {s.recipe.hardware.nodes}: other nodes cannot reach it"
        advice = "start `ctcgrpo serve CONFIG --host 0.0.0.0` and set its URL, or use launch/slurm.sbatch"
        raise RecipeError(f"{problem}; {advice}")
    tested = choice
    if (llm := choice.llm) is not None:
        check_timeout({"deadline": llm.deadline}, settings.timeout)
        hasty = llm.model_copy(update={"deadline": min(llm.deadline, _DEADLINE), "patience": 0.0})
        tested = replace(choice, config=choice.config.model_copy(update={"llm": hasty}))
    sets = {"training scenarios": () if player.field == VALIDATED_WITH else s.scenarios, "held-out scenarios": s.held_out}
    plays = {what: [scenario for scenario in scenarios if player.part.plays(scenario)] for what, scenarios in sets.items()}
    with tested.served([scenario for scenarios in plays.values() for scenario in scenarios]) as urls:
        client = tested.client(urls, settings.token_env, s.variables, patience=2)
        asked = next((scenario for scenario in s.examples if player.part.plays(scenario)), s.examples[0])
        says, reply = asyncio.run(_canary(client, asked))
    check_timeout(says, settings.timeout)
    who = ", ".join(map(str, says.get("models") or [says.get("backend")]))
    yield ok(f"{who} answered a test turn: {reply!r}", about)
    if says.get("backend") == SCRIPTED:
        for what, scenarios in plays.items():
            if text := unscripted_warning(scenarios, what):
                yield warning(text, "scripts")


async def _canary(client: SimulatorClient, scenario: Scenario) -> tuple[dict[str, Any], str]:
    try:
        async with asyncio.timeout(_PATIENCE), client:
            says = await client.health()
            dialogue = await played(client, scenario, ["Hello. I am here and I am listening."], 8)
    except TimeoutError:
        raise SimulatorTransportError(
            f"{client.name}: no response to a test turn within {_PATIENCE:g} s; the server's log names the cause"
        ) from None
    return says, dialogue.answer.reply[:60]


async def played(user: User, scenario: Scenario, replies: Sequence[str], rounds: int) -> EIBench:
    dialogue = EIBench(user, max_turns=rounds)
    dialogue.name = f"check/{scenario.id}"
    await dialogue.reset(task_of(scenario).data, seed=0)
    for reply in replies:
        await dialogue.step(reply)
    return dialogue


class Verbose:
    """A user with a constant line and reflection, which records its requests."""

    def __init__(self, line: str, thought: str) -> None:
        self._line, self._thought = line, thought
        self.asked: list[TurnRequest] = []

    async def turn(self, request: TurnRequest) -> TurnReply:
        self.asked.append(request)
        return TurnReply(
            reply=self._line, anger_delta=0, trust_delta=0, state=request.state, goes_on=True, reflection=self._thought
        )
