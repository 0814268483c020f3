"""The recipe: everything that decides a run, as typed sections. One way in, one place that validates (recipe_file.py reads it)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from ctcgrpo.centering import CENTERINGS
from ctcgrpo.credit import CREDITS, DISCOUNTED, SCALES
from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.errors import RecipeError
from ctcgrpo.model.sharding import splits_weights
from ctcgrpo.options import CreditOptions, LossWeights, OldLogprobs, Packing, SamplingDtype, recipe_field
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS
from ctcgrpo.simulator.config import TOKEN_ENV
from ctcgrpo.util.importing import is_reference
from ctcgrpo.util.naming import did_you_mean, quoted
from ctcgrpo.util.sections import Section, environment_name

_UNUSED: dict[str, Any] = {"simulator": True, "scoring": True, "policy": {"instructions", "persona_sections"}}
"""What a recipe with an environment of its own does not have."""


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
    reasoning_context: Literal["strip", "keep"] = recipe_field("reasoning_context")
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
    no_reasoning_penalty: float = recipe_field("no_reasoning_penalty")
    fault_penalty: float = recipe_field("fault_penalty")
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
    def _fits_together(self) -> Policy:
        if self.quantization != "none" and self.lora is None:
            raise ValueError("quantization freezes the weights, so it needs an adapter to train: policy.lora={rank: 16}")
        for name in ("no_reasoning_penalty", "fault_penalty"):
            if not self.reasons and (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value} and reasons false; the penalty is for a policy that reasons")
        return self


class Scenarios(Section):
    """The scenarios that are trained on."""

    train: str = Field(description="a path, a bundled pack (english/train), or a dataset in $CTCGRPO_DATA (eibench/train)")
    scenes: tuple[str, ...] = Field(
        SCENES, min_length=1, description="the scenes that are trained on, each once: of the published set, or of your own"
    )

    @field_validator("scenes")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
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


class OwnEnvironment(Section):
    """An environment of one's own, in place of the sections scenarios, simulator and scoring (ctcgrpo/types.py: Environment)."""

    factory: str = Field(
        description="module:attribute, a class or function that makes the Environment of an episode; or a class of asynchronous "
        "context managers, of which one makes them all and is open while a batch is played"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments for the factory")
    tasks: str = Field(description="what is trained on: a JSON lines file, an object a task, or module:function that gives them")
    timeout: float = recipe_field("environment_timeout")
    per_step: int = Field(8, ge=1, description="tasks in each step, equally many of each tag")
    folder: Path | None = Field(None, description="where modules are looked for first; the recipe's folder where absent")


class Vllm(Section):
    """vLLM, for rollout.engine vllm_colocated and vllm_server."""

    gpu_memory: float = Field(0.35, gt=0, lt=1, description="vllm_colocated: the share of each GPU's memory that it takes")
    urls: tuple[str, ...] = Field((), description="vllm_server: the servers, each as http://HOST:PORT")
    group_port: int = Field(51216, ge=1024, le=65000, description="vllm_server: the first port for weights, one a server")
    timeout: float = Field(600.0, gt=0, description="vllm_server: seconds a request")
    patience: float = recipe_field("vllm_server_patience")
    check_every: int = recipe_field("vllm_server_check_every")

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
    max_turns: int = recipe_field("max_turns")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of a reply at most, reasoning included")
    max_prompt_tokens: int = recipe_field("max_prompt_length")
    temperature: float = Field(0.6, gt=0, description="sampling temperature; the trainer scores tokens at the same one")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability; 1 is off")
    top_k: int = Field(0, ge=0, description="sample from this many most likely tokens; 0 is off")
    max_batch: int = recipe_field("max_batch")
    dtype: SamplingDtype = recipe_field("sampling_dtype")
    vllm: Vllm = Vllm()  # type: ignore[call-arg]
    deterministic: bool = recipe_field("deterministic")
    deadline: float | None = recipe_field("deadline")
    max_failed: float = recipe_field("max_failed")


class Simulator(Section):
    """Where the simulated user is, and how long a run waits for it."""

    url: str | tuple[str, ...] = Field("embedded", description="embedded, or the URL of a simulator server or its replicas")
    config: Path | None = Field(None, description="whom the server plays (configs/simulator); else the scripted user")
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

    _is_a_name = field_validator("token_env")(environment_name)


class Scoring(Section):
    """How the user's state becomes outcomes and turn scores."""

    variant: Literal["training", "evaluation"] = Field(
        "training",
        description="the outcome where a target anger is not below the initial one: training punishes anger beyond the target, "
        "evaluation (as in published figures) does not",
    )
    turn_weights: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = Field(
        {}, description="weights of the change in anger and in trust, by scene; [0.5, 0.5] where absent"
    )

    @field_validator("turn_weights")
    @classmethod
    def _at_most_one(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for scene, weights in value.items():
            if sum(weights) > 1 + 1e-9:
                raise ValueError(f"the weights of {scene} sum to {sum(weights):g}; they must sum to at most 1")
        return value


class Credit(Section):
    """How outcome and turn scores become the advantage of each turn: A = outcome term + alpha * turn term. A function of one's own
    (see ctcgrpo/credit.py) is named as my_module:my_function, in a file beside the recipe or in the current directory."""

    alpha: float = recipe_field("alpha")
    centering: str = recipe_field("centering")
    credit: str = recipe_field("credit")
    gamma: float = recipe_field("gamma")
    center_weights: Literal["turn", "token"] = recipe_field("center_weights")
    scale: str = recipe_field("scale_rewards")
    std_min: float = recipe_field("std_min")
    turn_scale: str = recipe_field("turn_scale")
    turn_std_min: float = recipe_field("turn_std_min")
    shuffle: Literal["nothing", "turn_scores", "advantages"] = recipe_field("shuffle_credit")

    @field_validator("centering", "credit", "scale", "turn_scale")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        tables: dict[str, Iterable[str]] = {"centering": CENTERINGS, "credit": CREDITS}
        options = tables.get(info.field_name, SCALES)
        if value not in options and not is_reference(value):
            raise ValueError(f"{did_you_mean(value, options)} (one of your own: my_module:my_function)")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Credit:
        if self.gamma != 1.0 and self.credit not in DISCOUNTED and not is_reference(self.credit):
            raise ValueError(f"gamma is {self.gamma} and credit {self.credit!r}; only {' and '.join(DISCOUNTED)} discount")
        if self.center_weights == "token" and self.centering == "none":
            raise ValueError("center_weights is 'token' and centering 'none', which weighs nothing")
        if self.std_min != CreditOptions.std_min and self.scale == "none":
            raise ValueError(f"std_min is {self.std_min} and scale 'none', which divides by nothing")
        if self.turn_std_min != CreditOptions.turn_std_min and self.turn_scale == "none":
            raise ValueError(f"turn_std_min is {self.turn_std_min} and turn_scale 'none', which divides by nothing")
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
    dual_clip: float | None = recipe_field("dual_clip")
    loss_weights: LossWeights = recipe_field("loss_weights")
    entropy_bonus: float = recipe_field("entropy_coef")
    kl: float = Field(0.0, ge=0, description="weight of the KL term to the policy before training; 0 as published")
    old_logprobs: OldLogprobs = recipe_field("old_logprobs")
    tokens_per_row: int = recipe_field("tokens_per_row")
    packing: Packing = recipe_field("packing")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    sharding: str = Field(
        "none", description="none (every process holds the policy), fsdp2, or a DeepSpeed configuration (configs/deepspeed)"
    )
    bf16: bool = Field(False, description="mixed precision: bfloat16 compute on float32 weights")
    process_timeout: int = Field(
        3600,
        ge=1,
        description="seconds that a process waits for the others before the run ends: longer than the slowest episode of a "
        "step, or of a validation, takes after all others are over",
    )
    save_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the newest checkpoints stay")


class Validation(Section):
    """Held-out scenarios that the policy plays before, during and after training."""

    scenarios: str | None = Field(None, description="held-out scenarios, named as in scenarios.train")
    tasks: str | None = Field(None, description="with environment: held-out tasks, named as in environment.tasks")
    every: int = Field(30, ge=1, description="steps between validations; there is one before and one after training too")
    samples: int = Field(1, ge=1, description="episodes of each scenario")
    seed: int = Field(0, ge=0, description="the same samples in every validation of every run with this seed")


class Hardware(Section):
    """What a run is meant for; read by `ctcgrpo check` alone."""

    gpu: str | None = Field(None, description="the card that the memory plan is for; one of ctcgrpo/preflight/cards.yaml")
    processes: int = Field(1, ge=1, description="GPUs that train, one process each, over all nodes")
    nodes: int = Field(1, ge=1, description="machines that train")
    tokens_per_second: float | None = Field(None, gt=0, description="if measured: tokens sampled a second over all GPUs")


class Recipe(Section):
    """A whole run: what is trained, on what, and how."""

    run: Run
    policy: Policy
    scenarios: Scenarios | None = None
    environment: OwnEnvironment | None = None
    rollout: Rollout = Rollout()  # type: ignore[call-arg]
    simulator: Simulator = Simulator()  # type: ignore[call-arg]
    scoring: Scoring = Scoring()  # type: ignore[call-arg]
    credit: Credit = Credit()
    training: Training = Training()  # type: ignore[call-arg]
    validation: Validation | None = None
    hardware: Hardware = Hardware()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _one_environment(self) -> Recipe:
        if (self.scenarios is None) == (self.environment is None):
            raise ValueError(
                "a recipe has either the section scenarios (EIBench's task) or the section environment (one of your own)"
            )
        own = self.environment is not None
        if own and (unused := {"simulator", "scoring"} & self.model_fields_set):
            raise ValueError(f"section {min(unused)} is for scenarios, and would do nothing beside the section environment")
        if own and (unused := _UNUSED["policy"] & self.policy.model_fields_set):
            raise ValueError(f"policy.{min(unused)} is for scenarios; an environment gives the policy its messages itself")
        if self.validation is not None:
            used, other = ("tasks", "scenarios") if own else ("scenarios", "tasks")
            if getattr(self.validation, used) is None or getattr(self.validation, other) is not None:
                what = "environment" if own else "scenarios"
                raise ValueError(f"beside the section {what}, validation has {used}, which are held out, and no {other}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.rollout.group_size % self.training.updates_per_step:
            raise ValueError(
                f"training.updates_per_step is {self.training.updates_per_step} and rollout.group_size "
                f"{self.rollout.group_size}; each update takes an equal share of every group"
            )
        if self.scenarios is not None and (known := {*SCENES, *self.scenarios.scenes}):
            for scene in self.scoring.turn_weights.keys() - known:
                raise ValueError(f"scoring.turn_weights: {scene!r} is not in scenarios.scenes; {did_you_mean(scene, known)}")
        if self.scenarios is not None and self.scenarios.per_step % len(self.scenarios.scenes):
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
            raise ValueError(f"rollout.vllm.urls names servers, but rollout.engine is {engine!r}; set it to 'vllm_server'")
        if self.rollout.deterministic and self.rollout.deadline is not None:
            raise ValueError(
                "rollout.deterministic promises the same run bit by bit, and what rollout.deadline cuts depends on the clock; "
                "leave one out"
            )
        if engine != "transformers" and self.rollout.dtype != "policy":
            raise ValueError(f"rollout.dtype is for rollout.engine 'transformers', not {engine!r}: vLLM samples in bfloat16")
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

    @property
    def tasks_per_step(self) -> int:
        """Groups in a step."""
        section = self.scenarios or self.environment
        assert section is not None  # _one_environment
        return section.per_step

    def own_functions(self) -> dict[str, str]:
        """The fields of the section credit that name a function of one's own, with its reference."""
        names = ("credit", "centering", "scale", "turn_scale")
        return {name: value for name in names if is_reference(value := getattr(self.credit, name))}

    def credit_options(self) -> CreditOptions:
        """What the recipe says of credit, under the names that the trainer's configuration has for it."""
        return CreditOptions(
            **self.credit.model_dump(exclude={"scale", "shuffle"}),
            scale_rewards=self.credit.scale,
            shuffle_credit=self.credit.shuffle,
            reasons=self.policy.reasons,
            no_reasoning_penalty=self.policy.no_reasoning_penalty,
            fault_penalty=self.policy.fault_penalty,
        )

    def eibench_scenarios(self, what: str = "this") -> Scenarios:
        """The section scenarios. Raises RecipeError for a recipe with an environment of its own, which `what` is not for."""
        if self.scenarios is None:
            assert self.environment is not None  # _one_environment
            raise RecipeError(
                f"{what} is for runs on scenarios (EIBench's task); the recipe of {self.run.name} has "
                f"environment.factory = {quoted(self.environment.factory)}"
            )
        return self.scenarios

    def validation_source(self) -> str:
        """What validation plays: a source of scenarios, or of tasks."""
        assert self.validation is not None
        source = self.validation.scenarios or self.validation.tasks
        assert source is not None  # _one_environment
        return source

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
        section = "scenarios" if self.environment is None else "environment"
        episodes = self.tasks_per_step * self.rollout.group_size
        if episodes % processes:
            raise RecipeError(
                f"{section}.per_step x rollout.group_size is {self.tasks_per_step} x {self.rollout.group_size} = "
                f"{episodes} episodes a step, which {processes} processes cannot share equally; choose a multiple of {processes}"
            )

    def to_yaml(self) -> str:
        """The resolved recipe, every field written out; of one with an environment of its own, those that it may have."""
        told = self.model_dump(mode="json", exclude=None if self.environment is None else _UNUSED)
        return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
