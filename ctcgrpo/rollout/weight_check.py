"""Whether a vLLM server samples from the weights that it was sent: its log-probabilities against the trainer's.

A transfer over NCCL has no checksum, and vLLM stores weights in a form of its own (fused, split over GPUs), so there is nothing to
compare bit by bit. The prompts take tokens from all over the vocabulary, so that a damaged stretch of the embedding shows as well
as one of the output layer, which every log-probability depends on.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.rollout.engine import Sampling
from ctcgrpo.types import Completion, TurnSample
from ctcgrpo.util.processes import raise_on_all

PROMPTS, PROMPT_TOKENS, REPLY_TOKENS = 4, 128, 32
TOLERANCE = 0.1
"""How far log-probabilities may be apart on the mean over all tokens, in nats at temperature 1. Two ways of computing in bfloat16
differ by 0.01 to 0.03; other weights by 1 and more."""

Score = Callable[[Sequence[TurnSample]], Sequence[Sequence[float]] | None]
"""The trainer's log-probabilities of completions at the sampling temperature. Collective; None where it cannot tell now."""


def spread_prompts(vocabulary: int, max_length: int) -> list[tuple[int, ...]]:
    """PROMPTS prompts of tokens that are spread evenly over [0, vocabulary), together with every token at most once."""
    length = min(PROMPT_TOKENS, max(1, max_length // 2), vocabulary // PROMPTS)
    tokens = [k * vocabulary // (PROMPTS * length) for k in range(PROMPTS * length)]
    return [tuple(tokens[k::PROMPTS]) for k in range(PROMPTS)]


def check_weights(
    ask: Callable[[str, Sequence[int], Sampling], Completion],
    score: Score,
    urls: Sequence[str],
    *,
    vocabulary: int,
    max_length: int,
    temperature: float,
) -> bool:
    """Compare; gives False where `score` could not tell. Collective: `urls` are those of the main process, and none on others.
    Raises PolicyEngineError on all processes together, for servers that cannot be asked and for other weights."""
    sampling = Sampling(temperature=temperature, max_new_tokens=REPLY_TOKENS)
    prompts = spread_prompts(vocabulary, max_length)
    samples: list[TurnSample] = []
    recorded: list[Sequence[float]] = []
    problem: PolicyEngineError | None = None
    try:
        for url in urls:
            for prompt in prompts:
                done = ask(url, prompt, sampling)
                samples.append(TurnSample(np.array(prompt), np.array(done.token_ids), 0.0))
                recorded.append(done.logprobs)
    except PolicyEngineError as error:
        problem, samples, recorded = error, [], []
    scored = score(samples)  # also where there is nothing to score: others take part
    if problem is None and scored is not None:
        problem = _difference(urls, len(prompts), recorded, scored, TOLERANCE / min(1.0, temperature))
    raise_on_all(problem)
    return scored is not None


def _difference(
    urls: Sequence[str], prompts: int, recorded: Sequence[Sequence[float]], scored: Sequence[Sequence[float]], bound: float
) -> PolicyEngineError | None:
    for k, url in enumerate(urls):
        here = slice(k * prompts, (k + 1) * prompts)
        apart = [abs(a - b) for r, s in zip(recorded[here], scored[here], strict=True) for a, b in zip(r, s, strict=True)]
        mean = sum(apart) / len(apart)
        if not mean <= bound:
            return PolicyEngineError(
                f"{url} samples from other weights than it was sent: its log-probabilities differ from the trainer's by "
                f"{mean:.3g} nats on average over {len(apart)} tokens; expected at most {bound:.2g}; check that it serves the "
                "model that is trained, unquantized, then restart the server and the run"
            )
    return None
