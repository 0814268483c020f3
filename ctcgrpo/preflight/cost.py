"""Estimates of a run's cost: GPU memory, simulator calls or environment steps, tokens, money, hours."""

import asyncio
import math
import statistics
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ctcgrpo.credit import VINE
from ctcgrpo.environments.eibench.mixture import mean_shares
from ctcgrpo.errors import RecipeError
from ctcgrpo.model.shapes import GIB
from ctcgrpo.model.sharding import FSDP2, deepspeed_stage, offloads
from ctcgrpo.options import importance_level
from ctcgrpo.preflight.eibench import Verbose, played
from ctcgrpo.preflight.memory import FULL_AT_WAKE, PHASES, Load, memory_plan
from ctcgrpo.preflight.remedies import advice
from ctcgrpo.preflight.subject import LINE_TOKENS, REASONED_TOKENS, REPLY_TOKENS, Finding, Subject, failed, ok, sample, warning
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.users import VALIDATED_WITH, Player
from ctcgrpo.simulator.config import BACKENDS
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.strict_yaml import load_yaml

VERDICT_TOKENS = 250  # assumed average tokens of a response of the simulator's LLM
_CHARACTERS_PER_TOKEN = {"zh": 1.6}
_OTHER_LANGUAGES = 4.0
_PLAYED = 4  # maximum scenarios per scene whose prompts are measured


class Asked(NamedTuple):
    """Upper bounds: dialogues that end early cost less. `validations` includes those before and after training."""

    steps: int
    episodes_per_step: int
    turns: int
    validations: int
    episodes_per_validation: int
    calls_per_turn: int = 1
    continuations: int = 0

    @property
    def calls_per_step(self) -> int:
        continued = self.continuations * self.turns * (self.turns - 1) // 2
        return self.episodes_per_step * (self.turns + continued) * self.calls_per_turn

    @property
    def calls(self) -> int:
        validation = self.validations * self.episodes_per_validation * self.turns * self.calls_per_turn
        return self.steps * self.calls_per_step + validation


class Tokens(NamedTuple):
    """Mean tokens of a simulator call over a dialogue of full length."""

    prompt: float
    completion: float


def money(calls: float, tokens: Tokens, prompt_price: float, completion_price: float) -> float:
    """The cost of calls, at prices per million tokens."""
    return calls * (tokens.prompt * prompt_price + tokens.completion * completion_price) / 1e6


def hours(asked: Asked, tokens_per_turn: float, tokens_per_second: float) -> float:
    """Hours of sampling only, at the policy's measured throughput."""
    turns = asked.calls / asked.calls_per_turn
    return turns * tokens_per_turn / tokens_per_second / 3600


def cost(s: Subject) -> Iterator[Finding]:
    recipe, own = s.recipe, s.recipe.environment
    asked = _asked(s, s.players[0] if s.players else None)
    by_player = _by_player(s)
    per_step = sum(calls for _, calls, _ in by_player) or asked.calls_per_step
    in_all = sum(calls for _, _, calls in by_player) or asked.calls
    what = "simulator calls" if own is None else "environment steps"
    held_out = len(s.held_out if own is None else s.held_out_tasks)
    including = "validation included" if asked.validations and held_out else "without validation"
    continued = asked.calls_per_step - asked._replace(continuations=0).calls_per_step
    of_which = f", {continued:,} of them for the continuations of credit {VINE}" if continued else ""
    yield ok(f"up to {per_step:,} per step{of_which}, {in_all:,} in total, {including}", what)
    if own is not None:
        yield ok(f"unknown: costs of {own.factory} itself (LLM calls, services)")
    for player, of_step, calls in by_player:
        yield _cost_of(s, player, of_step, calls)
    rate = recipe.hardware.tokens_per_second
    if rate is None and recipe.hardware.gpu:
        yield ok("unknown; set hardware.tokens_per_second to the metric tokens_per_second of a pilot", "hours")
    elif rate is not None:
        each = min(REASONED_TOKENS if recipe.policy.reasons else REPLY_TOKENS, recipe.rollout.max_new_tokens)
        twice = any(player.field == VALIDATED_WITH for player in s.players)
        took = hours(asked._replace(validations=asked.validations * (1 + twice)), each, rate)
        yield ok(f"{took:.1f} of sampling at {rate:,.0f} tokens/s and {each} tokens a reply, plus updates", "hours")


def _asked(s: Subject, player: Player | None) -> Asked:
    """What is asked of a user that plays every episode of training, or of the other user of validations."""
    recipe, validation, steps = s.recipe, s.recipe.validation, s.recipe.training.max_steps
    held_out = len(s.held_out if recipe.environment is None else s.held_out_tasks)
    llm = None if player is None else player.choice.llm
    return Asked(
        steps=0 if player is not None and player.field == VALIDATED_WITH else steps,
        episodes_per_step=recipe.tasks_per_step * recipe.rollout.group_size,
        turns=recipe.rollout.max_turns,
        validations=2 + (steps - 1) // validation.every if validation else 0,
        episodes_per_validation=held_out * validation.samples if validation else 0,
        calls_per_turn=llm.samples if llm else 1,
        continuations=recipe.credit.continuations if recipe.credit.credit == VINE else 0,
    )


def _by_player(s: Subject) -> list[tuple[Player, int, int]]:
    """Each user with its calls per step and in total; several users of training share the calls as expected by their weights."""
    share = mean_shares([player.part for player in s.players if player.several], s.examples)
    found = []
    for player in s.players:
        asked, part = _asked(s, player), share.get(player.name, 1.0) if player.several else 1.0
        per_step = asked.calls_per_step if asked.steps else 0
        found.append((player, round(part * per_step), round(part * asked.calls)))
    return found


def _cost_of(s: Subject, player: Player, per_step: int, calls: int) -> Finding:
    config, about = player.choice.config, s.about("cost", player)
    if not player.choice.urls and config.backend not in BACKENDS:
        return ok(f"unknown: costs of {config.backend} itself (LLM calls, services)", about)
    if not player.choice.urls and config.llm is None:
        return ok("none: the scripted user makes no LLM calls", about)
    llm, tokens = player.choice.llm, _simulator_tokens(s, player)
    millions = (tokens.prompt + tokens.completion) / 1e6
    text = (
        f"about {_short(per_step * millions)} million tokens per step, {_short(calls * millions)} million in "
        f"total (per call {tokens.prompt:.0f} prompt and {VERDICT_TOKENS} completion tokens; replies of {_reply_tokens(s)} "
        f"tokens, lines of {LINE_TOKENS}{'' if s.scenarios else '; estimated on the bundled English scenarios'})"
    )
    prices = [e.price for e in llm.endpoints if e.price.prompt or e.price.completion] if llm else []
    if prices:
        worst = max(money(calls, tokens, p.prompt, p.completion) for p in prices)
        text += f"; up to {_short(worst)} {config.budget.currency} at the most expensive endpoint's prices"
        limit = config.budget.money
        if limit is not None and worst > limit:
            return warning(f"{text}, but budget.money = {limit:g}: the run will pause when it is spent", about)
    elif llm is not None:
        text += "; no cost estimate: llm.endpoints have no price"
    return ok(text, about)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _reply_tokens(s: Subject) -> int:
    return min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens)


def _simulator_tokens(s: Subject, player: Player) -> Tokens:
    """Mean tokens of a call over a dialogue of full length, with this project's prompts; the official ones differ."""
    thinks = player.choice.llm is None or player.choice.llm.reflections
    prompts, rounds = TemplatePrompts(reflections=thinks), s.recipe.rollout.max_turns
    counts = []
    for scenario in sample(s.examples, _PLAYED):
        rate = _CHARACTERS_PER_TOKEN.get(scenario.language, _OTHER_LANGUAGES)
        thought_tokens = VERDICT_TOKENS - LINE_TOKENS if thinks else 0
        line, reply, thought = ("x" * math.ceil(n * rate) for n in (LINE_TOKENS, _reply_tokens(s), thought_tokens))
        user = Verbose(line, thought)
        asyncio.run(played(user, scenario, [reply] * rounds, rounds))
        for request in user.asked:
            text = "".join(m["content"] for m in prompts.messages(request))
            if s.tokenizer is None or scenario.language != "en":
                counts.append(len(text) / rate)
                continue
            lines = request.history[1:] if scenario.opening_line else request.history
            words = sum(len(line.text) + len(line.reflection) for line in lines)
            counts.append(len(s.tokenizer.encode(text.replace("x" * 40, ""))) + words / rate)
    return Tokens(statistics.mean(counts), VERDICT_TOKENS)


@cache
def cards() -> dict[str, float]:
    """GiB by card."""
    return dict(load_yaml((files("ctcgrpo.preflight") / "cards.yaml").read_text(encoding="utf-8")))


def memory(s: Subject) -> Iterator[Finding]:
    gpu = s.recipe.hardware.gpu
    if s.shape is None or gpu is None:
        return
    known = cards()
    if gpu not in known:
        raise RecipeError(f"hardware.gpu = {gpu!r}; {did_you_mean(gpu, known)}")
    load = load_of(s.recipe)
    s.memory = plan = memory_plan(s.shape, load, known[gpu] * GIB)
    worst = max(PHASES, key=plan.total)
    text = f"{plan.total(worst) / GIB:.1f} of {gpu}'s {plan.card / GIB:.1f} GiB, with the peak in the {worst}"
    if not plan.fits:
        yield failed(f"{text}; {advice(s.recipe, s.shape, load, plan.card)}")
        return
    if plan.kv_tokens is not None and plan.total("rollout") > FULL_AT_WAKE * plan.card:
        share = f"{plan.total('rollout') / plan.card:.0%} in rollouts; memory fragmented by the update may keep vLLM from waking"
        yield warning(f"{text}, {share}; lower rollout.vllm.gpu_memory to stay below {FULL_AT_WAKE:.0%}")
    else:
        yield ok(text)
    if plan.kv_tokens is None:
        return
    wanted = f"{load.rollouts} rollouts of full length need {plan.kv_wanted:,}"
    room = f"vLLM's KV cache holds {plan.kv_tokens:,} tokens; {wanted}"
    if plan.kv_tokens < s.longest:
        small = f"{room}: too small for one rollout ({s.longest:,})"
        yield failed(f"{small}; {advice(s.recipe, s.shape, load, plan.card)}")
    else:
        yield (warning(f"{room}: some rollouts will wait") if plan.kv_tokens < plan.kv_wanted else ok(room))


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
        sampling_copy=rollout.dtype == "bfloat16",
        overlaps=bool(rollout.overlap) or training.update_parts > 1,
        whole_logits=_needs_whole_logits(recipe),
    )


def _needs_whole_logits(recipe: Recipe) -> bool:
    """For importance weights under top-p or top-k."""
    rollout, training = recipe.rollout, recipe.training
    truncates, vllm = rollout.top_p < 1 or rollout.top_k > 0, rollout.engine != "transformers"
    level = importance_level(
        training.importance, old_logprobs=training.old_logprobs, overlap=rollout.overlap, vllm=vllm, truncates=truncates
    )
    return truncates and level != "none"
