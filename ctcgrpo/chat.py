"""A person plays the policy's role against the simulated user, and sees what each line does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ctcgrpo.errors import ScenarioError
from ctcgrpo.naming import did_you_mean
from ctcgrpo.records import Scenario, UserState
from ctcgrpo.scoring import outcome_score
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.protocol import ScenarioCard, Utterance, turn_request


def find_scenario(scenarios: Sequence[Scenario], name: str | None) -> Scenario:
    """The scenario of that id, or the first where none is named. Raises ScenarioError with the nearest id."""
    if name is None:
        return scenarios[0]
    found = next((s for s in scenarios if s.id == name), None)
    if found is None:
        raise ScenarioError(f"--scenario {name!r} is not among them; {did_you_mean(name, [s.id for s in scenarios])}")
    return found


async def chat(
    scenario: Scenario,
    role: str,
    simulator: SimulatorClient,
    console: Console,
    ask: Callable[[], str],
    *,
    rounds: int = 8,
    seed: int | None = None,
) -> float:
    """Play a dialogue; gives its outcome in [-1, 1]. `role` is what a policy is told; `ask` reads the person's next line and raises
    EOFError where there is none any more. Raises the simulator's errors: what was said so far stands on the screen."""
    seed = secrets.randbits(32) if seed is None else seed
    anchors, card = scenario.anchors, ScenarioCard.of(scenario)
    state, goal = anchors.initial, anchors.target
    console.print(Panel(Text(role), title=Text(f"you, in {scenario.id} ({scenario.scene})")))
    console.print(
        f"anger {state.anger}, trust {state.trust}; aim for anger {goal.anger}, trust {goal.trust} in {rounds} replies. "
        "An empty line ends it.\n",
        style="dim",
        highlight=False,
    )
    history: list[Utterance] = []

    def hear(line: str, reflection: str = "") -> None:
        history.append(Utterance(speaker="user", text=line, reflection=reflection))
        console.print(f"User: {line}", style="bold cyan", markup=False, highlight=False)

    if scenario.opening_line:
        hear(scenario.opening_line)
    async with simulator:
        await simulator.health()
        for round in range(1, rounds + 1):
            try:
                said = ask().strip()  # nothing else goes on meanwhile, and Ctrl-C ends it at once
            except EOFError:
                said = ""
            if not said:
                break
            history.append(Utterance(speaker="policy", text=said))
            request = turn_request(
                card, history, state, request_id=f"chat/{seed}/{round}", max_rounds=rounds, seed=seed + round
            )
            with console.status("..."):
                reply = await simulator.turn(request)
            before, state = state, UserState(reply.state.anger, reply.state.trust)
            better = (state.trust - before.trust) - (state.anger - before.anger)
            console.print(
                f"  anger {before.anger} to {state.anger}, trust {before.trust} to {state.trust}: {reply.why}",
                style="green" if better > 0 else "red" if better < 0 else "dim",
                markup=False,
                highlight=False,
            )
            hear(reply.reply, reply.reflection)
            if not reply.goes_on:
                break
    outcome = outcome_score(state, anchors)
    console.print(f"\nanger {state.anger}, trust {state.trust}: outcome {outcome:+.2f}", style="bold", highlight=False)
    return outcome
