"""The machinery of the checks for a new GPU node, and their parts that need no GPU.

1. A check that fails, dies, hangs or leaves processes behind costs a line of the table, never the others.
2. What a machine cannot run is listed with the reason.
3. Rows, digests and comparisons are what they are said to be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctcgrpo.training.packing import distinct_tokens, prefix_tree
from ctcgrpo.types import Completion
from tests.gpu import SUBJECTS, __main__
from tests.gpu.attention import LENGTHS, LENGTHS_ON_CPU, samples_of
from tests.gpu.colocated import below_best, require_greedy
from tests.gpu.engine import gaps
from tests.gpu.registry import CHECKS, Check, Figures, Machine, NotRun, all_checks, why_not
from tests.gpu.running import Result, run_apart
from tests.gpu.served import Digests, digest, expected_digests


def check_of(run: Any, **options: Any) -> Check:
    needs: dict[str, Any] = {"gpus": 1, "gib": 0, "modules": (), "on_cpu": True, "seconds": 1}
    return Check("a check", run, **needs | options)


@pytest.fixture
def cpu(tmp_path: Path) -> Machine:
    return Machine(0, 0.0, True, tmp_path)


def test_a_check_that_fails_dies_or_hangs_is_a_line(cpu: Machine, tmp_path: Path) -> None:
    def run(do: Any, limit: float | None = None) -> Result:
        return run_apart(check_of(do), cpu, tmp_path / "a-check.log", limit=limit)

    def wrong(machine: Machine) -> Figures:
        print("so far so good")
        raise RuntimeError(f"{machine.gpus}\nGPUs")

    def leaves(machine: Machine) -> Figures:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        return {"child": child.pid}

    good = run(lambda machine: {"tokens": 3, "seconds": 0.25})
    assert good.outcome == "ok" and good.figures == {"tokens": 3, "seconds": 0.25}
    failed = run(wrong)
    assert (failed.outcome, failed.why) == ("FAILED", "RuntimeError: 0 GPUs")
    assert "so far so good" in (tmp_path / "a-check.log").read_text()
    died = run(lambda machine: os.kill(os.getpid(), signal.SIGKILL))
    assert died.outcome == "FAILED" and died.why.startswith("its process ended with -9; last line: ")
    hung = run(lambda machine: print("waiting", flush=True) or time.sleep(60), limit=0.5)  # type: ignore[func-returns-value]
    assert (hung.outcome, hung.why) == ("FAILED", "no end after 0.5 s; last line: waiting")

    def tidies(machine: Machine) -> Figures:
        try:
            time.sleep(60)
        finally:
            (tmp_path / "tidied").touch()
        return {}

    assert run(tidies, limit=0.5).outcome == "FAILED" and (tmp_path / "tidied").exists()

    def cannot(machine: Machine) -> Figures:
        raise NotRun("needs NVLink")

    assert run(cannot).why == "needs NVLink" and run(cannot).outcome == "not run"
    child = int(run(leaves).figures["child"])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, "a child of a check outlived it"
        time.sleep(0.02)


def test_what_a_machine_cannot_run_has_a_reason(cpu: Machine, tmp_path: Path) -> None:
    node = Machine(2, 79.0, False, tmp_path)

    def reason(machine: Machine, **options: Any) -> str | None:
        return why_not(check_of(dict, **options), machine)

    assert reason(cpu) is None and reason(node) is None
    assert reason(cpu, on_cpu=False) == "needs a GPU" and reason(cpu, on_cpu=False, gpus=4) == "needs 4 GPUs"
    assert reason(node, gpus=4) == "needs 4 GPUs; 2 found"
    assert reason(node, gib=100) == "needs 100 GiB of GPU memory; 79 found"
    assert "needs no_such_module, not installed here" in str(reason(node, modules=("no_such_module", "torch")))


def test_checks_come_in_the_order_of_their_subjects_and_have_files_of_their_own() -> None:
    checks = all_checks()
    subjects = [check.run.__module__.rpartition(".")[2] for check in checks]
    assert list(dict.fromkeys(subjects)) == list(SUBJECTS) and subjects == sorted(subjects, key=SUBJECTS.index)
    assert len({check.name for check in checks}) == len(checks) >= 19
    assert CHECKS["imports and versions"].on_cpu and not CHECKS["a recipe with ZeRO-3 and vLLM on the same GPUs"].on_cpu


def test_the_report_is_written_and_a_failure_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Result("a", "ok", 1.4, {"graphs": 1, "peak GiB": 3.14159})
    absent = Result("b", "not run", 0.0, {}, "needs 2 GPUs; 1 found")
    bad = Result("c", "FAILED", 2.0, {}, "AssertionError: a | b", "c.log")
    assert __main__.report([good, absent], tmp_path) == 0 and __main__.report([good, absent, bad], tmp_path) == 1
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| a | ok | 1 | graphs 1; peak GiB 3.142 |",
        "| b | not run | 0 | needs 2 GPUs; 1 found |",
        "| c | FAILED | 2 | AssertionError: a / b |",
    ]
    assert [r["outcome"] for r in json.loads((tmp_path / "results.json").read_text())] == ["ok", "not run", "FAILED"]
    assert "1 ok, 1 FAILED, 1 not run" in capsys.readouterr().out
    assert __main__.main(["--list", "--only", "ZeRO-2"]) == 0
    assert "1 GPU or a CPU, deepspeed, 22 GiB; about 90 s" in capsys.readouterr().out
    assert __main__.main(["--list", "--cpu"]) == 0
    listed = capsys.readouterr().out
    assert "ZeRO-2" in listed and "vLLM" not in listed
    with pytest.raises(SystemExit):
        __main__.main(["--only", "no such check"])
    assert "no check has such a name" in capsys.readouterr().err


@pytest.mark.parametrize("length", sorted({*LENGTHS, *LENGTHS_ON_CPU}))
def test_rows_have_as_many_tokens_as_they_are_said_to(length: int) -> None:
    samples = samples_of(length, 2000)
    assert distinct_tokens(prefix_tree(samples), [range(len(samples))]) == length
    assert len(samples) == (1 if length < 64 else 12) and all(len(s.completion_ids) for s in samples)


def test_digests_are_of_the_bytes_and_know_what_vllm_fuses() -> None:
    torch.manual_seed(0)
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    weights = {name: torch.randn(4, 3).bfloat16() for name in [*names, "lm_head.weight"]}
    served: Any = Digests()
    fused = torch.cat([weights[name] for name in names])
    parameters = {"model.layers.0.self_attn.qkv_proj.weight": fused, "lm_head.weight": weights["lm_head.weight"]}
    served.model_runner = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: iter(parameters.items())))
    assert served.weight_digests() == expected_digests(parameters, weights)
    weights[names[1]][2, 1] += 1e-2
    found = expected_digests(parameters, weights)
    assert [found[n] == served.weight_digests()[n] for n in parameters] == [False, True]
    assert digest([torch.zeros(2)]) != digest([torch.zeros(3)])


class Fixed(torch.nn.Module):
    """Whatever comes before, token 3 has logit 2, token 1 has logit 1.5, others 0."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 5)
        logits[..., 3], logits[..., 1] = 2.0, 1.5
        return SimpleNamespace(logits=logits)


def test_greedy_choices_are_held_against_the_best_and_log_probabilities_against_the_models() -> None:
    log_p = torch.tensor([0.0, 1.5, 0.0, 2.0, 0.0]).log_softmax(-1)
    done = [Completion((3, 3, 1, 3), tuple(float(log_p[t]) for t in (3, 3, 1, 3)), "length")]
    assert below_best(Fixed(), [[0, 2]], done).tolist() == pytest.approx([0, 0, 0.5, 0])
    assert gaps(Fixed(), [[0, 2]], done).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert float(gaps(Fixed(), [[0, 2]], [Completion((1,), (float(log_p[3]),), "length")])[0]) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match="step 1: a greedy choice is 0.5 below transformers' best logit, 75% are the best"):
        require_greedy(Fixed(), [[0, 2]], done, "step 1")
    fine = [Completion((3,) * 4, (0.0,) * 4, "length")]
    assert require_greedy(Fixed(), [[0, 2]], fine, "step 1") == (0.0, 1.0)
