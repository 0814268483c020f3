"""Predicted step times of a recipe on 1 to 64 nodes, by layout, and where each layout stops scaling.

    python -m tests.benchmarks.scale [--recipe recipes/qwen3_8b.yaml] [--weak]      predictions
    python -m tests.benchmarks.scale --validate                                     real runs on this machine beside predictions

The model is in step_model.py. Episodes, turns, limits and sharding are the recipe's; memory is the plan of `ctcgrpo check`; lengths
and latencies are assumed. The speed of a GPU is computed from peak figures and assumed shares of them: **none of it was measured on
a GPU**. Every assumption is an option, and is printed first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from ctcgrpo.model.shapes import GIB, Shape, published_shapes
from ctcgrpo.preflight.cost import cards, load_of
from ctcgrpo.preflight.memory import memory_plan
from ctcgrpo.preflight.subject import LINE_TOKENS, REASONED_TOKENS, REPLY_TOKENS
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.simulator.config import load_simulator_config
from tests.benchmarks.step_model import (
    Batch,
    Engine,
    Inputs,
    LogNormal,
    Prediction,
    Trainer,
    draw_batches,
    predict,
    rollouts,
    update,
)

LAYOUTS = ("colocated", "servers, overlap 0", "servers, overlap 1")
STOPS = 1.2
"""A layout stops scaling where twice the nodes have less than this times the throughput."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Assumptions:
    """Speeds are of one GPU, in bfloat16, as the vendor publishes them for an H100 SXM."""

    recipe: str = _option("recipes/qwen3_8b.yaml", "recipe to predict")
    weak: bool = _option(False, "let the tasks of a step grow with the nodes")
    validate: bool = _option(False, "compare real runs on this machine with predictions")
    nodes: int = _option(64, "nodes at most")
    gpus: int = _option(8, "GPUs a node")
    steps: int = _option(3, "simulated steps")
    seed: int = _option(0, "of lengths and latencies")
    tflops: float = _option(989.0, "peak TFLOP/s")
    train_share: float = _option(0.4, "share of the peak in the update")
    prompt_share: float = _option(0.5, "share of the peak while an engine reads prompts")
    memory_gbs: float = _option(3350.0, "peak GB/s of the memory")
    memory_share: float = _option(0.7, "share of that while an engine decodes")
    nvlink_gbs: float = _option(360.0, "GB/s of collectives in a node")
    network_gbs: float = _option(320.0, "GB/s of collectives between nodes, for a node (eight ports of 400 Gbit/s at 0.8)")
    decode_overhead: float = _option(0.002, "seconds of a decoding step beside reading weights, keys and values")
    update_overhead: float = _option(1.0, "seconds of an optimizer step beside its rows")
    wake: float = _option(5.0, "seconds in a step in which a colocated engine falls asleep and wakes")
    publish: float = _option(1.0, "seconds of a transfer to servers beside sending the weights")
    host: float = _option(0.002, "seconds of a turn in the process that plays the episodes of an engine")
    engine_gpus: int = _option(0, "GPUs of a server (tensor parallel); 0: as few as hold the weights in half of their memory")
    server_batch: int = _option(256, "sequences of a server at most; the memory may allow fewer")
    opening_tokens: int = _option(600, "tokens of a first prompt")
    line_tokens: int = _option(LINE_TOKENS, "tokens of a user's line")
    reply_spread: float = _option(
        0.5, "standard deviation of the logarithm of reply lengths; the mean is that of `ctcgrpo check`"
    )
    user_median: float = _option(1.5, "median seconds of a user's answer")
    user_p99: float = _option(10.0, "their 99th percentile")
    users_at_once: int = _option(0, "concurrent user calls; 0: as the recipe's simulator.config says, else no limit")


class Split(NamedTuple):
    """GPUs that train, and engines."""

    train: int
    engines: int


@dataclass(frozen=True)
class Plan:
    """The inputs of the model for a recipe."""

    recipe: Recipe
    asked: Assumptions

    @cached_property
    def shape(self) -> Shape:
        return published_shapes()[self.recipe.policy.model]

    @cached_property
    def engine_gpus(self) -> int:
        return self.asked.engine_gpus or 2 ** max(0, math.ceil(math.log2(4 * self.shape.parameters / self.card)))

    @property
    def card(self) -> float:
        return cards()[self.recipe.hardware.gpu or "H100-80GB"] * GIB

    def batch(self, nodes: int) -> Batch:
        recipe, asked = self.recipe, self.asked
        mean, cap = REASONED_TOKENS if recipe.policy.reasons else REPLY_TOKENS, recipe.rollout.max_new_tokens
        config = recipe.simulator.config
        llm = load_simulator_config(config).llm if config else None
        limit = asked.users_at_once or (sum(endpoint.concurrency for endpoint in llm.endpoints) if llm else None)
        strips = recipe.policy.reasons and recipe.policy.reasoning_context == "strip"
        return Batch(
            tasks=recipe.tasks_per_step * (nodes if asked.weak else 1),
            group_size=recipe.rollout.group_size,
            turns=recipe.rollout.max_turns,
            opening=asked.opening_tokens,
            line=asked.line_tokens,
            reply=LogNormal(mean / math.exp(asked.reply_spread**2 / 2), asked.reply_spread, cap),
            user=LogNormal(asked.user_median, math.log(asked.user_p99 / asked.user_median) / 2.326),
            visible=REPLY_TOKENS if strips else None,
            users_at_once=limit,
        )

    def context(self, turns: float) -> float:
        """Tokens of a prompt and half a reply, after so many turns."""
        mean = REASONED_TOKENS if self.recipe.policy.reasons else REPLY_TOKENS
        return self.asked.opening_tokens + turns * (REPLY_TOKENS + self.asked.line_tokens) + mean / 2

    def engine(self, gpus: int, max_batch: int, kv_tokens: float) -> Engine:
        """An engine on so many GPUs, with room for `kv_tokens`."""
        asked, weights, turns = self.asked, 2.0 * self.shape.parameters, self.recipe.rollout.max_turns
        read = gpus * asked.memory_gbs * 1e9 * asked.memory_share
        forward = weights / (gpus * asked.tflops * 1e12 * asked.prompt_share)  # seconds a token: two operations a weight
        return Engine(
            max_batch=max(1, min(max_batch, int(kv_tokens / self.context(turns)))),
            fixed=asked.decode_overhead + weights / read,
            per_sequence=self.shape.kv_bytes * self.context((turns - 1) / 2) / read + forward,
            prompt_token=forward,
            host=asked.host,
        )

    def trainer(self, gpus: int, *, colocated: bool) -> Trainer:
        recipe, asked, weights = self.recipe, self.asked, float(self.shape.parameters)
        training, lora = recipe.training, recipe.policy.lora
        updates = training.updates_per_step
        recomputes = updates > 1 and training.old_logprobs == "recomputed"
        passes = 2 + (2 if lora else 4) + 2 * training.gradient_checkpointing + 2 * recomputes
        trained = self.shape.lora_parameters(lora.rank) if lora else weights
        sharded = load_of(recipe).sharding in ("zero3", "fsdp2")
        bandwidth = (asked.nvlink_gbs if gpus <= asked.gpus else asked.network_gbs) * 1e9
        gathered = 2 * weights * (2 + recomputes)  # in the forward and the backward pass
        sent = 2 * weights / bandwidth if sharded else 0.0
        port = asked.network_gbs / asked.gpus * 1e9
        return Trainer(
            gpus=gpus,
            updates=updates,
            per_token=passes * weights / (asked.tflops * 1e12 * asked.train_share),
            fixed=asked.update_overhead,
            tokens_per_row=training.tokens_per_row,
            row_bytes=gathered + 4 * trained if sharded else 0.0,
            update_bytes=0.0 if sharded else 2 * 4 * trained,
            bandwidth=bandwidth,
            transfer=sent + (asked.wake if colocated else asked.publish + 2 * weights / port),
        )

    def colocated(self, nodes: int) -> Inputs | str:
        """The inputs, or why the layout is not possible."""
        gpus, batch = nodes * self.asked.gpus, self.batch(nodes)
        if batch.episodes % gpus:
            return f"{batch.episodes} episodes on {gpus} GPUs; expected a multiple"
        load = replace(
            load_of(self.recipe),
            processes=gpus,
            gpu_memory=self.recipe.rollout.vllm.gpu_memory,
            rollouts=min(self.recipe.rollout.max_batch, batch.episodes // gpus),
            samples_here=False,
        )
        plan = memory_plan(self.shape, load, self.card)
        if not plan.fits or (plan.kv_tokens or 0) < load.longest:
            peak = max(plan.total("rollout"), plan.total("update")) / GIB
            return f"memory: {peak:.0f} of {self.card / GIB:.0f} GiB, room for {plan.kv_tokens:,} tokens of {load.longest:,}"
        engine = self.engine(1, self.recipe.rollout.max_batch, plan.kv_tokens or 0)
        return Inputs(batch=batch, engine=engine, trainer=self.trainer(gpus, colocated=True), engines=gpus, colocated=True)

    def splits(self, nodes: int) -> Iterator[Split]:
        """Whole nodes serve, where there are several."""
        gpus, episodes = nodes * self.asked.gpus, self.batch(nodes).episodes
        for train in range(max(1, gpus // 16), gpus):
            if episodes % train == 0 and (nodes == 1 or train % self.asked.gpus == 0) and self._fits(train):
                engines = min((gpus - train) // self.engine_gpus, episodes)
                if engines:
                    yield Split(train, engines)

    def _fits(self, train: int) -> bool:
        load = replace(load_of(self.recipe), processes=train, gpu_memory=0.0, samples_here=False)
        return memory_plan(self.shape, load, self.card).fits

    def servers(self, nodes: int, split: Split) -> Inputs:
        room = 0.9 * self.card * self.engine_gpus - 2 * self.shape.parameters - 2 * GIB * self.engine_gpus
        engine = self.engine(self.engine_gpus, self.asked.server_batch, room / self.shape.kv_bytes)
        trainer = self.trainer(split.train, colocated=False)
        return Inputs(batch=self.batch(nodes), engine=engine, trainer=trainer, engines=split.engines)


class Row(NamedTuple):
    """`problem`: why there is no prediction; `split`: the best one."""

    nodes: int
    episodes: int
    prediction: Prediction | None = None
    split: Split | None = None
    problem: str = ""

    @property
    def rate(self) -> float:
        """Episodes an hour."""
        return 3600 * self.episodes / self.prediction.step if self.prediction else 0.0


def predictions(plan: Plan, nodes: int) -> Mapping[str, Row]:
    """Of each layout; servers with the split that is fastest with that overlap."""
    asked, batch = plan.asked, plan.batch(nodes)
    draws = draw_batches(batch, asked.seed, asked.steps + 1)
    found: dict[str, Row] = {}

    def consider(layout: str, inputs: Inputs, split: Split | None, played: Sequence[Any]) -> None:
        prediction = predict(inputs, played, [update(batch, each, inputs.trainer) for each in draws])
        best = found.get(layout)
        if best is None or best.prediction is None or prediction.step < best.prediction.step:
            found[layout] = Row(nodes, batch.episodes, prediction, split)

    alone = plan.colocated(nodes)
    if isinstance(alone, str):
        found[LAYOUTS[0]] = Row(nodes, batch.episodes, problem=alone)
    else:
        consider(LAYOUTS[0], alone, None, [rollouts(batch, each, alone.engine, alone.engines) for each in draws])
    for split in plan.splits(nodes):
        inputs = plan.servers(nodes, split)
        played = [rollouts(batch, each, inputs.engine, inputs.engines) for each in draws]
        for overlap in (0, 1):
            consider(LAYOUTS[1 + overlap], replace(inputs, overlap=overlap), split, played)
    problem = "no split fits the memory and divides the episodes"
    return {layout: found.get(layout, Row(nodes, batch.episodes, problem=problem)) for layout in LAYOUTS}


def stops(rows: Sequence[Row]) -> str:
    """Where twice the nodes gain less than 20 %, and what most of the step is spent on there."""
    if not any(row.prediction for row in rows):
        return f"not possible: {rows[0].problem}"
    for row, double in pairwise(rows):
        if row.prediction is None:
            continue
        where = f"stops at {row.nodes} {'node' if row.nodes == 1 else 'nodes'}"
        if double.prediction is None:
            return f"{where}: {double.problem}"
        if double.rate < STOPS * row.rate:
            parts = double.prediction.parts
            longest = sorted(parts, key=lambda part: -parts[part])[:2]
            spent = ", ".join(f"{part} {parts[part] / double.prediction.step:.0%}" for part in longest)
            return f"{where}: {double.nodes} gain {double.rate / row.rate - 1:+.0%}; of a step there: {spent}"
    return f"scales to {rows[-1].nodes} nodes"


def show(plan: Plan, console: Console) -> None:
    asked = plan.asked
    console.print("Predicted, not measured; speeds of a GPU are assumed. Assumptions:", highlight=False)
    for option in fields(asked):
        if option.name not in ("validate", "recipe", "weak"):
            value = f"{getattr(asked, option.name)}"
            console.print(f"  --{option.name:16} {value:>8}  {option.metadata['help']}", highlight=False, markup=False)
    counts = [2**k for k in range(int(math.log2(asked.nodes)) + 1)]
    one = plan.batch(1)
    console.print(
        f"{asked.recipe}: {plan.shape.parameters / 1e9:.1f} billion parameters, {one.tasks} tasks x {one.group_size} x "
        f"{one.turns} turns, {plan.recipe.training.updates_per_step} updates; at most {one.users_at_once or 'any number of'} user "
        f"calls at once; a server has {plan.engine_gpus} GPU(s)",
        highlight=False,
    )
    by_nodes = [predictions(plan, nodes) for nodes in counts]
    for layout in LAYOUTS:
        rows = [found[layout] for found in by_nodes]
        grows = "tasks grow with the nodes" if asked.weak else "the batch as in the recipe"
        columns = "nodes", "GPUs train + serve", "s a step", "steps/h", "episodes/h", "speedup", "trainer idle", "engine idle"
        table = Table(*columns, "overlapped", "longest part of a step", title=f"{layout}; {grows}", title_justify="left")
        first = next((row.rate for row in rows if row.prediction), 1.0)
        for row in rows:
            p = row.prediction
            if p is None:
                table.add_row(str(row.nodes), row.problem)
                continue
            gpus = row.nodes * asked.gpus
            split = f"{row.split.train} + {row.split.engines * plan.engine_gpus}" if row.split else f"{gpus}, the same"
            idle = f"{p.trainer_idle:.0%}", f"{p.engine_idle:.0%}", f"{p.overlapped:.0%}"
            figures = f"{p.step:.1f}", f"{3600 / p.step:.0f}", f"{row.rate:,.0f}", f"{row.rate / first:.2f} x"
            table.add_row(str(row.nodes), split, *figures, *idle, p.limit)
        console.print(table)
        console.print(f"{layout}: {stops(rows)}\n", highlight=False)


def main() -> None:
    (asked,) = HfArgumentParser(Assumptions).parse_args_into_dataclasses()
    console = Console(width=180)
    if asked.validate:
        from tests.benchmarks.step_runs import validate

        validate(console)
        return
    show(Plan(load_recipe(asked.recipe), asked), console)


if __name__ == "__main__":
    main()
