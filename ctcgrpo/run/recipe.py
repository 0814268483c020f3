"""The recipe: all settings of a run, as typed and validated sections (recipe_file.py reads the file)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from ctcgrpo.centering import CENTERINGS
from ctcgrpo.credit import CREDIT_NAMES, DISCOUNTED, SCALES, VINE
from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.errors import CreditError, RecipeError
from ctcgrpo.model.sharding import splits_weights
from ctcgrpo.options import CreditOptions, LossWeights, OldLogprobs, Packing, SamplingDtype, conflicts, recipe_field
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS
from ctcgrpo.run.recipe_users import OtherUser, Simulator
from ctcgrpo.util.importing import is_reference
from ctcgrpo.util.naming import did_you_mean, quoted
from ctcgrpo.util.sections import Section

_UNUSED: dict[str, Any] = {"simulator": True, "scoring": True, "policy": {"instructions", "persona_sections"}}
"""Sections and fields that a recipe with a custom environment does not have."""


@contextlib.contextmanager
def credit_named() -> Iterator[None]:
    """Errors of a custom credit, which begin with an option of CTCGRPOConfig, begin with the recipe's field instead."""
    try:
        yield
    except CreditError as error:
        option, _, rest = str(error).partition(" ")
        raise CreditError(f"credit.{'scale' if option == 'scale_rewards' else option} {rest}") from error


class Run(Section):
    """The run's name, folder, seed and trackers."""

    moved: ClassVar[Mapping[str, str]] = {
        "wandb": "set run.report_to=[wandb] instead, and without a network the environment variable WANDB_MODE=offline"
    }

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder under output_dir")
    output_dir: Path = Field(Path("checkpoints"), description="parent folder of all runs")
    seed: int = Field(0, ge=0, description="seed of the order of scenarios, of sampling, and of weights that the run initialises")
    report_to: tuple[str, ...] = Field(
        (), description="trackers that get the metrics, as in TRL: tensorboard, wandb, trackio, mlflow, swanlab, ..."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Lora(Section):
    """Train a LoRA adapter (PEFT) and keep the model's own weights fixed."""

    rank: int = Field(16, ge=1, description="rank of the adapter's matrices; its number of parameters is proportional to it")
    alpha: int = Field(32, ge=1, description="the adapter's output is multiplied by alpha / rank")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="modules that get an adapter: all-linear, or names of layers (q_proj)"
    )


class Policy(Section):
    """The model that is trained."""

    model: str = Field(description="a model folder or Hub id; builtin/smollm2 or builtin/tiny (ctcgrpo/policy/)")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub model; default: the newest")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="data type of the loaded weights")
    attention: str = Field("sdpa", description="transformers' attn_implementation")
    reasons: bool = Field(False, description="the policy reasons before it replies; adds shaping")
    reasoning_context: Literal["strip", "keep"] = recipe_field("reasoning_context")
    chat_template: Path | None = Field(None, description="file with the chat template; default: the tokenizer's")
    template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the chat template: reasoning_effort, date_string, thinking, ..."
    )
    persona_sections: tuple[str, ...] | None = Field(
        None, description="sections of the persona (### headings) in the policy's prompt; default: all"
    )
    instructions: str = Field(
        DEFAULT_INSTRUCTIONS,
        description="reply instructions after the persona: eibench, short, none, a template file, or a folder of LANGUAGE.j2",
    )
    no_reasoning_penalty: float = recipe_field("no_reasoning_penalty")
    fault_penalty: float = recipe_field("fault_penalty")
    lora: Lora | None = None
    quantization: Literal["none", "nf4"] = Field("none", description="quantization of the frozen weights; nf4 is QLoRA")

    @field_validator("template_kwargs")
    @classmethod
    def _set_elsewhere(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "enable_thinking" in value:
            raise ValueError("enable_thinking is set by policy.reasons; set policy.reasons instead")
        if taken := {"tokenize", "add_generation_prompt", "messages", "conversation", "return_tensors"} & set(value):
            raise ValueError(f"{min(taken)} is set by ctcgrpo; leave it out")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Policy:
        if self.quantization != "none" and self.lora is None:
            raise ValueError("quantization freezes the weights; expected an adapter to train: policy.lora={rank: 16}")
        for name in ("no_reasoning_penalty", "fault_penalty"):
            if not self.reasons and (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value}, but reasons is false; set policy.reasons=true, or leave it out")
        return self


class Scenarios(Section):
    """The scenarios that are trained on."""

    train: str = Field(
        description="a path, a bundled pack (english/train), a dataset in $CTCGRPO_DATA (eibench/train), or a data set on the Hub "
        "(hf://datasets/OWNER/NAME[@REVISION][/SPLIT])"
    )
    scenes: tuple[str, ...] = Field(
        SCENES, min_length=1, description="scenes to train on, without duplicates: of the published set, or custom ones"
    )

    @field_validator("scenes")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("duplicate scene")
        return value

    per_step: int = Field(16, ge=1, description="scenarios per step; the same number of each scene")
    invalid: Literal["skip", "refuse"] = Field(
        "skip",
        description="malformed or inconsistent records, also in validation.scenarios: skip them with a warning, or refuse them. "
        "Always an error: duplicate ids, a file without a valid record, and a set more than half invalid",
    )


class OwnEnvironment(Section):
    """A custom environment; it replaces the sections scenarios, simulator and scoring (ctcgrpo/types.py: Environment)."""

    factory: str = Field(
        description="module:attribute: a class or function that makes the Environment of an episode; or an asynchronous context "
        "manager class, of which one instance makes them all and is open while a batch is played"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments for the factory")
    tasks: str = Field(
        description="training tasks: a file of JSON lines or JSON with one object per task, a folder of them, a data set on the "
        "Hub (hf://datasets/OWNER/NAME[@REVISION][/SPLIT]), or module:function that returns them"
    )
    timeout: float = recipe_field("environment_timeout")
    per_step: int = Field(8, ge=1, description="tasks per step; the same number of each tag")
    folder: Path | None = Field(None, description="first folder searched for modules; default: the recipe's")


class Vllm(Section):
    """vLLM, for rollout.engine vllm_colocated and vllm_server."""

    gpu_memory: float = Field(0.35, gt=0, lt=1, description="vllm_colocated: share of each GPU's memory for vLLM")
    urls: tuple[str, ...] = Field((), description="vllm_server: URLs of the servers, http://HOST:PORT")
    group_port: int = Field(51216, ge=1024, le=65000, description="vllm_server: first port of weight transfer, one per server")
    timeout: float = Field(600.0, gt=0, description="vllm_server: timeout of a request in seconds")
    patience: float = recipe_field("vllm_server_patience")
    check_every: int = recipe_field("vllm_server_check_every")

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r}; expected a URL that begins with http:// or https://")
        return value


class Rollout(Section):
    """How episodes are played and sampled."""

    engine: Literal["transformers", "vllm_colocated", "vllm_server"] = Field(
        "transformers", description="engine that samples replies: transformers, vLLM on the training GPUs, or vLLM servers"
    )
    group_size: int = Field(8, ge=2, description="G: episodes per scenario and step; they are compared with each other")
    max_turns: int = recipe_field("max_turns")
    max_new_tokens: int = Field(1024, ge=1, description="maximum tokens of a reply, reasoning included")
    max_prompt_tokens: int = recipe_field("max_prompt_length")
    temperature: float = Field(0.6, gt=0, description="sampling temperature; log-probabilities are computed at the same one")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens of this total probability; 1 is off")
    top_k: int = Field(0, ge=0, description="sample from this many most likely tokens; 0 is off")
    max_batch: int = recipe_field("max_batch")
    dtype: SamplingDtype = recipe_field("sampling_dtype")
    vllm: Vllm = Vllm()  # type: ignore[call-arg]
    deterministic: bool = recipe_field("deterministic")
    overlap: int = recipe_field("overlap")
    deadline: float | None = recipe_field("deadline")
    max_failed: float = recipe_field("max_failed")


class Scoring(Section):
    """How the user's state gives outcomes and turn scores."""

    variant: Literal["training", "evaluation"] = Field(
        "training",
        description="outcome where the target anger is not below the initial one: training penalises anger beyond the target, "
        "evaluation (as in published scores) does not",
    )
    turn_weights: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = Field(
        {}, description="weights of the changes in anger and in trust, by scene; default: [0.5, 0.5]"
    )

    @field_validator("turn_weights")
    @classmethod
    def _at_most_one(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for scene, weights in value.items():
            if sum(weights) > 1 + 1e-9:
                raise ValueError(f"the weights of {scene} sum to {sum(weights):g}; expected at most 1")
        return value


class Credit(Section):
    """How outcome and turn scores give the advantage of each turn: A = outcome term + alpha * turn term. A custom function
    (ctcgrpo/credit.py) is named as my_module:my_function, in a file beside the recipe or in the current directory."""

    alpha: float = recipe_field("alpha")
    outcome_weight: float = recipe_field("outcome_weight")
    centering: str = recipe_field("centering")
    credit: str = recipe_field("credit")
    continuations: int = recipe_field("continuations")
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
        tables: dict[str, Iterable[str]] = {"centering": CENTERINGS, "credit": CREDIT_NAMES}
        options = tables.get(info.field_name, SCALES)
        if value not in options and not is_reference(value):
            raise ValueError(f"{did_you_mean(value, options)} (a custom one: my_module:my_function)")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Credit:
        if self.gamma != 1.0 and self.credit not in DISCOUNTED and not is_reference(self.credit):
            raise ValueError(
                f"gamma is {self.gamma}, but credit {self.credit!r} does not discount; leave it out, or set credit.gamma=1"
            )
        if self.center_weights == "token" and self.centering == "none":
            raise ValueError("center_weights is 'token', but centering 'none' uses no weights; leave center_weights out")
        if self.std_min != CreditOptions.std_min and self.scale == "none":
            raise ValueError(f"std_min is {self.std_min}, but scale 'none' does not divide; leave it out")
        if self.continuations != CreditOptions.continuations and self.credit != VINE:
            raise ValueError(f"continuations is {self.continuations}, but credit {self.credit!r} plays none; leave it out")
        if self.shuffle == "turn_scores" and self.credit == VINE:
            raise ValueError(f"shuffle is 'turn_scores', which credit {VINE!r} does not read; expected 'advantages'")
        if self.turn_std_min != CreditOptions.turn_std_min and self.turn_scale == "none":
            raise ValueError(f"turn_std_min is {self.turn_std_min}, but turn_scale 'none' does not divide; leave it out")
        return self


class Training(Section):
    """The update: optimizer, loss, memory, checkpoints."""

    max_steps: int = Field(250, ge=1, description="steps of the run; a step is one batch of rollouts")
    updates_per_step: int = Field(1, ge=1, description="K: optimizer steps per batch of rollouts, each on 1/K of it")
    learning_rate: float = Field(1e-6, ge=0, description="AdamW's learning rate after the warmup")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="schedule of the learning rate after the warmup")
    min_learning_rate: float = Field(
        0.1, ge=0, le=1, description="final learning rate of the cosine, as a share of learning_rate"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 for no clipping")
    clip: float = Field(0.2, gt=0, lt=1, description="PPO clips the ratio to [1 - clip, 1 + clip]")
    dual_clip: float | None = recipe_field("dual_clip")
    loss_weights: LossWeights = recipe_field("loss_weights")
    entropy_bonus: float = recipe_field("entropy_coef")
    kl: float = Field(0.0, ge=0, description="weight of the KL term to the reference policy (before training); the paper uses 0")
    old_logprobs: OldLogprobs = recipe_field("old_logprobs")
    importance: Literal["auto", "none", "token", "turn", "episode"] = recipe_field("importance")
    importance_max: float = recipe_field("importance_max")
    loss_total: float | None = recipe_field("loss_total")
    update_parts: int = recipe_field("update_parts")
    tokens_per_row: int = recipe_field("tokens_per_row")
    packing: Packing = recipe_field("packing")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    sharding: str = Field(
        "none", description="none (every process holds the policy), fsdp2, or a DeepSpeed configuration (configs/deepspeed)"
    )
    bf16: bool = Field(False, description="mixed precision: bfloat16 compute on float32 weights")
    audit_every: int | None = recipe_field("audit_every")
    process_timeout: int = Field(
        3600,
        ge=1,
        description="seconds that a process waits for the others before the run fails; must exceed the time by which the slowest "
        "episode of a step or validation outlasts the others",
    )
    save_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="number of newest checkpoints to keep")


class Validation(Section):
    """Held-out scenarios, played before, during and after training."""

    scenarios: str | None = Field(None, description="held-out scenarios, named as in scenarios.train")
    tasks: str | None = Field(None, description="with environment: held-out tasks, named as in environment.tasks")
    every: int = Field(30, ge=1, description="steps between validations; one more runs before and one after training")
    samples: int = Field(1, ge=1, description="episodes of each scenario")
    seed: int = Field(0, ge=0, description="sampling seed of every validation; runs with the same seed are comparable")
    simulator: OtherUser | None = None


class Hardware(Section):
    """The hardware that a run is planned for; read only by `ctcgrpo check`."""

    gpu: str | None = Field(None, description="GPU of the memory plan; one of ctcgrpo/preflight/cards.yaml")
    processes: int = Field(1, ge=1, description="GPUs that train, one process each, on all nodes together")
    nodes: int = Field(1, ge=1, description="machines that train")
    tokens_per_second: float | None = Field(None, gt=0, description="measured sampling throughput of all GPUs together")


class Recipe(Section):
    """All settings of a run."""

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
            raise ValueError("expected exactly one of the sections scenarios (EIBench's task) and environment (a custom one)")
        own = self.environment is not None
        if own and (unused := {"simulator", "scoring"} & self.model_fields_set):
            raise ValueError(f"section {min(unused)} has no effect with the section environment; leave it out")
        if own and (unused := _UNUSED["policy"] & self.policy.model_fields_set):
            raise ValueError(f"policy.{min(unused)} has no effect with the section environment; leave it out")
        if self.validation is not None:
            used, other = ("tasks", "scenarios") if own else ("scenarios", "tasks")
            if getattr(self.validation, used) is None or getattr(self.validation, other) is not None:
                what = "environment" if own else "scenarios"
                raise ValueError(f"with the section {what}, expected validation.{used} (held out), and no validation.{other}")
            if own and self.validation.simulator is not None:
                raise ValueError("validation.simulator has no effect with the section environment; leave it out")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.rollout.group_size % self.training.updates_per_step:
            raise ValueError(
                f"training.updates_per_step is {self.training.updates_per_step} and rollout.group_size "
                f"{self.rollout.group_size}; expected a divisor: each update takes an equal share of every group"
            )
        if self.scenarios is not None and (known := {*SCENES, *self.scenarios.scenes}):
            for scene in self.scoring.turn_weights.keys() - known:
                raise ValueError(f"scoring.turn_weights: {scene!r} is not in scenarios.scenes; {did_you_mean(scene, known)}")
        if self.scenarios is not None and self.scenarios.per_step % len(self.scenarios.scenes):
            raise ValueError(
                f"scenarios.per_step is {self.scenarios.per_step} for {len(self.scenarios.scenes)} scenes; "
                "expected a multiple: a step takes the same number of each scene"
            )
        if self.scenarios is not None and (known := {*SCENES, *self.scenarios.scenes}):
            for k, user in enumerate(self.simulator.users):
                for scene in {*(user.scenes or ())} - known:
                    raise ValueError(f"simulator.users.{k}.scenes: {scene!r}; {did_you_mean(scene, known)}")
        if wrong := next(self._conflicts(), None):
            raise ValueError(wrong)
        return self

    def _conflicts(self) -> Iterator[str]:
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        for section in ("credit", "rollout", "training"):
            for name, field in type(part := getattr(self, section)).model_fields.items():
                extra = field.json_schema_extra
                option = str(extra["option"]) if isinstance(extra, dict) and "option" in extra else name
                values[option], names[option] = getattr(part, name), f"{section}.{name}"
        values["num_iterations"], names["num_iterations"] = self.training.updates_per_step, "training.updates_per_step"
        return conflicts(values, lambda option: names[option])

    @model_validator(mode="after")
    def _engine_fits(self) -> Recipe:
        engine, vllm = self.rollout.engine, self.rollout.vllm
        if self.policy.attention != "sdpa" and (self.training.packing != "none" or engine == "transformers"):
            raise ValueError(
                f"policy.attention is {self.policy.attention!r}, but packing and the transformers engine use "
                "their own; leave it out, or set training.packing=none and a vLLM engine"
            )
        if engine == "vllm_server" and not vllm.urls:
            raise ValueError("rollout.engine is 'vllm_server', but rollout.vllm.urls is empty; set the servers' URLs")
        if engine != "vllm_server" and vllm.urls:
            raise ValueError(f"rollout.vllm.urls names servers, but rollout.engine is {engine!r}; set it to 'vllm_server'")
        if engine != "transformers" and self.rollout.dtype != "policy":
            raise ValueError(
                f"rollout.dtype has no effect with rollout.engine {engine!r}: vLLM samples in bfloat16; leave it out"
            )
        if self.policy.quantization != "none" and self.rollout.dtype != "policy":
            raise ValueError("rollout.dtype needs unquantized weights; leave it out, or policy.quantization")
        while_updating = "rollout.overlap" if self.rollout.overlap else "training.update_parts"
        plays_while_updating = self.rollout.overlap or self.training.update_parts > 1
        if plays_while_updating and engine != "vllm_server" and (engine, self.rollout.dtype) != ("transformers", "bfloat16"):
            raise ValueError(
                f"{while_updating} with rollout.engine {engine!r}, which samples from the trained weights themselves; expected "
                "'vllm_server', or 'transformers' with rollout.dtype=bfloat16"
            )
        if self.training.update_parts > self.tasks_per_step:
            raise ValueError(
                f"training.update_parts = {self.training.update_parts} with {self.tasks_per_step} groups a step (per_step); "
                "expected at most as many parts as groups"
            )
        if engine != "transformers" and self.rollout.deterministic:
            raise ValueError(
                "rollout.deterministic needs rollout.engine 'transformers': the composition of vLLM's batches is not fixed"
            )
        if self.policy.quantization != "none" and (engine != "transformers" or self.training.sharding != "none"):
            raise ValueError(
                "policy.quantization needs rollout.engine 'transformers' and training.sharding none: vLLM, DeepSpeed and FSDP "
                "need unquantized weights"
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
        """The fields of the section credit that name a custom function, with its reference."""
        names = ("credit", "centering", "scale", "turn_scale")
        return {name: value for name in names if is_reference(value := getattr(self.credit, name))}

    def credit_options(self) -> CreditOptions:
        """The section credit, under the field names of the trainer's configuration."""
        return CreditOptions(
            **self.credit.model_dump(exclude={"scale", "shuffle"}),
            scale_rewards=self.credit.scale,
            shuffle_credit=self.credit.shuffle,
            reasons=self.policy.reasons,
            no_reasoning_penalty=self.policy.no_reasoning_penalty,
            fault_penalty=self.policy.fault_penalty,
        )

    def eibench_scenarios(self, what: str = "this") -> Scenarios:
        """The section scenarios, which `what` needs. Raises RecipeError for a recipe with a custom environment."""
        if self.scenarios is None:
            assert self.environment is not None  # _one_environment
            raise RecipeError(
                f"{what} needs a recipe with the section scenarios (EIBench's task); that of {self.run.name} has "
                f"environment.factory = {quoted(self.environment.factory)}"
            )
        return self.scenarios

    def validation_source(self) -> str:
        """The source of validation scenarios or tasks."""
        assert self.validation is not None
        source = self.validation.scenarios or self.validation.tasks
        assert source is not None  # _one_environment
        return source

    def check_sharding(self) -> None:
        """Refuse sharding that the engine cannot sample from, and an invalid DeepSpeed configuration. It reads that file, and so is
        not part of recipe validation."""
        if splits_weights(self.training.sharding) and self.rollout.engine == "transformers":
            raise RecipeError(
                f"training.sharding = {self.training.sharding!r} leaves no process a whole policy, which rollout.engine "
                "'transformers' needs; use rollout.engine vllm_colocated or vllm_server, or ZeRO-1 or -2"
            )

    def check_processes(self, processes: int) -> None:
        """Refuse a number of processes that does not divide the episodes of a step."""
        section = "scenarios" if self.environment is None else "environment"
        episodes = self.tasks_per_step * self.rollout.group_size
        if episodes % processes:
            raise RecipeError(
                f"{section}.per_step x rollout.group_size is {self.tasks_per_step} x {self.rollout.group_size} = "
                f"{episodes} episodes a step for {processes} processes; expected a multiple of {processes}"
            )

    def to_yaml(self) -> str:
        """The resolved recipe with every field; for a custom environment without the fields that it cannot have."""
        fields = self.model_dump(mode="json", exclude=None if self.environment is None else _UNUSED)
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
