"""Runs a recipe on processes without GPUs with DeepSpeed or FSDP2, for which accelerate has no communication of its own.

DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu torchrun --nproc_per_node 2 -m tests.on_gloo zero3 RECIPE [overrides]
"""

from __future__ import annotations

import runpy
import sys

from tests.sameness import on_cpu_with_gloo

if __name__ == "__main__":
    backend, recipe = sys.argv[1:3]
    on_cpu_with_gloo(backend)
    sys.argv = [recipe, *sys.argv[3:]]
    runpy.run_path(recipe, run_name="__main__")
