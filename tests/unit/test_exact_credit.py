"""What the docstrings of credit.py and centering.py say of bias, held to exact enumeration; and the real code path held to that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctcgrpo.centering import make_centering
from ctcgrpo.credit import VINE
from ctcgrpo.options import CreditOptions
from ctcgrpo.training.loss import token_sums
from ctcgrpo.training.samples import Summary, step_credit
from tests.exact_credit import (
    CONTINUATIONS,
    PROCESSES,
    Enumerated,
    Floats,
    History,
    Row,
    all_groups,
    enumerated,
    logits,
    moments,
    noise_of_continuations,
    table,
    terms_of,
)

G = 3
ROWS = {(row.process, row.estimator): row for row in table(G)}
ALL = [process.name for process in PROCESSES]
FIXED = ["own", "later"]
"""Processes whose dialogues all have the same length."""


def of(process: str, credit: str, centering: str) -> Row:
    return ROWS[process, f"{credit}, {centering}"]


@pytest.mark.parametrize("process", ALL)
def test_the_outcome_term_loses_its_own_share_and_nothing_else(process: str) -> None:
    row = ROWS[process, "outcome (GRPO, unscaled)"]
    assert row.factor == pytest.approx(1 - 1 / G) and row.bias < 1e-9


@pytest.mark.parametrize("process", ALL)
@pytest.mark.parametrize("centering", ["none", "group_loo", "group_turn_loo", "scene"])
def test_reward_to_go_is_unbiased_where_no_rollout_is_in_its_own_baseline(process: str, centering: str) -> None:
    row = of(process, "reward_to_go", centering)
    assert row.factor == pytest.approx(1) and row.bias < 1e-9


def test_reward_to_go_with_group_turn_is_unbiased_but_for_its_own_share() -> None:
    for process in FIXED:
        row = of(process, "reward_to_go", "group_turn")
        assert row.factor == pytest.approx(1 - 1 / G) and row.bias < 1e-9
    assert 1e-3 < of("worn", "reward_to_go", "group_turn").bias < 0.5  # the share grows as dialogues end


def test_immediate_is_unbiased_only_where_turns_do_not_depend_on_each_other() -> None:
    for centering in ("none", "group_loo", "group_turn_loo", "scene"):
        assert of("own", "immediate", centering).factor == pytest.approx(1)
        assert of("own", "immediate", centering).bias < 1e-9
    for centering in ("none", "rollout", "group", "group_turn", "group_loo", "group_turn_loo", "scene"):
        assert of("later", "immediate", centering).cosine < -0.5  # it teaches the opposite


def test_centering_on_the_rollout_takes_out_one_turn_of_them_all() -> None:
    row = of("own", "immediate", "rollout")
    assert row.factor == pytest.approx(1 - 1 / 3) and row.bias < 1e-9  # dialogues of three turns
    assert of("worn", "immediate", "rollout").bias > 0.1


def test_centering_reward_to_go_on_the_rollout_takes_out_what_it_is_for() -> None:
    assert of("later", "reward_to_go", "rollout").cosine < -0.5
    assert of("worn", "reward_to_go", "rollout").cosine < of("worn", "reward_to_go", "none").cosine - 0.1


def test_smeared_lies_between_immediate_and_reward_to_go() -> None:
    for process in ("worn", "later"):
        cosines = [of(process, credit, "group_turn_loo").cosine for credit in ("immediate", "smeared", "reward_to_go")]
        assert cosines == sorted(cosines) and cosines[0] < cosines[1] < cosines[2]


def test_a_scaled_turn_term_points_nearly_the_same_way() -> None:
    for credit in ("immediate", "reward_to_go"):
        scaled, plain = of("own", credit, "group_turn, scaled"), of("own", credit, "group_turn")
        assert scaled.factor > 5 * plain.factor and scaled.cosine > 0.97


@pytest.mark.parametrize("process", ALL)
def test_vine_is_unbiased_whatever_pays_off_when(process: str) -> None:
    row = of(process, VINE, "none")
    assert row.factor == pytest.approx(1) and row.bias < 1e-9
    assert row.noise < of(process, "reward_to_go", "group_turn_loo").noise
    assert row.noise < ROWS[process, "outcome (GRPO, unscaled)"].noise


@pytest.mark.parametrize("process", ALL)
def test_baselines_lessen_noise(process: str) -> None:
    """Where the expected return is near 0 (worn), a mean over two siblings adds more noise than it takes out."""
    for centering in ("scene", *(["group_turn_loo"] if process in FIXED else [])):
        assert of(process, "reward_to_go", centering).noise < of(process, "reward_to_go", "none").noise


# --- the code path of training: step_credit, and the loss on a table of logits -------------------------------------------


def _played(of: Enumerated, groups: int, rng: np.random.Generator) -> list[tuple[Summary, int]]:
    found, paths = [], of.process.paths()
    continued = [[_after(of, path[:tau]) for tau in range(1, len(path) + 1)] for path in paths]
    for k, path in enumerate(rng.choice(len(of.probability), size=groups * G, p=of.probability / of.probability.sum())):
        rewards = of.rewards[path]
        summary = Summary(
            tag="scene", group=k // G, rollout=k % G, outcome=float(of.outcomes[path]), reward=float(of.outcomes[path]),
            turn_scores=tuple(rewards), final={}, failure=None, turn_tokens=(1,) * len(rewards), cut_turns=0,
            empty_turns=0, dropped_exchanges=0,
            continuations=tuple(tuple(rng.choice(of.outcomes, size=CONTINUATIONS, p=p)) for p in continued[path]),
        )  # fmt: skip
        found.append((summary, int(path)))
    return found


def _after(of: Enumerated, history: History) -> Floats:
    """The probability of each path, given how it begins (P,)."""
    p = of.probability * [path[: len(history)] == history for path in of.process.paths()]
    return np.asarray(p / p.sum())


def _gradients(of: Enumerated, played: list[tuple[Summary, int]], options: CreditOptions) -> torch.Tensor:
    """Of each group's loss (groups, D), by autograd through the loss on log-probabilities of a table of logits."""
    credit = step_credit([s for s, _ in played], options, make_centering(options.centering))
    process = of.process
    place, paths = process.states(), process.paths()
    table_of_logits = torch.tensor(logits(process), requires_grad=True)
    by_group: dict[int, torch.Tensor] = {}
    log_policy = table_of_logits.log_softmax(dim=1)
    for summary, path in played:
        at = [(place[paths[path][:tau]], paths[path][tau]) for tau in range(len(paths[path]))]
        turns = credit.turns[summary.group, summary.rollout]
        advantages = torch.tensor([turn.advantage for turn in turns], dtype=torch.float64)
        logprobs = torch.stack([log_policy[k, a] for k, a in at])
        sums = token_sums(logprobs, torch.zeros_like(logprobs), None, advantages, clip=0.2, entropy_bonus=0.0)
        by_group[summary.group] = by_group.get(summary.group, torch.zeros((), dtype=torch.float64)) + sums.loss / G
    return torch.stack(
        [-torch.autograd.grad(loss, table_of_logits, retain_graph=True)[0].reshape(-1) for loss in by_group.values()]
    )


@pytest.mark.parametrize(("credit", "centering"), [("immediate", "rollout"), ("reward_to_go", "group_turn_loo"), (VINE, "none")])
def test_training_has_the_expected_gradient(credit: str, centering: str) -> None:
    for process in PROCESSES:
        exact = enumerated(process)
        weight = 0.0 if credit == VINE else 1.0
        options = CreditOptions(
            alpha=2.0,
            outcome_weight=weight,
            centering=centering,
            credit=credit,
            scale_rewards="none",
            continuations=CONTINUATIONS,
        )
        sampled = _gradients(exact, _played(exact, 400, np.random.default_rng(7)), options)
        groups = all_groups(exact, G)
        terms = terms_of(exact, groups, centering=centering, credit=credit, turn_scale="none")
        expected, variance = moments(exact, groups, [weight * term.outcome + 2.0 * term.turn for term in terms])
        if credit == VINE:
            variance += 4.0 * noise_of_continuations(exact, G)
        error = sampled.mean(dim=0).numpy() - expected
        assert float(error @ error) < 9 * variance / len(sampled)  # its expectation is variance / len
        spread = float(sampled.var(dim=0).sum())
        assert spread == pytest.approx(variance, rel=0.25)
