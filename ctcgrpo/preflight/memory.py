"""GPU memory of a run, by part, in the two phases of a step: rollouts, and the update. Pure arithmetic on bytes; uses no GPU.

Per parameter, with bfloat16 compute: DeepSpeed keeps 2 bytes of weights, 4 of summed gradients and 12 of optimizer (float32 master,
two moments), of which ZeRO-1 spreads the optimizer over the processes, ZeRO-2 the gradients too, ZeRO-3 all of it; FSDP2
spreads 4 of weights, 4 of gradients, 8 of moments. Activations are those of a dense decoder with gated MLP and an attention that
keeps no scores. An estimate, not a measurement: compare `memory/peak_gib` in a run's metrics with the update's total."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ctcgrpo.model.shapes import GIB, Shape
from ctcgrpo.training.planning import kept_per_token

Phase = Literal["rollout", "update"]
PHASES: tuple[Phase, ...] = ("rollout", "update")
_NF4_BYTES = 0.52
_RUNTIME = 2 * GIB  # CUDA's context, NCCL's buffers, and what fragmentation loses
FULL_AT_WAKE = 0.9  # share of GPU memory above which fragmentation may keep a colocated vLLM from waking
_VLLM_RUNTIME = 2 * GIB  # vLLM's activations and CUDA graphs, inside its share
_BUCKETS = 2 * GIB  # DeepSpeed's communication buffers under ZeRO-1 and -2, and the parameters that ZeRO-3 holds gathered
_FLOAT32_BUCKET = 4 * 500_000_000
"""The copy of a bucket in which ZeRO-1 and -2 sum gradients over the processes (communication_data_type)."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a process. `tokens_per_row` and `longest` in tokens; `rollouts`: concurrent ones; `gpu_memory`: share of a
    colocated vLLM, else 0."""

    processes: int
    sharding: Literal["none", "zero1", "zero2", "zero3", "fsdp2"]
    offload: bool
    weight_bytes: int
    quantized: bool  # whether the layers' frozen weights are held in 4 bits (half a byte, and what undoes the rounding)
    bf16: bool
    lora_rank: int | None
    reference: bool
    checkpointing: bool
    tokens_per_row: int
    longest: int
    rollouts: int
    gpu_memory: float
    samples_here: bool  # whether the policy itself samples (transformers), and keeps its keys and values here
    sampling_copy: bool = False  # whether a bfloat16 copy of it does
    overlaps: bool = False  # whether episodes are played during the update
    whole_logits: bool = False  # whether importance weights need them (top-p, top-k)


class MemoryPlan(NamedTuple):
    """Bytes a GPU by part and phase; `kv_tokens` that a colocated engine has room for, and `kv_wanted`."""

    parts: Mapping[str, Mapping[Phase, float]]
    card: float
    kv_tokens: int | None
    kv_wanted: int

    def total(self, phase: Phase) -> float:
        return sum(part[phase] for part in self.parts.values())

    @property
    def fits(self) -> bool:
        return max(self.total("rollout"), self.total("update")) <= self.card


def memory_plan(shape: Shape, load: Load, card: float) -> MemoryPlan:
    """The plan for a card of `card` bytes."""
    total = shape.parameters
    trained = total if load.lora_rank is None else shape.lora_parameters(load.lora_rank)
    frozen = total if load.lora_rank is not None else 0
    n = load.processes
    deepspeed = load.sharding.startswith("zero")
    compute = 2 if load.bf16 or load.weight_bytes == 2 else 4
    if deepspeed:
        split_weights, split_gradients = load.sharding == "zero3", load.sharding in ("zero2", "zero3")
        weights = (frozen + trained) * compute / (n if split_weights else 1)
        gradients = trained * 4 / (n if split_gradients else 1)
        optimizer = trained * (12 if load.bf16 else 8) / n
        gathered = float(_BUCKETS if split_weights else _BUCKETS + _FLOAT32_BUCKET)
    else:
        split = n if load.sharding == "fsdp2" else 1
        each = load.weight_bytes if load.lora_rank is None else 4  # adapters are trained in float32
        layers = shape.layers * shape.per_layer if load.quantized else 0
        weights = (layers * _NF4_BYTES + (frozen - layers) * load.weight_bytes + trained * each) / split
        gradients, optimizer = trained * each / split, trained * 2 * each / split
        gathered = 2 * shape.per_layer * compute + 2 * shape.vocabulary * shape.hidden * compute if split > 1 else 0.0
    parts: dict[str, tuple[float, float]] = {  # in rollouts, in the update
        "weights": (weights, weights),
        "gradients": (gradients if deepspeed and not load.offload else 0.0, gradients),
        "optimizer": (0.0, 0.0) if load.offload else (optimizer, optimizer),
        "activations": (0.0, _activations(shape, load, compute)),
    }
    if load.lora_rank is None:
        parts["gradient of the output layer"] = 0.0, _head_gradient(shape, load)
    if load.sharding == "none" and load.bf16 and load.weight_bytes == 4:
        parts["bfloat16 copies (autocast)"] = 0.0 if load.sampling_copy else total * 2.0, total * 2.0
    if gathered:
        parts["gathered and buffers"] = gathered, gathered
    if load.sharding == "none" and n > 1:  # DistributedDataParallel's buckets
        parts["DDP buckets"] = gradients, gradients
    if load.lora_rank is not None and load.sharding in ("zero3", "fsdp2") and load.gpu_memory:
        parts["gathered to merge the adapter"] = float(total * load.weight_bytes), 0.0
    if load.reference and load.lora_rank is None:
        whole = total * compute if load.sharding == "fsdp2" else weights  # FSDP2 gathers it at every forward pass
        parts["reference policy"] = weights, float(whole)
    wanted = load.rollouts * load.longest
    room = None
    if load.gpu_memory:
        share, served = load.gpu_memory * card, total * 2
        room = max(0, int((share - served - _VLLM_RUNTIME) / shape.kv_bytes))
        parts["vLLM: weights"] = float(served), 0.0
        parts["vLLM: keys, values, buffers"] = max(share - served, float(_VLLM_RUNTIME)), 0.0
    elif load.samples_here:
        held = float(wanted * shape.kv_bytes) if load.sampling_copy else wanted * shape.kv_bytes * compute / 2
        parts["keys and values"] = held, held if load.overlaps else 0.0
        if load.sampling_copy:
            parts["bfloat16 copy that samples"] = total * 2.0, total * 2.0
    parts["CUDA and NCCL"] = float(_RUNTIME), float(_RUNTIME)
    by_phase = {part: dict(zip(PHASES, both, strict=True)) for part, both in parts.items()}
    return MemoryPlan(by_phase, card, room, wanted)


def _head_gradient(shape: Shape, load: Load) -> float:
    """The largest gradient there is, while it is made and summed: in float32 by TRL's fused head, beside the copy in the weights'
    type; ZeRO-3 then holds that copy, one in float32, and one to scatter."""
    numbers = shape.vocabulary * shape.hidden
    if load.sharding == "zero3":
        return 10.0 * numbers if load.bf16 else 12.0 * numbers
    rounded = load.weight_bytes == 2 or (load.bf16 and load.sharding != "none")
    return 6.0 * numbers if rounded else 4.0 * numbers


def _activations(shape: Shape, load: Load, compute: int) -> float:
    """Of one row, forward and backward; or of half a row forward with all of its logits, where that is more."""
    tokens = max(load.tokens_per_row, load.longest)
    widths = {name: getattr(shape, name) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate")}
    layer = tokens * compute * kept_per_token(**widths)
    mask = tokens * load.longest
    head = tokens * shape.hidden * 4 * 2
    kept = (shape.layers + 1) * layer
    if load.checkpointing:  # inputs of all layers, and one layer at a time with its gradients
        kept = shape.layers * tokens * shape.hidden * compute + 2 * layer
    scored = max(load.tokens_per_row // 2, load.longest) if load.whole_logits else 0
    return float(mask + max(kept + head, layer + scored * shape.vocabulary * compute))
