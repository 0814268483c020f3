"""NaN never trains: the run stops before the optimizer's step, keeps the checkpoint before it, and says what happened."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctcgrpo.errors import PolicyError, TrainingDiverged
from ctcgrpo.model.finite import nonfinite_gradient, nonfinite_weight, refuse_nonfinite
from ctcgrpo.training import update as update_module
from ctcgrpo.training.loss import token_sums
from ctcgrpo.util.files import is_complete
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY


def metrics(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_weights_that_an_update_makes_infinite_are_neither_saved_nor_sampled_from(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "training.max_steps=3", "training.updates_per_step=1"]
    code, _, err = ctcgrpo(*command, "training.learning_rate=1e38", "training.max_grad_norm=0", "training.weight_decay=1")
    assert code == 11, err
    assert "after the optimizer step of step 1 the policy's weights are not finite (" in err
    assert "learning_rate = 1e+38 is too high" in err and "set max_grad_norm (it is 0; 1 is usual)" in err
    folder = tmp_path / "tiny"
    assert not list(folder.glob("checkpoint-*/COMPLETE")) and not (folder / "final").exists()
    assert [line["step"] for line in metrics(folder)] == [1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_checkpoint_before_it(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """From the fifth row on, the loss (or what flows back from it) is NaN."""
    rows = 0

    def sums(logprobs: torch.Tensor, *args: Any, **options: Any) -> Any:
        nonlocal rows
        rows += 1
        if rows > 4 and where == "loss":
            logprobs = logprobs * math.nan
        elif rows > 4:
            logprobs.register_hook(lambda gradient: gradient * math.nan)
        return token_sums(logprobs, *args, **options)

    monkeypatch.setattr(update_module, "token_sums", sums)
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "training.max_steps=9", "training.save_every=1"]
    code, _, err = ctcgrpo(*command, "training.updates_per_step=1")
    assert code == 11, err
    assert {"loss": "the loss is not finite", "gradient": "gradients are not finite (model."}[where] in err
    folder = tmp_path / "tiny"
    (last,) = [line["step"] for line in metrics(folder)][-1:]
    newest = folder / f"checkpoint-{last}"
    assert f"step {last + 1}: " in err and f"The last good checkpoint is {newest}" in err
    assert "policy.model=" in err and is_complete(newest) and not (folder / f"checkpoint-{last + 1}").exists()
    assert nonfinite_in(newest) == []

    monkeypatch.undo()  # what the message says to do works
    code, _, err = ctcgrpo(*command[:-2], "training.max_steps=1", f"policy.model={newest}", "run.name=again")
    assert code == 0, err


def nonfinite_in(folder: Path) -> list[str]:
    weights = load_file(folder / "model.safetensors")
    return [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]


def test_a_policy_with_weights_that_are_not_finite_is_refused(ctcgrpo: Command, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", f"policy.model={broken}")
    assert code == 4 and "its weights are not finite (model.norm.weight): the files are damaged" in err
    assert not list((tmp_path / "tiny" / "traces").glob("*.jsonl"))


def test_what_is_finite() -> None:
    model = torch.nn.Linear(2, 2)
    assert nonfinite_weight(model) is None
    refuse_nonfinite(model, "fine")
    for number in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.bias[1] = number
        assert nonfinite_weight(model) == "bias"
        with pytest.raises(PolicyError, match=r"model 'odd': its weights are not finite \(bias\)"):
            refuse_nonfinite(model, "odd")


def test_gradients_whose_norm_overflows_are_not_finite() -> None:
    """Clipping would scale them to nothing without a word."""
    model = torch.nn.Linear(4, 4)
    model.weight.grad = torch.full_like(model.weight, 1e30)
    assert nonfinite_gradient(model) == "weight"
    model.weight.grad = torch.ones_like(model.weight)
    assert nonfinite_gradient(model) is None


def test_a_policy_that_says_nothing_is_told_of(ctcgrpo: Command, tiny: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(tiny, silent)
    weights = load_file(silent / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    table[:] = 0.01 * table.abs() + 0.01  # states are positive, so the largest row wins
    table[2] = 40 * torch.ones_like(table[2])  # <|im_end|>
    weights["model.norm.weight"] = weights["model.norm.weight"].abs()
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = 0 * weights[name]
    save_file(weights, silent / "model.safetensors", metadata={"format": "pt"})
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", f"policy.model={silent}", "training.max_steps=1"]
    code, out, err = ctcgrpo(*command, "training.updates_per_step=1")
    assert code == 0, err
    (line,) = metrics(tmp_path / "tiny")
    assert line["replies/empty"] == 1 and "step 1: every reply of the policy is empty" in " ".join(out.split())


def test_divergence_is_no_pause() -> None:
    """It must not be saved as a run that was told to stop is."""
    from ctcgrpo.errors import RunPaused

    assert not issubclass(TrainingDiverged, RunPaused)
