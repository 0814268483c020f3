"""What makes two configurations of the trainer the same, as a runnable thing.

Equal losses prove nothing: with old = new log-probabilities the loss does not depend on the forward pass. So: float32; recorded
log-probabilities that put ratios between 0.7 and 1.4, so that both sides of the clip act; entropy bonus on; rows of unequal
lengths; one failed episode. Compared are gradients per parameter (relative 1e-5), the gradient norm, log-probabilities per
token, and the weights after two steps at lr 1e-3, relative to how far they moved (1e-3).

    python -m tests.sameness OUT.pt BASE [--tokens-per-row N] [--shift] [--backend zero1|zero2|zero3|fsdp2] [--kl B] [--bf16]

Also under torchrun, for several processes; with a backend always so.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ctcgrpo import CTCGRPOConfig, CTCGRPOTrainer, Environment
from ctcgrpo.model.sharding import sharding_arguments
from ctcgrpo.options import LossWeights, Packing
from ctcgrpo.training.rows import Row
from ctcgrpo.types import Completion, Episode, Failure, Turn

GROUPS, GROUP_SIZE, STEPS = 2, 4, 2
TEMPERATURE, CLIP, ENTROPY_BONUS = 0.8, 0.2, 0.01
TURNS = ((1, 8, 3, 5), (4, 2, 6, 1))
"""By group and rollout."""
FAILED = (1, 2)
"""(group, rollout) of the episode that failed."""


@dataclass
class Outcome:
    """`gradients`, `norm`, `logprobs` and `sketches` (of this process's turns) are those of the first step; `moved` is final minus
    initial weights."""

    processes: int
    backend: str
    rows: int
    gradients: dict[str, torch.Tensor]
    norm: float
    logprobs: dict[str, list[tuple[float, ...]]]
    sketches: torch.Tensor
    moved: dict[str, torch.Tensor]


def fixed_episodes(base: str) -> list[Episode]:
    """Two groups of four dialogues of 1 to 8 turns, made of random tokens; the same on every process. A group's begin alike; a turn
    is some reasoning and a reply, and later turns see the reply alone (group 0) or both (group 1), and the user's line."""
    rng = random.Random(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    vocabulary = model.config.vocab_size
    episodes = []

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(rng.randint(least, most)))

    for group in range(GROUPS):
        opening = some(30, 50)
        for rollout in range(GROUP_SIZE):
            turns, prompt = [], opening
            for _ in range(TURNS[group][rollout]):
                reasoning, reply = some(0, 20), some(2, 20)
                completion_ids, seen = reasoning + reply, (reply, reasoning + reply)[group]
                ratios = torch.tensor([rng.uniform(0.7, 1.4) for _ in completion_ids])
                old = naive_logprobs(model, prompt, completion_ids)[0] - ratios.log()
                reward = (rng.randint(-10, 10) + rng.randint(-10, 10)) / 200
                completion = Completion(completion_ids, tuple(old.tolist()), "stop")
                turns.append(Turn(prompt, completion, "", None, (), "", reward, False))
                prompt = prompt + seen + some(3, 12)
            failed = (group, rollout) == FAILED
            episodes.append(
                Episode(
                    task=f"s{group}",
                    tag=("first", "second")[group],
                    step=1,
                    group=group,
                    rollout=rollout,
                    turns=tuple(turns),
                    outcome=float("nan") if failed else 3 * sum(turn.reward or 0.0 for turn in turns),
                    failure=Failure("simulator_transport", "gone") if failed else None,
                )
            )
    return episodes


def naive_logprobs(model: Any, prompt: tuple[int, ...], reply: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (n,) of a reply, from full logits, one sample at a time."""
    grad = torch.is_grad_enabled() and model.training
    with torch.set_grad_enabled(grad):
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        log_p = torch.log_softmax(logits, dim=-1)
        return log_p[range(len(reply)), list(reply)], -(log_p.exp() * log_p).sum(-1)


class _Capture(TrainerCallback):
    """Keeps the gradients of the first optimizer step, just before it is taken."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.keep(model)

    def keep_before(self, engine: Any) -> None:
        """DeepSpeed takes its step by itself, before transformers would call."""
        plain_step = engine.step

        def step(*a: Any, **k: Any) -> Any:
            self.keep(engine.module)
            return plain_step(*a, **k)

        engine.step = step

    def keep(self, model: Any) -> None:
        if not self.gradients:
            named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
            self.gradients = {n: g for n, p in named if (g := _gradient(p)) is not None}


class _BeforeTraining(TrainerCallback):
    """Log-probabilities under the first weights, once the model is wrapped as it will be trained."""

    sketches = torch.zeros(0)

    def __init__(self, trainer: CTCGRPOTrainer, capture: _Capture, logprobs: list[tuple[float, ...]]) -> None:
        self.trainer, self.capture, self.logprobs = trainer, capture, logprobs

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            self.capture.keep_before(trainer.model_wrapped)
        tasks = [0] * (GROUPS * GROUP_SIZE // trainer.accelerator.num_processes)
        samples = trainer._new_batch(trainer._take_played(1, tasks))[0]
        self.logprobs += trainer.logprobs(trainer.model_wrapped, samples)
        self.sketches = torch.from_numpy(trainer.sketches(samples))


def _gradient(parameter: Any) -> torch.Tensor | None:
    """The whole gradient of a parameter, wherever its parts are."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).float().cpu().clone()
    if parameter.grad is None:
        return None
    grad = parameter.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu().clone()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter whole, on every process, in the host's memory."""
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
    if any(hasattr(p, "ds_id") for _, p in named):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            return {n: p.detach().cpu().clone() for n, p in named}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().clone() for n, p in named}


def on_cpu_with_gloo(backend: str) -> None:
    """Let accelerate run DeepSpeed and FSDP2 on processes without GPUs, for which it has no communication of its own, and let
    arguments be made as where there are GPUs: with `use_cpu`, accelerate would shard nothing."""
    from accelerate.state import DistributedType, PartialState

    plain = CTCGRPOConfig.__post_init__

    def as_with_gpus(self: CTCGRPOConfig) -> None:
        with (
            mock.patch("torch.accelerator.is_available", return_value=True),
            mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
        ):
            plain(self)

    CTCGRPOConfig.__post_init__ = as_with_gpus  # type: ignore[method-assign]

    kind = DistributedType.DEEPSPEED if backend.startswith("zero") else DistributedType.MULTI_GPU
    PartialState._prepare_backend = lambda self, *a, **k: ("gloo", kind)  # type: ignore[method-assign]
    if backend.startswith("zero"):
        import deepspeed.ops

        # It would be compiled here, for over a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def backend_arguments(backend: str | None) -> dict[str, Any]:
    """What chooses it, as a recipe does."""
    return sharding_arguments({None: "none", "fsdp2": "fsdp2"}.get(backend, f"configs/deepspeed/{backend}.json"))


class FixedEpisodes(CTCGRPOTrainer):
    """The trainer on given episodes, each process with its contiguous share of them, in place of playing any."""

    episodes: list[Episode]

    def collect(self, step: int, positions: Any) -> list[Episode]:
        share = len(self.episodes) // self.accelerator.num_processes
        assert len(positions) == share
        first = self.accelerator.process_index * share
        return self.episodes[first : first + share]


def build_trainer(
    base: str,
    folder: str,
    *,
    tokens_per_row: int = 400,
    updates: int = 1,
    max_failed: float = 0.5,
    centering: str = "rollout",
    packing: Packing = "auto",
    callbacks: Any = (),
    peft_config: Any = None,
    loss_weights: LossWeights = "token",
    **config: Any,
) -> FixedEpisodes:
    """The trainer on the fixed episodes."""
    episodes = fixed_episodes(base)  # before there are arguments: under ZeRO-3 a model is sharded when it is loaded
    processes = int(CTCGRPOConfig(folder, bf16=False, num_generations=2, per_device_train_batch_size=2).world_size)
    trainer = FixedEpisodes(
        model=base,
        args=CTCGRPOConfig(
            folder,
            max_steps=STEPS * updates,
            per_device_train_batch_size=GROUPS * GROUP_SIZE // processes,
            num_generations=GROUP_SIZE,
            num_iterations=updates,
            temperature=TEMPERATURE,
            centering=centering,
            tokens_per_row=tokens_per_row,
            packing=packing,
            epsilon=CLIP,
            loss_weights=loss_weights,
            entropy_coef=ENTROPY_BONUS,
            max_failed=max_failed,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            save_total_limit=3,
            **{
                "bf16": False,
                "old_logprobs": "recorded" if updates == 1 else "recomputed",
                "learning_rate": 1e-3,
                "model_init_kwargs": {"dtype": "float32"},
                "max_grad_norm": 0.0,
                "save_strategy": "no",
                "gradient_checkpointing": False,
            }
            | config,
        ),
        environment=Environment,
        train_dataset=[{"id": f"s{k}"} for k in range(GROUPS)],
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    trainer.episodes = episodes
    trainer.remove_callback(PrinterCallback)
    return trainer


def shift_one_position(trainer: CTCGRPOTrainer) -> None:
    """A deliberate mistake, to see that the comparison notices: the sixth token of each row sits one position late."""
    plain = trainer._score

    def wrong(model: Any, row: Row) -> Any:
        positions = row.positions.clone()
        positions[:, 5] += 1
        return plain(model, replace(row, positions=positions))

    trainer._score = wrong  # type: ignore[method-assign]
    trainer._refuse_other_logprobs = lambda samples: None  # type: ignore[method-assign]  # it would notice first


def run(
    base: str,
    *,
    tokens_per_row: int = 400,
    packing: Packing = "auto",
    shift: bool = False,
    backend: str | None = None,
    peft_config: Any = None,
    parts: bool = False,
    **config: Any,
) -> Outcome:
    """`parts`: each update comes in two parts, the second half of the samples first."""
    capture = _Capture()
    if backend:
        on_cpu_with_gloo(backend)
    with tempfile.TemporaryDirectory() as folder:
        before = weights(AutoModelForCausalLM.from_pretrained(base, dtype="float32"))
        trainer = build_trainer(
            base,
            folder,
            tokens_per_row=tokens_per_row,
            packing=packing,
            callbacks=[capture],
            peft_config=peft_config,
            **config | backend_arguments(backend),
        )
        if peft_config is not None:
            before = weights(trainer.model)
        if shift:
            shift_one_position(trainer)
        made: list[int] = []
        plain_update = trainer.update_rows
        trainer.update_rows = lambda model, rows, **k: (made.append(len(rows)), plain_update(model, rows, **k))[1]  # type: ignore
        if parts:
            update_in_parts(trainer)
        trainer.add_callback(at_first := _BeforeTraining(trainer, capture, logprobs := []))
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        return Outcome(
            processes=trainer.accelerator.num_processes,
            backend=_backend_of(trainer.model_wrapped),
            rows=made[0],
            gradients=capture.gradients,
            norm=float(norms[0]),
            logprobs={str(trainer.accelerator.process_index): logprobs},
            sketches=at_first.sketches,
            moved={n: p - before[n] for n, p in weights(trainer.model).items()},
        )


def update_in_parts(trainer: CTCGRPOTrainer) -> None:
    update = trainer.update

    def in_parts(model: Any, samples: Any) -> torch.Tensor:
        [tokens] = trainer._sum_over_processes([float(sum(len(sample.completion_ids) for sample in samples))])
        trainer.args.loss_total = tokens
        half = len(samples) // 2
        update(model, samples[half:], is_last=False)
        return update(model, samples[:half])

    trainer.update = in_parts  # type: ignore[assignment]


def _backend_of(wrapped: Any) -> str:
    """What really ran, not what was asked for."""
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    return type(wrapped).__name__ + (f", ZeRO-{stage}" if stage is not None else "")


def difference(a: Outcome, b: Outcome) -> dict[str, float]:
    """How far two outcomes are apart, each in its own measure."""

    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm() / x.norm().clamp_min(1e-12))

    assert a.gradients.keys() == b.gradients.keys()
    flat_a, flat_b = (torch.cat([m.flatten() for m in o.moved.values()]) for o in (a, b))
    return {
        "gradients": max(relative(a.gradients[n], b.gradients[n]) for n in a.gradients),
        "norm": abs(a.norm - b.norm) / a.norm,
        "weights": relative(flat_a, flat_b),
    }


def is_same(a: Outcome, b: Outcome) -> bool:
    d = difference(a, b)
    return d["gradients"] <= 1e-5 and d["norm"] <= 1e-5 and d["weights"] <= 1e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("base")
    parser.add_argument("--tokens-per-row", type=int, default=400)
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--backend")
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--importance", default="none")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; compare gradients and norm of the first step")
    args = parser.parse_args()
    how = {"tokens_per_row": args.tokens_per_row, "shift": args.shift, "backend": args.backend, "parts": args.parts}
    old = {"old_logprobs": "recomputed"} if args.importance != "none" else {}
    outcome = run(args.base, **how, beta=args.kl, bf16=args.bf16, importance=args.importance, top_k=args.top_k, **old)
    rank = next(iter(outcome.logprobs))
    torch.save(vars(outcome), args.out.with_suffix(f".rank{rank}.pt"))
    if torch.distributed.is_initialized():  # left to the interpreter's end, its threads may abort the process
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
