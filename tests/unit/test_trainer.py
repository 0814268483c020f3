"""The update: its gradients are the formula's, however samples are cut into rows, and nothing that failed enters them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from ctcgrpo import credit
from ctcgrpo.errors import PolicyError
from ctcgrpo.model.tree_attention import SegmentLayout
from ctcgrpo.options import Importance, LossWeights, Packing
from ctcgrpo.types import Failure
from tests import sameness


@pytest.fixture(scope="module")
def plain(tiny: Path) -> sameness.Outcome:
    return sameness.run(str(tiny), tokens_per_row=10_000, packing="none")


def test_the_comparison_covers_both_sides_of_the_clip_and_a_failure(tiny: Path) -> None:
    episodes = sameness.fixed_episodes(str(tiny))
    assert sum(e.failure is not None for e in episodes) == 1
    assert len({len(e.turns) for e in episodes}) > 2
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    low = high = 0
    for turn in episodes[0].turns:
        now, _ = sameness.naive_logprobs(model, turn.prompt_ids, turn.completion.token_ids)
        ratios = (now - torch.tensor(turn.completion.logprobs)).exp()
        low, high = low + int((ratios < 0.8).sum()), high + int((ratios > 1.2).sum())
    assert low and high


@pytest.mark.parametrize("loss_weights", ["token", "turn"])
def test_gradients_are_those_of_the_formula_turn_by_turn(tiny: Path, plain: sameness.Outcome, loss_weights: LossWeights) -> None:
    if loss_weights == "turn":
        plain = sameness.run(str(tiny), tokens_per_row=300, packing="segments", loss_weights=loss_weights)
    episodes = sameness.fixed_episodes(str(tiny))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").train()
    outcomes, groups = [e.outcome for e in episodes], [e.group for e in episodes]
    scores = [[t.reward or 0.0 for t in e.turns] for e in episodes]
    advantages = credit.turn_advantages(outcomes, groups, scores)
    valid = [(e, a) for e, a in zip(episodes, advantages, strict=True) if e.failure is None]
    tokens = sum(len(t.completion.token_ids) for e, _ in valid for t in e.turns)
    turns = sum(len(e.turns) for e, _ in valid)
    for episode, turn_advantages in valid:
        for turn, advantage in zip(episode.turns, turn_advantages, strict=True):
            logp, entropy = sameness.naive_logprobs(model, turn.prompt_ids, turn.completion.token_ids)
            ratio = (logp - torch.tensor(turn.completion.logprobs)).exp()
            clipped = ratio.clamp(1 - sameness.CLIP, 1 + sameness.CLIP)
            objective = torch.minimum(ratio * advantage, clipped * advantage) + sameness.ENTROPY_BONUS * entropy
            (-(objective.sum() / tokens if loss_weights == "token" else objective.mean() / turns)).backward()
    for name, parameter in model.named_parameters():
        if name in plain.gradients:
            apart = (parameter.grad - plain.gradients[name]).norm() / parameter.grad.norm()
            assert apart < 1e-5, name
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert plain.norm == pytest.approx(float(norm), rel=1e-5)


def truncated_logprobs(
    model: Any, prompt: Sequence[int], reply: Sequence[int], *, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """As transformers truncates."""
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1] / sameness.TEMPERATURE
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)  # type: ignore[arg-type]
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
    return torch.log_softmax(scores, -1)[range(len(reply)), list(reply)]


@pytest.mark.parametrize(
    ("level", "packing", "truncation"),
    [
        ("token", "segments", {}),
        ("turn", "segments", {}),
        ("turn", "none", {}),
        ("episode", "segments", {}),
        ("token", "segments", {"top_k": 800}),
        ("token", "none", {"top_k": 900, "top_p": 0.9}),
        ("turn", "segments", {"top_p": 0.98}),
    ],
)
def test_gradients_with_importance_weights_are_those_of_the_formula(
    tiny: Path, level: Importance, packing: Packing, truncation: dict[str, Any]
) -> None:
    bound = 1.1
    found = sameness.run(
        str(tiny),
        tokens_per_row=300,
        packing=packing,
        importance=level,
        importance_max=bound,
        old_logprobs="recomputed",
        **truncation,
    )
    episodes = sameness.fixed_episodes(str(tiny))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").train()
    advantages = credit.turn_advantages(
        [e.outcome for e in episodes], [e.group for e in episodes], [[t.reward or 0.0 for t in e.turns] for e in episodes]
    )
    valid = [(e, a) for e, a in zip(episodes, advantages, strict=True) if e.failure is None]
    tokens = sum(len(t.completion.token_ids) for e, _ in valid for t in e.turns)
    truncated = removed = 0
    for episode, turn_advantages in valid:
        scored = [sameness.naive_logprobs(model, turn.prompt_ids, turn.completion.token_ids) for turn in episode.turns]
        logs = []
        for turn in episode.turns:
            now = truncated_logprobs(model, turn.prompt_ids, turn.completion.token_ids, **truncation)
            logs.append(now - torch.tensor(turn.completion.logprobs))
            removed += int(now.isinf().sum())
        whole = torch.stack([log.sum() for log in logs]).sum()
        for (logp, entropy), log, advantage in zip(scored, logs, turn_advantages, strict=True):
            exponent = {"token": log, "turn": log.sum(), "episode": whole}[level]
            v = exponent.exp().clamp(max=bound)
            truncated += int((v == bound).sum())
            (-(v * advantage * logp + sameness.ENTROPY_BONUS * entropy).sum() / tokens).backward()
    assert truncated and bool(removed) == bool(truncation)
    for name, parameter in model.named_parameters():
        if name in found.gradients:
            apart = (parameter.grad - found.gradients[name]).norm() / parameter.grad.norm()
            assert apart < 1e-5, name


def test_a_large_gap_between_engine_and_trainer_is_a_warning(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def logged(name: str, **config: Any) -> list[dict[str, float]]:
        trainer = sameness.build_trainer(str(tiny), str(tmp_path / name), old_logprobs="recomputed", **config)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "trained_tokens" in entry]

    uncorrected = logged("none")[0]  # auto: the engine is transformers
    assert 0.1 < uncorrected["importance/gap"] < 0.25 and "importance/mean" not in uncorrected
    first = logged("token", importance="token", importance_max=1.2)[0]
    # The fixed episodes have ratios of 0.7 to 1.4, uniformly.
    assert 0.1 < first["importance/gap"] < 0.25 and 0.9 < first["importance/mean"] < 1.05
    assert 0.1 < first["importance/truncated"] < 0.4
    assert "step 1: log-probabilities of the engine and of the trainer differ by" in caplog.text
    assert 1 < logged("episode", importance="episode", updates=2)[0]["importance/mean"] <= 3  # products over some 80 tokens


def test_without_importance_weights_what_top_k_keeps_is_computed_for_a_few_samples(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several updates score all samples again; another pass over all of them would be for a metric alone."""
    monkeypatch.setattr("ctcgrpo.training.update._COMPARED_TOKENS", 200)
    trainer = sameness.build_trainer(str(tiny), str(tmp_path), updates=2, top_k=2000)
    scored: dict[str, list[int]] = {"logprobs": [], "log_kept": []}
    for name, seen in scored.items():
        plain = getattr(trainer, name)
        monkeypatch.setattr(
            trainer, name, lambda m, some, plain=plain, seen=seen, **k: (seen.append(len(some)), plain(m, some, **k))[1]
        )
    trainer.train()
    assert 0 < max(scored["log_kept"]) < max(scored["logprobs"]) and len(scored["log_kept"]) == 2
    gaps = [entry["logprob_gap"] for entry in trainer.state.log_history if "logprob_gap" in entry]
    assert len(gaps) == 2 and np.isfinite(gaps).all()


def test_a_total_far_from_the_tokens_of_a_step_is_a_warning(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def logged(total: float | None, weights: LossWeights) -> dict[str, float]:
        caplog.clear()
        trainer = sameness.build_trainer(str(tiny), str(tmp_path), loss_total=total, loss_weights=weights)
        trainer.train()
        return next(entry for entry in trainer.state.log_history if "trained_tokens" in entry)

    turns = logged(None, "turn")["trained_turns"]
    assert turns < logged(2 * turns, "turn")["trained_tokens"] and "loss_total" not in caplog.text
    logged(100 * turns, "turn")
    text = f"loss_total is {100 * turns:g}, and this step has {turns:g} trained turns; expected a number near that"
    assert caplog.text.count("loss_total is") == 1 and text in caplog.text and "0.01 times as large" in caplog.text


@pytest.mark.parametrize(
    ("packing", "tokens_per_row", "rows"),
    [("none", 1500, 3), ("segments", 10_000, 1), ("segments", 300, 5), ("auto", 90, 20)],
)
def test_cutting_into_rows_and_sharing_prefixes_change_nothing(
    tiny: Path, plain: sameness.Outcome, packing: Packing, tokens_per_row: int, rows: int
) -> None:
    cut = sameness.run(str(tiny), tokens_per_row=tokens_per_row, packing=packing)
    assert (plain.rows, cut.rows) == (1, rows)
    assert sameness.is_same(plain, cut), sameness.difference(plain, cut)
    for a, b in zip(plain.logprobs["0"], cut.logprobs["0"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_sharing_prefixes_changes_nothing_under_checkpointing_and_lora(tiny: Path, lora: bool) -> None:
    def run(packing: Packing, checkpointing: bool) -> sameness.Outcome:
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        return sameness.run(str(tiny), packing=packing, peft_config=adapter, gradient_checkpointing=checkpointing)

    plain, packed = run("none", False), run("segments", True)
    assert all(("lora" in name) == lora for name in plain.gradients) and plain.gradients
    assert sameness.is_same(plain, packed), sameness.difference(plain, packed)


def test_a_layout_that_sees_otherwise_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = sameness.build_trainer(str(tiny), str(tmp_path))
    plain = SegmentLayout._masks_of
    monkeypatch.setattr(SegmentLayout, "_masks_of", lambda self, window, dtype: plain(self, 1, dtype))
    with pytest.raises(PolicyError, match=r"packing = 'auto', segments.*beyond 0.025; set packing to 'none'"):
        trainer.train()


def test_a_wrong_position_is_noticed(tiny: Path, plain: sameness.Outcome) -> None:
    for packing in ("none", "segments"):
        wrong = sameness.run(str(tiny), tokens_per_row=10_000, packing=packing, shift=True)
        assert not sameness.is_same(plain, wrong)


def test_a_step_without_comparable_episodes_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    trainer = sameness.build_trainer(str(tiny), str(tmp_path), max_failed=1.0, weight_decay=0.1, max_grad_norm=1.0)
    # One valid rollout in each group: nothing to compare with.
    lone = [
        e if e.rollout == 0 else replace(e, outcome=float("nan"), failure=Failure("simulator_transport", "gone"))
        for e in sameness.fixed_episodes(str(tiny))
    ]
    trainer.episodes = lone
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == sameness.STEPS
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_several_updates_keep_the_old_logprobs_of_before_the_first(tiny: Path, tmp_path: Path) -> None:
    trainer = sameness.build_trainer(str(tiny), str(tmp_path), updates=2)
    episodes = sameness.fixed_episodes(str(tiny))
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    parts = trainer._new_batch(trainer._take_played(1, [0] * len(episodes)))
    replies = [turn for e in episodes for turn in e.turns]
    assert sum(map(len, parts)) == sum(len(e.turns) for e in episodes if e.failure is None)
    for sample in (sample for part in parts for sample in part):
        prompt, reply = tuple(sample.prompt_ids.tolist()), tuple(sample.completion_ids.tolist())
        assert any(reply == turn.completion.token_ids for turn in replies)
        now, _ = sameness.naive_logprobs(model, prompt, reply)
        assert sample.old_logprobs is not None and sample.old_logprobs.tolist() == pytest.approx(now.tolist(), abs=1e-5)
    trainer.train()
    ratios = [entry["ratio"] for entry in trainer.state.log_history if "ratio" in entry]
    # The first update of a batch is on policy; the second meets a policy that has moved.
    assert ratios[0] == pytest.approx(1.0, abs=1e-5) and ratios[1] != pytest.approx(1.0, abs=1e-4)


def test_the_scene_baseline_survives_a_resume(tiny: Path, tmp_path: Path) -> None:
    def run(folder: str, resume: bool = False, **config: Any) -> Any:
        trainer = sameness.build_trainer(str(tiny), folder, centering="scene", save_strategy="steps", save_steps=1, **config)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1" if resume else None)
        return trainer.centering.state_dict(), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    whole, weights = run(str(tmp_path / "whole"))
    assert whole["weights"]["first"][0] == 2 * sameness.GROUP_SIZE  # group 0, two steps, nobody failed
    resumed, again = run(str(tmp_path / "whole"), resume=True)
    assert resumed == whole
    assert all(torch.equal(weights[n], again[n]) for n in weights)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")])
def test_the_kl_term_is_to_the_policy_before_training(tiny: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    """A second model, or the policy without its adapter: of both the first update is no distance away, the second is."""
    trainer = sameness.build_trainer(str(tiny), str(tmp_path), peft_config=lora, beta=0.5, learning_rate=1e-2)
    assert (trainer.ref_model is None) == (lora is not None)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == pytest.approx(0.0, abs=1e-5) and second > 1e-4
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora" in n} if lora else len(moved) == len(before)
