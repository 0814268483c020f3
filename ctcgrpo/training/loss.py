"""The loss: PPO's clipped objective, an entropy bonus and an optional KL term, each a sum over trained tokens, normalised over
the whole step.

    L = - 1/W * sum_t w_t [ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta_H * H_t - beta_KL * k_t ],
    rho_t = exp(logp_t - old_t),   k_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1

w_t is 1 where tokens weigh alike, or 1 / (tokens of its turn) where turns do. W is the sum of w_t over the optimizer step, all
rows and processes, so the loss does not depend on how samples are cut into rows. With a dual clip c > 1 (Ye et al. 2020, arXiv
1912.09729) the minimum is bounded below by c A_t where A_t < 0: a token that has become likely cannot outweigh the others. k_t is
the unbiased, never negative estimator of KL(policy || reference) of Schulman (2020), as in GRPO; the published method has none
(beta_KL = 0).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the trained tokens of a row; `loss` carries the gradient. It and `weight`, the sum of w_t, are weighted."""

    loss: torch.Tensor
    weight: torch.Tensor
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
    weights: torch.Tensor | None = None,
    dual_clip: float | None = None,
    reference: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> TokenSums:
    """All tensors (E,), one number a trained token; old_logprobs None means the detached current ones, so the ratio is 1 and its
    gradient that of logprobs. `weights`: w_t, None where tokens weigh alike. `reference`: log-probabilities under the reference
    policy, None for no KL term. `clipped` counts tokens where a clip is active, so that they pass on no policy gradient."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    gap = torch.zeros_like(logprobs) if reference is None else reference - logprobs
    kl = gap.exp() - gap - 1
    objective = torch.minimum(free, bounded)
    clipped = bounded < free
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    per_token = -objective - entropy_bonus * entropy + kl_weight * kl
    if weights is not None:
        per_token = weights * per_token
    return TokenSums(
        loss=per_token.sum(),
        weight=torch.tensor(float(len(logprobs)), device=logprobs.device) if weights is None else weights.sum(),
        clipped=clipped.sum(),
        entropy=entropy.detach().sum(),
        ratio=ratio.detach().sum(),
        kl=kl.detach().sum(),
    )
