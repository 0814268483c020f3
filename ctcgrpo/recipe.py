"""The recipe: everything that decides a run, as typed sections. One way in, one place that validates.

A recipe file is YAML and Python at once (see recipes/tiny.yaml): for Python all of it is one string, followed by the call
that runs it; for YAML that string's opening is a key named `'`, which the loader drops.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from ctcgrpo.credit import CENTERINGS, CREDITS, SCALES
from ctcgrpo.errors import RecipeError
from ctcgrpo.naming import cut, did_you_mean, quoted
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS
from ctcgrpo.records import SCENES, Scene
from ctcgrpo.sections import Section, environment_name, named_value, parse_mapping, read_text, validated
from ctcgrpo.sharding import splits_weights
from ctcgrpo.simulator.config import TOKEN_ENV

_PYTHON_KEY = "'"
_OWN_VARIABLES = "CTCGRPO_"
_OPENING, _CLOSING = "'''':", "# '''; from ctcgrpo.cli import run_recipe"


class Run(Section):
    """The run's name, folder, seed and tracking."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder under output_dir")
    output_dir: Path = Field(Path("checkpoints"), description="the folder that holds the folders of runs")
    seed: int = Field(0, ge=0, description="of the order of scenarios, of sampling, and of weights that the run builds")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="Weights & Biases mode")


class Lora(Section):
    """Train a LoRA adapter (PEFT) and keep the model's own weights fixed."""

    rank: int = Field(16, ge=1, description="of the adapter's matrices: the number of its parameters grows with it")
    alpha: int = Field(32, ge=1, description="the adapter's output is multiplied by alpha / rank")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="the modules that get an adapter: all-linear, or names of layers (q_proj)"
    )


class Policy(Section):
    """The model that is trained."""

    model: str = Field(description="a model folder or Hub id; builtin/smollm2 or builtin/tiny (ctcgrpo/policy/)")
    revision: str | None = Field(None, description="the branch, tag or commit of a Hub model; the newest where absent")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="the type of the weights when loaded")
    attention: str = Field("sdpa", description="transformers' attn_implementation")
    reasons: bool = Field(False, description="the policy reasons before it replies: sets the template, turns shaping on")
    reasoning_context: Literal["strip", "keep"] = Field(
        "strip", description="whether later prompts leave out earlier reasoning (strip) or hold it (keep)"
    )
    chat_template: Path | None = Field(None, description="a file with the chat template to use; else the tokenizer's own")
    template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is rendered with: reasoning_effort, date_string, thinking, ..."
    )
    persona_sections: tuple[str, ...] | None = Field(
        None, description="the sections of its role (### headings) that the policy is told; all of it where absent"
    )
    instructions: str = Field(
        DEFAULT_INSTRUCTIONS,
        description="how to reply, appended to the role: eibench, short, none, a template file, or a folder with LANGUAGE.j2",
    )
    lora: Lora | None = None
    quantization: Literal["none", "nf4"] = Field("none", description="of the frozen weights under an adapter; nf4 is QLoRA")

    @field_validator("template_kwargs")
    @classmethod
    def _set_elsewhere(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "enable_thinking" in value:
            raise ValueError("enable_thinking is what policy.reasons sets; use that")
        if taken := {"tokenize", "add_generation_prompt", "messages", "conversation", "return_tensors"} & set(value):
            raise ValueError(f"{min(taken)} is set by ctcgrpo; leave it out")
        return value

    @model_validator(mode="after")
    def _quantized_under_an_adapter(self) -> Policy:
        if self.quantization != "none" and self.lora is None:
            raise ValueError("quantization freezes the weights, so it needs an adapter to train: policy.lora={rank: 16}")
        return self


class Scenarios(Section):
    """The scenarios that are trained on."""

    train: str = Field(
        description="a path, a bundled pack (english/train), or a dataset under $CTCGRPO_DATA (eibench/train)"
    )
    scenes: tuple[Scene, ...] = Field(SCENES, min_length=1, description="the scenes that are trained on, each once")

    @field_validator("scenes")
    @classmethod
    def _once(cls, value: tuple[Scene, ...]) -> tuple[Scene, ...]:
        if len(set(value)) < len(value):
            raise ValueError("duplicate scene")
        return value

    per_step: int = Field(16, ge=1, description="scenarios in each step, equally many of each scene")
    invalid: Literal["skip", "refuse"] = Field(
        "skip",
        description="what becomes of records that are malformed or out of order, here and in validation.scenarios: left out with a "
        "warning (skip), or an error (refuse); always an error: two records with one id, a file without a valid record, and more "
        "than half of a set",
    )


class Vllm(Section):
    """vLLM, for rollout.engine vllm_colocated and vllm_server."""

    gpu_memory: float = Field(0.35, gt=0, lt=1, description="vllm_colocated: the share of each GPU's memory that it takes")
    urls: tuple[str, ...] = Field((), description="vllm_server: the servers, each as http://HOST:PORT")
    group_port: int = Field(51216, ge=1024, le=65000, description="vllm_server: the first port for weights, one a server")
    timeout: float = Field(600.0, gt=0, description="vllm_server: seconds a request")
    patience: float = Field(120.0, gt=0, description="vllm_server: seconds that a request is repeated for")

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} does not begin with http:// or https://")
        return value


class Rollout(Section):
    """How episodes are played and sampled."""

    engine: Literal["transformers", "vllm_colocated", "vllm_server"] = Field(
        "transformers", description="what samples replies: transformers, vLLM on the training GPUs, or vLLM servers"
    )
    group_size: int = Field(8, ge=2, description="G: episodes of each scenario in a step, compared with each other")
    max_turns: int = Field(8, ge=1, description="replies of the policy in an episode at most; the user may leave earlier")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of a reply at most, reasoning included")
    max_prompt_tokens: int = Field(
        8192,
        ge=1,
        description="tokens of a prompt at most; a longer one drops its oldest exchanges, never the system prompt",
    )
    temperature: float = Field(0.6, gt=0, description="sampling temperature; the trainer scores tokens at the same one")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens with this total probability; 1 is off"
    )
    top_k: int = Field(0, ge=0, description="sample from this many most likely tokens; 0 is off")
    max_batch: int = Field(64, ge=1, description="requests that the engine generates together")
    dtype: Literal["policy", "bfloat16"] = Field(
        "policy",
        description="transformers: sample with the policy itself, or with a bfloat16 copy of it that is renewed every step: faster "
        "on a CPU with bfloat16 instructions, for 2 bytes a parameter",
    )
    vllm: Vllm = Vllm()  # type: ignore[call-arg]
    deterministic: bool = Field(False, description="fix the composition of every batch, for bit-identical reruns")
    deadline: float | None = Field(
        None,
        gt=0,
        description="seconds after which a step no longer waits for episodes that still go on: they fail. It cuts long dialogues, "
        "so what is learned from leans to short ones; the log says how many turns they had (deadline/...)",
    )
    max_failed: float = Field(0.5, ge=0, le=1, description="the share of failed episodes in a step that stops the run")


class Simulator(Section):
    """Where the simulated user is, and how long a run waits for it."""

    url: str | tuple[str, ...] = Field(
        "embedded", description="embedded, or the URL of a simulator server, or of its replicas"
    )
    config: Path | None = Field(
        None, description="who the embedded server plays (configs/simulator); else the scripted user"
    )
    port: int = Field(0, ge=0, le=65535, description="of the embedded server; 0 takes any free one")
    token_env: str = Field(
        TOKEN_ENV,
        description="the environment variable with the servers' bearer token, where they need one; a name that does not begin with "
        "CTCGRPO_ is for the command line only",
    )
    timeout: float = Field(240.0, gt=0, description="seconds that one request for a turn may take")
    patience: float = Field(
        600.0, gt=0, description="seconds that a turn is asked for again where no server answers, or no LLM can be asked"
    )

    @field_validator("url")
    @classmethod
    def _are_urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for url in (value,) if isinstance(value, str) else value:
            if url != "embedded" and not url.startswith(("http://", "https://")):
                raise ValueError("it is 'embedded', or a URL that begins with http:// or https://, or a list of them")
        if value == () or (not isinstance(value, str) and "embedded" in value):
            raise ValueError("a list holds URLs of replicas, at least one")
        return value

    @field_validator("token_env")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return environment_name(value)


class Scoring(Section):
    """How the user's state becomes outcomes and turn scores."""

    variant: Literal["training", "evaluation"] = Field(
        "training",
        description="the outcome where a target anger is not below the initial one: training punishes anger beyond the target, "
        "evaluation (as in published figures) does not",
    )
    turn_weights: dict[Scene, tuple[NonNegativeFloat, NonNegativeFloat]] = Field(
        {}, description="weights of the change in anger and in trust, by scene; [0.5, 0.5] where absent"
    )
    no_reasoning_penalty: float = Field(
        0.2, ge=0, description="policy.reasons only: taken off the outcome, times the share of turns without reasoning"
    )
    fault_penalty: float = Field(
        0.05,
        ge=0,
        description="policy.reasons only: taken off the outcome once for empty or broken reasoning or an empty reply",
    )

    @field_validator("turn_weights")
    @classmethod
    def _at_most_one(cls, value: dict[Scene, tuple[float, float]]) -> dict[Scene, tuple[float, float]]:
        for scene, weights in value.items():
            if sum(weights) > 1 + 1e-9:
                raise ValueError(f"the weights of {scene} sum to {sum(weights):g}; they must sum to at most 1")
        return value


_DEFAULT_STD_MIN = 0.1


class Credit(Section):
    """How outcome and turn scores become the advantage of each turn: A = outcome term + alpha * turn term."""

    alpha: float = Field(15.0, ge=0, description="weight of the turn term; 0 is outcome-only GRPO")
    centering: str = Field(
        "rollout",
        description="the mean that is taken off a turn's credit: over the rollout, the group, the group's turns at that position, "
        "earlier steps of the scene at that position, or none",
        json_schema_extra={"enum": list(CENTERINGS)},
    )
    credit: str = Field(
        "immediate",
        description="a turn's credit: its own score, or the discounted sum of its own and all later ones",
        json_schema_extra={"enum": list(CREDITS)},
    )
    gamma: float = Field(1.0, ge=0, le=1, description="credit reward_to_go only: the discount for each turn")
    center_weights: Literal["turn", "token"] = Field(
        "turn", description="whether turns weigh alike in the means that center, or by their tokens"
    )
    scale: str = Field(
        "group",
        description="the standard deviation that outcomes are divided by: of the group, of the batch, or none",
        json_schema_extra={"enum": list(SCALES)},
    )
    std_min: float = Field(
        _DEFAULT_STD_MIN, gt=0, description="the smallest standard deviation that outcomes are divided by"
    )
    shuffle: Literal["nothing", "turn_scores", "advantages"] = Field(
        "nothing", description="a control: what is dealt out at random over the turns of a step"
    )

    @field_validator("centering", "credit", "scale")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        tables: dict[str, Iterable[str]] = {"centering": CENTERINGS, "credit": CREDITS, "scale": SCALES}
        options = tables[info.field_name]
        if value not in options:
            raise ValueError(did_you_mean(value, options))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Credit:
        if self.gamma != 1.0 and self.credit != "reward_to_go":
            raise ValueError(f"gamma is {self.gamma} and credit {self.credit!r}; only credit=reward_to_go discounts")
        if self.center_weights == "token" and self.centering == "none":
            raise ValueError("center_weights is 'token' and centering 'none', which weighs nothing")
        if self.std_min != _DEFAULT_STD_MIN and self.scale == "none":
            raise ValueError(f"std_min is {self.std_min} and scale 'none', which divides by nothing")
        return self


class Training(Section):
    """The update: optimizer, loss, memory, checkpoints."""

    max_steps: int = Field(250, ge=1, description="steps of the run; each is one batch of rollouts")
    updates_per_step: int = Field(1, ge=1, description="K: optimizer steps for each batch of rollouts, each on a K-th of it")
    learning_rate: float = Field(1e-6, ge=0, description="of AdamW, after the warmup")
    warmup: float = Field(0.03, ge=0, lt=1, description="the share of the steps in which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate after the warmup")
    min_learning_rate: float = Field(0.1, ge=0, le=1, description="where the cosine ends, as a share of learning_rate")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="the norm that gradients are clipped to; 0 for no clipping")
    clip: float = Field(0.2, gt=0, lt=1, description="PPO's clip of the probability ratio, to 1 - clip and 1 + clip")
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="bounds the loss of a token with a negative advantage A at this many times -A; 3 as published",
    )
    loss_weights: Literal["token", "turn"] = Field(
        "token", description="what weighs alike in the loss: every trained token of a step, or every trained turn"
    )
    entropy_bonus: float = Field(0.001, ge=0, description="weight of the policy's entropy in the loss; keeps replies varied")
    kl: float = Field(0.0, ge=0, description="weight of the KL term to the policy before training; 0 as published")
    old_logprobs: Literal["recomputed", "recorded"] = Field(
        "recomputed", description="recomputed by the trainer, or as recorded by the engine (without top-p and top-k only)"
    )
    tokens_per_row: int = Field(
        16384, ge=1, description="distinct tokens (without packing: padded ones) that one forward and backward pass takes"
    )
    packing: Literal["auto", "segments", "flex", "flash3", "none"] = Field(
        "auto",
        description="forward what turns and rollouts have in common once, attended to as the device allows (auto), by segments, "
        "flex_attention, or TRL's kernel on Hopper (flash3); none: a sequence a turn, padded",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    sharding: str = Field(
        "none", description="none (every process holds the policy), fsdp2, or a DeepSpeed configuration (configs/deepspeed)"
    )
    bf16: bool = Field(False, description="mixed precision: bfloat16 compute on float32 weights")
    save_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the newest checkpoints stay")


class Validation(Section):
    """Held-out scenarios that the policy plays before, during and after training."""

    scenarios: str = Field(description="held-out scenarios, named as in scenarios.train")
    every: int = Field(30, ge=1, description="steps between validations; there is one before and one after training too")
    samples: int = Field(1, ge=1, description="episodes of each scenario")
    seed: int = Field(0, ge=0, description="the same samples in every validation of every run with this seed")


class Hardware(Section):
    """What a run is meant for; read by `ctcgrpo check` alone."""

    gpu: str | None = Field(None, description="the card that the memory plan is for; one of ctcgrpo/plan/cards.yaml")
    processes: int = Field(1, ge=1, description="GPUs that train, one process each, over all nodes")
    nodes: int = Field(1, ge=1, description="machines that train")
    tokens_per_second: float | None = Field(
        None,
        gt=0,
        description="tokens that the policy samples in a second over all GPUs, if measured: for hours in the plan",
    )


class Recipe(Section):
    """A whole run: what is trained, on what, and how."""

    run: Run
    policy: Policy
    scenarios: Scenarios
    rollout: Rollout = Rollout()  # type: ignore[call-arg]
    simulator: Simulator = Simulator()  # type: ignore[call-arg]
    scoring: Scoring = Scoring()  # type: ignore[call-arg]
    credit: Credit = Credit()  # type: ignore[call-arg]
    training: Training = Training()  # type: ignore[call-arg]
    validation: Validation | None = None
    hardware: Hardware = Hardware()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.rollout.group_size % self.training.updates_per_step:
            raise ValueError(
                f"training.updates_per_step is {self.training.updates_per_step} and rollout.group_size "
                f"{self.rollout.group_size}; each update takes an equal share of every group"
            )
        if self.scenarios.per_step % len(self.scenarios.scenes):
            raise ValueError(
                f"scenarios.per_step is {self.scenarios.per_step} for {len(self.scenarios.scenes)} scenes; "
                "a step takes equally many of each scene, so it must be a multiple"
            )
        if self.simulator.url != "embedded" and self.simulator.port:
            raise ValueError(f"simulator.port is {self.simulator.port}, but only an embedded simulator listens on it")
        if self.simulator.url != "embedded" and self.simulator.config is not None:
            raise ValueError(
                f"simulator.config is {str(self.simulator.config)!r}, but simulator.url names a server; a server has a "
                "configuration of its own (ctcgrpo serve)"
            )
        if self.training.old_logprobs == "recorded" and (self.rollout.top_p < 1 or self.rollout.top_k):
            raise ValueError(
                "training.old_logprobs is 'recorded' with top-p or top-k, under which recorded log-probabilities are "
                "renormalised over the kept mass; use 'recomputed', or rollout.top_p=1 and rollout.top_k=0"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Recipe:
        engine, vllm = self.rollout.engine, self.rollout.vllm
        if self.policy.attention != "sdpa" and (self.training.packing != "none" or engine == "transformers"):
            raise ValueError(
                f"policy.attention is {self.policy.attention!r}, but packing and the transformers engine bring their own, "
                "so it would not be used; leave it out, or set training.packing=none and let vLLM sample"
            )
        if engine == "vllm_server" and not vllm.urls:
            raise ValueError("rollout.engine is 'vllm_server' and rollout.vllm.urls names no server")
        if engine != "vllm_server" and vllm.urls:
            raise ValueError(
                f"rollout.vllm.urls names servers, but rollout.engine is {engine!r}; it is 'vllm_server' for them"
            )
        if self.rollout.deterministic and self.rollout.deadline is not None:
            raise ValueError(
                "rollout.deterministic promises the same run bit by bit, and what rollout.deadline cuts depends on the clock; "
                "leave one out"
            )
        if engine != "transformers" and self.rollout.dtype != "policy":
            raise ValueError(
                f"rollout.dtype is for rollout.engine 'transformers', not {engine!r}: vLLM samples in bfloat16 anyway"
            )
        if self.policy.quantization != "none" and self.rollout.dtype != "policy":
            raise ValueError("rollout.dtype copies weights that are whole; with policy.quantization leave it out")
        if engine != "transformers" and self.rollout.deterministic:
            raise ValueError(
                "rollout.deterministic promises the same run bit by bit, which vLLM's batches do not allow; "
                "it needs rollout.engine 'transformers'"
            )
        if self.policy.quantization != "none" and (engine != "transformers" or self.training.sharding != "none"):
            raise ValueError(
                "policy.quantization works with rollout.engine 'transformers' and training.sharding none: vLLM, DeepSpeed and FSDP "
                "would need the weights whole"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.run.output_dir / self.run.name

    def check_sharding(self) -> None:
        """Refuse sharding that the engine cannot sample from, and a DeepSpeed configuration that cannot serve. Reads that file, so
        it is no part of reading a recipe."""
        if splits_weights(self.training.sharding) and self.rollout.engine == "transformers":
            raise RecipeError(
                f"training.sharding {self.training.sharding!r} leaves no process with the whole policy, which rollout.engine "
                "'transformers' samples from; use vllm_colocated or vllm_server, or ZeRO-1 or -2"
            )

    def check_processes(self, processes: int) -> None:
        """Refuse a number of processes that the episodes of a step cannot be shared among."""
        episodes = self.scenarios.per_step * self.rollout.group_size
        if episodes % processes:
            raise RecipeError(
                f"scenarios.per_step x rollout.group_size is {self.scenarios.per_step} x {self.rollout.group_size} = "
                f"{episodes} episodes a step, which {processes} processes cannot share equally; choose a multiple of {processes}"
            )

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(file: str | Path, overrides: Sequence[str] = (), *, changes: Sequence[str] = ()) -> Recipe:
    """Read, override, validate. Raises RecipeError naming file, field, value and what would be right.

    `overrides` come from the command line; `changes` have the same form and come from a file (a sweep). What
    simulator.token_env names is sent to simulator.url, so a file may only name variables that begin with CTCGRPO_; a user may
    name another one on the command line.
    """
    path = Path(file)
    data, typed = _parse(path), dict[str, Any]()
    for change in [*changes, *overrides]:
        _apply(data, change)
    for override in overrides:
        _apply(typed, override)
    recipe = validated(data, Recipe, path)
    name = recipe.simulator.token_env
    if not name.startswith(_OWN_VARIABLES) and "token_env" not in typed.get("simulator", {}):
        raise RecipeError(
            f"{path}: simulator.token_env = {name!r}; expected a name that begins with {_OWN_VARIABLES}, since the value of the "
            f"variable is sent to simulator.url; to allow {name} for a run, write simulator.token_env={name} on its command line"
        )
    return recipe


def resolved_recipe(file: str | Path) -> Recipe:
    """The recipe that a run wrote into its folder, for readers of the run, which send nothing to its simulator: what it names was
    allowed when the run began. Raises RecipeError as `load_recipe` does."""
    path = Path(file)
    return validated(_parse(path), Recipe, path)


def overrides(chosen: Mapping[str, Any]) -> list[str]:
    """Values as overrides of a recipe, as YAML reads them."""
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value, default=str)}" for name, value in chosen.items()
    ]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The fields in which two resolved recipes differ, each as "field: old -> new"."""
    found: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{cut(name)}: {cut(str(a))} -> {cut(str(b))}")
    return found


def _parse(path: Path) -> dict[str, Any]:
    text = read_text(path, "recipe")
    body = "\n".join(line for line in text.splitlines() if not line.startswith((_OPENING, _CLOSING)))
    if "'''" in body or "\\" in body:
        raise RecipeError(f"{path}: a recipe may hold neither ''' nor a backslash: it is also read as a Python string")
    data = parse_mapping(text, path, Recipe, "recipe")
    data.pop(_PYTHON_KEY, None)
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    name, value = named_value(override, "override", "section.field=value, for example credit.alpha=10")
    *parents, last = name.split(".")
    target = data
    for parent in parents:
        below = target.get(parent)
        if below is None:
            below = target[parent] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"override {quoted(override)}: {quoted(parent)} is not a section")
        target = below
    target[last] = value
