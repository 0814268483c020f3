"""Checks of the policy and its training: credit, model, adapter, attention, reasoning tags, precision, prompt length."""

import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import AutoConfig

from ctcgrpo.environments.eibench import opening_messages
from ctcgrpo.errors import PolicyError
from ctcgrpo.model.attention import refuse_layouts
from ctcgrpo.model.shapes import published_shapes, shape_of
from ctcgrpo.model.sharding import deepspeed_stage
from ctcgrpo.model.tree_attention import how_to_attend
from ctcgrpo.policy.builtin import build_builtin, wheel_of
from ctcgrpo.policy.loading import check_fits, load_tokenizer, refuse_tied_targets, stop_ids
from ctcgrpo.policy.model_wheel import refuse_unfetchable
from ctcgrpo.policy.reasoning import CLOSE, OPEN
from ctcgrpo.preflight.subject import LINE_TOKENS, REPLY_TOKENS, Finding, Subject, failed, ok, sample, warning
from ctcgrpo.run.folders import check_model
from ctcgrpo.run.recipe import credit_named
from ctcgrpo.run.settings import briefing, context_builder, lora_config, template_kwargs
from ctcgrpo.training.samples import try_credit
from ctcgrpo.types import Completion, Message, Observation

_ROUNDED_AWAY = 1e-4
"""AdamW moves a weight by about the learning rate; bfloat16 keeps 8 bits, so weights of the usual 0.02 need steps of 1e-4."""
_MEASURED = 48  # maximum scenarios per scene whose prompts are measured


def credit(s: Subject) -> Iterator[Finding]:
    options = s.recipe.credit_options()
    with credit_named():
        try_credit(options)
    yield ok(f"{options.credit}, centered on {options.centering}, scale {options.scale_rewards}")


def model(s: Subject) -> Iterator[Finding]:
    policy, name = s.recipe.policy, s.recipe.policy.model
    check_model(name, "policy.model")
    if (wheel := wheel_of(name)) and not wheel.is_here:
        s.shape = published_shapes()[wheel.hub_id]
        refuse_unfetchable(wheel)
        size = f"{s.shape.parameters / 1e6:,.1f} million parameters"
        yield warning(f"{name}, {size}, is not downloaded yet: the run will first {wheel.plan}; prompts are measured after that")
        return
    path = build_builtin(name, s.folder / "base", s.recipe.run.seed)
    try:
        config = AutoConfig.from_pretrained(path, revision=policy.revision)
    except (OSError, ValueError) as error:
        s.shape = published_shapes().get(name)
        plan = "; the memory estimate uses its published shape" if s.shape else ""
        raise PolicyError(f"policy.model = {name!r} cannot be loaded ({str(error).splitlines()[0]}){plan}") from None
    s.shape, s.config = shape_of(config), config
    s.tokenizer = load_tokenizer(path, policy.revision, policy.chat_template)
    check_fits(config, s.tokenizer, s.recipe.rollout.max_prompt_tokens, s.recipe.rollout.max_new_tokens, name)
    yield ok(f"{name}, {s.shape.parameters / 1e6:,.1f} million parameters")
    ends = stop_ids(path, s.tokenizer, policy.revision, template_kwargs(s.recipe))
    s.contexts = context_builder(s.recipe, s.tokenizer, ends)


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
        raise PolicyError(f"policy.lora.target_modules: the model has no {', '.join(missing)}; available: {', '.join(known)}")
    yield ok(f"LoRA on {', '.join(lora.target_modules)}")


def attention(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.policy.attention
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(wanted)
    if package is not None and importlib.util.find_spec(package) is None:
        raise PolicyError(f"policy.attention = {wanted!r}, but {package} is not installed; use sdpa, or install it")
    packing = s.recipe.training.packing
    if s.recipe.hardware.gpu is None:  # meant for this machine
        half = s.recipe.training.bf16 or s.recipe.policy.dtype == "bfloat16"
        how_to_attend(packing, torch.device("cuda" if torch.cuda.is_available() else "cpu"), half=half)
    if s.config is not None and (packing != "none" or s.recipe.rollout.engine == "transformers"):
        refuse_layouts(s.skeleton)
    yield ok(f"{wanted}, packing {packing}")


def reasoning_tags(s: Subject) -> Iterator[Finding]:
    if s.tokenizer is None or not s.recipe.policy.reasons:
        return
    long = [tag for tag in (OPEN, CLOSE) if len(s.tokenizer.encode(tag, add_special_tokens=False)) != 1]
    several = f"{' and '.join(long)}: several tokens in this tokenizer; the model may not be trained to reason with these tags"
    yield warning(several) if long else ok(f"{OPEN} and {CLOSE} are single tokens")


def precision(s: Subject) -> Iterator[Finding]:
    policy, training = s.recipe.policy, s.recipe.training
    masters = policy.dtype == "float32" or policy.lora or (deepspeed_stage(training.sharding) and training.bf16)
    if not masters and 0 < training.learning_rate < _ROUNDED_AWAY:
        rate = f"an update at training.learning_rate = {training.learning_rate:g}"
        advice = "use policy.dtype=float32 with training.bf16=true, or a DeepSpeed configuration"
        yield failed(f"policy.dtype = bfloat16 without float32 masters: {rate} is lost to rounding; {advice}")
    elif policy.dtype == "float32" and not training.bf16 and s.recipe.hardware.gpu:
        yield warning("training.bf16 = false: float32 compute takes twice the memory and time on a GPU")
    else:
        trained = "adapters" if policy.lora else f"{policy.dtype} weights"
        yield ok(f"{trained}, compute in {'bfloat16' if training.bf16 else policy.dtype}")


def context(s: Subject) -> Iterator[Finding]:
    """Checks that prompts fit. (That each prompt is a prefix of the next was checked when the builder was made.)"""
    if s.contexts is None:
        return
    openings: Mapping[str, Sequence[Message]]
    if s.recipe.environment is None:
        instructed, noun, lines = briefing(s.recipe), "scenario", f"lines of {LINE_TOKENS}"
        openings = {scenario.id: opening_messages(scenario, instructed) for scenario in [*s.scenarios, *s.held_out]}
        measured = [x.id for x in sample(s.scenarios, _MEASURED)]
    else:
        noun, lines, openings = "task", "messages as in the test episode", s.openings
        measured = list(openings)
    if not measured:
        return
    s.contexts.check(openings, noun)
    yield from map(warning, s.contexts.notes(openings.values()))
    assert s.tokenizer is not None  # as contexts
    words = s.tokenizer("word " * REPLY_TOKENS, add_special_tokens=False)["input_ids"]
    reply = min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens)
    last = [_last_prompt(s, openings[name], Completion(tuple(words[:reply]), (), "stop")) for name in measured]
    dropped = sum(n > 0 for _, n in last) / len(last)
    text = (
        f"prompt of turn {s.recipe.rollout.max_turns}, the last: at most {max(n for n, _ in last)} tokens, "
        f"{statistics.mean(n for n, _ in last):.0f} on average (replies of {reply} tokens, {lines})"
    )
    share = f"{dropped:.0%} of the {noun}s drop exchanges by then; raise rollout.max_prompt_tokens"
    yield warning(f"{text}; {share}") if dropped else ok(text)


def _last_prompt(s: Subject, opening: Sequence[Message], reply: Completion) -> tuple[int, int]:
    assert s.contexts is not None
    dialogue = s.contexts.start(opening)
    for turn in range(s.recipe.rollout.max_turns - 1):
        own = s.recipe.environment is not None
        if own and not s.observations:  # the test episode has one turn
            break
        observation: Observation = s.observations[min(turn, len(s.observations) - 1)] if own else "word " * LINE_TOKENS
        dialogue = s.contexts.extend(dialogue, reply, observation)
    ids, dropped = s.contexts.prompt(dialogue)
    return len(ids), dropped
