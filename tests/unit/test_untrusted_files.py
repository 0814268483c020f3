"""Model folders, checkpoints and names from others: errors by name, and no code of theirs runs."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import CtcGrpoError, OutputError, PolicyError, ScenarioError
from ctcgrpo.factory.storage import load_splits, save_dataset
from ctcgrpo.policy.chat_template import ChatTemplate
from ctcgrpo.policy.hub import hub_reason
from ctcgrpo.policy.loading import load_config, load_tokenizer, loading_weights, stop_ids
from ctcgrpo.run.folders import check_model, require_folder
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.train import train
from ctcgrpo.training.checkpoint_pickles import weights_only
from ctcgrpo.util.files import mark_complete
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY

_SCENE = "credit.centering=scene"
"""A centering with a state in the checkpoint."""


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def ends(model: str) -> frozenset[int]:
    return stop_ids(model, load_tokenizer(model))


@pytest.mark.parametrize(
    ("file", "text", "load"),
    [
        ("config.json", "[]", load_config),
        ("config.json", '{"model_type": "qwen3", "hidden_size": "big"}', load_config),
        ("config.json", '{"model_type": ["qwen3"]}', load_config),
        ("tokenizer.json", "[]", load_tokenizer),
        ("tokenizer.json", "{", load_tokenizer),
        ("generation_config.json", '{"eos_token_id": [1', ends),
        ("generation_config.json", "[]", ends),
        ("generation_config.json", '{"eos_token_id": [[1]]}', ends),
    ],
)
def test_files_of_another_shape_are_named(model: Path, file: str, text: str, load: Callable[[str], Any]) -> None:
    (model / file).write_text(text)
    with pytest.raises(PolicyError, match=f"model '{model}'.*{file.split('.')[0]}"):
        load(str(model))


def test_a_number_out_of_range_in_a_tokenizer_is_named(model: Path) -> None:
    file = model / "tokenizer.json"
    text = file.read_text().replace('": 300,', '": 1e999,')
    assert "1e999" in text
    file.write_text(text)
    with pytest.raises(PolicyError, match=f"model '{model}': its tokenizer cannot be loaded: number out of range"):
        load_tokenizer(str(model))


def test_weights_that_are_not_the_configurations_are_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({k: v[:1].clone() if "mlp" in k else v for k, v in weights.items()}, model / "model.safetensors")
    with pytest.raises(PolicyError, match=r"policy 'x': the sizes of its weights differ from its config.json"):
        with loading_weights("policy 'x'"):
            AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(RuntimeError, match="a defect"), loading_weights("policy 'x'"):
        raise RuntimeError("a defect")


def test_pickled_weights_run_nothing(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"x": Runs(tmp_path / "ran")}, model / "pytorch_model.bin")
    with pytest.raises(PolicyError, match="its pickled weights contain other objects, and were not loaded"):
        with loading_weights("policy 'x'"):
            AutoModelForCausalLM.from_pretrained(model)
    assert not (tmp_path / "ran").exists()


def test_a_template_that_asks_for_all_memory_is_refused(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ 'x' * 10 ** 15 }}"
    with pytest.raises(PolicyError, match="refuses messages"):
        ChatTemplate(tokenizer).render([{"role": "user", "content": "Hello."}])


def test_what_torch_loads_of_a_checkpoint_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller asks for everything, as DeepSpeed does, and for classes of its own, which DeepSpeed keeps."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    folder = tmp_path / "checkpoint-1"
    (folder / "global_step1").mkdir(parents=True)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"x": Runs(tmp_path / "ran")}, folder / "evil.pt")
    torch.save({"scaler": LossScaler(scale=2.0), "weight": torch.ones(2)}, folder / "good.pt")
    with weights_only(folder):
        assert torch.load(folder / "good.pt", weights_only=False)["scaler"].cur_scale == 2.0
    with pytest.raises(
        OutputError, match=rf"{folder}: a file contains more than weights and numbers .*posix.mkdir.* was not loaded"
    ):
        with weights_only(folder):
            torch.load(folder / "evil.pt", weights_only=False)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    shutil.rmtree(folder / "global_step1")
    with pytest.raises(OutputError, match="LossScaler"), weights_only(folder):  # a run without DeepSpeed has none
        torch.load(folder / "good.pt", weights_only=False)
    torch.load(folder / "evil.pt", weights_only=False)  # so the pickle does run where nobody forbids it
    assert (tmp_path / "ran").exists()


def test_a_run_with_a_pickle_in_its_checkpoint_does_not_resume(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}"]
    assert ctcgrpo(*command, "training.max_steps=1")[0] == 0
    folder = tmp_path / "tiny"
    shutil.rmtree(folder / "final")
    (checkpoint,) = folder.glob("checkpoint-*")
    torch.save({"x": Runs(tmp_path / "ran")}, checkpoint / "scaler.pt")  # not one of this run's: it is not read
    torch.save({"x": Runs(tmp_path / "ran")}, checkpoint / "optimizer.pt")
    mark_complete(checkpoint)
    code, _, err = ctcgrpo(*command, "training.max_steps=2")
    assert code == 6 and f"{checkpoint}: a file contains more than weights" in err and not (tmp_path / "ran").exists()


def with_state(**state: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | {"state": state}).encode()


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("model.safetensors", lambda data: b"", "a file is damaged"),
        ("optimizer.pt", lambda data: data[: len(data) // 2], "a file is damaged"),
        ("rng_state.pth", lambda data: data[:-500], "a file is damaged"),
        ("scheduler.pt", lambda data: b"", "a file is damaged"),
        ("scheduler.pt", lambda data: bytes(len(data)), "a file is damaged"),
        ("scheduler.pt", lambda data: saved({"last_epoch": "x"}), "a file is damaged"),
        ("optimizer.pt", lambda data: saved([1, 2]), "a file is damaged"),
        ("optimizer.pt", lambda data: saved({"state": {}, "param_groups": []}), "a file is damaged"),
        ("rng_state.pth", lambda data: saved({"python": 1}), "a file is damaged"),
        ("config.json", lambda data: bytes(len(data)), "config.json cannot be read"),
        ("config.json", lambda data: b"[]", "config.json: expected a JSON object, got a list"),
        ("trainer_state.json", lambda data: b"[]", "trainer_state.json: cannot be read"),
        ("trainer_state.json", lambda data: b'{"global_step": "1"}', "global_step = '1'"),
        ("credit_state.json", lambda data: b"[" * 9, "credit_state.json cannot be read"),
        ("credit_state.json", lambda data: b"[]", "credit_state.json: expected a JSON object, got a list"),
        (
            "credit_state.json",
            with_state(sums={"a": [math.nan]}, weights={"a": [1]}),
            "cannot be used: centering =",
        ),
        ("credit_state.json", with_state(sums={"a": [1]}, weights={"a": [0]}), "weights must be positive"),
        ("credit_state.json", with_state(sums={"a": [1]}, weights={"a": [1, 2]}), "differ in length"),
        ("credit_state.json", lambda data: b'{"state": null}', "credit_state.json: expected the options of the credit"),
    ],
)
def test_a_damaged_checkpoint_that_is_marked_complete_is_named(
    ctcgrpo: Command, one_step: Path, tmp_path: Path, file: str, damage: Callable[[bytes], bytes], problem: str
) -> None:
    folder = Path(shutil.copytree(one_step, tmp_path / "tiny"))
    checkpoint = max(folder.glob("checkpoint-*"))
    (checkpoint / file).write_bytes(damage((checkpoint / file).read_bytes()))
    mark_complete(checkpoint)
    code, _, err = ctcgrpo("train", TINY, *FAST, _SCENE, f"run.output_dir={tmp_path}", "training.max_steps=2")
    assert code == 6 and problem in err and str(checkpoint) in err, err


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended after a step, without what it ended with."""
    folder = tmp_path_factory.mktemp("one-step")
    train(load_recipe(TINY, [*FAST, _SCENE, f"run.output_dir={folder}", "training.max_steps=1"]))
    shutil.rmtree(folder / "tiny" / "final")
    return folder / "tiny"


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/" + "x" * 300])
def test_names_that_can_be_no_path(name: str) -> None:
    for check, kind in (
        (lambda: check_model(name, "policy.model"), PolicyError),
        (lambda: load_scenarios(name), ScenarioError),
        (lambda: require_folder(Path(name)), OutputError),
    ):
        with pytest.raises(kind) as refused:
            check()
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["", "/", "alone", "a/b/c", "../../etc", "me/x\n", "me/name?token=1"])
def test_names_that_are_no_dataset_of_the_hub(name: str) -> None:
    for call in (lambda: load_splits(f"hf://datasets/{name}"), lambda: save_dataset({}, f"hf://datasets/{name}")):
        with pytest.raises(CtcGrpoError, match="expected hf://datasets/OWNER/NAME"):
            call()


def test_what_the_hub_quotes_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_abcdefghijklmnopqrstuvwxyz0123"
    monkeypatch.setenv("HF_TOKEN", token)
    for said in (f"403 Forbidden: you sent Bearer {token}.\nand more", f"token {token[:7]}...{token[-4:]} is wrong"):
        shown = hub_reason(RuntimeError(said))
        assert token not in shown and token[:7] not in shown and "[key]" in shown and "\n" not in shown
    assert hub_reason(RuntimeError()) == "RuntimeError"
