"""What a trained policy has to beat on held-out scenarios: replies that listen to nobody.

    python -m tests.controls checkpoints/quickstart [checkpoints/ANOTHER ...]

Prints the policy's score beside those of (a) the best constant reply and (b) the best script of one reply for each scene and
turn, both picked on the training scenarios from what the policy said in the first and in the last steps of training; (c) a
parrot of the user's line; (d) nonsense around the user's words. For each: the paired difference with its 95 % interval.
Takes some five minutes a run; several are compared together as well, scenario by scenario. (Picked on the held-out scenarios
themselves, a script of four lines for four scenarios a scene fits their very words, and says nothing about scripts.)
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ctcgrpo.environments.eibench import task_of
from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.environments.eibench.scoring import Variant
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.scores import Validation, improvement
from ctcgrpo.run.validation import validation_of
from ctcgrpo.simulator.protocol import Utterance
from ctcgrpo.simulator.scripted.language import load_language
from tests.dialogue import converse
from tests.held_out import pooled

LANGUAGE = load_language("en")
MOST_CANDIDATES = 60
"""Of the first steps, and of the last."""
_STEPS = 8
NONSENSE = (
    "The {a} sings to the {b} and my window drinks it.",
    "You know that the {a} and the {b} are two friends of the moon.",
    "It makes sense that the {a} eats the {b}, and I am here under the sofa.",
    "Your {a} must be the {b}, so I will paint it green.",
)
Speaker = Callable[[Scenario, Sequence[Utterance]], str]


def play(scenario: Scenario, speaker: Speaker, rounds: int, variant: Variant) -> float:
    """The outcome of a dialogue with the scripted user."""
    return converse(scenario, [lambda history: speaker(scenario, history)] * rounds, rounds=rounds, variant=variant)[0]


def last_line(scenario: Scenario, history: Sequence[Utterance]) -> str:
    return next((u.text for u in reversed(history) if u.speaker == "user"), scenario.policy_persona)


def parrot(scenario: Scenario, history: Sequence[Utterance]) -> str:
    return last_line(scenario, history)


def nonsense(scenario: Scenario, history: Sequence[Utterance]) -> str:
    rng = random.Random(f"{scenario.id}/{len(history)}")
    words = [t for t in LANGUAGE.tokens(last_line(scenario, history)) if t.isalpha() and not LANGUAGE.is_common(t)]
    a, b = rng.choices(words or ["thing"], k=2)
    return rng.choice(NONSENSE).format(a=a, b=b)


def script(lines: dict[str, list[str]]) -> Speaker:
    """By scene the replies turn by turn; the last one again where they run out."""

    def speak(scenario: Scenario, history: Sequence[Utterance]) -> str:
        of_scene = lines[scenario.scene]
        return of_scene[min(sum(u.speaker == "policy" for u in history), len(of_scene) - 1)]

    return speak


def candidates(folder: Path) -> list[str]:
    """What the policy said most in the first steps of training and in the last ones; of what it said as often, a random part."""
    files = sorted(folder.glob("traces/step-*.jsonl"))
    found: dict[str, None] = {}
    for part in (files[:_STEPS], files[-_STEPS:]):
        lines = [line for file in part for line in file.read_text(encoding="utf-8").splitlines()]
        said = [turn["reply"] for line in lines for turn in json.loads(line)["turns"] if turn["reply"]]
        random.Random(0).shuffle(said)
        found.update(dict.fromkeys(text for text, _ in Counter(said).most_common(MOST_CANDIDATES)))
    return list(found)


def best_constant(scenarios: Sequence[Scenario], replies: Sequence[str], score: Callable[[Scenario, Speaker], float]) -> str:
    def total(reply: str) -> float:
        return sum(score(s, lambda *_: reply) for s in scenarios)

    return max(replies, key=total)


def best_script(
    scenarios: Sequence[Scenario], replies: Sequence[str], turns: int, score: Callable[[Scenario, Speaker], float]
) -> dict[str, list[str]]:
    """Chosen turn by turn, each the best in the light of those before it, what comes after being the same reply again; then
    once more, each the best in the light of all others."""
    chosen: dict[str, list[str]] = {}
    for scene in SCENES:
        here = [s for s in scenarios if s.scene == scene]

        def total(lines: list[str], scene: str = scene, here: Sequence[Scenario] = here) -> float:
            return sum(score(s, script({scene: lines})) for s in here)

        lines: list[str] = []
        for _ in range(turns):
            lines = max(([*lines, reply] for reply in replies), key=total)
        for k in range(turns):
            lines = max(([*lines[:k], reply, *lines[k + 1 :]] for reply in replies), key=total)
        chosen[scene] = lines
    return chosen


def policy_outcomes(folder: Path, scenarios: Sequence[Scenario]) -> Validation:
    records = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return Validation(**max(records, key=lambda record: record["step"]))


def against_controls(folder: Path, console: Console) -> tuple[Validation, dict[str, Validation]]:
    """The policy of a run and its controls on the held-out scenarios; prints them."""
    recipe: Recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.validation is not None
    scenarios = load_scenarios(recipe.validation.scenarios, "test")
    turns = recipe.rollout.max_turns

    def score(scenario: Scenario, speaker: Speaker) -> float:
        return play(scenario, speaker, turns, recipe.scoring.variant)

    replies = candidates(folder)
    trained_on = load_scenarios(recipe.scenarios.train, "train")
    constant = best_constant(trained_on, replies, score)
    lines = best_script(trained_on, replies, turns, score)
    speakers: dict[str, Speaker] = {
        "best constant reply": lambda *_: constant,
        "best script by scene and turn": script(lines),
        "parrot": parrot,
        "nonsense around the user's words": nonsense,
    }
    controls = {
        name: validation_of(0, [task_of(s) for s in scenarios], [(s.id, score(s, speaker)) for s in scenarios])
        for name, speaker in speakers.items()
    }
    policy = policy_outcomes(folder, scenarios)
    console.print(compared(str(folder), policy, controls))
    console.print(f"best constant: {constant}", markup=False)
    for scene, said in lines.items():
        console.print(f"best script, {scene}: {' | '.join(said)}", markup=False)
    return policy, controls


def compared(title: str, policy: Validation, controls: Mapping[str, Validation]) -> Table:
    table = Table(title=f"{title}: held-out score {policy.overall:+.3f}, against")
    for name in ("control", "score", "policy is better by", "95 % interval"):
        table.add_column(name)
    for name, control in controls.items():
        gain = improvement(control, policy)
        low, high = gain.ci95 or (math.nan, math.nan)
        table.add_row(name, f"{control.overall:+.3f}", f"{gain.overall:+.3f}", f"{low:+.3f} to {high:+.3f}")
    return table


def main(folders: Sequence[Path]) -> None:
    console = Console(width=110)
    runs = [against_controls(folder, console) for folder in folders]
    if len(runs) > 1:
        policy = pooled([policy for policy, _ in runs])
        controls = {name: pooled([c[name] for _, c in runs]) for name in runs[0][1]}
        console.print(compared(f"all {len(runs)} runs together", policy, controls))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
