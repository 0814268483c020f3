"""The credit audit: its statistics against what is exact, and the command from a recipe to its tables."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ctcgrpo.audit.commands import compared
from ctcgrpo.audit.kinds import BASELINE
from ctcgrpo.audit.measure import PlayedStep, credits_of, effects_by_tag
from ctcgrpo.audit.statistics import Turns, agreement, credit_figures, prediction
from ctcgrpo.credit import VINE
from ctcgrpo.errors import RecipeError
from ctcgrpo.options import CreditOptions
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.training.samples import Summary
from tests.conftest import ROOT
from tests.exact_credit import PROCESSES, all_groups, enumerated, moments, terms_of

GROUP = 4
BATCH = 8
CREDITS = {
    "outcome": ("immediate", "none", 0.0, 1.0),
    "immediate": ("immediate", "none", 1.0, 0.0),
    "reward_to_go": ("reward_to_go", "group_turn_loo", 1.0, 0.0),
}
"""(credit, centering, alpha, weight of the outcome)."""


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_figures_are_those_of_the_exact_distribution(process: object) -> None:
    """Groups drawn from a process whose estimators are known exactly. Each interval is 95 % wide; with a margin of its own half."""
    of = enumerated(process)  # type: ignore[arg-type]
    groups = all_groups(of, GROUP)
    rng = np.random.default_rng(5)
    drawn = rng.choice(len(groups.probability), size=600, p=groups.probability / groups.probability.sum())
    sampled, exact = {}, {}
    for name, (credit, centering, alpha, weight) in CREDITS.items():
        terms = terms_of(of, groups, centering=centering, credit=credit, turn_scale="none")
        advantages = [weight * t.outcome + alpha * t.turn for t in terms]
        flat = groups.members.reshape(-1)
        by_rollout = np.array([A @ of.scores[p] for A, p in zip(advantages, flat, strict=True)])
        sampled[name] = by_rollout.reshape(*groups.members.shape, -1).mean(axis=1)[drawn]
        exact[name] = moments(of, groups, advantages)
    o = exact["outcome"][0]
    gains = {name: float(mean @ o) / math.sqrt(mean @ mean + variance / BATCH) for name, (mean, variance) in exact.items()}
    found = credit_figures(sampled, reference="outcome", baseline="outcome", batch=BATCH)
    for name, (mean, variance) in exact.items():
        expected = {
            "noise": variance / float(mean @ mean),
            "cosine": float(mean @ o) / math.sqrt((mean @ mean) * (o @ o)),
            "gain": gains[name] / gains["outcome"],
        }
        for figure, value in expected.items():
            got = getattr(found[name], figure)
            margin = max(got.high - got.low, 0.02) / 2
            assert got.low - margin <= value <= got.high + margin, (process, name, figure, value, got)
    assert found["outcome"].gain.value == found["outcome"].gain.low == 1


def test_no_noise_is_multiplied_by_itself() -> None:
    """Gradients that are noise alone: the squared length of their mean is zero on the mean, so the cosine is as often unknown."""
    rng = np.random.default_rng(0)
    unknown = 0
    for _ in range(40):
        gradients = {"outcome": rng.normal(size=(20, 50)), "other": rng.normal(size=(20, 50))}
        found = credit_figures(gradients, reference="outcome", baseline="outcome", batch=4)
        unknown += math.isinf(found["other"].noise.value)
    assert 10 <= unknown <= 30


def test_halves_agree_where_credits_differ_beyond_their_noise() -> None:
    rng = np.random.default_rng(1)
    direction = np.zeros(30)
    direction[0] = 1.0
    signal = direction + 0.3 * rng.normal(size=(40, 30))
    clear = {"outcome": signal} | {f"c{k}": signal + k * rng.normal(size=(40, 30)) for k in range(6)}
    chance = {"outcome": signal} | {f"c{k}": signal + rng.normal(size=(40, 30)) for k in range(6)}
    sure = agreement(clear, reference="outcome", batch=4)
    unsure = agreement(chance, reference="outcome", batch=4)
    assert sure.low > 0.5 and sure.value > unsure.value + 0.3 and unsure.low < 0.2


def test_prediction_takes_the_noise_of_effects_out() -> None:
    rng = np.random.default_rng(2)

    def groups(noise: float, slope: float) -> list[Turns]:
        made = []
        for _ in range(400):
            r = rng.normal(size=6)
            effect = slope * r + math.sqrt(1 - slope**2) * rng.normal(size=6)
            made.append(Turns(r, effect + noise * rng.normal(size=6), np.full(6, noise**2)))
        return made

    for noise in (0.0, 1.0):
        found = prediction(groups(noise, 0.6))
        assert found.value == pytest.approx(0.6, abs=0.08) and found.low < 0.6 < found.high and found.high - found.low < 0.25
    flat = [Turns(np.zeros(3), np.ones(3), np.zeros(3))] * 4
    assert math.isnan(prediction(flat).value)


# --- from summaries --------------------------------------------------------------------------------------------------------


def summary(rollout: int, outcome: float, scores: Sequence[float], continuations: Sequence[Sequence[float]] = ()) -> Summary:
    kept = tuple(map(tuple, continuations)) or ((),) * len(scores)
    return Summary("t", 0, rollout, outcome, outcome, tuple(scores), (1,) * len(scores), continuations=kept)


def played(*summaries: Summary) -> PlayedStep:
    return PlayedStep(summaries, [], np.zeros((0, 0), np.float32))


def test_a_baseline_with_a_state_has_not_seen_the_step(tmp_path: Path) -> None:
    steps = [played(summary(0, 1.0, [a, 0.0]), summary(1, 0.0, [a, 0.0])) for a in (0.1, 0.2, 0.6)]
    options = CreditOptions(centering="scene", alpha=1.0, outcome_weight=0.0)
    turns = [credit.turns[0, 0][0].turn for credit in credits_of(steps, options, seed=0)]
    assert turns == pytest.approx([0.1 - 0.4, 0.2 - 0.35, 0.6 - 0.15])


def test_effects_come_from_continuations() -> None:
    group = [
        summary(0, 1.0, [0.3, 0.1], [[0.2, 0.6], []]),
        summary(1, 0.0, [0.0, 0.0], [[0.1, 0.3], []]),
        summary(2, 0.5, [0.2, 0.0], [[0.4], []]),  # a single continuation: its error is unknown
    ]
    [turns] = effects_by_tag([played(*group)])["t"]
    assert turns.rewards.tolist() == [0.3, 0.1, 0.0, 0.0]
    assert turns.effects == pytest.approx([0.4 - 0.25, 0.6, 0.2 - 0.75, -0.2])
    siblings = 0.25 / 2  # the variance of the outcomes, of a mean of two
    assert turns.errors == pytest.approx([siblings + 0.04, 0.04, siblings + 0.01, 0.01])


# --- what is compared ------------------------------------------------------------------------------------------------------


def test_kinds_of_credit_are_those_of_the_package_and_the_recipes_own() -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", ["credit.alpha=7", "credit.scale=batch"])
    found = compared(recipe, None, continuations=0)
    assert next(iter(found)) == BASELINE and found[BASELINE].alpha == 0 and VINE not in found and "recipe" not in found
    assert found["rollout"].alpha == 7 and found["rollout"].scale_rewards == "batch" and found["scaled"].alpha == 1
    assert compared(recipe, None, continuations=2)[VINE].credit == VINE
    own = load_recipe(ROOT / "recipes" / "tiny.yaml", ["credit.centering=group", "credit.center_weights=token"])
    assert compared(own, None, continuations=0)["recipe"].center_weights == "token"


@pytest.mark.parametrize(
    "text, message",
    [
        ("credits: {mine: {centering: grup}}", r"credits.mine.centering is 'grup'; did you mean 'group'\?"),
        ("credits: {mine: {alhpa: 3}}", r"unknown field credits.mine.alhpa; did you mean 'alpha'\?"),
        ("credits: {mine: 3}", "credits.mine"),
        ("mine: {alpha: 3}", "unknown field mine"),
        ("credits: {mine: {credit: vine}}", r"credits.mine.credit = 'vine' needs --continuations of 1 or more"),
    ],
)
def test_a_file_of_kinds_is_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kinds.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        compared(load_recipe(ROOT / "recipes" / "tiny.yaml"), file, continuations=0)
    with pytest.raises(RecipeError, match=r"list of kinds of credit '.*none.yaml' not found"):
        compared(load_recipe(ROOT / "recipes" / "tiny.yaml"), tmp_path / "none.yaml", continuations=0)
