"""What is installed, and what the update chooses here."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

from ctcgrpo.model.tree_attention import how_to_attend
from tests.gpu.registry import Figures, Machine, check

_OLDEST_TORCH = (2, 11)


@check("imports and versions", seconds=20, on_cpu=True)
def imports(machine: Machine) -> Figures:
    found = {"torch": torch.__version__}
    older = tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH
    assert not older, f"torch {torch.__version__} is older than {'.'.join(map(str, _OLDEST_TORCH))}"
    for name in ("transformers", "trl", "accelerate", "peft"):
        importlib.import_module(name)
        found[name] = version(name)
    for name in ("ctcgrpo.training.trainer", "ctcgrpo.rollout.engines", "trl.kernels.chunked_logprob"):
        importlib.import_module(name)
    for name in ("deepspeed", "vllm", "triton", "kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if not machine.on_cpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        found["GPU"] = f"{machine.gpus} x {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
        assert torch.cuda.is_bf16_supported(), f"{properties.name} computes no bfloat16"
        x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
        assert float((x @ x).sum()) == 256.0**3
    return found


@check("how_to_attend", seconds=15, on_cpu=True)
def attends(machine: Machine) -> Figures:
    chosen = {str(half): how_to_attend("auto", machine.device, half=half) for half in (True, False)}
    if machine.on_cpu:
        assert chosen == {"True": "segments", "False": "segments"}, chosen
    else:
        assert chosen["True"] in ("flex", "flash3") and chosen["False"] == "flex", chosen
    return {"16 bits": str(chosen["True"]), "float32": str(chosen["False"])}
