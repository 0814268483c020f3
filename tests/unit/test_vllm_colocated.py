"""What a colocated vLLM leaves behind in the process that trains, with a stand-in that changes it as vLLM 0.31 does on CUDA; vLLM
itself is in tests/real_vllm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ctcgrpo.rollout import vllm_adapter
from ctcgrpo.rollout.continuous import ContinuousEngine
from ctcgrpo.rollout.vllm_adapter import ColocatedVllm


class Llm:
    """Builds with one thread (gpu_worker.load_model), and remembers with how many it was woken."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.llm_engine = SimpleNamespace(
            **dict.fromkeys(("add_request", "abort_request", "step", "model_executor", "engine_core")),
            has_unfinished_requests=lambda: False,
        )
        self.threads: list[int] = []

    def wake_up(self, tags: list[str]) -> None:
        self.threads.append(torch.get_num_threads())

    def sleep(self, level: int) -> None: ...

    def reset_prefix_cache(self) -> bool:
        return True


class Generation:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.llm = Llm()
        self._llm_weights_sleeping = True

    def sync_weights(self) -> None:
        self._llm_weights_sleeping = False


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def engine(threads: int, monkeypatch: pytest.MonkeyPatch) -> ContinuousEngine:
    monkeypatch.setattr(vllm_adapter, "vllm_generation", Generation)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda", 0))
    options: dict[str, Any] = {"stop_ids": frozenset({7}), "max_length": 64, "max_requests": 2, "gpu_memory": 0.5, "seed": 1}
    return ContinuousEngine(ColocatedVllm(lambda: None, accelerator, None, **options))  # type: ignore[arg-type]


def test_the_update_has_its_threads_and_vllm_those_that_it_has_compiled_for(engine: ContinuousEngine, threads: int) -> None:
    assert torch.get_num_threads() == threads
    for version in range(2):
        engine.take_weights(version)
        engine.sleep()
        assert torch.get_num_threads() == threads
    assert engine._batcher._generation.llm.threads == [1, 1]  # type: ignore[attr-defined]


def test_memory_that_sleeps_is_not_counted(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    class CuMemAllocator:
        @classmethod
        def get_instance(cls) -> CuMemAllocator:
            return cls()

        def get_current_usage(self) -> int:
            return 5 * 2**30

    for name in ("vllm", "vllm.device_allocator", "vllm.device_allocator.cumem"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.device_allocator.cumem"].CuMemAllocator = CuMemAllocator  # type: ignore[attr-defined]
    assert engine.sleeping_bytes == 5 * 2**30
    engine.take_weights(0)
    assert engine.sleeping_bytes == 0
    engine.sleep()
    assert engine.sleeping_bytes == 5 * 2**30
