"""Changes of a recipe with which its memory plan fits the card, each found by the plan itself. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ctcgrpo.model.shapes import GIB, Shape
from ctcgrpo.preflight.memory import FULL_AT_WAKE, PHASES, Load, memory_plan
from ctcgrpo.run.recipe import Recipe

_Value = tuple[str, Mapping[str, Any]]
"""An override of the recipe, and what it changes of the load."""
_SHORTEST = 1024  # tokens of a prompt


def remedies(recipe: Recipe, load: Load) -> Iterator[Sequence[_Value]]:
    """The changes that could help this recipe, each with its values from the mildest to the strongest. Those that change what is
    trained come last."""
    rollout, policy, episodes = recipe.rollout, recipe.policy, recipe.tasks_per_step * recipe.rollout.group_size
    if not load.checkpointing:
        yield [("training.gradient_checkpointing=true", {"checkpointing": True})]
    if load.tokens_per_row > load.longest:
        halves = [load.tokens_per_row >> k for k in range(1, 24) if load.tokens_per_row >> k > load.longest]
        yield [(f"training.tokens_per_row={n}", {"tokens_per_row": n}) for n in [*halves, load.longest]]
    if load.gpu_memory:
        shares = sorted((k / 20 for k in range(1, 19)), key=lambda share: abs(share - load.gpu_memory))
        yield [(f"rollout.vllm.gpu_memory={share:g}", {"gpu_memory": share}) for share in shares]
    elif load.samples_here and load.rollouts > 1:
        batches = [load.rollouts >> k for k in range(1, load.rollouts.bit_length())]
        yield [(f"rollout.max_batch={n}", {"rollouts": n}) for n in batches]
    if not load.quantized:
        names = ["zero2"] * (load.processes > 1 and load.sharding in ("none", "zero1"))
        if not load.samples_here:
            names += ["zero3"] * (load.processes > 1 and load.sharding != "zero3") + ["zero3_offload"] * (not load.offload)
        if names:
            changes = [{"sharding": name[:5], "offload": name.endswith("offload")} for name in names]
            yield [(f"training.sharding=configs/deepspeed/{n}.json", c) for n, c in zip(names, changes, strict=True)]
    if load.sharding != "none" and (more := [n for n in (2, 4, 8) if episodes % (n * load.processes) == 0]):
        yield [(f"hardware.processes={n * load.processes}", {"processes": n * load.processes}) for n in more]
    if prompts := range((rollout.max_prompt_tokens - 1) // _SHORTEST * _SHORTEST, 0, -_SHORTEST):
        lengths = [(f"rollout.max_prompt_tokens={n}", n + rollout.max_new_tokens) for n in prompts]
        rows = [(text, n, f" training.tokens_per_row={n}" if n < load.tokens_per_row else "") for text, n in lengths]
        yield [(f"{t}{row}", {"longest": n, "tokens_per_row": min(n, load.tokens_per_row)}) for t, n, row in rows]
    if policy.lora is None:
        adapter = "'policy.lora={rank: 16}' policy.dtype=bfloat16", {"lora_rank": 16, "weight_bytes": 2}
        nf4 = f"{adapter[0]} policy.quantization=nf4", {**adapter[1], "quantized": True}
        yield [adapter, nf4] if load.samples_here and load.sharding == "none" else [adapter]


def advice(recipe: Recipe, shape: Shape, load: Load, card: float) -> str:
    """What to change so that the plan fits: each change that suffices alone, or else several together."""

    def peak(changes: Sequence[_Value]) -> tuple[bool, float]:
        """Whether the KV cache is too small for a rollout, and the bytes of the larger phase."""
        changed = replace(load, **{name: value for _, fields in changes for name, value in fields.items()})
        plan = memory_plan(shape, changed, card)
        return plan.kv_tokens is not None and plan.kv_tokens < changed.longest, max(map(plan.total, PHASES))

    def fits(*changes: _Value, most: float = card) -> bool:
        return peak(changes) <= (False, most)

    def shown(*changes: _Value) -> str:
        return f"{' '.join(text for text, _ in changes)} ({peak(changes)[1] / GIB:.1f} GiB)"

    known = list(remedies(recipe, load))
    for most in (FULL_AT_WAKE * card, card)[not load.gpu_memory :]:
        mildest = (next((value for value in remedy if fits(value, most=most)), None) for remedy in known)
        if alone := [shown(value) for value in mildest if value is not None]:
            return f"it fits with {' or '.join(alone)}"
    taken: list[_Value] = []
    for remedy in known:
        suffices = (value for value in remedy if fits(*taken, value))
        best = next(suffices, None) or min(remedy, key=lambda value: peak([*taken, value]))
        if peak([*taken, best]) < peak(taken):
            taken.append(best)
        if fits(*taken):
            for value in [*taken]:
                without = [other for other in taken if other is not value]
                taken = without if fits(*without) else taken
            return f"no single change suffices; it fits with {shown(*taken)}"
    return f"it does not fit, even with {shown(*taken)}; use a larger card, or a smaller model"
