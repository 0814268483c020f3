"""TRL's own GRPOTrainer on EIBench over OpenEnv, by both mechanisms that it has for environments."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openenv", reason="needs the extra openenv")

import trl
from datasets import Dataset
from openenv.core.generic_client import GenericEnvClient
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.openenv import OpenEnvServer
from ctcgrpo.simulator.server import running
from tests.conftest import ROOT

TASKS = ["support-train-01", "defense-train-02"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    scenarios = load_scenarios("english/train")
    with running(OpenEnvServer(SCRIPTED_USER, scenarios, briefing=Briefing(), max_turns=2)) as at:
        yield at


def config(folder: Path, **options: Any) -> GRPOConfig:
    return GRPOConfig(
        str(folder),
        num_generations=2,
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=1e-2,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def trained(trainer: GRPOTrainer) -> dict[str, Any]:
    """The log of its one step, which changed the weights."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))
    log: dict[str, Any] = trainer.state.log_history[0]
    return log


def test_a_rollout_func(url: str, tiny: Path, tmp_path: Path) -> None:
    """Each completion is a dialogue: the policy's sampled tokens, and the user's, which are masked."""
    played: list[dict[str, Any]] = []

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        tokenizer, model = trainer.processing_class, trainer.model
        names = ("prompt_ids", "completion_ids", "logprobs", "env_mask", "outcome")
        found: dict[str, list[Any]] = {name: [] for name in names}
        for prompt in prompts:
            with GenericEnvClient(base_url=url).sync() as env:
                seen = env.reset(id=prompt[-1]["content"], seed=0)
                text = tokenizer.apply_chat_template(seen.observation["messages"], add_generation_prompt=True, tokenize=False)
                prompt_ids = tokenizer.encode(text)
                ids, mask, logprobs, rewards = [], [], [], []
                while not seen.done:
                    context = torch.tensor([prompt_ids + ids])
                    made = model.generate(
                        context, max_new_tokens=6, do_sample=True, output_logits=True, return_dict_in_generate=True
                    )
                    reply = made.sequences[0, context.shape[1] :].tolist()
                    chosen = [step[0].log_softmax(-1)[token].item() for step, token in zip(made.logits, reply, strict=True)]
                    ids, mask, logprobs = [*ids, *reply], [*mask, *[1] * len(reply)], [*logprobs, *chosen]
                    seen = env.step({"message": tokenizer.decode(reply, skip_special_tokens=True)})
                    rewards.append(seen.reward)
                    if not seen.done:
                        heard = f"<|im_end|>\n<|im_start|>user\n{seen.observation['message']}<|im_end|>\n<|im_start|>assistant\n"
                        heard_ids = tokenizer.encode(heard)
                        ids, mask, logprobs = (
                            [*ids, *heard_ids],
                            [*mask, *[0] * len(heard_ids)],
                            [*logprobs, *[0.0] * len(heard_ids)],
                        )
                values = (prompt_ids, ids, logprobs, mask, seen.metadata["outcome"])
                for name, value in zip(names, values, strict=True):
                    found[name].append(value)
                played.append({"state": env.state(), "rewards": rewards, "outcome": seen.metadata["outcome"]})
        return found

    def reward(outcome: list[float], **_: Any) -> list[float]:
        assert len(outcome) == 4
        return [value + 0.1 * k for k, value in enumerate(outcome)]  # noise may earn the same in a whole group

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": task}]} for task in TASKS])
    trainer = GRPOTrainer(str(tiny), reward, config(tmp_path, max_completion_length=200), rows, rollout_func=rollout)
    log = trained(trainer)
    assert sorted(episode["state"]["task"] for episode in played) == sorted(TASKS * 2)
    for episode in played:
        assert len(episode["rewards"]) == 2 and all(-0.1 <= earned <= 0.1 for earned in episode["rewards"])
        assert episode["state"]["done"] and -1 <= episode["outcome"] <= 1
    mean = sum(episode["outcome"] for episode in played) / 4
    assert log["reward"] == pytest.approx(mean + 0.15, abs=1e-4)
    assert log["completions/mean_length"] <= 12  # the user's tokens are none of the policy's


def test_an_environment_factory(url: str, tiny: Path, tmp_path: Path) -> None:
    """The class of the README. A policy of noise calls no tool, so its sampling is held to calls, with words of its own."""
    page = (ROOT / "ctcgrpo" / "environments" / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "GenericEnvClient" in block)
    scope: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:8765", url), scope)
    made: list[Any] = []

    def dialogue() -> Any:
        made.append(scope["Dialogue"]())
        return made[-1]

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    opens = tokenizer.encode("<|im_start|>assistant\n")
    words = [tokenizer.encode(f" {word}") for word in ("sorry", "help", "listen", "tell")]
    call = [[token] for token in tokenizer.encode('<tool_call>\n{"name": "reply", "arguments": {"message": "I hear you.')]
    call += [[word[0] for word in words], *([token] for token in tokenizer.encode('"}}\n</tool_call>')), [tokenizer.eos_token_id]]

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        tokens = ids.tolist()
        begins = [k + len(opens) for k in range(len(tokens)) if tokens[k : k + len(opens)] == opens]
        place = len(tokens) - begins[-1]
        return call[place] if len(begins) <= 2 and place < len(call) else [tokenizer.eos_token_id]

    model.generate = functools.partial(model.generate, prefix_allowed_tokens_fn=allowed)
    rows = Dataset.from_list([{"id": task, "prompt": [{"role": "user", "content": "Reply with the tool."}]} for task in TASKS])
    with pytest.warns(UserWarning, match="environment_factory"):
        trainer = GRPOTrainer(
            model,
            lambda completions, **_: [0.1 * k for k in range(len(completions))],
            config(tmp_path, max_completion_length=600),
            rows,
            processing_class=tokenizer,
            environment_factory=dialogue,
        )
    log = trained(trainer)
    assert len(made) == 4 and log["tools/call_frequency"] == 2.0 and log["tools/failure_frequency"] == 0.0, log
    for environment in made:
        state = environment.client.state()
        assert state["step_count"] == 2 and state["done"] and state["episode_return"] == pytest.approx(environment.get_reward())
    assert sorted(environment.client.state()["task"] for environment in made) == sorted(TASKS * 2)
    assert log["rewards/Dialogue/mean"] == pytest.approx(sum(e.get_reward() for e in made) / 4, abs=1e-6)
