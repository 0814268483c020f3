"""Trackers: what reaches them in a real run, by step of the recipe; missing ones are named first; W&B's table and its secrets."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import read_validations
from ctcgrpo.run.weights_and_biases import COLUMNS, dialogue_rows
from tests.conftest import Command
from tests.fake_llm import FakeLlm
from tests.unit.test_python_api import events_of
from tests.unit.test_report import EPISODES, made
from tests.unit.test_run import FAST, TINY

SMALL = ["rollout.max_turns=1", "rollout.group_size=2", "validation={scenarios: english/test, every: 1}"]


def validated(run: Path) -> list[float]:
    """The overall scores of its validations."""
    found, problems = read_validations(run / "validation.jsonl")
    assert not problems
    return [v.overall for v in found]


def test_tensorboard_gets_metrics_and_validations_by_step_of_the_recipe(ctcgrpo: Command, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="writes TensorBoard's files")
    code, _, err = ctcgrpo("train", TINY, *SMALL, f"run.output_dir={tmp_path}", "run.report_to=tensorboard")
    assert code == 0, err
    run = tmp_path / "tiny"
    (file,) = (run / "runs").rglob("events.*")
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(file):
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["policy_version"] for m in logged] == [0, 2]  # two optimizer steps a step
    for name in ("outcome/all", "outcome/charm", "grad_norm", "credit/turn_term_std"):
        assert curves[f"train/{name}"] == [(m["step"], pytest.approx(m[name])) for m in logged]
    assert curves["eval/outcome/all"] == [(k, pytest.approx(score)) for k, score in enumerate(validated(run))]
    assert len(curves["eval/outcome/charm"]) == 3 and curves["eval/episodes/failed"][-1] == (2, 0)


def test_a_tracker_that_is_missing_is_named_before_anything_is_loaded(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    monkeypatch.setattr("ctcgrpo.run.train._Run._policy", lambda self: pytest.fail("a model is loaded"))
    command = [TINY, f"run.output_dir={tmp_path}", "run.report_to=[mlflow]"]
    code, out, err = ctcgrpo("train", *command)
    assert code == 2 and "run.report_to = 'mlflow': its package is not installed" in err and "pip install mlflow" in err
    assert not (tmp_path / "tiny").exists()
    code, out, _ = ctcgrpo("check", *command)
    assert code == 2 and "try pip install mlflow" in " ".join(out.replace("│", " ").split())
    code, _, err = ctcgrpo("train", *command, "run.report_to=[tensorboard, wandbb]")
    assert code == 2 and "run.report_to = 'wandbb'; did you mean 'wandb'?" in err


def test_the_field_that_there_was_is_refused_with_what_to_write(ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("train", TINY, "run.wandb=offline")
    assert code == 2 and "unknown field run.wandb; set run.report_to=[wandb] instead" in err and "WANDB_MODE=offline" in err


def test_trackers_may_change_when_a_run_resumes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "tiny")
    folder.path.mkdir()
    folder.begin(load_recipe(TINY, [f"run.output_dir={tmp_path}"]), 0)
    assert folder.changes(load_recipe(TINY, [f"run.output_dir={tmp_path}", "run.report_to=[tensorboard]"])) == []


def test_the_table_of_dialogues_reads_the_traces_of_its_step_alone(tmp_path: Path) -> None:
    folder = RunFolder(made(tmp_path / "r", EPISODES))
    for other in ("step-000002.rank-0.jsonl", "validation-000001.rank-0.jsonl"):
        (folder.traces / other).mkdir()  # cannot be read
    rows = dialogue_rows(folder, 1)
    tasks = {row[COLUMNS.index("task")] for row in rows}
    assert rows and len(tasks) == 1 and {row[COLUMNS.index("step")] for row in rows} == {1}
    assert dialogue_rows(folder, 0) == []


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed; it is part of the extra dev")
def test_trackio_gets_the_same(tmp_path: Path) -> None:
    """In a process of its own, since trackio reads TRACKIO_DIR when it is imported."""
    command = [sys.executable, "-m", "ctcgrpo", "train", TINY, *SMALL, f"run.output_dir={tmp_path}", "run.report_to=[trackio]"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "ctcgrpo.db")) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics where run_name = 'tiny' order by id")]
    validations = [(row["train/global_step"], row["eval/outcome/all"]) for row in rows if "eval/outcome/all" in row]
    assert validations == list(enumerate(validated(tmp_path / "tiny")))
    assert [row["train/global_step"] for row in rows if "train/outcome/all" in row] == [1, 2]


def _wandb_history(log: Path) -> dict[str, list[str]]:
    """What an offline run of W&B was told, by name: JSON values in their order. Its file is a LevelDB log of records: after 7
    bytes, blocks of 32 KiB with pieces of (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = log.read_bytes(), 7, b""
    told: dict[str, list[str]] = {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            for item in record.history.item:
                told.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    return told


def test_weights_and_biases_offline_learn_no_secret(ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MARKED_KEY", "marked-secret-key")
    monkeypatch.setenv("CTCGRPO_SIMULATOR_TOKEN", "marked-secret-token")
    with FakeLlm(key="marked-secret-key").serving() as llm:
        config = tmp_path / "simulator.yaml"
        config.write_text(f"backend: llm\nllm:\n  endpoints:\n    - {{url: '{llm.url}', model: m, key_env: MARKED_KEY}}\n")
        command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "run.report_to=[wandb]", f"simulator.config={config}"]
        command += ["validation.scenarios=english/test", "validation.every=1"]
        code, _, err = ctcgrpo(*command)
    assert code == 0, err
    [log] = (tmp_path / "tiny" / "wandb").glob("offline-run-*/*.wandb")
    told = _wandb_history(log)
    assert {"train/outcome/all", "train/outcome/charm", "eval/outcome/all", "eval/outcome/support"} <= set(told)
    assert any(name.startswith("dialogues") for name in told)
    assert [json.loads(value) for value in told["eval/outcome/all"]] == validated(tmp_path / "tiny")
    assert not {"outcome/all", "train/eval_outcome/all"} & set(told)
    [table] = (tmp_path / "tiny" / "wandb").glob("offline-run-*/files/media/table/*.json")
    rows = json.loads(table.read_text())
    assert tuple(rows["columns"]) == COLUMNS and len(rows["data"]) == 4 * 2 * 2  # scenes, rollouts, turns
    traces = (tmp_path / "tiny" / "traces" / "step-000001.rank-0.jsonl").read_text()
    for row in rows["data"]:
        told_row = dict(zip(COLUMNS, row, strict=True))
        assert told_row["advantage"] == told_row["outcome term"] + told_row["turn term"]
        assert json.dumps(told_row["reply"], ensure_ascii=False) in traces
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"marked-secret" not in file.read_bytes(), file
