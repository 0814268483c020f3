"""Whole recipes on several GPUs: ZeRO-3 with vLLM on the same ones, and Ctrl-C in the middle of a save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.util.files import is_complete
from tests.gpu.policy import MIDDLE, policy_folder
from tests.gpu.registry import Figures, Machine, check
from tests.gpu.running import end_group, forked, spawned, wait

ROOT = Path(__file__).parent.parent.parent
NOISE = 0.3
"""How far a recorded log-probability may be off at most, in nats, in bfloat16."""
STEPS = 3


def torchrun(recipe: str, overrides: Sequence[str], processes: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d"]
    return [*command, "--rdzv-endpoint", "localhost:0", recipe, *overrides]


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@check("a recipe with ZeRO-3 and vLLM on the same GPUs", seconds=300, gpus=4, gib=22, modules=("vllm", "deepspeed"))
def colocated_zero3(machine: Machine) -> Figures:
    processes = 8 if machine.gpus >= 8 else 4
    overrides = [f"policy.model={policy_folder(machine, MIDDLE)}", "rollout.engine=vllm_colocated"]
    overrides += ["training.sharding=configs/deepspeed/zero3.json", "training.bf16=true", "rollout.deterministic=false"]
    overrides += ["scenarios.per_step=8", "rollout.vllm.gpu_memory=0.4", f"training.max_steps={STEPS}"]
    overrides += [f"run.output_dir={machine.scratch}", "run.name=colocated", "training.updates_per_step=1"]
    subprocess.run(torchrun("recipes/tiny.yaml", overrides, processes), cwd=ROOT, check=True)
    found = metrics(machine.scratch / "colocated")
    assert [m["step"] for m in found] == list(range(1, STEPS + 1)), found
    assert all(m["logprob_gap"] < NOISE for m in found), [m["logprob_gap"] for m in found]
    gap = max(m["logprob_gap"] for m in found)
    return {"processes": processes, "logprob_gap": gap, "seconds/update": found[-1]["seconds/update"]}


@check("Ctrl-C in the middle of a save: it is completed, and the same command resumes", seconds=240, gpus=4, gib=22, on_cpu=True)
def ctrl_c_during_a_save(machine: Machine) -> Figures:
    folder = machine.scratch / "stopped"
    processes = 1 if machine.on_cpu else 8 if machine.gpus >= 8 else 4
    overrides = [f"policy.model={policy_folder(machine, MIDDLE, torch.float32)}", f"training.max_steps={STEPS}"]
    overrides += [
        f"run.output_dir={machine.scratch}",
        "run.name=stopped",
        "training.updates_per_step=1",
        "rollout.max_turns=1",
    ]
    overrides += [
        "scenarios.per_step=4",
        "rollout.group_size=2",
        "rollout.deterministic=false",
        "training.learning_rate=1e-5",
    ]
    if not machine.on_cpu:
        overrides += ["training.sharding=configs/deepspeed/zero2.json", "training.bf16=true"]
    saving, seconds = folder / "checkpoint-1", 300.0
    first = _start(machine, overrides, processes)
    try:
        _until(saving.exists, first, seconds, "checkpoint-1 begins to be written")
        completed = is_complete(saving)  # on a CPU it may be quicker than this process looks
        os.killpg(first, signal.SIGINT)  # as a terminal does: all processes of the group get it
        code = wait(first, seconds)
    finally:
        end_group(first)
    # torchrun has exit codes of its own.
    assert code == 130 or (code and not machine.on_cpu), f"after Ctrl-C it ended with {code}; expected 130"
    kept = [p for p in folder.glob("checkpoint-*") if is_complete(p)]
    assert kept, "no checkpoint is complete after Ctrl-C during a save"
    shown = {"completed before the signal": str(completed), "kept": ", ".join(sorted(p.name for p in kept))}
    assert not is_complete(folder / "final"), f"it went on to the end, after {shown}"
    second = _start(machine, overrides, processes)
    try:
        code = wait(second, seconds)
    finally:
        end_group(second)
    assert code == 0, f"the same command again ended with {code}"
    steps = [m["step"] for m in metrics(folder)]
    assert steps == list(range(1, STEPS + 1)) and is_complete(folder / "final"), steps
    shutil.rmtree(folder)
    return {"processes": processes, **shown, "steps after resuming": len(steps)}


def _start(machine: Machine, overrides: Sequence[str], processes: int) -> int:
    """Start the recipe; gives the id of its process, which leads a group of its own."""
    if machine.on_cpu:
        return forked(lambda: _train(overrides))
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    command = torchrun("recipes/tiny.yaml", overrides, processes)
    return spawned(command, cwd=ROOT, env=environment)


def _train(overrides: Sequence[str]) -> None:
    from ctcgrpo.errors import RunInterrupted
    from ctcgrpo.run.train import train

    try:
        train(load_recipe(ROOT / "recipes" / "tiny.yaml", list(overrides)))
    except RunInterrupted as error:
        print(error, flush=True)
        os._exit(130)


def _until(holds: Callable[[], bool], pid: int, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"before {what}, the run ended with {os.waitstatus_to_exitcode(status)}"
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.002)
