"""The pieces of the update that need no trainer: schedule, samples, rows, loss, metrics."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctcgrpo.centering import SceneBaseline, make_centering
from ctcgrpo.credit import turn_advantages
from ctcgrpo.environments.eibench.records import SCENES, Anchors, Scenario, UserState
from ctcgrpo.environments.eibench.scoring import turn_score
from ctcgrpo.options import CreditOptions
from ctcgrpo.training.loss import TokenSums, importance_weights, token_sums
from ctcgrpo.training.metrics import rollout_metrics
from ctcgrpo.training.rows import dummy_row, plain_rows
from ctcgrpo.training.samples import episode_weights, step_credit, summarise, turn_samples, update_of
from ctcgrpo.training.tasks import step_schedule
from ctcgrpo.types import Completion, Episode, Failure, Turn, TurnSample

ANCHORS = Anchors(UserState(60, 40), UserState(20, 80), UserState(95, 5))


def scenario(scene: str = "support", name: str = "s") -> Scenario:
    return Scenario(name, "", scene, "en", "u", "hello", "p", "", (), (), ANCHORS)  # type: ignore[arg-type]


def episode(
    group: int,
    rollout: int,
    deltas: list[tuple[int, int]],
    outcome: float,
    reasoning: str | None = None,
    faults: tuple[str, ...] = (),
) -> Episode:
    state, turns = ANCHORS.initial, []
    for k, (anger, trust) in enumerate(deltas):
        after = state.plus(anger, trust)
        done = Completion((5, 6, k), (-1.0, -2.0, -3.0), "stop")
        prompt = (1, 2, group, rollout, k)
        turns.append(Turn(prompt, done, "r", reasoning, faults, "", turn_score(state, after), False, after._asdict()))
        state = after
    failure = Failure("simulator_reply", "x") if math.isnan(outcome) else None
    info = ANCHORS.initial._asdict()
    return Episode(f"s{group}", SCENES[group % 4], 1, group, rollout, tuple(turns), outcome, failure, info=info)


def test_the_schedule_is_stratified_and_deals_every_scenario_before_any_comes_again() -> None:
    tags = [scene for scene in SCENES for _ in range(8)]
    schedule = step_schedule(tags, steps=20, per_step=8, seed=1)
    for step in schedule:
        assert Counter(tags[k] for k in step) == dict.fromkeys(SCENES, 2)
    for first in range(0, 20, 4):  # four steps of two deal a scene's eight
        assert len({k for step in schedule[first : first + 4] for k in step}) == 32
    assert schedule == step_schedule(tags, steps=20, per_step=8, seed=1)
    assert schedule != step_schedule(tags, steps=20, per_step=8, seed=2)
    assert schedule[:5] == step_schedule(tags, steps=5, per_step=8, seed=1)
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        step_schedule(tags, steps=1, per_step=6, seed=0)


def test_samples_leave_out_what_is_not_in_the_loss() -> None:
    episodes = [
        episode(0, 0, [(-5, 5), (-1, 1)], 0.5),
        episode(0, 1, [(2, -2)], -0.5),
        episode(0, 2, [(9, 9)], math.nan),  # failed
        episode(1, 0, [(-3, 3)], 0.4),  # alone: the rest of its group failed
        episode(1, 1, [], math.nan),
    ]
    options = CreditOptions()
    credit = step_credit([summarise(e, options) for e in episodes], options, make_centering(options.centering))
    assert set(credit.advantages) == {(0, 0), (0, 1)}
    samples = turn_samples(episodes, credit.advantages)
    assert [tuple(s.prompt_ids[2:].tolist()) for s in samples] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert all(s.old_logprobs is None for s in samples)
    # By hand: A = +-0.5 / (0.7071 + 1e-6); turn scores 0.05 and 0.01, mean 0.03, so +-15 * 0.02.
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert [s.advantage for s in samples] == pytest.approx([a + 0.3, a - 0.3, -a])
    assert turn_samples(episodes, credit.advantages, recorded=True)[0].old_logprobs.tolist() == [-1.0, -2.0, -3.0]


def test_the_scene_baseline_is_used_after_it_was_learned_and_leaves_failures_out() -> None:
    episodes = [episode(0, 0, [(-5, 5)], 0.5), episode(0, 1, [(1, -1)], -0.5), episode(0, 2, [(9, 9)], math.nan)]
    options = CreditOptions(centering="scene", alpha=10)
    baseline = make_centering("scene")
    assert isinstance(baseline, SceneBaseline)
    first = step_credit([summarise(e, options) for e in episodes], options, baseline)
    assert baseline.of("support") == pytest.approx([(0.05 - 0.01) / 2])
    second = step_credit([summarise(e, options) for e in episodes], options, baseline)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert first.advantages[0, 0] == pytest.approx((a + 0.5,))
    assert second.advantages[0, 0] == pytest.approx((a + 10 * (0.05 - 0.02),))
    by_token = CreditOptions(center_weights="token", centering="group")
    weighted = step_credit([summarise(e, by_token) for e in episodes], by_token, make_centering(by_token.centering))
    assert weighted.advantages[0, 0] == pytest.approx((a + 15 * 0.03,))


def test_shuffled_advantages_are_the_same_ones_elsewhere() -> None:
    episodes = [episode(g, r, [(-r, r), (g, -1), (2, r)][: 2 + r % 2], 0.1 * r - 0.2 * g) for g in range(3) for r in range(4)]
    options = CreditOptions()
    summaries = [summarise(e, options) for e in episodes]
    true = step_credit(summaries, options, make_centering(options.centering)).advantages
    control = CreditOptions(shuffle_credit="advantages")
    dealt = step_credit(summaries, control, make_centering(control.centering), step=5).advantages
    assert {key: len(a) for key, a in dealt.items()} == {key: len(a) for key, a in true.items()} and dealt != true
    assert sorted(x for a in dealt.values() for x in a) == sorted(x for a in true.values() for x in a)
    assert dealt == step_credit(summaries, control, make_centering(control.centering), step=5).advantages
    assert dealt != step_credit(summaries, control, make_centering(control.centering), step=6).advantages


def test_shuffled_turn_scores_leave_the_outcome_terms() -> None:
    episodes = [episode(g, r, [(-r, r), (g, -1), (2, r)][: 2 + r % 2], 0.1 * r - 0.2 * g) for g in range(3) for r in range(4)]
    episodes.append(episode(0, 4, [(-9, 9)], math.nan))
    options = CreditOptions(centering="none")
    summaries = [summarise(e, options) for e in episodes]
    true = step_credit(summaries, options, make_centering(options.centering))
    dealt = step_credit(summaries, CreditOptions(centering="none", shuffle_credit="turn_scores"), make_centering("none"))
    assert dealt.advantages.keys() == true.advantages.keys() and (0, 4) not in dealt.advantages
    outcomes = step_credit(summaries, CreditOptions(alpha=0), make_centering("rollout")).advantages

    def turn_terms(advantages: Mapping[tuple[int, int], tuple[float, ...]]) -> list[float]:
        return sorted(round(x - y, 9) for key, a in advantages.items() for x, y in zip(a, outcomes[key], strict=True))

    assert turn_terms(dealt.advantages) == turn_terms(true.advantages) and dealt.advantages != true.advantages
    assert dealt.outcome_term_std == true.outcome_term_std


def test_shaping_only_where_the_policy_reasons() -> None:
    silent = episode(0, 0, [(0, 0), (0, 0)], 0.5)
    assert summarise(silent, CreditOptions()).reward == 0.5
    shaped = CreditOptions(reasons=True)
    assert summarise(silent, shaped).reward == pytest.approx(0.5 - 0.2 - 0.05)
    broken = episode(0, 0, [(0, 0)], 0.5, reasoning="x", faults=("broken_tags",))
    assert summarise(broken, shaped).reward == pytest.approx(0.45)
    assert summarise(broken, shaped).outcome == 0.5
    cut = episode(0, 0, [(0, 0)], 0.5, reasoning="x", faults=("cut",))
    assert summarise(cut, shaped).reward == 0.5
    assert math.isnan(summarise(episode(0, 0, [], math.nan), shaped).reward)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_updates_take_an_equal_share_of_every_group(updates: int) -> None:
    counts = Counter((g, update_of(episode(g, r, [], 0.0), updates)) for g in range(4) for r in range(8))
    assert set(counts.values()) == {8 // updates}


def test_metrics_count_failures_and_leave_them_out() -> None:
    episodes = [episode(0, 0, [(-5, 5)], 0.5), episode(0, 1, [(5, -5)] * 3, -0.5), episode(0, 2, [(9, 9)], math.nan)]
    options = CreditOptions()
    summaries = [summarise(e, options) for e in episodes]
    metrics = rollout_metrics(summaries, step_credit(summaries, options, make_centering(options.centering)))
    assert metrics["outcome/all"] == metrics["outcome/support"] == 0
    assert (metrics["episodes/valid"], metrics["episodes/failed"], metrics["failed/simulator_reply"]) == (2, 1, 1)
    assert metrics["final_anger/support"] == (55 + 75) / 2
    assert metrics["episodes/turns"] == 2 and metrics["replies/tokens"] == 3
    assert "outcome/charm" not in metrics
    none = rollout_metrics(summaries[2:], step_credit(summaries[2:], options, make_centering(options.centering)))
    assert math.isnan(none["outcome/all"]) and none["credit/groups_without_signal"] == 1


samples_strategy = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 10)).map(
        lambda n: TurnSample(tuple(range(n[0])), tuple(range(50, 50 + n[1])), n[0] / 10)
    ),
    max_size=20,
)


@given(samples_strategy, st.integers(20, 200))
def test_rows_hold_every_sample_once_within_the_budget(samples: list[TurnSample], budget: int) -> None:
    rows = plain_rows(samples, tokens_per_row=budget, pad_id=0)
    assert sorted(k for row in rows for k in row.sample.unique().tolist()) == list(range(len(samples)))
    for row in rows:
        chosen, width = row.sample.unique_consecutive().tolist(), row.input_ids.shape[1]
        assert row.input_ids.numel() <= budget or len(chosen) == 1
        assert row.attention_mask is not None and len(row.at) == int((row.labels >= 0).sum())
        for b, k in enumerate(chosen):
            sample, n, own = samples[k], len(samples[k]), row.sample == k
            assert row.input_ids[b, :n].tolist() == [*sample.prompt_ids, *sample.completion_ids]
            assert row.attention_mask[b].tolist() == [1] * n + [0] * (width - n)
            assert (row.at[own] - b * width).tolist() == list(range(len(sample.prompt_ids) - 1, n - 1))
            assert row.labels.flatten()[row.at[own]].tolist() == list(sample.completion_ids)
            assert row.advantages[own].tolist() == pytest.approx([sample.advantage] * len(sample.completion_ids))


def test_a_dummy_row_trains_nothing() -> None:
    row = dummy_row(3)
    assert not len(row.at) and (row.labels >= 0).any()


def test_rows_do_not_mix_samples_with_and_without_old_logprobs() -> None:
    with pytest.raises(ValueError, match="some samples have old log-probabilities and others do not"):
        plain_rows([TurnSample((1,), (2,), 0.0), TurnSample((1,), (2,), 0.0, (-1.0,))], tokens_per_row=99, pad_id=0)


def test_the_loss_by_hand() -> None:
    # Four trained tokens with A = +1, +1, -1, -1 and ratios 1.5, 0.5, 1.5, 0.5; clip 0.2.
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    sums = token_sums(
        logprobs,
        torch.full((4,), 2.0),
        torch.zeros(4),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        clip=0.2,
        entropy_bonus=0.01,
    )
    # min(1.5, 1.2) + min(0.5, 0.8) + min(-1.5, -1.2) + min(-0.5, -0.8) = 1.2 + 0.5 - 1.5 - 0.8, entropy 4 x 0.02
    assert sums.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) - 0.08)
    assert int(sums.clipped) == 2
    assert float(sums.entropy) == 8 and float(sums.ratio) == pytest.approx(4.0)
    sums.loss.backward()
    # Clipped tokens pass nothing on; the others -A * ratio.
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0, -0.5, 1.5, 0])


def test_a_dual_clip_bounds_what_a_likely_token_costs() -> None:
    # Ratios 5 and 2 with A = -1, 5 with A = +1; dual clip 3.
    logprobs = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0])

    def sums(dual_clip: float | None) -> TokenSums:
        return token_sums(logprobs, torch.zeros(3), torch.zeros(3), advantages, clip=0.2, entropy_bonus=0.0, dual_clip=dual_clip)

    assert sums(None).loss.item() == pytest.approx(5 + 2 - 1.2) and int(sums(None).clipped) == 1
    assert sums(3.0).loss.item() == pytest.approx(3 + 2 - 1.2) and int(sums(3.0).clipped) == 2
    sums(3.0).loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0, 2, 0])


def test_turns_that_weigh_alike() -> None:
    """Samples of one and three tokens, in a row that has them in another order."""
    samples = [TurnSample((1, 2), (3,), 1.0), TurnSample((1, 2), (4, 5, 6), -1.0)]
    (row,) = plain_rows(samples, tokens_per_row=99, pad_id=0)
    by_sample = dict(zip(row.sample.tolist(), row.turn_weights.tolist(), strict=True))
    assert by_sample == pytest.approx({0: 1.0, 1: 1 / 3})
    logprobs = torch.zeros(4, requires_grad=True)
    sums = token_sums(logprobs, torch.zeros(4), None, row.advantages, clip=0.2, entropy_bonus=0.0, weights=row.turn_weights)
    assert float(sums.weight) == pytest.approx(2.0) and sums.loss.item() == pytest.approx(0.0)
    assert dummy_row(0).turn_weights.shape == (0,)


@given(
    st.lists(st.lists(st.tuples(st.floats(-0.1, 0.1), st.integers(1, 30)), min_size=1, max_size=6), min_size=2, max_size=4),
    st.sampled_from(["turn", "token"]),
)
def test_the_turn_term_sums_to_zero_over_what_the_loss_weighs(
    rollouts: list[list[tuple[float, int]]], weights: Literal["turn", "token"]
) -> None:
    """Centered with the weights of the loss, credit moves between the turns of a rollout and is neither made nor lost."""
    scores = [[score for score, _ in rollout] for rollout in rollouts]
    lengths = [[length for _, length in rollout] for rollout in rollouts]
    zeros = [0.0] * len(rollouts)
    advantages = turn_advantages(zeros, [0] * len(rollouts), scores, center_weights=None if weights == "turn" else lengths)
    for turns, sizes in zip(advantages, lengths, strict=True):
        samples = [TurnSample((1,), (2,) * n, float(a)) for a, n in zip(turns, sizes, strict=True)]
        total = 0.0
        for row in plain_rows(samples, tokens_per_row=16, pad_id=0):
            w = row.turn_weights if weights == "turn" else torch.ones(len(row.at))
            total += float((w * row.advantages).sum())
        assert total == pytest.approx(0.0, abs=1e-4)


def test_importance_weights_by_hand() -> None:
    # Two turns: tokens 0 and 1, and token 2. Ratios trainer / engine 2, 1.2 and 0.5.
    old, sampled = torch.zeros(3), -torch.tensor([2.0, 1.2, 0.5]).log()
    assert importance_weights(old, sampled, bound=1.5).tolist() == pytest.approx([1.5, 1.2, 0.5])
    by_turn = importance_weights(old, sampled, bound=3.0, sample=torch.tensor([4, 4, 1]))
    assert by_turn.tolist() == pytest.approx([2.4, 2.4, 0.5])
    advantages, logprobs = torch.tensor([1.0, -1.0, 2.0]), torch.zeros(3, requires_grad=True)
    sums = token_sums(
        logprobs, torch.ones(3), None, advantages, clip=0.2, entropy_bonus=0.0, sampled_logprobs=sampled, importance_max=1.5
    )
    sums.loss.backward()
    # The gradient of a token is -v A: the weight itself is constant.
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-1.5, 1.2, -1.0])
    assert float(sums.importance) == pytest.approx(3.2) and int(sums.truncated) == 1
    assert float(sums.gap) == pytest.approx(math.log(2) + math.log(1.2) + math.log(2))


def test_importance_weights_of_episodes_make_the_engines_samples_those_of_the_policy() -> None:
    """By enumeration of all episodes of two turns with two tokens each: E_q[w f] = E_p[f], without a bound that is reached."""
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.ones(3), size=4)) for _ in range(2))  # (position, token), independent positions
    value = rng.normal(size=(3,) * 4)
    found = expected = turns_only = 0.0
    for path in itertools.product(range(3), repeat=4):
        log_p, log_q = ([float(table[k, token]) for k, token in enumerate(path)] for table in (p, q))
        replies = [
            Turn((), Completion(path[a:b], tuple(log_q[a:b]), "stop"), "", None, (), "", 0.0, False) for a, b in ((0, 2), (2, 4))
        ]
        one = Episode("s", "t", 1, 0, 0, tuple(replies), 1.0)
        samples = turn_samples([one], {(0, 0): (1.0, 1.0)})
        current = [np.array(log_p[:2], np.float32), np.array(log_p[2:], np.float32)]
        weights = episode_weights([one], samples, current, bound=1e6)
        assert weights[0] == weights[1] == pytest.approx(math.exp(sum(log_p) - sum(log_q)), rel=1e-5)
        found += math.exp(sum(log_q)) * weights[0] * value[path]
        expected += math.exp(sum(log_p)) * value[path]
        turns_only += math.exp(sum(log_q)) * value[path]
    assert found == pytest.approx(expected, rel=1e-5) and abs(turns_only - expected) > 0.01
    assert episode_weights([one], samples, [c + 9 for c in current], bound=2.0) == pytest.approx([2.0, 2.0])


def test_a_token_that_truncation_removes_has_no_weight() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    sampled, turns = torch.tensor([-1.2, torch.inf, -1.0]), torch.tensor([4, 4, 7])
    for by_turn, gradient in ((None, [-math.exp(0.2), 0.0, -1.0]), (turns, [0.0, 0.0, -1.0])):
        logprobs.grad = None
        sums = token_sums(
            logprobs, torch.zeros(3), None, torch.ones(3), clip=0.2, entropy_bonus=0.0, sampled_logprobs=sampled, by_turn=by_turn
        )
        sums.loss.backward()
        assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx(gradient)
        assert float(sums.gap) == pytest.approx(0.2) and int(sums.removed) == 1
    assert episode_weights(
        [Episode("s", "t", 1, 0, 0, (Turn((1,), Completion((5,), (-1.0,), "stop"), "", None, (), "", 0.0, True),), 1.0)],
        [TurnSample([1], [5], 1.0, None, [math.inf])],  # type: ignore[arg-type]
        [np.array([-1.0], np.float32)],
        bound=3.0,
    ) == [0.0]


def test_without_old_logprobs_the_gradient_is_that_of_logprobs() -> None:
    logprobs = torch.tensor([-3.0, -1.0], requires_grad=True)
    sums = token_sums(logprobs, torch.zeros(2), None, torch.tensor([2.0, -1.0]), clip=0.2, entropy_bonus=0.0)
    sums.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2.0, 1.0] and sums.loss.item() == -1.0


def test_the_kl_term_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    reference, nothing = torch.tensor([-1.5, -1.0]), torch.zeros(2)
    sums = token_sums(logprobs, nothing, None, nothing, clip=0.2, entropy_bonus=0.0, reference=reference, kl_weight=0.3)
    # exp(ref - logp) - (ref - logp) - 1 with ref - logp = -0.5 and 1
    expected = (math.exp(-0.5) + 0.5 - 1) + (math.e - 1 - 1)
    assert float(sums.kl) == pytest.approx(expected) and sums.loss.item() == pytest.approx(0.3 * expected)
    sums.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.3 * (1 - math.exp(-0.5)), 0.3 * (1 - math.e)])


def test_fsdp2_sums_gradients_and_gives_logprobs_in_float32(tmp_path: Path) -> None:
    """Left to itself accelerate does both in bfloat16."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    from ctcgrpo.run.settings import fsdp2_precision

    init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(torch.nn.Linear(8, 8, bias=False), mesh=mesh, mp_policy=fsdp2_precision())
        seen = []
        model.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
        for _ in range(2):
            out = model(torch.ones(2, 8))
            out.sum().backward()
        assert out.dtype == torch.float32 and model.weight.grad.dtype == torch.float32 and torch.bfloat16 in seen
    finally:
        destroy_process_group()
