"""Real processes: the three ways of launching a recipe; Ctrl-C, kills and resumption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from ctcgrpo.report.parts import credit_of
from ctcgrpo.report.reading import read_run
from tests.conftest import ROOT

ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
SHARDED = {k: v for k, v in ENVIRONMENT.items() if k != "ACCELERATE_USE_CPU"}
SHARDED |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def test_a_recipe_trains_on_two_processes_through_accelerate(tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"  # a recipe without its Python lines is one for the command
    text = (ROOT / "recipes" / "tiny.yaml").read_text()
    plain.write_text("".join(line for line in text.splitlines(keepends=True) if "'''" not in line))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "ACCELERATE_USE_CPU"}
    held_out = ["validation.scenarios=english/test", "validation.every=1"]
    command = [sys.executable, "-m", "ctcgrpo", "train", str(plain), "--processes", "2", "training.max_steps=1"]
    command += [f"run.output_dir={tmp_path}", *held_out]
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    folder = tmp_path / "tiny"
    assert [m["step"] for m in metrics(folder)] == [1]
    assert metrics(folder)[0]["episodes/valid"] == 16
    assert metrics(folder)[0]["logprob_gap"] < 1e-4
    # Each of the two processes played its half.
    traces = sorted((folder / "traces").glob("step-*.jsonl"))
    assert [t.name for t in traces] == ["step-000001.rank-0.jsonl", "step-000001.rank-1.jsonl"]
    assert [len(t.read_text().splitlines()) for t in traces] == [8, 8]
    run = read_run(folder)  # and wrote the credit of its own, which together is what the run logged
    assert not run.problems
    assert all((credit_of(e) is None) == (e["kind"] == "validation") for e in run.episodes)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["n"] == summary["after"]["n"] == 16 and (folder / "best" / "STEP").exists()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["max_steps"] == 1


def test_killed_runs_end_as_if_nothing_had_happened() -> None:
    """One kill in each phase; `python -m tests.kills` does more."""
    done = run(sys.executable, "-m", "tests.kills", "3", "--seed", "5")
    assert done.returncode == 0 and "3 of 3 as if nothing had happened" in done.stdout, (done.stdout, done.stderr)


def test_a_sharded_run_goes_on_from_its_checkpoint_and_is_exported(tmp_path: Path) -> None:
    """ZeRO-2 on two processes; its last checkpoint is lost before it was complete; the same command makes the same policy."""
    command = [*TORCHRUN, "-m", "tests.on_gloo", "zero2", "recipes/tiny.yaml", f"run.output_dir={tmp_path}"]
    command += ["training.sharding=configs/deepspeed/zero2.json"]
    folder = tmp_path / "tiny"

    def train() -> dict[str, torch.Tensor]:
        done = subprocess.run(command, cwd=ROOT, env=SHARDED, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return load_file(folder / "final" / "model.safetensors")

    first = train()
    assert list((folder / "checkpoint-4").glob("global_step4/*zero_pp_rank_1*optim_states.pt"))
    shutil.rmtree(folder / "final")
    (folder / "checkpoint-4" / "COMPLETE").unlink()
    (folder / "checkpoint-4" / "global_step4").rename(folder / "checkpoint-4" / "broken")
    again = train()
    assert [m["step"] for m in metrics(folder)] == [1, 2]
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)

    from ctcgrpo.run.export import export

    joined = load_file(export(folder, tmp_path / "out", which="4", dtype="float32") / "model.safetensors")
    # DeepSpeed's own saving writes tied weights twice.
    assert first.keys() - joined.keys() == {"lm_head.weight"} and all(torch.equal(joined[n], first[n]) for n in joined)


def test_python_runs_a_recipe_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "recipes/tiny.yaml",
        "training.max_steps=6",
        "training.save_every=50",
        f"run.output_dir={tmp_path}",
    ]
    folder = tmp_path / "tiny"
    started = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 2):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=120)
    assert started.returncode == 130, err
    assert "Traceback" not in err
    saved = re.search(r"Saved (\S+); run the same command to resume", err)
    assert saved, err
    steps = int(saved[1].rpartition("-")[2]) // 2
    assert 2 <= steps < 6 and (Path(saved[1]) / "COMPLETE").exists()

    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert f"step {steps + 1}/6" in again.stdout and f"step {steps}/6" not in again.stdout

    # What was trained loads, and a finished run is not run over.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    finished = run(*command)
    assert finished.returncode == 6 and "Traceback" not in finished.stderr
    assert "the run of this recipe is finished" in finished.stderr


def test_sigterm_at_the_launcher_saves_on_all_processes(tmp_path: Path) -> None:
    """As a scheduler does it: the launcher tells the processes, and waits for them."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/cpu_two_processes.yaml",
    ]
    command += ["recipes/tiny.yaml", "training.max_steps=50", "training.save_every=50", f"run.output_dir={tmp_path}"]
    folder = tmp_path / "tiny"
    started = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not ((folder / "metrics.jsonl").exists() and metrics(folder)):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.05)
    started.terminate()
    out, err = started.communicate(timeout=120)
    assert started.returncode and "stopping: " in out, (out, err)
    (saved,) = folder.glob("checkpoint-*")
    assert (saved / "COMPLETE").exists() and f"Saved {saved}; run the same command to resume" in err
    assert len(list(saved.glob("rng_state_*.pth"))) == 2


def test_quickstart_stops_at_ctrl_c_goes_on_and_shows_what_it_learned(tmp_path: Path) -> None:
    """The script with a policy that is built in a moment and a few steps; the whole of it is what the README shows."""
    command = [
        "./launch/quickstart.sh",
        f"run.output_dir={tmp_path}",
        "run.name=q",
        "policy.model=builtin/tiny",
        "training.max_steps=4",
        "scenarios.per_step=4",
        "rollout.group_size=2",
        "rollout.max_turns=2",
        "rollout.max_new_tokens=12",
        "rollout.max_prompt_tokens=512",
        "validation.every=50",
        "validation.samples=1",
    ]
    venv = tmp_path / "venv"  # the one that runs this, as if launch/install.sh had just made it
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.prefix) / "bin")
    shutil.copy(ROOT / "pyproject.toml", venv / ".installed-dev")
    environment = {**ENVIRONMENT, "CTCGRPO_VENV": str(venv)}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not ((tmp_path / "q" / "metrics.jsonl").exists() and metrics(tmp_path / "q")):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: the script gets it too
    out, err = started.communicate(timeout=120)
    assert started.returncode == 130 and "run the same command to resume" in err, (out, err)
    assert not (tmp_path / "q" / "summary.json").exists() and "before" not in out

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [m["step"] for m in metrics(tmp_path / "q")] == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert {"overall", "scenes", "n"} <= summary["before"].keys() & summary["after"].keys()
    assert summary["before"]["n"] == 16 and len(summary["improvement"]["ci95"]) == 2
    assert f"{summary['after']['overall']:+.3f}" in again.stdout
    for part in (
        "before: ",
        "after: ",
        "charm",
        "distinct replies",
        str(tmp_path / "q" / "final"),
        f"report {tmp_path / 'q'}",
    ):
        assert part in again.stdout, again.stdout
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0 and "is finished" in finished.stdout and "before: " in finished.stdout
