"""Sketches of gradients against the gradients themselves."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from ctcgrpo.errors import PolicyError
from ctcgrpo.model.sketch import DIRECTIONS, GradientSketch
from ctcgrpo.types import TurnSample
from tests.unit.test_python_api import trainer


def samples(n: int, vocabulary: int, seed: int = 0) -> list[TurnSample]:
    """Of different lengths, some with a common beginning."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, vocabulary, size=9)
    made = []
    for k in range(n):
        prompt = np.concatenate([common[: 9 * (k % 2)], rng.integers(0, vocabulary, size=rng.integers(2, 12))])
        made.append(TurnSample(prompt, rng.integers(0, vocabulary, size=rng.integers(1, 9)), advantage=1.0))
    return made


@pytest.fixture(scope="module", params=["all weights", "lora"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    parts: dict[str, Any] = {}
    if request.param == "lora":
        parts["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    found = trainer(tmp_path_factory.mktemp("sketch"), max_steps=1, tokens_per_row=64, **parts)
    if request.param == "lora":
        torch.manual_seed(0)
        for name, p in found.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
    return found


def exact(made: Any, of: list[TurnSample]) -> Iterator[dict[torch.nn.Module, torch.Tensor]]:
    """For each sample the gradient of its summed log-probability in every trainable linear layer, one backward pass each."""
    model = made.accelerator.unwrap_model(made.model)
    layers = GradientSketch(model)._layers
    for sample in of:
        model.zero_grad()
        [row] = made._plan([sample], packed=False).rows
        made._score(model, row)[0].sum().backward()
        yield {layer: layer.weight.grad.clone() for layer in layers}
    model.zero_grad()


@pytest.mark.parametrize("weights", ["token", "turn"])
def test_a_sketch_is_the_projected_gradient(made: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digits of float32, for each sample by itself, whatever stands beside it in a row."""
    monkeypatch.setattr(made.args, "loss_weights", weights)
    of = samples(7, made.model.config.vocab_size)
    model = made.accelerator.unwrap_model(made.model)
    sketch = GradientSketch(model, seed=made.args.seed)
    found = made.sketches(of)
    assert found.shape == (7, sketch.size) and sketch.size == len(sketch._layers) * DIRECTIONS**2
    for sample, gradients, got in zip(of, exact(made, of), found, strict=True):
        parts = [
            inputs.T @ gradients[layer].T @ outputs
            for layer, (inputs, outputs) in zip(sketch._layers, sketch._projections, strict=True)
        ]
        expected = torch.cat([part.flatten() for part in parts]).numpy()
        assert np.abs(expected).max() > 1e-3
        assert got * (len(sample.completion_ids) if weights == "turn" else 1) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_inner_products_are_those_of_the_gradients(made: Any) -> None:
    of = samples(6, made.model.config.vocab_size, seed=1)
    found = made.sketches(of).astype(np.float64)
    flat = np.array([torch.cat([g.flatten() for g in gradients.values()]).double().numpy() for gradients in exact(made, of)])
    true, sketched = flat @ flat.T, found @ found.T
    scale = np.sqrt(np.outer(np.diag(true), np.diag(true)))
    assert np.abs(sketched - true).max() < 0.35 * scale.max() and np.abs((sketched - true) / scale).mean() < 0.15


def test_checkpointing_changes_nothing(made: Any) -> None:
    of = samples(5, made.model.config.vocab_size, seed=2)
    plain = made.sketches(of)
    model = made.accelerator.unwrap_model(made.model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        assert made.sketches(of) == pytest.approx(plain, abs=1e-5)
    finally:
        model.gradient_checkpointing_disable()


def test_without_trainable_layers_there_is_nothing_to_sketch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(PolicyError, match="Sequential has no trainable linear layer"):
        GradientSketch(model)


def test_hooks_are_gone_afterwards(made: Any) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in made.model.modules())

    before = hooks()
    made.sketches(samples(2, made.model.config.vocab_size))
    assert hooks() == before
