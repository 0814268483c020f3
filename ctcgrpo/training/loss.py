"""The loss: PPO's clipped objective and an entropy bonus, each a sum over trained tokens, normalised over the whole step.

    L = - 1/N * sum_t [ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta_H * H_t ],   rho_t = exp(logp_t - old_t)

N is the number of trained tokens of the optimizer step over all rows and processes, so the loss does not depend on how
samples are cut into rows. No KL term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the trained tokens of a row; `loss` carries the gradient."""

    loss: torch.Tensor
    tokens: torch.Tensor
    clipped: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor


def token_sums(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
    entropy_bonus: float,
) -> TokenSums:
    """All tensors (B, T); old_logprobs None means the detached current ones, so the ratio is 1 and its gradient that of
    logprobs. `clipped` counts tokens where the clip is active, so that they pass on no policy gradient."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(torch.where(mask, logprobs - old, 0.0))
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(free, bounded) - entropy_bonus * entropy
    return TokenSums(
        loss=(per_token * mask).sum(),
        tokens=mask.sum(),
        clipped=((bounded < free) & mask).sum(),
        entropy=(entropy.detach() * mask).sum(),
        ratio=(ratio.detach() * mask).sum(),
    )
