"""Drawing tokens: one a row, by inverse transform from a number that the row brings along, with its exact log-probability."""

import torch

from ctcgrpo.rollout.engine import Sampling

_FIRST_LOOK = 64
"""How many of the likeliest tokens top-p looks at first: sorting a whole vocabulary for a handful of them takes longer than a small
model's forward pass."""

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> Drawn:
    """logits (R, V), uniforms (R,) float64 in [0, 1) -> (tokens, log-probabilities, log of the kept mass), each (R,), as in
    `records.Completion`. Top-k is applied before top-p, which then counts within what top-k kept."""
    if sampling.temperature == 0:
        full = torch.log_softmax(logits.float(), dim=-1)
        best = full.max(dim=-1)
        return best.indices, best.values, torch.zeros_like(best.values)
    full = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.truncates:
        return _among_the_likeliest(full, uniforms, sampling, sampling.top_k or _FIRST_LOOK)
    tokens = _inverse(full.double().exp(), uniforms)
    return tokens, _at(full, tokens), torch.zeros_like(full[:, 0])


def _among_the_likeliest(full: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling, look: int) -> Drawn:
    look = min(look, full.shape[-1])
    likeliest = torch.topk(full, look, dim=-1)
    p = likeliest.values.double().exp()
    sums = p.cumsum(dim=-1)
    # A token stays when those before it have not filled top_p yet; so the first always does.
    bound = sampling.top_p * (sums[:, -1:] if sampling.top_k else torch.ones_like(sums[:, -1:]))
    p = torch.where(sums - p < bound, p, 0.0)
    log_kept = p.sum(dim=-1).log().float()
    chosen = _inverse(p, uniforms)
    tokens, logprobs = _at(likeliest.indices, chosen), _at(likeliest.values, chosen) - log_kept
    if not sampling.top_k and look < full.shape[-1]:
        short = sums[:, -1] < bound[:, 0]
        if bool(short.any()):
            more = _among_the_likeliest(full[short], uniforms[short], sampling, 8 * look)
            tokens[short], logprobs[short], log_kept[short] = more
    return tokens, logprobs, log_kept


def _inverse(p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """For each row, the place at which the running sum of p (R, N), of any mass, passes the row's share of it."""
    sums = p.cumsum(dim=-1)
    passed = torch.searchsorted(sums, (uniforms * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding can put a share at the very end: the last place of positive mass is meant.
    return torch.minimum(passed, (sums < sums[:, -1:]).sum(dim=-1))


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, places.unsqueeze(-1)).squeeze(-1)
