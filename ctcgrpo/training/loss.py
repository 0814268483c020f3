"""The loss: PPO's clipped objective, an entropy bonus and an optional KL term, each a sum over trained tokens, normalised over
the whole step.

    L = - 1/N * sum_t [ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta_H * H_t - beta_KL * k_t ],
    rho_t = exp(logp_t - old_t),   k_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1

N is the number of trained tokens of the optimizer step over all rows and processes, so the loss does not depend on how
samples are cut into rows. k_t is the unbiased, never negative estimator of KL(policy || reference) of Schulman (2020), as in GRPO;
the published method has none (beta_KL = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the trained tokens of a row; `loss` carries the gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor


def token_sums(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    clip: float,
    entropy_bonus: float,
    reference: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> TokenSums:
    """All tensors (E,), one number a trained token; old_logprobs None means the detached current ones, so the ratio is 1 and its
    gradient that of logprobs. `reference`: log-probabilities under the reference policy, None for no KL term. `clipped` counts
    tokens where the clip is active, so that they pass on no policy gradient."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    gap = torch.zeros_like(logprobs) if reference is None else reference - logprobs
    kl = gap.exp() - gap - 1
    per_token = -torch.minimum(free, bounded) - entropy_bonus * entropy + kl_weight * kl
    return TokenSums(
        loss=per_token.sum(),
        clipped=(bounded < free).sum(),
        entropy=entropy.detach().sum(),
        ratio=ratio.detach().sum(),
        kl=kl.detach().sum(),
    )
