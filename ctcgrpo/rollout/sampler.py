"""Drawing tokens: one a row, by inverse transform from a number that the row brings along, with its exact log-probability."""

import torch

from ctcgrpo.rollout.engine import Sampling

_FIRST_LOOK = 64
"""How many of the likeliest tokens top-p looks at first: sorting a whole vocabulary for a handful of them takes longer than a small
model's forward pass."""


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (R, V), uniforms (R,) float64 in [0, 1) -> (tokens, log-probabilities), each (R,), as in `types.Completion`. Top-k is
    applied before top-p, which then counts within what top-k kept."""
    if sampling.temperature == 0:
        full = torch.log_softmax(logits.float(), dim=-1)
        best = full.max(dim=-1)
        return best.indices, best.values
    full = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if not sampling.truncates:
        tokens = _inverse(full.double().exp(), uniforms)
        return tokens, _at(full, tokens)
    tokens, logprobs = torch.empty_like(full[:, 0], dtype=torch.long), torch.empty_like(full[:, 0])
    for rows, likeliest, p in _kept(full, sampling):
        chosen = _inverse(p, uniforms[rows])
        tokens[rows] = _at(likeliest, chosen)
        logprobs[rows] = _at(full[rows], tokens[rows]) - p.sum(dim=-1).log().float()
    return tokens, logprobs


def log_kept(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """logits (R, V), tokens (R,) -> the log (R,) of the probability mass that top-p and top-k keep, at the sampling temperature. A
    token's log-probability less that is the one under truncation. +inf for a token that is not kept, whose probability is 0."""
    full = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    found = torch.zeros_like(full[:, 0])
    for rows, likeliest, p in _kept(full, sampling) if sampling.truncates else ():
        is_kept = ((likeliest == tokens[rows].unsqueeze(-1)) & (p > 0)).any(dim=-1)
        found[rows] = torch.where(is_kept, p.sum(dim=-1).log().float(), torch.inf)
    return found


def _kept(full: torch.Tensor, sampling: Sampling) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What truncation keeps of log-probabilities (R, V), in parts: rows (r,), the likeliest tokens (r, L) of each, and their
    probabilities (r, L), 0 where not kept."""
    parts = []
    rows, look = torch.arange(len(full), device=full.device), sampling.top_k or _FIRST_LOOK
    while len(rows):
        look = min(look, full.shape[-1])
        likeliest = torch.topk(full[rows], look, dim=-1)
        p = likeliest.values.double().exp()
        sums = p.cumsum(dim=-1)
        bound = sampling.top_p * (sums[:, -1:] if sampling.top_k else torch.ones_like(sums[:, -1:]))
        # A token stays when those before it have not filled top_p yet; so the first always does.
        p = torch.where(sums - p < bound, p, 0.0)
        whole = sums[:, -1] >= bound[:, 0]  # whether top-p has not kept more than was looked at
        if sampling.top_k or look == full.shape[-1]:
            whole = torch.ones_like(whole)
        if bool(whole.any()):
            parts.append((rows[whole], likeliest.indices[whole], p[whole]))
        rows, look = rows[~whole], 8 * look
    return parts


def _inverse(p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """For each row, the place at which the running sum of p (R, N), of any mass, passes the row's share of it."""
    sums = p.cumsum(dim=-1)
    passed = torch.searchsorted(sums, (uniforms * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding can put a share at the very end: the last place of positive mass is meant.
    return torch.minimum(passed, (sums < sums[:, -1:]).sum(dim=-1))


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, places.unsqueeze(-1)).squeeze(-1)
