"""`ctcgrpo check`: everything that would fail later, found before any GPU is taken; then the plan of memory, calls, money, hours.

A check is a small function with the decorator `check`: it takes what was loaded and yields findings. Order matters: a later one may
need what an earlier one has loaded, and says nothing where that is missing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import netrc
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ctcgrpo.environments.eibench import EIBench, User, opening_messages, task_of
from ctcgrpo.errors import (
    CtcGrpoError,
    PolicyError,
    RecipeError,
    SimulatorTransportError,
)
from ctcgrpo.folders import check_model
from ctcgrpo.naming import did_you_mean
from ctcgrpo.plan.cost import Asked, Tokens, hours, money
from ctcgrpo.plan.known import cards, published_shapes, shape_of
from ctcgrpo.plan.memory import GIB, PHASES, Load, MemoryPlan, Shape, memory_plan
from ctcgrpo.plan.saving import checkpoint_bytes, notice_seconds, save_seconds, too_little_time
from ctcgrpo.policy.adapter import refuse_tied_targets
from ctcgrpo.policy.attention import refuse_layouts
from ctcgrpo.policy.builtin import build_builtin, wheel_of
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.loading import check_fits, load_tokenizer, stop_ids
from ctcgrpo.policy.model_wheel import refuse_unfetchable
from ctcgrpo.policy.persona import Briefing
from ctcgrpo.policy.reasoning import CLOSE, OPEN
from ctcgrpo.proxies import open_url
from ctcgrpo.recipe import Recipe
from ctcgrpo.records import Scenario
from ctcgrpo.rollout.vllm_adapter import base_url
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.scenarios import ScenarioSet, load_scenarios, load_scenes, load_set
from ctcgrpo.settings import briefing, context_builder, lora_config, template_kwargs
from ctcgrpo.sharding import FSDP2, NONE, check_launcher, deepspeed_stage, offloads
from ctcgrpo.simulator.choice import check_patience
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER, SimulatorConfig, bearer_token, load_simulator_config
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.scripted.backend import ScriptedBackend
from ctcgrpo.simulator.scripted.knowledge import unscripted_warning
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.startup import SHUTDOWN_TIMEOUT
from ctcgrpo.training.tree_attention import how_to_attend
from ctcgrpo.types import Completion, Message

Level = Literal["ok", "warning", "failed"]

REPLY_TOKENS, LINE_TOKENS, VERDICT_TOKENS = 150, 60, 250
"""What a reply of the policy, a line of the user and an answer of the simulating LLM are taken to have, on the average:
assumptions, said beside every figure that rests on them."""
_CHARACTERS_PER_TOKEN = {"zh": 1.6}
_OTHER_LANGUAGES = 4.0
_ROUNDED_AWAY = 1e-4
"""AdamW moves a weight by about the learning rate; bfloat16 keeps 8 bits, so weights of the usual 0.02 need steps of 1e-4."""
_FULL_AT_WAKE = 0.9
"""The share of a card beyond which a colocated vLLM may find no room to wake, for fragmentation."""
_PATIENCE = 20.0
"""Seconds for a canary turn."""
_MEASURED, _PLAYED = 48, 4
"""Scenarios of each scene whose prompts are measured, and whose dialogues are laid out for the simulator, at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check says: of what, how bad, and what is so or would have to change."""

    about: str
    level: Level
    text: str


@dataclass
class Subject:
    """The recipe, and what checks have loaded of it so far."""

    recipe: Recipe
    folder: Path
    """For what is built in passing; gone after the check."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    accelerate_config: Path = Path(default_config_file)
    scenarios: list[Scenario] = field(default_factory=list)
    held_out: list[Scenario] = field(default_factory=list)
    shape: Shape | None = None
    config: Any = None
    """The model's own configuration, where it is at hand."""
    tokenizer: PreTrainedTokenizerBase | None = None
    contexts: ContextBuilder | None = None
    simulator: SimulatorConfig | None = None
    memory: MemoryPlan | None = None

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights; there must be a configuration."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        return model

    @property
    def examples(self) -> list[Scenario]:
        """Of what is played: the run's own scenarios, or the bundled ones while those are not here."""
        return self.scenarios or load_scenarios("english/train")

    @property
    def longest(self) -> int:
        return self.recipe.rollout.max_prompt_tokens + self.recipe.rollout.max_new_tokens


Check = Callable[[Subject], Iterator[Finding]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def findings(
    recipe: Recipe, environment: Mapping[str, str] = os.environ, accelerate_config: Path = Path(default_config_file)
) -> tuple[list[Finding], Subject]:
    """All findings, and what was loaded on the way. A check that raises one of this project's errors has found what is wrong."""
    found: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(recipe, Path(folder), environment, accelerate_config)
        for one in CHECKS:
            try:
                found += one(subject)
            except CtcGrpoError as error:
                if str(error) not in {f.text for f in found}:  # one mistake may be in the way of several checks
                    found.append(Finding(one.__name__.replace("_", " "), "failed", str(error)))
    return found, subject


# --- what is there ------------------------------------------------------------------------------------------------------


@check
def scenarios(s: Subject) -> Iterator[Finding]:
    found = load_scenes(
        s.recipe.eibench_scenarios().train, s.recipe.eibench_scenarios().scenes, s.recipe.eibench_scenarios().invalid
    )
    s.scenarios = found.scenarios
    yield from _left_out("scenarios", found)
    yield Finding("scenarios", "ok", f"{len(s.scenarios)} to train on")


@check
def validation(s: Subject) -> Iterator[Finding]:
    if s.recipe.validation is None:
        yield Finding("validation", "warning", "none: the run will not say whether it got better (section validation)")
        return
    found = load_set(s.recipe.validation_source(), "test", s.recipe.eibench_scenarios().invalid)
    s.held_out = found.scenarios
    yield from _left_out("validation", found)
    if both := {x.id for x in s.held_out} & {x.id for x in s.scenarios}:
        yield Finding(
            "validation", "failed", f"validation.scenarios holds {len(both)} that are trained on, {min(both)!r} among them"
        )
    else:
        yield Finding("validation", "ok", f"{len(s.held_out)} held out")


def _left_out(about: str, found: ScenarioSet) -> Iterator[Finding]:
    if lines := found.report():
        yield Finding(about, "warning", "\n".join(lines))


@check
def sharding(s: Subject) -> Iterator[Finding]:
    s.recipe.check_sharding()
    chosen = s.recipe.training.sharding
    stage = deepspeed_stage(chosen)
    yield Finding("sharding", "ok", f"DeepSpeed ZeRO-{stage}" if stage else {NONE: "none", FSDP2: "FSDP2"}[chosen])


@check
def libraries(s: Subject) -> Iterator[Finding]:
    needed = {
        "vllm": s.recipe.rollout.engine != "transformers",
        "deepspeed": deepspeed_stage(s.recipe.training.sharding) > 0,
        "bitsandbytes": s.recipe.policy.quantization != "none",
    }
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    for name in missing:
        extra = {"bitsandbytes": "qlora"}.get(name, name)
        yield Finding("libraries", "failed", f"{name} is not installed here: pip install 'ctcgrpo[{extra}]'")
    if not missing:
        used = [name for name, wanted in needed.items() if wanted]
        yield Finding("libraries", "ok", ", ".join(used) if used else "none beyond the base")


@check
def model(s: Subject) -> Iterator[Finding]:
    name = s.recipe.policy.model
    check_model(name, "policy.model")
    if (wheel := wheel_of(name)) and not wheel.is_here:
        s.shape = published_shapes()[wheel.hub_id]
        refuse_unfetchable(wheel)
        yield Finding(
            "model",
            "warning",
            f"{name}, {s.shape.parameters / 1e6:,.1f} million parameters, is not here yet: the run will first {wheel.plan}; "
            "prompts are measured once it is here",
        )
        return
    path = build_builtin(name, s.folder / "base", s.recipe.run.seed)
    try:
        config = AutoConfig.from_pretrained(path, revision=s.recipe.policy.revision)
    except (OSError, ValueError) as error:
        s.shape = published_shapes().get(name)
        plan = "; the plan below takes its published shape" if s.shape else ""
        raise PolicyError(f"policy.model {name!r} cannot be loaded here ({str(error).splitlines()[0]}){plan}") from None
    s.shape, s.config = shape_of(config), config
    policy = s.recipe.policy
    s.tokenizer = load_tokenizer(path, policy.revision, policy.chat_template)
    check_fits(config, s.tokenizer, s.longest, name)
    yield Finding("model", "ok", f"{name}, {s.shape.parameters / 1e6:,.1f} million parameters")
    ends = stop_ids(path, s.tokenizer, policy.revision, template_kwargs(s.recipe))
    s.contexts = context_builder(s.recipe, s.tokenizer, ends)


@check
def adapter(s: Subject) -> Iterator[Finding]:
    lora, config = s.recipe.policy.lora, lora_config(s.recipe)
    if s.config is None or lora is None or config is None:
        return
    refuse_tied_targets(s.config, config)
    if isinstance(lora.target_modules, str):
        return
    names = [name for name, _ in s.skeleton.named_modules()]
    if missing := [t for t in lora.target_modules if not any(name == t or name.endswith(f".{t}") for name in names)]:
        known = sorted({name.rpartition(".")[2] for name in names if name.endswith("_proj")})
        raise PolicyError(f"policy.lora.target_modules: the model has no {', '.join(missing)}; it has {', '.join(known)}")
    yield Finding("adapter", "ok", f"LoRA on {', '.join(lora.target_modules)}")


@check
def attention(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.policy.attention
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(wanted)
    if package is not None and importlib.util.find_spec(package) is None:
        raise PolicyError(f"policy.attention is {wanted!r}, and {package} is not installed here; use sdpa, or install it")
    packing = s.recipe.training.packing
    if s.recipe.hardware.gpu is None:  # meant for this machine
        half = s.recipe.training.bf16 or s.recipe.policy.dtype == "bfloat16"
        how_to_attend(packing, torch.device("cuda" if torch.cuda.is_available() else "cpu"), half=half)
    if s.config is not None and (packing != "none" or s.recipe.rollout.engine == "transformers"):
        refuse_layouts(s.skeleton)
    yield Finding("attention", "ok", f"{wanted}, packing {packing}")


@check
def reasoning_tags(s: Subject) -> Iterator[Finding]:
    if s.tokenizer is None or not s.recipe.policy.reasons:
        return
    long = [tag for tag in (OPEN, CLOSE) if len(s.tokenizer.encode(tag, add_special_tokens=False)) != 1]
    if long:
        yield Finding(
            "reasoning tags",
            "warning",
            f"{' and '.join(long)} are several tokens to this tokenizer: was it taught to reason so?",
        )
    else:
        yield Finding("reasoning tags", "ok", f"{OPEN} and {CLOSE} are a token each")


@check
def context(s: Subject) -> Iterator[Finding]:
    """Whether contexts stay a prefix under the template was found out when they were made; whether they fit is found out here."""
    if s.contexts is None or not s.scenarios:
        return
    told = briefing(s.recipe)
    openings = {scenario.id: opening_messages(scenario, told) for scenario in [*s.scenarios, *s.held_out]}
    s.contexts.check(openings)
    for note in s.contexts.notes(openings.values()):
        yield Finding("context", "warning", note)
    last = [_last_prompt(s, openings[x.id]) for x in _sample(s.scenarios, _MEASURED)]
    dropped = sum(n > 0 for _, n in last) / len(last)
    reply = min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens)
    text = (
        f"the last of {s.recipe.rollout.max_turns} turns has a prompt of {max(n for n, _ in last)} tokens at most, "
        f"{statistics.mean(n for n, _ in last):.0f} on the average (replies of {reply} tokens, lines of {LINE_TOKENS})"
    )
    if dropped:
        share = f"{dropped:.0%} of the scenarios would drop exchanges by then; raise rollout.max_prompt_tokens"
        yield Finding("context", "warning", f"{text}; {share}")
    else:
        yield Finding("context", "ok", text)


def _last_prompt(s: Subject, opening: Sequence[Message]) -> tuple[int, int]:
    assert s.contexts is not None
    dialogue = s.contexts.start(opening)
    reply = Completion((0,) * min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens), (), (), "stop")
    for _ in range(s.recipe.rollout.max_turns - 1):
        dialogue = s.contexts.extend(dialogue, reply, "word " * LINE_TOKENS)
    ids, dropped = s.contexts.prompt(dialogue)
    return len(ids), dropped


# --- whether it fits together -------------------------------------------------------------------------------------------


@check
def processes(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.hardware.processes
    s.recipe.check_processes(wanted)
    episodes = s.recipe.tasks_per_step * s.recipe.rollout.group_size // wanted
    text = f"{wanted} with {episodes} episodes a step each (hardware.processes)"
    if episodes % s.recipe.rollout.group_size:
        yield Finding("processes", "warning", f"{text}: groups are split over processes, and share no prefix cache")
    else:
        yield Finding("processes", "ok", text)


@check
def precision(s: Subject) -> Iterator[Finding]:
    policy, training = s.recipe.policy, s.recipe.training
    whole = policy.lora is None
    masters = policy.dtype == "float32" or not whole or (deepspeed_stage(training.sharding) and training.bf16)
    if not masters and 0 < training.learning_rate < _ROUNDED_AWAY:
        yield Finding(
            "precision",
            "failed",
            f"policy.dtype bfloat16 without float32 masters rounds updates of training.learning_rate {training.learning_rate:g} "
            "away; use policy.dtype=float32 with training.bf16=true, or a DeepSpeed configuration",
        )
        return
    if policy.dtype == "float32" and not training.bf16 and s.recipe.hardware.gpu:
        yield Finding(
            "precision", "warning", "training.bf16 is off: float32 throughout takes twice the memory and time on a GPU"
        )
    else:
        trained = "adapters" if not whole else f"{policy.dtype} weights"
        yield Finding("precision", "ok", f"{trained}, compute in {'bfloat16' if training.bf16 else policy.dtype}")


@check
def launcher(s: Subject) -> Iterator[Finding]:
    sharding = s.recipe.training.sharding
    check_launcher(sharding, s.environment)
    file = s.accelerate_config
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        yield Finding("launcher", "failed", f"{file}, accelerate's default, is not valid YAML: {error}")
        return
    if not isinstance(config, dict):
        yield Finding(
            "launcher", "failed", f"{file}, accelerate's default, is no mapping; `accelerate config default` writes one"
        )
        return
    kind = str(config.get("distributed_type", "NO"))
    if (kind == "DEEPSPEED") or (kind == "FSDP" and sharding != FSDP2):
        yield Finding(
            "launcher",
            "failed",
            f"{file} makes accelerate launch with {kind}, and the recipe says training.sharding={sharding}; launch with "
            "--config_file configs/accelerate/one_node.yaml",
        )
        return
    yield Finding(
        "launcher", "ok", f"accelerate's default is {kind}; a --config-file decides otherwise" if config else "plain"
    )


@check
def memory(s: Subject) -> Iterator[Finding]:
    gpu = s.recipe.hardware.gpu
    if s.shape is None or gpu is None:
        return
    known = cards()
    if gpu not in known:
        raise RecipeError(f"hardware.gpu is {gpu!r}; {did_you_mean(gpu, known)}")
    s.memory = plan = memory_plan(s.shape, load_of(s.recipe), known[gpu] * GIB)
    worst = max(PHASES, key=plan.total)
    text = f"{plan.total(worst) / GIB:.1f} of {gpu}'s {plan.card / GIB:.1f} GiB, most in the {worst}"
    if not plan.fits:
        what = "rollout.vllm.gpu_memory" if worst == "rollout" else "training.tokens_per_row"
        more = "shard more (training.sharding), use more GPUs, or policy.lora"
        yield Finding("memory", "failed", f"{text}; lower {what}, {more}")
        return
    if plan.kv_tokens is None:
        yield Finding("memory", "ok", text)
        return
    if plan.total("rollout") > _FULL_AT_WAKE * plan.card:
        share = f"{plan.total('rollout') / plan.card:.0%} in rollouts; vLLM wakes into what the update has left in pieces"
        yield Finding(
            "memory", "warning", f"{text}, {share}; lower rollout.vllm.gpu_memory to stay below {_FULL_AT_WAKE:.0%}"
        )
    else:
        yield Finding("memory", "ok", text)
    rollouts = load_of(s.recipe).rollouts
    room = f"vLLM has room for keys and values of {plan.kv_tokens:,} tokens, and {rollouts} rollouts of full length want"
    if plan.kv_tokens < s.longest:
        yield Finding("memory", "failed", f"{room} {plan.kv_wanted:,}: not even one fits; raise rollout.vllm.gpu_memory")
    elif plan.kv_tokens < plan.kv_wanted:
        yield Finding("memory", "warning", f"{room} {plan.kv_wanted:,}: some will wait for others")
    else:
        yield Finding("memory", "ok", f"{room} {plan.kv_wanted:,}")


def load_of(recipe: Recipe) -> Load:
    rollout, training, policy = recipe.rollout, recipe.training, recipe.policy
    stage = deepspeed_stage(training.sharding)
    here = recipe.tasks_per_step * rollout.group_size // recipe.hardware.processes
    return Load(
        processes=recipe.hardware.processes,
        sharding="fsdp2" if training.sharding == FSDP2 else ("none", "zero1", "zero2", "zero3")[stage],
        offload=offloads(training.sharding),
        weight_bytes=4 if policy.dtype == "float32" else 2,
        quantized=policy.quantization != "none",
        bf16=training.bf16,
        lora_rank=policy.lora.rank if policy.lora else None,
        reference=training.kl > 0,
        checkpointing=training.gradient_checkpointing,
        tokens_per_row=training.tokens_per_row,
        longest=rollout.max_prompt_tokens + rollout.max_new_tokens,
        rollouts=min(rollout.max_batch, max(1, here)),
        gpu_memory=rollout.vllm.gpu_memory if rollout.engine == "vllm_colocated" else 0.0,
        samples_here=rollout.engine == "transformers",
    )


@check
def policy_servers(s: Subject) -> Iterator[Finding]:
    for url in map(base_url, s.recipe.rollout.vllm.urls):
        try:
            with open_url(f"{url}/v1/models", timeout=5) as response:
                served = json.load(response)["data"][0]
            with open_url(f"{url}/server_info?config_format=json", timeout=5) as response:
                transfer = json.load(response).get("vllm_config", {}).get("weight_transfer_config")
        except (OSError, ValueError, KeyError, IndexError) as error:
            why = f"{url} does not answer as a vLLM server with development endpoints ({error})"
            yield Finding("policy servers", "failed", f"{why}; launch/serve_policy.sh and launch/slurm.sbatch start such")
            continue
        if transfer is None:
            why = f"{url} cannot take weights: it needs --weight-transfer-config"
            yield Finding("policy servers", "failed", f"{why} (launch/serve_policy.sh)")
        elif (length := served.get("max_model_len") or s.longest) < s.longest:
            yield Finding("policy servers", "failed", f"{url} has max_model_len {length}, and the recipe needs {s.longest}")
        else:
            yield Finding("policy servers", "ok", f"{url} serves {served['id']}")


# --- the simulator --------------------------------------------------------------------------------------------------------


@check
def simulator(s: Subject) -> Iterator[Finding]:
    """One canary turn, on the real simulator: it costs a call."""
    settings = s.recipe.simulator
    if settings.url == "embedded" and s.recipe.hardware.nodes > 1:
        raise RecipeError(
            f"simulator.url is 'embedded', which the others of {s.recipe.hardware.nodes} nodes cannot reach; start "
            "`ctcgrpo serve CONFIG --host 0.0.0.0` and name it, or leave it to launch/slurm.sbatch"
        )
    with ExitStack() as stack:
        if settings.url == "embedded":
            s.simulator = SCRIPTED_USER if settings.config is None else load_simulator_config(settings.config)
            server = SimulatorServer(s.simulator)
            server.check([*s.scenarios, *s.held_out])
            deadline = s.simulator.llm.deadline if s.simulator.llm else 0
            client = SimulatorClient(stack.enter_context(running(server)), timeout=deadline + 30, patience=2)
        else:
            urls = [settings.url] if isinstance(settings.url, str) else list(settings.url)
            client = SimulatorClient(
                urls, token=bearer_token(settings.token_env, s.environment), timeout=_PATIENCE, patience=2
            )
        says, reply = asyncio.run(_canary(client, s.examples[0]))
    check_patience(says, settings.timeout)
    who = ", ".join(map(str, says.get("models") or [says.get("backend")]))
    yield Finding("simulator", "ok", f"{who} answered a canary turn: {reply!r}")
    if says.get("backend") == ScriptedBackend.name:
        for played, what in ((s.scenarios, "training scenarios"), (s.held_out, "held-out scenarios")):
            if warning := unscripted_warning(played, what):
                yield Finding("scripts", "warning", warning)


async def _canary(client: SimulatorClient, scenario: Scenario) -> tuple[dict[str, Any], str]:
    try:
        async with asyncio.timeout(_PATIENCE), client:
            says = await client.health()
            dialogue = await _played(client, scenario, ["Hello. I am here and I am listening."], 8)
    except TimeoutError:
        raise SimulatorTransportError(f"no answer to a canary turn within {_PATIENCE:g} s") from None
    return says, dialogue.answer.reply[:60]


@check
def cost(s: Subject) -> Iterator[Finding]:
    recipe, config = s.recipe, s.simulator
    steps = recipe.training.max_steps
    held_out, every = recipe.validation, recipe.validation.every if recipe.validation else 0
    llm = config.llm if config else None
    asked = Asked(
        steps=steps,
        episodes_per_step=recipe.tasks_per_step * recipe.rollout.group_size,
        turns=recipe.rollout.max_turns,
        validations=2 + (steps - 1) // every if held_out else 0,
        episodes_per_validation=len(s.held_out) * held_out.samples if held_out else 0,
        calls_per_turn=llm.samples if llm else 1,
    )
    yield Finding(
        "simulator calls", "ok", f"up to {asked.calls_per_step:,} a step, {asked.calls:,} in all, validation included"
    )
    if llm is None and recipe.simulator.url == "embedded":
        yield Finding("cost", "ok", "the scripted user costs nothing")
    else:
        tokens = _simulator_tokens(s)
        total = asked.calls * (tokens.prompt + tokens.completion)
        step = asked.calls_per_step * (tokens.prompt + tokens.completion)
        text = (
            f"some {step / 1e6:.1f} million tokens a step, {total / 1e6:,.0f} million in all ({tokens.prompt:.0f} to read and "
            f"{VERDICT_TOKENS} to write a call, replies of {REPLY_TOKENS} tokens, lines of {LINE_TOKENS}"
            f"{'' if s.scenarios else ', by the bundled English scenarios'})"
        )
        prices = [e.price for e in llm.endpoints if e.price.prompt or e.price.completion] if llm else []
        if prices and config is not None:
            worst = max(money(asked.calls, tokens, p.prompt, p.completion) for p in prices)
            text += f"; up to {worst:,.0f} {config.budget.currency} at the dearest endpoint's prices"
            limit = config.budget.money
            if limit is not None and worst > limit:
                yield Finding("cost", "warning", f"{text}, and budget.money is {limit:g}: the run will pause there")
                return
        elif llm is not None:
            text += "; no prices are configured (llm.endpoints: price)"
        yield Finding("cost", "ok", text)
    if recipe.hardware.tokens_per_second:
        reply = min(REPLY_TOKENS, recipe.rollout.max_new_tokens)
        took = hours(asked, reply, recipe.hardware.tokens_per_second)
        yield Finding(
            "hours",
            "ok",
            f"{took:.1f} of sampling at {recipe.hardware.tokens_per_second:,.0f} tokens/s; updates come on top",
        )


def _simulator_tokens(s: Subject) -> Tokens:
    """Of a call, over a dialogue of full length, by our prompts; the official ones differ."""
    thinks = s.simulator is None or s.simulator.llm is None or s.simulator.llm.reflections
    prompts, rounds = TemplatePrompts(reflections=thinks), s.recipe.rollout.max_turns
    counts = []
    for scenario in _sample(s.examples, _PLAYED):
        rate = _CHARACTERS_PER_TOKEN.get(scenario.language, _OTHER_LANGUAGES)
        thought = "x" * _rounded_up((VERDICT_TOKENS - LINE_TOKENS) * rate) if thinks else ""
        user = _Verbose("x" * _rounded_up(LINE_TOKENS * rate), thought)
        asyncio.run(_played(user, scenario, ["x" * _rounded_up(REPLY_TOKENS * rate)] * rounds, rounds))
        for request in user.asked:
            text = "".join(m["content"] for m in prompts.messages(request))
            exact = s.tokenizer is not None and scenario.language == "en"
            said = request.history[1:] if scenario.opening_line else request.history
            words = sum(len(line.text) + len(line.reflection) for line in said)
            standing = len(s.tokenizer.encode(text.replace("x" * 40, ""))) if exact and s.tokenizer is not None else 0
            counts.append(standing + words / rate if exact else len(text) / rate)
    return Tokens(statistics.mean(counts), VERDICT_TOKENS)


class _Verbose:
    """A user who says and thinks the same every time, and keeps what it was asked."""

    def __init__(self, line: str, thought: str) -> None:
        self._line, self._thought = line, thought
        self.asked: list[TurnRequest] = []

    async def turn(self, request: TurnRequest) -> TurnReply:
        self.asked.append(request)
        return TurnReply(
            reply=self._line, anger_delta=0, trust_delta=0, state=request.state, goes_on=True, reflection=self._thought
        )


async def _played(user: User, scenario: Scenario, replies: Sequence[str], rounds: int) -> EIBench:
    """The dialogue after these replies."""
    dialogue = EIBench(user, briefing=Briefing(), max_turns=rounds)
    dialogue.name = f"check/{scenario.id}"
    await dialogue.reset(task_of(scenario).data, seed=0)
    for reply in replies:
        await dialogue.step(reply)
    return dialogue


def _rounded_up(number: float) -> int:
    return -int(-number // 1)


# --- the machine ----------------------------------------------------------------------------------------------------------


@check
def disk(s: Subject) -> Iterator[Finding]:
    if s.shape is None:
        return
    recipe, size = s.recipe, checkpoint_bytes(s.shape, s.recipe)
    # One more than are kept stands beside them while it is written; of best and final there are weights alone, at most a third.
    needed = (recipe.training.keep_checkpoints + 1) * size + 2 * size / 3
    where = next(p for p in [recipe.folder, *recipe.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(where).free
    text = f"{needed / GIB:.1f} GiB for {recipe.training.keep_checkpoints} checkpoints, best and final; {free / GIB:.0f} are free"
    level: Level = "ok" if needed < free else "failed"
    more = "" if needed < free else f" at {where}; lower training.keep_checkpoints, or set run.output_dir"
    yield Finding("disk", level, text + more)


@check
def stopping(s: Subject) -> Iterator[Finding]:
    """How long Ctrl-C and a scheduler's end have to wait."""
    if s.shape is None:
        return
    size = checkpoint_bytes(s.shape, s.recipe)
    if warning := too_little_time(size, s.environment):
        yield Finding("stopping", "warning", warning)
    elif s.recipe.hardware.processes > 1:
        told = f"{SHUTDOWN_TIMEOUT}=3600 for accelerate and torchrun, sbatch --signal=B:TERM@{notice_seconds(size)}"
        yield Finding(
            "stopping", "ok", f"a checkpoint of {size / GIB:.1f} GiB is saved in about {save_seconds(size):.0f} s; {told}"
        )


@check
def threads(s: Subject) -> Iterator[Finding]:
    if offloads(s.recipe.training.sharding) and s.environment.get("OMP_NUM_THREADS", "1") == "1":
        yield Finding(
            "threads",
            "warning",
            f"{s.recipe.training.sharding} updates on the CPU, and launchers give each process one thread; set OMP_NUM_THREADS to "
            "the cores of a machine / its processes",
        )


@check
def output(s: Subject) -> Iterator[Finding]:
    folder = RunFolder(s.recipe.folder)
    resumed = folder.open(s.recipe)
    if resumed is None:
        yield Finding("output", "ok", f"{folder.path} is free")
    else:
        extended = folder.extended_from(s.recipe)
        more = f", with training.max_steps {extended} -> {s.recipe.training.max_steps}" if extended else ""
        yield Finding("output", "ok", f"resumes from {resumed}{more}")


@check
def weights_and_biases(s: Subject) -> Iterator[Finding]:
    if s.recipe.run.wandb != "online":
        return
    known = "WANDB_API_KEY" in s.environment
    if not known:
        try:
            known = netrc.netrc().authenticators("api.wandb.ai") is not None
        except (FileNotFoundError, netrc.NetrcParseError):
            known = False
    if known:
        yield Finding("W&B", "ok", "a key is there")
    else:
        yield Finding("W&B", "failed", "run.wandb is 'online' and there is no key: wandb login, or run.wandb=offline")


def _sample(scenarios: Sequence[Scenario], of_each: int) -> list[Scenario]:
    """At most so many of each scene, evenly over the list."""
    chosen = []
    for scene in sorted({x.scene for x in scenarios}):
        of_scene = [x for x in scenarios if x.scene == scene]
        chosen += of_scene[:: max(1, len(of_scene) // of_each)][:of_each]
    return chosen
