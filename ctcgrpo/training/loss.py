"""The loss: PPO's clipped objective, an entropy bonus and an optional KL term, each a sum over trained tokens, normalised over
the whole step.

    L = - 1/W * sum_t w_t [ v_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta_H * H_t - beta_KL * k_t ],
    rho_t = exp(logp_t - old_t),   k_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1

w_t is 1 where tokens weigh alike, or 1 / (tokens of its turn) where turns do. W is the sum of w_t over the optimizer step, all
rows and processes, so the loss does not depend on how samples are cut into rows. With a dual clip c > 1 (Ye et al. 2020, arXiv
1912.09729) the minimum is bounded below by c A_t where A_t < 0: a token that has become likely cannot outweigh the others. k_t is
the unbiased, never negative estimator of KL(policy || reference) of Schulman (2020), as in GRPO; the published method has none
(beta_KL = 0).

v_t is the truncated importance weight of what the engine sampled, min(exp(old_t - sampled_t), v_max), constant in the gradient; for
a turn the exponent is summed over its tokens. It corrects for an engine that computes other probabilities than the trainer (another
precision, other kernels, older weights). Without importance weights v_t = 1. Source: truncated importance sampling, Ionides (2008).
Where top-p and top-k truncate, sampled_t contains the log of the mass that they keep of the old policy, so that v_t is the ratio of
the truncated probabilities: 0 (sampled_t = inf) for a token that they remove.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the trained tokens of a row; `loss` carries the gradient. It and `weight`, the sum of w_t, are weighted. `gap` sums
    |old_t - sampled_t| where sampled_t is finite, and `removed` counts where it is not; `importance` sums v_t, and `truncated`
    counts tokens with v_t = v_max."""

    loss: torch.Tensor
    weight: torch.Tensor
    clipped: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor
    gap: torch.Tensor
    importance: torch.Tensor
    truncated: torch.Tensor
    removed: torch.Tensor


def importance_weights(
    old: torch.Tensor, sampled: torch.Tensor, *, bound: float, sample: torch.Tensor | None = None
) -> torch.Tensor:
    """v_t (E,) in [0, bound] from log-probabilities (E,). `sample` (E,): the index of each token's turn, for one weight a turn."""
    log_ratio = old - sampled
    if sample is not None:
        _, which = torch.unique(sample, return_inverse=True)
        log_ratio = torch.zeros(len(sample), device=old.device).index_add(0, which, log_ratio)[which]
    return log_ratio.clamp(max=math.log(bound)).exp()


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
    sampled_logprobs: torch.Tensor | None = None,
    importance_max: float = 3.0,
    by_turn: torch.Tensor | None = None,
) -> TokenSums:
    """All tensors (E,), one number a trained token; old_logprobs None means the detached current ones, so the ratio is 1 and its
    gradient that of logprobs. `weights`: w_t, None where tokens weigh alike. `reference`: log-probabilities under the reference
    policy, None for no KL term. `clipped` counts tokens where a clip is active, so that they pass on no policy gradient.
    `sampled_logprobs`: the engine's, None for no importance weights; `importance_max`: their bound; `by_turn`: as
    `importance_weights.sample`."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    d = torch.zeros_like(logprobs) if reference is None else reference - logprobs
    kl = d.exp() - d - 1
    objective = torch.minimum(free, bounded)
    clipped = bounded < free
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    v = torch.ones_like(logprobs)
    gap, removed = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    if sampled_logprobs is not None:
        old = old.detach()
        removed = sampled_logprobs.isinf()
        gap = (old - sampled_logprobs).abs().where(~removed, 0.0)
        v = importance_weights(old, sampled_logprobs, bound=importance_max, sample=by_turn)
    per_token = -v * objective - entropy_bonus * entropy + kl_weight * kl
    if weights is not None:
        per_token = weights * per_token
    return TokenSums(
        loss=per_token.sum(),
        weight=torch.tensor(float(len(logprobs)), device=logprobs.device) if weights is None else weights.sum(),
        clipped=clipped.sum(),
        entropy=entropy.detach().sum(),
        ratio=ratio.detach().sum(),
        kl=kl.detach().sum(),
        gap=gap.sum(),
        importance=v.detach().sum(),
        truncated=(v >= importance_max * (1 - 1e-6)).sum() if sampled_logprobs is not None else torch.zeros_like(clipped.sum()),
        removed=removed.sum(),
    )
