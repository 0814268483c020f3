"""A TRL user's script under `accelerate launch`, on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.process.test_processes import ENVIRONMENT

SCRIPT = """
import json
import sys

from datasets import Dataset

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step


class Long(Environment):
    def reset(self, task, *, seed):
        self.turns = 0
        return f"Talk about {task['topic']}."

    def step(self, reply):
        self.turns += 1
        return Step("More.", reward=len(reply) / 100, done=self.turns == 2)


AHEAD = {
    "overlap": 1,
    "update_parts": 2,
    "loss_total": 60.0,
    "sampling_dtype": "bfloat16",
    "num_generations": 6,
    "per_device_train_batch_size": 9,  # three groups, one of them on both processes
    "max_steps": 3,
    "deterministic": False,
}


def train(folder, options, **resume):
    trainer = CTCGRPOTrainer(
        model="builtin/tiny",
        args=CTCGRPOConfig(
            folder,
            max_turns=2,
            max_completion_length=4,
            learning_rate=1e-3,
            bf16=False,
            logging_steps=1,
            save_steps=1,
            **{"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 2, "deterministic": True} | options,
        ),
        environment=Long,
        train_dataset=Dataset.from_list([{"topic": topic, "tag": "all" if options else topic} for topic in ("rain", "sun")]),
        eval_dataset=[{"topic": "snow"}, {"topic": "fog"}, {"topic": "hail"}],
    )
    trainer.train(**resume)
    evaluated = trainer.evaluate()
    trainer.save_model()
    return trainer, evaluated


if __name__ == "__main__":
    options = AHEAD if "ahead" in sys.argv else {}
    trainer, evaluated = train(sys.argv[1], options, resume_from_checkpoint="resume" in sys.argv or None)
    found = {"processes": trainer.accelerator.num_processes, "evaluated": evaluated, "log": trainer.state.log_history}
    if trainer.accelerator.is_main_process:
        with open(sys.argv[1] + "/found.json", "w") as file:
            json.dump(found, file)
    trainer.accelerator.wait_for_everyone()
"""


def launch(script: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(script), *arguments], cwd=script.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_script_on_two_processes_and_resumed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    launch(script, str(run))
    found = json.loads((run / "found.json").read_text())
    assert found["processes"] == 2
    steps = [entry for entry in found["log"] if "outcome/all" in entry]
    assert [entry["episodes/valid"] for entry in steps] == [8, 8] and "outcome/rain" in steps[0] and "outcome/sun" in steps[1]
    assert found["evaluated"]["eval_episodes/valid"] == 3
    # A group of four is played by one process here; each has written its own episodes.
    for rank, tag in ((0, {"rain", "sun"}), (1, {"rain", "sun"})):
        lines = (run / "traces" / f"step-000002.rank-{rank}.jsonl").read_text().splitlines()
        assert len(lines) == 4 and {json.loads(line)["tag"] for line in lines} < tag
    assert (run / "checkpoint-2" / "COMPLETE").exists()

    whole = load_file(run / "model.safetensors")
    (run / "checkpoint-2" / "COMPLETE").unlink()
    launch(script, str(run), "resume")
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert json.loads((run / "found.json").read_text())["evaluated"] == found["evaluated"]


def test_parts_of_a_step_and_the_next_step_on_two_processes(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(SCRIPT)
    launch(script, str(run := tmp_path / "run"), "ahead")
    found = json.loads((run / "found.json").read_text())
    steps = [entry for entry in found["log"] if "outcome/all" in entry]
    assert found["processes"] == 2 and [entry["episodes/valid"] for entry in steps] == [18] * 3
    assert [entry["overlap/staleness"] for entry in steps] == [0, 1, 1]
    assert [entry["trained_tokens"] for entry in steps] == [18 * 2 * 4] * 3
    for step, version in ((1, 0), (2, 0), (3, 1)):
        files = [run / "traces" / f"step-{step:06d}.rank-{rank}.jsonl" for rank in (0, 1)]
        episodes = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        assert [len(mine) for mine in episodes] == [9, 9]
        both = {(e["group"], e["rollout"]) for mine in episodes for e in mine}
        assert len(both) == 18 and {e["version"] for mine in episodes for e in mine} == {version}
        assert all("credit" in turn for mine in episodes for e in mine for turn in e["turns"])
