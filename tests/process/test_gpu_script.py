"""launch/test_gpu.sh on a machine without a GPU: every check that needs none is run, and all others are listed with the reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.gpu.registry import CHECKS, Machine, all_checks
from tests.gpu.running import run_apart


def test_all_that_needs_no_gpu_is_run(tmp_path: Path) -> None:
    command = ["launch/test_gpu.sh", "--cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CTCGRPO_VENV": sys.prefix}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (
        done.stdout,
        done.stderr,
        [p.read_text()[-3000:] for p in (tmp_path / "out").glob("*.log")],
    )
    results = {r["name"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(results) == [check.name for check in all_checks()]
    for check in all_checks():
        found = results[check.name]
        assert (found["outcome"], bool(found["why"])) == (("ok", False) if check.on_cpu else ("not run", True)), found
        assert bool(found["figures"]) == check.on_cpu and check.name in done.stdout


def test_with_gpus_a_check_is_a_process_of_its_own(tmp_path: Path) -> None:
    found = run_apart(CHECKS["how_to_attend"], Machine(1, 80.0, False, tmp_path), tmp_path / "how.log")
    wanted = "ok" if torch.cuda.is_available() else "FAILED"
    assert found.outcome == wanted and (re.search("CUDA|NVIDIA", found.why) or wanted == "ok"), (
        found,
        (tmp_path / "how.log").read_text(),
    )
