"""The examples of recipes/examples run as they are, and learn."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from ctcgrpo.util.importing import load_object
from tests.conftest import ROOT, Command

EXAMPLES = ROOT / "recipes" / "examples"
QUICK = ["training.max_steps=1", "training.save_every=1"]


def traced(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "traces" / "step-000001.rank-0.jsonl").read_text().splitlines()]


def test_guess_from_python_learns(tmp_path: Path) -> None:
    """Half of the replies fit by chance; what is held out is how four words follow each other."""
    make = load_object("guess:make_trainer", "example", EXAMPLES)
    trainer = make(tmp_path, disable_tqdm=True)
    assert {row["task"] for row in trainer.train_dataset} == set(range(12)) and len(trainer.eval_dataset) == 4
    before = trainer.evaluate()["eval_outcome/all"]
    trainer.train()
    after = trainer.evaluate()["eval_outcome/all"]
    assert 0.4 < before < 0.6 and after > 0.75
    for episode in traced(tmp_path):
        assert episode["outcome"] == pytest.approx(sum(turn["reward"] for turn in episode["turns"]))


def test_guess_as_a_recipe(ctcgrpo: Command, tmp_path: Path) -> None:
    code, _, err = ctcgrpo("train", str(EXAMPLES / "guess.yaml"), f"run.output_dir={tmp_path}", *QUICK, "validation.every=1")
    assert code == 0, err
    episodes = traced(tmp_path / "guess")
    assert len(episodes) == 64 and all(len(episode["turns"]) == 4 for episode in episodes)
    assert "guess" in json.loads((tmp_path / "guess" / "data.json").read_text())["environment.factory"].popitem()[0]


def test_a_reward_of_one_s_own_as_a_recipe(ctcgrpo: Command, tmp_path: Path) -> None:
    code, _, err = ctcgrpo("train", str(EXAMPLES / "own_reward.yaml"), f"run.output_dir={tmp_path}", *QUICK, "validation=null")
    assert code == 0, err
    episodes = traced(tmp_path / "own_reward")
    assert len(episodes) == 16 and len({episode["tag"] for episode in episodes}) == 4
    assert not any(episode["failure"] for episode in episodes)


async def test_long_replies_cost_what_the_example_says() -> None:
    from ctcgrpo.environments.eibench import EIBench

    brief, tasks = (load_object(f"own_reward:{name}", "example", EXAMPLES) for name in ("Brief", "train_tasks"))
    task = tasks()[0]
    for words, cost in ((30, 0.0), (50, 0.04)):
        rewards = []
        for kind in (EIBench, brief):
            environment = kind(max_turns=3)
            await environment.reset(task.data, seed=1)
            step = await environment.step(" ".join(["word"] * words))
            rewards.append(step.reward)
            assert step.info["anger"] == environment.state.anger and step.message
        assert rewards[0] - rewards[1] == pytest.approx(cost)


def test_a_reward_of_one_s_own_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_reward.py"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "own_reward.py"), run_name="__main__")
    episodes = traced(tmp_path / "checkpoints" / "own_reward")
    assert len(episodes) == 16 and len({episode["tag"] for episode in episodes}) == 4
    assert all(episode["failure"] is None and episode["turns"][0]["info"]["anger"] >= 0 for episode in episodes)


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # committed without
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output for cell in cells for output in cell.outputs]
    said = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    before, after = (float(part.split()[0]) for part in said.split("held-out episodes: ")[1].split(","))
    assert before < 0.6 and after > 0.75
    assert any("image/png" in output.data for output in shown if "data" in output)
    tables = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(tables) == 2 and all("advantage" in table for table in tables)
