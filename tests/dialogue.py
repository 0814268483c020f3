"""A dialogue with the scripted user, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scoring import Variant, outcome_score
from ctcgrpo.simulator.protocol import ScenarioCard, Utterance, turn_request
from ctcgrpo.simulator.scripted.backend import react

Speaker = Callable[[list[Utterance]], str]
ROUNDS = 8


def converse(
    scenario: Scenario,
    replies: Sequence[str | Speaker],
    *,
    rounds: int = ROUNDS,
    variant: Variant = "training",
    reluctance: float = 0.0,
) -> tuple[float, list[tuple[int, int, str, str]]]:
    """The outcome of a dialogue, and (anger change, trust change, why, user's line) for each turn. A reply is a text, or what
    to make of the history."""
    card, state, turns = ScenarioCard.of(scenario), scenario.anchors.initial, []
    history = [Utterance(speaker="user", text=scenario.opening_line)] if scenario.opening_line else []
    for reply in replies:
        history.append(Utterance(speaker="policy", text=reply if isinstance(reply, str) else reply(history)))
        reaction = react(turn_request(card, history, state, request_id="t", max_rounds=rounds, seed=0), reluctance)
        turns.append((reaction.anger_delta, reaction.trust_delta, reaction.why, reaction.reply))
        state = state.plus(reaction.anger_delta, reaction.trust_delta)
        history.append(Utterance(speaker="user", text=reaction.reply))
        if not reaction.goes_on:
            break
    return outcome_score(state, scenario.anchors, variant), turns
