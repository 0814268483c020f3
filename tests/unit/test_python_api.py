"""What TRL users do with a trainer, tried one by one with CTCGRPOTrainer on a tiny policy."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
from ctcgrpo.config import WITHOUT_EFFECT, without_effect
from ctcgrpo.errors import CreditError, OutputError, PolicyError, RecipeError, TooManyFailures
from ctcgrpo.training.trainer import INSTEAD
from ctcgrpo.types import Task
from ctcgrpo.util.files import is_complete
from tests.conftest import ROOT


class Count(Environment):
    """Two turns; pays for characters. Plain methods."""

    def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
        self.task, self.turns = task, 0
        return f"Say something about {task['topic']}."

    def step(self, reply: str) -> Step:
        self.turns += 1
        return Step("More.", reward=len(reply) / 100, done=self.turns == 2, info={"turns": self.turns})


TASKS = [{"topic": "rain", "tag": "wet"}, {"topic": "sun", "tag": "dry"}]


def config(folder: Path, **options: Any) -> CTCGRPOConfig:
    defaults = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_turns": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return CTCGRPOConfig(str(folder), **defaults | options)


def trainer(folder: Path, environment: Any = Count, tasks: Any = TASKS, model: Any = "builtin/tiny", **parts: Any) -> Any:
    options = {k: parts.pop(k) for k in list(parts) if k in CTCGRPOConfig.__dataclass_fields__}
    return CTCGRPOTrainer(model, config(folder, **options), environment, tasks, **parts)


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def logged(made: Any, name: str) -> list[Any]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def traced(folder: Path, name: str = "step-000001") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "traces" / f"{name}.rank-0.jsonl").read_text().splitlines()]


# --- data ----------------------------------------------------------------------------------------------------------------


def test_all_columns_of_a_data_set_reach_the_environment(tmp_path: Path) -> None:
    rows = [
        {"id": f"t{k}", "topic": "rain", "prompt": [{"role": "user", "content": "Hi."}], "more": {"a": [k, 1]}, "n": k}
        for k in range(2)
    ]
    seen: list[Mapping[str, Any]] = []

    class Look(Count):
        def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
            seen.append(task)
            return super().reset(task, seed=seed)

    made = trainer(tmp_path, Look, Dataset.from_list(rows), max_steps=1)
    made.train()
    assert sorted(seen, key=lambda task: str(task["id"])) == [rows[0], rows[0], rows[1], rows[1]]
    assert {line["task"] for line in traced(tmp_path)} == {"t0", "t1"}


def test_epochs_count_tasks(tmp_path: Path) -> None:
    made = trainer(tmp_path, tasks=TASKS * 2, max_steps=-1, num_train_epochs=3, shuffle_dataset=False)
    assert made.args.max_steps == 6 and [row["task"] for row in made.train_dataset] == [0, 1, 2, 3] * 3


def test_arguments_can_be_used_again(tmp_path: Path) -> None:
    """What a trainer derives from its data stays its own."""
    args = config(tmp_path, max_steps=-1, num_train_epochs=1)
    first = CTCGRPOTrainer("builtin/tiny", args, Count, TASKS * 6)
    again = CTCGRPOTrainer("builtin/tiny", args, Count, TASKS * 2)
    assert (first.args.max_steps, again.args.max_steps, args.max_steps) == (6, 2, -1)
    orders = {tuple(row["task"] for row in first.train_dataset), tuple(range(12))}
    assert len(orders) == 2  # shuffled


def test_the_order_of_tasks_has_a_seed_of_its_own(tmp_path: Path) -> None:
    def order(**seeds: int) -> list[int]:
        made = trainer(tmp_path, tasks=[{"topic": str(k)} for k in range(8)], max_steps=4, **seeds)
        return [row["task"] for row in made.train_dataset]

    assert order(seed=1) == order(seed=2, data_seed=1) != order(seed=2)


def test_every_step_plays_equally_many_tasks_of_each_tag(tmp_path: Path) -> None:
    tasks = [{"topic": str(k), "tag": "rare" if k == 0 else "frequent"} for k in range(7)]
    made = trainer(tmp_path, tasks=Dataset.from_list(tasks))
    made.train()
    for step in (1, 2):
        assert sorted(line["tag"] for line in traced(tmp_path, f"step-{step:06d}")) == ["frequent"] * 2 + ["rare"] * 2
    assert logged(made, "outcome/rare") and logged(made, "outcome/frequent")
    expected = (
        r"3 tasks a step \(per_device_train_batch_size x processes / num_generations\) for 2 tags \(frequent, rare\); "
        "expected a multiple of 2: .* set per_device_train_batch_size x processes to a multiple of 2 x num_generations"
    )
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, tasks=tasks, per_device_train_batch_size=6)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (
            {"tasks": {"train": TASKS}},
            TypeError,
            "train_dataset is a dict; expected a datasets.Dataset or a list of mappings",
        ),
        ({"tasks": ["rain"]}, TypeError, r"train_dataset\[0\] is a str; expected a mapping"),
        ({"tasks": []}, ValueError, "train_dataset is empty"),
        ({"tasks": [{"id": 1}, {"id": 1}]}, ValueError, "train_dataset: duplicate task id"),
        ({"eval_dataset": "held out"}, TypeError, r"eval_dataset\[0\] is a str"),
        ({"environment": None}, TypeError, "environment is None; expected a class or a function"),
        (
            {"environment": None, "reward_funcs": len},
            TypeError,
            r"does not take reward_funcs; instead pass environment=MyEnvironment, whose Step.reward and outcome",
        ),
        ({"rewards": len}, TypeError, "CTCGRPOTrainer does not take rewards$"),
        ({"credit": "absent_m:f"}, RecipeError, "^credit = 'absent_m:f': there is no module 'absent_m'"),
        ({"credit": "reward_togo"}, ValueError, "or a custom one as 'my_module:my_function'; did you mean 'reward_to_go'"),
        ({"centering": len}, ValueError, r"or a custom one as .* \(settings are recorded as text, so pass a name"),
        ({"scale_rewards": "math:sqrt"}, CreditError, "^scale_rewards = 'math:sqrt' raised TypeError"),
        ({"model": "builtin/tony"}, PolicyError, "model = 'builtin/tony'; did you mean 'builtin/tiny'"),
        ({"max_completion_length": 5000}, ValueError, "max_completion_length = 5000; expected less than the 4096 positions"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, parts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, **parts)
    with pytest.raises(TypeError, match="args is a GRPOConfig; expected a CTCGRPOConfig"):
        CTCGRPOTrainer("builtin/tiny", GRPOConfig(str(tmp_path), bf16=False, use_cpu=True), Count, TASKS)  # type: ignore[arg-type]


# --- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "scale"), [(True, "group"), (False, "none")])
def test_scale_rewards_is_a_bool_too_as_in_trl(tmp_path: Path, given: bool, scale: str) -> None:
    assert config(tmp_path, scale_rewards=given).scale_rewards == scale


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_model_object(tmp_path: Path, tiny: Path, tokenizer: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(tmp_path, model=model, processing_class=AutoTokenizer.from_pretrained(tiny) if tokenizer else None)
    made.train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())  # it is trained in place


def test_a_model_without_a_name_needs_its_tokenizer(tmp_path: Path, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="the model has no name to load its tokenizer by; pass processing_class"):
        trainer(tmp_path, model=model)


def test_peft(tmp_path: Path, tiny: Path) -> None:
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trainer(tmp_path, model=str(tiny), peft_config=adapter, save_strategy="steps", save_steps=1, max_steps=2)
    before = weights(made)
    made.train()
    moved = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    made.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter").state_dict()
    assert all(torch.equal(value, made.model.state_dict()[name]) for name, value in loaded.items())
    # A second run on it passes the comparison of packed and plain log-probabilities, in which dropout would be noise.
    made = trainer(tmp_path, model=str(tiny), peft_config=adapter, save_strategy="steps", save_steps=1, max_steps=3)
    made.train(resume_from_checkpoint=True)
    assert logged(made, "packing/logprob_gap")[-1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("cast", [True, False])
def test_the_head_in_float32(tmp_path: Path, tiny: Path, cast: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    made = trainer(tmp_path, model=model, cast_lm_head_to_fp32=cast, processing_class=AutoTokenizer.from_pretrained(tiny))
    made.train()
    assert (made.model.lm_head.weight.dtype == torch.float32) == cast
    assert max(logged(made, "logprob_gap")) < 0.2


def test_the_reference_policy_follows_where_asked(tmp_path: Path) -> None:
    kl: dict[bool, float] = {}
    for follows in (False, True):
        options = {"sync_ref_model": follows, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
        made = trainer(tmp_path, beta=0.1, max_steps=4, lr_scheduler_type="constant", **options)
        made.train()
        assert logged(made, "kl")[0] == pytest.approx(0, abs=1e-6)
        kl[follows] = logged(made, "kl")[-1]
    assert kl[True] < kl[False] / 2


# --- following a run -----------------------------------------------------------------------------------------------------


def test_callbacks_are_classes_or_instances(tmp_path: Path) -> None:
    events: list[str] = []

    class Note(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("begin")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            events.append(f"outcome at {state.global_step}" if "outcome/all" in logs else "log")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    made = trainer(tmp_path, callbacks=[Note, Stop()])
    made.train()
    assert events == ["begin", "outcome at 1", "log"] and made.state.global_step == 1


def test_tensorboard(tmp_path: Path) -> None:
    trainer(tmp_path, report_to="tensorboard", eval_dataset=TASKS, eval_strategy="steps", eval_steps=2).train()
    (file,) = (tmp_path / "runs").rglob("events.*")
    found = {(value.tag, event.step) for event in events_of(file) for value in event.summary.value}
    assert {("train/outcome/all", 1), ("train/outcome/wet", 2), ("train/credit/turn_term_std", 2)} <= found
    assert ("eval/outcome/all", 2) in found


def events_of(file: Path) -> list[Event]:
    """Records of a length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, events = file.read_bytes(), []
    assert RecordWriter is not None
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_an_evaluation_takes_nothing_from_the_log_of_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_steps=2, max_steps=4, eval_dataset=TASKS, eval_strategy="steps", eval_steps=1)
    made.train()
    evaluations = [entry for entry in made.state.log_history if "eval_outcome/all" in entry]
    assert len(evaluations) == 4 and not any("outcome/all" in entry or "seconds/update" in entry for entry in evaluations)
    steps = [entry for entry in made.state.log_history if "outcome/all" in entry]
    means = [traced(tmp_path, f"step-{k:06d}") for k in range(1, 5)]
    outcome = [sum(line["outcome"] for line in lines) / len(lines) for lines in means]
    assert [entry["outcome/all"] for entry in steps] == pytest.approx([sum(outcome[:2]) / 2, sum(outcome[2:]) / 2])


def test_evaluate_plays_held_out_tasks(tmp_path: Path) -> None:
    made = trainer(tmp_path, num_generations_eval=3, eval_strategy="steps", eval_steps=1, eval_dataset=TASKS[:1])
    first, again = made.evaluate(), made.evaluate()
    assert first["eval_episodes/valid"] == 3 and first["eval_outcome/all"] == first["eval_outcome/wet"]
    assert first == again  # the same seeds
    other = made.evaluate([{"topic": "snow", "tag": "cold"}], metric_key_prefix="test")
    assert "test_outcome/cold" in other and len(traced(tmp_path, "test-000000")) == 3
    assert not made.model.training
    with pytest.raises(ValueError, match="no eval_dataset; pass one to the trainer"):
        trainer(tmp_path).evaluate()
    with pytest.raises(TypeError, match=r"predict is not supported: episodes have no labels; use evaluate"):
        made.predict(TASKS)


def test_running_inside_an_event_loop(tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell() -> Any:
        made = trainer(tmp_path, eval_dataset=TASKS)
        made.train()
        return made.evaluate()

    assert asyncio.run(cell())["eval_episodes/valid"] == 2


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_path", [True, False])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path, by_path: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "deterministic": True, "centering": "scene", "num_iterations": 2}
    whole = trainer(tmp_path / "whole", max_steps=6, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    (tmp_path / "resumed" / "checkpoint-4" / "COMPLETE").unlink()  # passed over
    resumed = trainer(tmp_path / "resumed", max_steps=6, **options)
    path = str(tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=path if by_path else True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == list(range(1, 7))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert is_complete(tmp_path / "resumed" / "checkpoint-4") and is_complete(tmp_path / "resumed" / "checkpoint-6")


def test_another_credit_does_not_resume(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    for options, change in (
        ({"centering": "scene"}, "centering: rollout -> scene"),
        ({"credit": "reward_to_go", "alpha": 1.0}, "alpha: 15.0 -> 1.0; credit: immediate -> reward_to_go"),
    ):
        with pytest.raises(OutputError, match=rf"checkpoint-1 was saved with another credit \({change}\); undo the change"):
            trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_tied_head_is_not_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    assert made.model.all_tied_weights_keys
    caplog.clear()
    made.train(resume_from_checkpoint=True)
    assert not [record.message for record in caplog.records if "missing keys" in record.message]


def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(
        tmp_path,
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_dataset=TASKS,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_outcome/all",
        load_best_model_at_end=True,
    )
    scores, plain = iter([0.1, 0.9, 0.3, 0.2, 0.1]), made.evaluate

    def evaluate(**options: Any) -> dict[str, float]:
        return plain(**options) | {"eval_outcome/all": next(scores)}

    monkeypatch.setattr(made, "evaluate", evaluate)
    made.train()
    assert made.args.greater_is_better and Path(made.state.best_model_checkpoint).name == "checkpoint-2"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in made.model.state_dict().items())
    # What is sampled now is sampled from them, although the number of the step is that of the last ones.
    assert made.engine.version is None


def test_save_model_writes_what_transformers_loads(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    made.save_model(str(tmp_path / "mine"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert all(torch.equal(p, weights(made)[name]) for name, p in loaded.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template


class Hub:
    """What would be uploaded, at the edge of huggingface_hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uploads: list[dict[str, Any]] = []

        def create_repo(api: Any, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(api: Any, *, folder_path: str, ignore_patterns: Any = None, **options: Any) -> Any:
            folder = Path(folder_path)
            files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
            card = folder / "README.md"
            self.uploads.append(options | {"files": files, "card": card.read_text() if card.exists() else ""})
            return type("Done", (), {"done": lambda self: True, "result": lambda self: None})()

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


_POLICY = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


def test_push_to_hub(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    made = trainer(tmp_path / "my-run", report_to="tensorboard")
    made.train()
    made.push_to_hub()
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/my-run" and upload["commit_message"] == "End of training"
    assert upload["files"] >= _POLICY and any(name.startswith("runs/") for name in upload["files"])
    assert not any("traces" in name or "base" in name or "jsonl" in name for name in upload["files"])
    card = " ".join(upload["card"].split())
    assert "Model Card for my-run" in card and "fine-tuned version of `builtin/tiny`" in card
    assert "trained with CTC-GRPO, a method introduced in [the EIBench paper](https://huggingface.co/papers/2606.15532)" in card
    assert "DeepSeekMath" not in card and "- ctcgrpo" in upload["card"] and "base_model: None" not in upload["card"]
    assert made.args.output_dir == str(tmp_path / "my-run")


def test_a_base_model_from_the_hub_is_named(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config._name_or_path = model.name_or_path = "Qwen/Qwen3-0.6B"
    made = trainer(tmp_path, model=model, processing_class=AutoTokenizer.from_pretrained(tiny), hub_model_id="lab/name")
    made.push_to_hub()
    assert "base_model: Qwen/Qwen3-0.6B" in hub.uploads[0]["card"] and "Model Card for name" in hub.uploads[0]["card"]


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_pushing_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    hub = Hub(monkeypatch)
    made = trainer(tmp_path, push_to_hub=True, hub_strategy=strategy, hub_always_push=True, save_strategy="steps", save_steps=1)
    made.train()
    policies = [upload for upload in hub.uploads if "path_in_repo" not in upload]
    assert len(policies) == 2 and all(upload["files"] >= _POLICY for upload in policies)
    assert all("Model Card for test_pushing" in upload["card"] for upload in policies)
    assert not any("traces" in name for upload in hub.uploads for name in upload["files"])
    pushed = [upload for upload in hub.uploads if "path_in_repo" in upload]
    assert [upload["path_in_repo"] for upload in pushed] == (["checkpoint-1", "checkpoint-2"] if "all" in strategy else [])
    assert all("COMPLETE" in upload["files"] for upload in pushed)


# --- environments that misbehave -----------------------------------------------------------------------------------------


class Broken(Count):
    """One of a group's episodes goes wrong, in the way that `how` says."""

    how = ""
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.broken = self.made % 4 == 1
        if self.broken and self.how == "constructor":
            raise OSError("no display")

    def step(self, reply: str) -> Step:
        if self.broken and self.how == "raises":
            raise KeyError("lost")
        if self.broken and self.how == "hangs":
            time.sleep(5)
        step = super().step(reply)
        return Step(step.message, math.nan, step.done) if self.broken and self.how == "nan" else step


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "turn 1: step raised KeyError: 'lost'"),
        ("hangs", "turn 1: step exceeded its timeout of 0.5 s"),
        ("nan", "turn 1: step returned a reward of nan; expected a finite number or None"),
        ("constructor", "turn 1: the environment's constructor raised OSError: no display"),
    ],
)
def test_a_broken_episode_is_a_failed_one(tmp_path: Path, how: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    environment = type("OneBroken", (Broken,), {"how": how, "made": 0})
    made = trainer(tmp_path, environment, environment_timeout=0.5 if how == "hangs" else 60, max_steps=2, tasks=TASKS)
    before = weights(made)
    made.train()
    assert made.state.global_step == 2 and logged(made, "failed/environment") == [1, 1]
    (failure,) = [line["failure"] for line in traced(tmp_path) if line["failure"]]
    assert failure["kind"] == "environment" and failure["message"].startswith(reason)
    shown = [record.message for record in caplog.records if "failed: environment" in record.message]
    assert len(shown) == 2 and failure["message"] in shown[0]  # a line an episode, without another set-up of logging
    assert all(bool(torch.isfinite(p).all()) for p in weights(made).values())
    assert any(not torch.equal(before[name], value) for name, value in weights(made).items())


def test_too_many_failed_episodes_stop_the_run(tmp_path: Path) -> None:
    class Gone(Count):
        def reset(self, task: Mapping[str, Any], *, seed: int) -> str:
            if made.state.global_step == 1:
                raise ConnectionError("the game server is gone")
            return super().reset(task, seed=seed)

    made = trainer(tmp_path, Gone, save_strategy="steps", save_steps=1, max_failed=0.25)
    with pytest.raises(TooManyFailures) as raised:
        made.train()
    assert "step 2: 4 of 4 episodes failed ({'environment': 4}), above max_failed = 0.25" in str(raised.value)
    assert "ConnectionError: the game server is gone" in str(raised.value) and is_complete(tmp_path / "checkpoint-1")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("in_notebook", [False, True])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_training_at_once_and_closes_episodes(tmp_path: Path, in_notebook: bool) -> None:
    closed, pressed = [], threading.Event()

    class Slow(Count):
        async def step(self, reply: str) -> Step:  # type: ignore[override]
            if not pressed.is_set() and made.state.global_step == 1:
                pressed.set()
                os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(20 if pressed.is_set() and made.state.global_step == 1 and not closed else 0)
            return Count.step(self, reply)

        def close(self) -> None:
            if pressed.is_set():
                closed.append(1)

    made = trainer(tmp_path, Slow, save_strategy="steps", save_steps=1, max_steps=3)
    started = time.monotonic()

    async def cell() -> None:
        made.train()

    with pytest.raises(KeyboardInterrupt):
        asyncio.new_event_loop().run_until_complete(cell()) if in_notebook else made.train()
    assert time.monotonic() - started < 15 and len(closed) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "episodes"]
    made.train(resume_from_checkpoint=True)  # from the checkpoint before
    assert made.state.global_step == 3


# --- options -------------------------------------------------------------------------------------------------------------


def test_importance_weights_are_on_by_default_with_vllm_as_in_trl() -> None:
    def config(**options: Any) -> CTCGRPOConfig:
        return CTCGRPOConfig("out", bf16=False, num_generations=2, per_device_train_batch_size=2, **options)

    assert config().importance_level == "none" and config(use_vllm=True).importance_level == "token"
    assert config(use_vllm=True, top_k=20).importance_level == "none"
    assert config(use_vllm=True, old_logprobs="recorded").importance_level == "none"
    assert config(use_vllm=True, top_p=0.9, importance="turn").importance_level == "turn"
    with pytest.raises(ValueError, match="whose ratio contains the importance weight already"):
        config(importance="token", old_logprobs="recorded")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_fields_without_effect_are_refused_by_name(tmp_path: Path, name: str) -> None:
    default = without_effect()[name]
    values: dict[type, Callable[[], Any]] = {
        bool: lambda: not default,
        int: lambda: default + 1,
        float: lambda: default + 0.5,
    }
    value = values.get(type(default), lambda: "something")()
    with pytest.raises(ValueError, match=f"CTCGRPOConfig.{name} = .* has no effect: .*; leave it out"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps and steps_per_generation must be 1"),
        ({"alpha": -1.0}, "CTCGRPOConfig.alpha = -1.0; expected a number >= 0"),
        ({"num_iterations": 3}, "num_iterations = 3; expected a divisor of num_generations"),
        ({"optim": "galore_adamw_layerwise"}, "optim = .*; expected an optimizer that updates once per step"),
        ({"optim": "schedule_free_adamw"}, "optim = .*; expected an optimizer that updates once per step"),
        ({"save_strategy": "epoch"}, r"save_strategy = 'epoch'; expected 'steps' \(and save_steps\)"),
        ({"eval_strategy": "epoch"}, r"eval_strategy = 'epoch'; expected 'steps' \(and eval_steps\)"),
        (
            {"save_strategy": "steps", "save_steps": 3, "num_iterations": 2},
            "save_steps = 3; expected a multiple of num_iterations",
        ),
        (
            {"per_device_train_batch_size": 3},
            r"per_device_train_batch_size x processes = 3 x 1 = 3 episodes a step; expected a multiple of num_generations \(2\)",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_every_argument_of_grpo_trainer_is_taken_or_named() -> None:
    theirs, ours = (set(inspect.signature(made.__init__).parameters) for made in (GRPOTrainer, CTCGRPOTrainer))
    assert theirs - ours == set(INSTEAD)


@pytest.mark.filterwarnings("error::FutureWarning", "error::UserWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_warns_of_nothing(tmp_path: Path, checkpointing: bool) -> None:
    made = trainer(tmp_path, **({} if checkpointing else {"gradient_checkpointing": False}))  # True is TRL's default
    made.train()
    assert made.args.gradient_checkpointing == checkpointing


def test_every_other_field_of_grpo_config_is_decided() -> None:
    """A field that a later release adds has to be looked at: it may be read by nothing here."""
    assert set(GRPOConfig.__dataclass_fields__) - set(WITHOUT_EFFECT) == {
        name for names in HEEDED.values() for name in names.split()
    }


HEEDED = {
    "here": """num_generations num_generations_eval max_completion_length temperature top_p top_k chat_template_kwargs
        shuffle_dataset data_seed seed num_iterations epsilon beta entropy_coef scale_rewards steps_per_generation
        gradient_accumulation_steps max_steps num_train_epochs per_device_train_batch_size use_vllm vllm_mode
        vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
        vllm_gpu_memory_utilization model_init_kwargs trust_remote_code output_dir run_name""",
    "TRL's trainer": "disable_dropout cast_lm_head_to_fp32 sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "transformers: the update": """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
        optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 tf32 gradient_checkpointing
        gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs full_determinism use_cpu""",
    "transformers: processes": """parallelism_config fsdp fsdp_config deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank dataloader_pin_memory""",
    "transformers: logs": """logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
        log_level_replica disable_tqdm report_to project trackio_space_id trackio_bucket_id trackio_static_space_id debug
        skip_memory_metrics""",
    "transformers: evaluation and checkpoints": """eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end
        metric_for_best_model greater_is_better save_strategy save_steps save_total_limit save_only_model save_on_each_node
        ignore_data_skip restore_callback_states_from_checkpoint""",
    "transformers: the Hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "for scripts alone, as in transformers": "do_train do_eval do_predict resume_from_checkpoint",
}


def test_tasks_of_one_s_own_type(tmp_path: Path) -> None:
    made = trainer(tmp_path, tasks=[Task("a", {"topic": "rain"}, "all"), Task("b", {"topic": "sun"}, "all")], max_steps=1)
    made.train()
    assert {line["task"] for line in traced(tmp_path)} == {"a", "b"}


def test_several_updates_of_a_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, num_iterations=2, max_steps=4, max_failed=1.0)
    made.train()
    assert made.state.global_step == 4 and len(list((tmp_path / "traces").glob("step-*"))) == 2
    assert logged(made, "policy_version") == [0, 2]


def test_what_the_readme_shows_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(from ctcgrpo import CTCGRPOConfig.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    text = code[1].replace("Qwen/Qwen3-0.6B", "builtin/tiny").replace("checkpoints/polite", str(tmp_path)).replace("128", "8")
    exec(compile(text, "README.md", "exec"), found := {"__name__": "readme"})
    assert found["trainer"].state.global_step == 6  # three epochs of two tasks
    assert all(len(episode["turns"]) == 3 for episode in traced(tmp_path))
