"""Before heavy libraries are loaded: which commands need none, what a user reads at once, and which warnings are left out."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctcgrpo.evaluation.benches import EIBENCH
from ctcgrpo.evaluation.results import Result, summarise, write_results
from ctcgrpo.run import startup
from ctcgrpo.run.startup import announce_loading
from tests.conftest import ROOT
from tests.unit.test_report import episode, made

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "inspect_ai", "optuna")
_RUN_ALL = f"""
import io, json, sys
from ctcgrpo import cli

found = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["ctcgrpo", *command]
    sys.stdin = io.StringIO("\\n")
    try:
        code = cli.main()
    except SystemExit as stop:
        code = stop.code
    found.append([command, code or 0, [name for name in {HEAVY!r} if name in sys.modules]])
print("FOUND", json.dumps(found))
"""


def test_commands_that_need_no_model_load_none(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [episode(0, k, 0.1 * k, [(45, 55), (40, 60)]) for k in range(2)])
    facts = {"model": "m/x", "other": {"backend": "scripted"}, "task": {}, "generation": {}, "limit": None, "data": None}
    results = [Result(name, 1, "support", 0.1) for name in "ab"]
    for name in "xy":
        write_results(tmp_path / name, results, summarise(EIBENCH, results, facts))
    commands = [
        ["--help"],
        ["version"],
        ["scenarios", "--help"],
        ["scenarios", "validate", "english/train"],
        ["scenarios", "new", str(tmp_path / "mine.jsonl")],
        ["scenarios", "gate", str(tmp_path / "mine.jsonl")],
        ["chat", "--scenarios", str(tmp_path / "mine.jsonl")],
        ["report", str(run)],
        ["noise", str(run)],
        ["leaderboard", str(tmp_path)],
        ["compare", str(tmp_path / "x"), str(tmp_path / "y")],
        ["show", str(run)],
        ["train", "--help"],
        ["train", str(ROOT / "recipes" / "tiny.yaml"), "scenarios.train=english/trian"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, json.dumps(commands)], env=environment, capture_output=True, text=True, timeout=60
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, done.stderr
    for command, code, heavy in json.loads(line.removeprefix("FOUND ")):
        assert heavy == [], (command, heavy)
        wrong = {"show": 6, "train": 3, "noise": 6}  # not trained to the end; a misspelt pack; its scenarios are of no pack
        assert code == (wrong.get(command[0], 0) if "--help" not in command else 0), (command, code, done.stderr)
    assert "did you mean 'english/train'?" in done.stderr and "loading" not in done.stderr


def test_what_is_being_loaded_is_said_once_and_by_the_main_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(startup, "_announced", False)
    announce_loading("training x")
    announce_loading("training x")
    said = capsys.readouterr().err
    assert said.startswith("training x: loading PyTorch and transformers (") and said.count("\n") == 1
    monkeypatch.setattr(startup, "_announced", False)
    monkeypatch.setenv("RANK", "1")
    announce_loading("training x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "torch", sys)
    announce_loading("training x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, text",
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no such module"),
    ],
)
def test_warnings_of_libraries_that_help_nobody_are_left_out(name: str, text: str) -> None:
    announce_loading("x")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.warning(text)
        logger.warning("There were missing keys in the checkpoint model loaded: ['model.norm.weight'].")
    finally:
        logger.removeHandler(handler)
    assert heard == ["There were missing keys in the checkpoint model loaded: ['model.norm.weight']."]
