"""A person plays the policy's role against the simulated user, and sees how each reply changes anger and trust."""

import secrets
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import ScenarioError
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.util.naming import did_you_mean


def find_scenario(scenarios: Sequence[Scenario], name: str | None) -> Scenario:
    """The scenario of that id, or the first without one. Raises ScenarioError with the nearest id."""
    if name is None:
        return scenarios[0]
    found = next((s for s in scenarios if s.id == name), None)
    if found is None:
        raise ScenarioError(f"--scenario {name!r}: no such id; {did_you_mean(name, [s.id for s in scenarios])}")
    return found


async def chat(
    scenario: Scenario,
    briefing: Briefing,
    simulator: SimulatorClient,
    console: Console,
    ask: Callable[[], str],
    *,
    rounds: int = 8,
    seed: int | None = None,
) -> float:
    """Play a dialogue; gives its outcome in [-1, 1]. `briefing` makes the policy's prompt of the scenario. `ask` reads the person's
    next line, and raises EOFError at the end of input. Raises the simulator's errors."""
    environment = EIBench(simulator, briefing=briefing, max_turns=rounds)
    environment.name = "chat"
    system, *opening = await environment.reset(task_of(scenario).data, seed=secrets.randbits(31) if seed is None else seed)
    state, goal = environment.state, scenario.anchors.target
    console.print(Panel(Text(system["content"]), title=Text(f"you, in {scenario.id} ({scenario.scene})")))
    console.print(
        f"anger {state.anger}, trust {state.trust}; the goal is anger {goal.anger}, trust {goal.trust} in {rounds} replies. "
        "An empty line ends the dialogue.\n",
        style="dim",
        highlight=False,
    )

    def hear(line: str) -> None:
        console.print(f"User: {line}", style="bold cyan", markup=False, highlight=False)

    for message in opening:
        hear(message["content"])
    waiting = Text(f"waiting for {simulator.name}")
    async with simulator:
        with console.status(waiting):
            await simulator.health()
        for _ in range(rounds):
            try:
                reply = ask().strip()  # blocking: nothing else runs meanwhile, and Ctrl-C ends it at once
            except EOFError:
                reply = ""
            if not reply:
                break
            before = environment.state
            with console.status(waiting):
                await environment.step(reply)
            state, answer = environment.state, environment.answer
            better = (state.trust - before.trust) - (state.anger - before.anger)
            console.print(
                f"  anger {before.anger} to {state.anger}, trust {before.trust} to {state.trust}: {answer.why}",
                style="green" if better > 0 else "red" if better < 0 else "dim",
                markup=False,
                highlight=False,
            )
            hear(answer.reply)
            if not answer.goes_on:
                break
    outcome = environment.outcome()
    state = environment.state
    console.print(f"\nanger {state.anger}, trust {state.trust}: outcome {outcome:+.2f}", style="bold", highlight=False)
    return outcome
