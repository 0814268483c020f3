"""Episodes of the next step are played while a step's updates run, from one version of the weights, and none is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment, Step
from ctcgrpo.errors import PolicyEngineError, RecipeError, RunInterrupted, TooManyFailures
from ctcgrpo.run.progress import RunProgress
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.train import train
from ctcgrpo.training.ahead import PlayingAhead
from ctcgrpo.training.playing import PLAYING, RolloutHooks
from ctcgrpo.types import TurnSample

ROOT = Path(__file__).parents[2]
TASKS = [{"id": f"t{k}", "words": f"Say {k}."} for k in range(8)]
PATIENCE = 60.0


class Talk(Environment):
    """Two turns; a reply earns what its length says."""

    began: threading.Event
    steps_begun: set[int]

    async def reset(self, task: Any, *, seed: int) -> str:
        self.turns = 0
        Talk.steps_begun.add(int(self.name.split("/")[0]) if self.name[0].isdigit() else 0)
        Talk.began.set()
        await asyncio.sleep(0)
        return str(task["words"])

    def step(self, reply: str) -> Step:
        self.turns += 1
        return Step("And?", reward=len(reply) / 50, done=self.turns == 2)


@pytest.fixture(autouse=True)
def nothing_begun() -> None:
    Talk.began, Talk.steps_begun = threading.Event(), set()


def trainer(folder: Path, hooks: RolloutHooks | None = None, environment: Any = Talk, **options: Any) -> CTCGRPOTrainer:
    defaults: dict[str, Any] = {
        "overlap": 1,
        "sampling_dtype": "bfloat16",
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_turns": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return CTCGRPOTrainer(
        "builtin/tiny",
        args=CTCGRPOConfig(str(folder), **defaults | options),
        environment=environment,
        train_dataset=TASKS,
        eval_dataset=TASKS[:2],
        **({"hooks": hooks} if hooks else {}),
    )


def traces(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The episodes of each step."""
    files = sorted((folder / "traces").glob("step-*"))
    return {int(f.stem.split("-")[1].split(".")[0]): [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def logged(made: CTCGRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


@pytest.mark.parametrize("overlap", [1, 0])
def test_the_next_step_is_played_while_the_update_runs(tmp_path: Path, overlap: int) -> None:
    made = trainer(tmp_path, overlap=overlap, max_steps=3)
    update, seen = made.update, []

    def slow_update(*args: Any) -> torch.Tensor:
        """Ends only once an episode of the next step has begun, if one may."""
        step = made.rollout_step + 1
        if overlap and step < 3:
            while step + 1 not in Talk.steps_begun:
                assert Talk.began.wait(PATIENCE)
                Talk.began.clear()
        seen.append(max(Talk.steps_begun))
        return update(*args)

    made.update = slow_update  # type: ignore[method-assign]
    made.train()
    assert seen == ([2, 3, 3] if overlap else [1, 2, 3])
    assert logged(made, "policy_version") == ([0, 0, 1] if overlap else [0, 1, 2])
    assert logged(made, "overlap/staleness") == ([0, 1, 1] if overlap else [])
    assert all(0 <= share <= 1 for share in logged(made, "overlap/share"))
    assert len(logged(made, "overlap/engine_waited")) == (2 if overlap else 0)
    assert ("importance/mean" in made.state.log_history[0]) == bool(overlap)


def test_a_batch_comes_from_one_version_and_every_task_is_played_once(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3, learning_rate=1e-3, save_strategy="steps", save_steps=1, save_total_limit=9)
    parts: dict[int, list[Any]] = {}
    new_batch = made._new_batch

    def keep(*args: Any) -> Any:
        parts[made.rollout_step + 1] = (found := new_batch(*args))[0]
        return found

    made._new_batch = keep  # type: ignore[method-assign]
    made.engine._batcher._dtype = torch.float32  # of the engine's copy: exact, so that versions are told apart
    made.train()
    played = traces(tmp_path)
    assert sorted(played) == [1, 2, 3] and all(len(episodes) == 4 for episodes in played.values())
    assert [{e["version"] for e in played[k]} for k in (1, 2, 3)] == [{0}, {0}, {1}]
    assert sorted(e["task"] for step in played.values() for e in step)[::2] == sorted(
        {e["task"] for s in played.values() for e in s}
    )
    assert all(turn["credit"] for step in played.values() for e in step for turn in e["turns"])
    # Step 3 was sampled from the weights after one update, and not from those that it trained (after two).
    models = {k: AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{k}", dtype="float32").eval() for k in (1, 2)}
    gaps = dict.fromkeys(models, 0.0)
    for sample in parts[3]:
        ids, n = torch.tensor([[*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()]]), len(sample.completion_ids)
        for k, model in models.items():
            with torch.no_grad():
                scores = model(ids).logits[0, -n - 1 : -1].log_softmax(-1)[range(n), ids[0, -n:]]
            gaps[k] += float((scores - torch.from_numpy(sample.sampled_logprobs)).abs().sum())
    assert gaps[1] < 0.01 < gaps[2], gaps


class Uneven(Talk):
    """Groups of even tasks are over at once. The others wait until gradients of the first part were computed."""

    first_part: threading.Event

    async def reset(self, task: Any, *, seed: int) -> str:
        line = await super().reset(task, seed=seed)
        self.waits = int(task["id"][1:]) % 2
        if self.waits:
            await asyncio.to_thread(Uneven.first_part.wait, PATIENCE)
        return line

    def step(self, reply: str) -> Step:
        """The groups that wait have one turn, the others two."""
        return replace(super().step(reply), done=self.turns == 2 - self.waits)


@pytest.mark.parametrize("overlap", [0, 1])
def test_groups_that_are_over_are_updated_on_while_others_are_played(tmp_path: Path, overlap: int) -> None:
    Uneven.first_part = threading.Event()
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1, "loss_total": 100.0, "shuffle_dataset": False}
    made = trainer(tmp_path / "parts", environment=Uneven, update_parts=2, overlap=overlap, **options)
    updates, gradients = made.update, Gradients()
    made.add_callback(gradients)
    seen: list[tuple[bool, int]] = []

    def update(model: Any, samples: Any, *, is_last: bool = True) -> torch.Tensor:
        seen.append((is_last, len(samples)))
        loss = updates(model, samples, is_last=is_last)
        if not is_last:
            assert made._ahead is not None and made._ahead.ended is None and len(made._ahead.over) == 4
        Uneven.first_part.set()
        return loss

    made.update = update  # type: ignore[method-assign]
    made.train()
    # Two groups of two episodes with two turns come first; then the others, with one turn.
    assert seen == [(False, 8), (True, 4)]
    logs = made.state.log_history[0]
    assert logs["episodes/valid"] == 8 and logs["overlap/trainer_waited"] > 0 and 0 <= logs["overlap/share"] <= 1
    [episodes] = traces(tmp_path / "parts").values()
    assert len(episodes) == 8 and all("credit" in turn for e in episodes for turn in e["turns"])

    # The same episodes in one part have the same gradients, and so have parts in the other order.
    whole = trainer(tmp_path / "whole", environment=Uneven, overlap=overlap, **options)
    whole.add_callback(found := Gradients())
    whole.train()
    same(gradients.found, found.found)
    assert whole.state.log_history[0]["trained_tokens"] == logs["trained_tokens"]
    assert whole.state.log_history[0]["policy_loss"] == pytest.approx(logs["policy_loss"])


class FailsFirst(Talk):
    """The first group of a step fails at once; the others take a while."""

    async def reset(self, task: Any, *, seed: int) -> str:
        line = await super().reset(task, seed=seed)
        if int(task["id"][1:]) % 4 == 0:
            raise OSError("the disk is full")
        await asyncio.sleep(0.3)
        return line


@pytest.mark.parametrize("importance", ["episode", "none"])
def test_a_part_of_failed_groups_is_compared_with_nothing(tmp_path: Path, importance: str) -> None:
    """What is compared once a run waits for a part that has something to compare, and no mean counts the part without."""
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1, "loss_total": 100.0, "shuffle_dataset": False}
    options |= {"overlap": 0, "importance": importance}
    logs = []
    for name, parts in (("parts", 4), ("whole", 1)):
        made = trainer(tmp_path / name, environment=FailsFirst, update_parts=parts, **options)
        made.train()
        logs.append(made.state.log_history[0])
    for metric in ("logprob_gap", "importance/gap", *(["importance/mean"] if importance == "episode" else [])):
        assert logs[0][metric] == pytest.approx(logs[1][metric], rel=0.2), metric


class WaitsAfterTheFirst(Talk):
    async def reset(self, task: Any, *, seed: int) -> str:
        line = await super().reset(task, seed=seed)
        if int(task["id"][1:]) % 4:
            await asyncio.sleep(3600)
        return line


def test_no_part_is_computed_of_an_interrupted_step(tmp_path: Path) -> None:
    class StopsAfterTheFirst(RolloutHooks):
        over, begun = 0, 0

        def rollouts(self, step: int, episodes: int) -> None:
            assert not self.begun
            self.begun = episodes

        def episode(self, episode: Any) -> None:
            self.over += 1

        def interrupted(self) -> bool:
            return self.over == 2

    options: dict[str, Any] = {"per_device_train_batch_size": 8, "loss_total": 100.0, "shuffle_dataset": False, "overlap": 0}
    made = trainer(tmp_path, StopsAfterTheFirst(), WaitsAfterTheFirst, update_parts=2, **options)

    def update(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("an update")

    made.update = update  # type: ignore[method-assign]
    with pytest.raises(RunInterrupted):
        made.train()


class Gradients(TrainerCallback):
    """Those of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.found = self.found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    flat, other = (torch.cat([g.flatten() for g in found.values()]) for found in (a, b))
    return float((flat - other).norm() / flat.norm())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and apart(a, b) < 1e-5


def test_parts_divided_by_what_comes_favour_the_first_and_by_a_fixed_total_they_do_not(tmp_path: Path) -> None:
    """Groups of short replies are over first. Were each part divided by its own tokens, a token of theirs would weigh more."""
    options: dict[str, Any] = {"max_steps": 1, "overlap": 0, "loss_total": 100.0, "entropy_coef": 0.0}
    made = trainer(tmp_path, **options)
    rng = random.Random(3)

    def some(tokens: int, advantage: float) -> TurnSample:
        ids = [rng.randrange(20, 900) for _ in range(10 + tokens)]
        return TurnSample(np.array(ids[:10]), np.array(ids[10:]), advantage)

    short = [some(2, 1.0) for _ in range(4)]
    long = [some(30, -1.0) for _ in range(4)]

    def gradients(*parts: list[TurnSample], total: float | None = 100.0) -> dict[str, torch.Tensor]:
        made.model.zero_grad()
        made.args.loss_total = total
        made.begin_update()
        for k, part in enumerate(parts, 1):
            made.update(made.model, part, is_last=k == len(parts))
        return {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}

    whole = gradients(short + long)
    same(whole, gradients(short, long))
    same(whole, gradients(long, short))
    same(whole, gradients(short[:1] + long[2:], [], long[:2] + short[1:], []))
    tokens = sum(len(sample.completion_ids) for sample in short + long)
    same({n: g * 100 / tokens for n, g in whole.items()}, gradients(short + long, total=None))
    biased = gradients(short, long, total=None)
    alone = [gradients(part, total=None) for part in (short, long)]
    same({n: alone[0][n] + alone[1][n] for n in biased}, biased)
    assert apart(whole, {n: g * 100 / tokens for n, g in biased.items()}) > 0.3


def test_what_excludes_parts_is_named(tmp_path: Path) -> None:
    for options, message in (
        ({"sampling_dtype": "policy", "overlap": 0}, "update_parts = 2 needs an engine with weights of its own"),
        ({"loss_total": None}, "update_parts = 2 needs loss_total: .* take the metric trained_tokens"),
        (
            {"overlap": 0, "deterministic": True},
            "update_parts = 2 depends on the clock, and deterministic needs runs that repeat",
        ),
        ({"update_parts": 3}, "update_parts = 3 with 2 groups a step"),
        ({"num_iterations": 2}, "update_parts = 2 with num_iterations = 2, which needs all episodes of a step at once"),
        ({"credit": "vine"}, "update_parts = 2 with credit = 'vine', which needs all episodes of a step at once"),
        ({"turn_scale": "batch"}, "update_parts = 2 with turn_scale = 'batch', which needs all episodes of a step at once"),
        ({"scale_rewards": "my_credit:by_range"}, "update_parts = 2 with scale_rewards = 'my_credit:by_range', which needs all"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **{"update_parts": 2, "loss_total": 50.0, **options})
    tiny = [ROOT / "recipes" / "tiny.yaml", ["training.update_parts=2", "rollout.deterministic=false", "rollout.dtype=bfloat16"]]
    with pytest.raises(RecipeError, match="training.update_parts = 2 needs training.loss_total"):
        load_recipe(*tiny)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="training.update_parts = 5 with 4 groups a step"):
        many = ["training.loss_total=9", "training.update_parts=5", "training.updates_per_step=1"]
        load_recipe(tiny[0], [*tiny[1], *many])  # type: ignore[list-item, arg-type]
    with pytest.raises(RecipeError, match="training.update_parts = 2 with training.updates_per_step = 2"):
        load_recipe(tiny[0], [*tiny[1], "training.loss_total=9", "training.updates_per_step=2"])  # type: ignore[list-item, arg-type]


class StopsDuring(RolloutHooks):
    """Asks to stop once an episode of a step has begun."""

    def __init__(self, step: int) -> None:
        self.step = step

    def interrupted(self) -> bool:
        return self.step in Talk.steps_begun


class Waits(Talk):
    """Its third step does not end until it is cancelled."""

    async def reset(self, task: Any, *, seed: int) -> str:
        line = await super().reset(task, seed=seed)
        if self.name.startswith("3/"):
            await asyncio.sleep(3600)
        return line


def test_a_stopped_run_plays_what_was_ahead_again(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    stopped = trainer(tmp_path, hooks=StopsDuring(3), environment=Waits, **options)
    try:
        stopped.train()
    except RunInterrupted:
        stopped.save_now()
    # Step 2 was trained or about to be; step 3 was in progress, and left no episodes that were not trained on.
    reached = stopped.state.global_step
    assert reached in (1, 2) and not [t for t in threading.enumerate() if t.name == "rollouts"]
    assert all(e["version"] is not None for e in traces(tmp_path).get(3, []))
    Talk.steps_begun.clear()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and min(Talk.steps_begun) == reached + 1
    played = traces(tmp_path)
    assert sorted(played) == [1, 2, 3, 4] and all(len(episodes) == 4 for episodes in played.values())
    assert {e["version"] for e in played[reached + 1]} == {reached}  # again, with the newest weights


def test_an_error_in_the_trainer_ends_the_batch_ahead(tmp_path: Path) -> None:
    made = trainer(tmp_path, environment=Waits)

    def fails(*args: Any) -> torch.Tensor:
        if made.rollout_step == 1:
            raise ValueError("an error of the update")
        return update(*args)

    update, made.update = made.update, fails  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="an error of the update"):
        made.train()
    assert not [t for t in threading.enumerate() if t.name == "rollouts"] and sorted(traces(tmp_path)) == [1, 2]


class Breaks(Talk):
    def step(self, reply: str) -> Step:
        if self.name.startswith("2/"):
            raise OSError("the disk is full")
        return super().step(reply)


def test_failures_of_a_batch_ahead_are_those_of_its_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, environment=Breaks)
    with pytest.raises(TooManyFailures, match="step 2: 4 of 4 episodes failed.*the disk is full"):
        made.train()
    assert made.state.global_step == 1


def test_evaluations_use_current_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, num_iterations=1)
    made.train()
    files = sorted((tmp_path / "traces").glob("eval-*"))
    assert [{json.loads(line)["version"] for line in f.read_text().splitlines()} for f in files] == [{1}, {2}, {3}]
    assert sorted(traces(tmp_path)) == [1, 2, 3] and len(logged(made, "eval_outcome/all")) == 3


def test_the_engine_does_not_wait_during_an_evaluation(tmp_path: Path) -> None:
    class Slow(Talk):
        evaluates = False

        async def reset(self, task: Any, *, seed: int) -> str:
            await asyncio.sleep(2.0 * Slow.evaluates)
            return await super().reset(task, seed=seed)

    made = trainer(tmp_path, environment=Slow, max_steps=3, eval_strategy="steps", eval_steps=1)
    evaluate = made.evaluate

    def slowly(*args: Any, **kwargs: Any) -> dict[str, float]:
        made.await_ahead()
        Slow.evaluates = True
        try:
            return evaluate(*args, **kwargs)
        finally:
            Slow.evaluates = False

    made.evaluate = slowly  # type: ignore[method-assign]
    made.train()
    assert max(logged(made, "overlap/engine_waited")) < 2.0


def test_a_validation_is_shown_once_the_batch_ahead_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is shown would be the batch ahead, with episodes of the validation."""
    shown: list[str] = []
    for name in ("validation", "rollouts", "update"):
        monkeypatch.setattr(RunProgress, name, lambda *_, name=name: shown.append(name))
    overrides = [f"run.output_dir={tmp_path}", "training.max_steps=2", "validation.every=1", "rollout.overlap=1"]
    overrides += ["rollout.deterministic=false", "rollout.dtype=bfloat16", "validation.scenarios=english/test"]
    train(load_recipe(ROOT / "recipes" / "tiny.yaml", overrides))
    assert shown == ["validation", "rollouts", "update", "rollouts", "validation", "update", "validation"]


def test_several_updates_of_a_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=6, num_iterations=2)
    made.train()
    assert logged(made, "overlap/staleness") == [0, 2, 2] and logged(made, "policy_version") == [0, 0, 2]


def test_what_an_engine_raises_reaches_the_trainer() -> None:
    def play(stopped: Any, over: Any) -> list[Any]:
        raise PolicyEngineError("http://127.0.0.1:9 did not answer")

    ahead = PlayingAhead(2, [0], 0, play)
    with pytest.raises(PolicyEngineError, match="did not answer"):
        ahead.wait()
    ahead.stop()


def test_a_batch_that_is_waited_for_no_longer_is_cancelled(tmp_path: Path) -> None:
    """Ctrl-C where nobody handles it, as in a notebook: no thread may go on playing, and asking a simulator."""
    made = trainer(tmp_path, environment=Waits)

    def interrupt() -> None:
        while made.phase != PLAYING or made.rollout_step != 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            made.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [t for t in threading.enumerate() if t.name == "rollouts"]


def test_what_excludes_overlap_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlap = 1 needs an engine with weights of its own"):
        trainer(tmp_path, sampling_dtype="policy")
    with pytest.raises(ValueError, match="overlap = 1 depends on the clock, and deterministic needs runs that repeat"):
        trainer(tmp_path, deterministic=True)
    tiny = ROOT / "recipes" / "tiny.yaml"
    free = ["rollout.overlap=1", "rollout.deterministic=false"]
    load_recipe(tiny, [*free, "rollout.dtype=bfloat16"])
    served = ["rollout.engine=vllm_server", "rollout.vllm.urls=[http://127.0.0.1:9]"]
    load_recipe(tiny, [*free, *served, "rollout.top_k=20"])
    for overrides, message in (
        (
            ["rollout.overlap=1", "rollout.deterministic=true", "rollout.dtype=bfloat16"],
            "rollout.overlap = 1 depends on the clock, and rollout.deterministic needs",
        ),
        (free, "which samples from the trained weights themselves"),
        ([*free, "rollout.engine=vllm_colocated"], "which samples from the trained weights themselves"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tiny, overrides)
