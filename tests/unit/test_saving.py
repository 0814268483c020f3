"""How long a run takes to save, what a launcher gives it, and that documented commands give it enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ctcgrpo.model.shapes import published_shapes
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.saving import checkpoint_bytes, notice_seconds, save_seconds, too_little_time
from ctcgrpo.run.startup import SHUTDOWN_TIMEOUT
from tests.conftest import ROOT, Command
from tests.unit.test_run import FAST, TINY

SIZES = {"qwen3_8b": 115e9, "qwen3_32b": 459e9, "qwen3_8b_lora": 1.05e9}
"""By recipe: bfloat16 weights and three float32 numbers a parameter, or an adapter of rank 32 with its moments."""


def size_of(name: str) -> float:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    shape, lora = published_shapes()[recipe.policy.model], recipe.policy.lora
    return checkpoint_bytes(recipe, shape.parameters if lora is None else shape.lora_parameters(lora.rank))


@pytest.mark.parametrize("name", SIZES)
def test_what_saving_takes(name: str) -> None:
    size = size_of(name)
    assert size == pytest.approx(SIZES[name], rel=0.01)
    assert save_seconds(size) == size / 0.5e9
    notice = notice_seconds(size)
    assert notice % 60 == 0 and 0 <= notice - 300 - save_seconds(size) < 60


def test_a_launcher_that_kills_too_early_is_noticed() -> None:
    large, launched = size_of("qwen3_8b"), {"TORCHELASTIC_RUN_ID": "none"}
    assert too_little_time(large, {}) is None  # nobody kills it
    assert too_little_time(1e6, launched) is None
    assert too_little_time(large, launched | {SHUTDOWN_TIMEOUT: "3600"}) is None
    warning = too_little_time(large, launched)
    assert warning is not None
    assert "kills processes 30 s after" in warning and "takes about 244 s: 107 GiB" in warning and "=3600" in warning
    assert "kills processes 100 s after" in str(too_little_time(large, launched | {SHUTDOWN_TIMEOUT: "100"}))


def test_a_run_warns_at_its_start(ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv(SHUTDOWN_TIMEOUT, "10")
    code, out, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}")
    assert code == 0, err
    assert "warning: the launcher kills processes 10 s after Ctrl-C or SIGTERM" in out


@pytest.mark.parametrize("file", [*(ROOT / "recipes").glob("*.yaml"), ROOT / "README.md"], ids=lambda f: f.name)
def test_documented_commands_of_several_processes_give_enough_time(file: Path) -> None:
    text = file.read_text()
    several = re.search(r"(accelerate launch|torchrun) .*(one_node|nodes|fsdp2)\.yaml", text)
    assert (SHUTDOWN_TIMEOUT in text) == bool(several)


def test_slurm_tells_the_largest_recipe_in_time() -> None:
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    told = re.search(r"#SBATCH --signal=B:TERM@(\d+)", script)
    assert told is not None and int(told[1]) >= notice_seconds(size_of("qwen3_32b"))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_commands_for_one_gpu_name_it(file: Path) -> None:
    """A process that sees several is refused."""
    for line in file.read_text().splitlines():
        assert "one_gpu.yaml" not in line or "CUDA_VISIBLE_DEVICES=0 accelerate launch" in line
