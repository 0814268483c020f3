"""ZeRO-3, ZeRO-2 and FSDP2 in bfloat16: trained, saved, resumed to the same weights, exported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ctcgrpo.run.export import export
from ctcgrpo.run.recipe_file import load_recipe
from tests.gpu import sharded
from tests.gpu.policy import MIDDLE, policy_folder
from tests.gpu.registry import Figures, Machine, check
from tests.gpu.running import end_group, forked, wait

ROOT = Path(__file__).parent.parent.parent
RESUMED_BOUND = 0.02
"""How far a resumed run may end from the whole one, relative to how far weights moved: kernels sum in another order each time."""


def launch(machine: Machine, program: Sequence[str], *, processes: int, limit: float = 600) -> None:
    """Run `tests.gpu.sharded` with arguments: under torchrun on GPUs, in a fork of this process on a CPU. Raises RuntimeError where
    it fails."""
    if machine.on_cpu:
        pid = forked(lambda: _alone(program))
        try:
            if code := wait(pid, limit):
                raise RuntimeError(f"tests.gpu.sharded {' '.join(program)} ended with {code}")
        finally:
            end_group(pid)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.gpu.sharded", *program]
    done = subprocess.run(command, cwd=ROOT, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{' '.join(program)} on {processes} processes ended with {done.returncode}")


def _alone(program: Sequence[str]) -> None:
    """As torchrun would set it up for one process, on gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    sharded.main([*program, "--gloo"])


def trained_and_resumed(machine: Machine, backend: str) -> Figures:
    base, folder = policy_folder(machine, MIDDLE, torch.float32), machine.scratch / f"run-{backend}"
    processes = min(2, max(1, machine.gpus))
    folder.mkdir()
    overrides = [f"policy.model={base}", f"run.output_dir={machine.scratch}", f"run.name={folder.name}"]
    (folder / "recipe.yaml").write_text(load_recipe(ROOT / "recipes" / "tiny.yaml", overrides).to_yaml())
    program = [backend, str(base), str(folder), "--tokens", "300" if machine.on_cpu else "4000"]
    launch(machine, program, processes=processes)
    written = folder / "weights.pt"
    whole: dict[str, Any] = torch.load(written)
    written.unlink()
    launch(machine, [*program, "--resume"], processes=processes)
    again: dict[str, Any] = torch.load(written)
    ran, resumed = ({k: v for k, v in of.items() if k in ("backend", "steps", "batches")} for of in (whole, again))
    assert ran["steps"] == ran["batches"] == sharded.STEPS and resumed == ran | {"batches": 1}, (ran, resumed)
    first = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    moved = _norm({n: p.float() - first[n].detach() for n, p in whole["weights"].items()})
    apart = _norm({n: p.float() - again["weights"][n].float() for n, p in whole["weights"].items()}) / moved
    assert moved > 0 and apart <= RESUMED_BOUND, f"resumed, it ends {apart:.3g} off; expected at most {RESUMED_BOUND}"
    out = export(folder, machine.scratch / f"export-{backend}", which=str(sharded.STEPS), dtype="float32")
    exported = dict(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).named_parameters())
    rounding = _norm({n: exported[n].detach() - p.float() for n, p in again["weights"].items()}) / _norm(exported)
    assert exported.keys() == again["weights"].keys() and rounding <= 2**-8, f"the export is {rounding:.3g} off"
    return {"ran": whole["backend"], "processes": processes, "resumed": apart, "exported": rounding, "loss": whole["loss"]}


def _norm(tensors: dict[str, Any]) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors.values()) ** 0.5)


@check("ZeRO-3 in bfloat16: save, resume, export", seconds=90, gib=22, modules=("deepspeed",), on_cpu=True)
def zero3(machine: Machine) -> Figures:
    return trained_and_resumed(machine, "zero3")


@check("ZeRO-2 in bfloat16: save, resume, export", seconds=90, gib=22, modules=("deepspeed",), on_cpu=True)
def zero2(machine: Machine) -> Figures:
    return trained_and_resumed(machine, "zero2")


@check("FSDP2 in bfloat16: save, resume, export", seconds=90, gib=22, on_cpu=True)
def fsdp2(machine: Machine) -> Figures:
    return trained_and_resumed(machine, "fsdp2")
