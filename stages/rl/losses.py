"""PPO's losses of each token, as pure functions beside their formulas (Schulman et al. 2017, arXiv:1707.06347).

With rho_t = pi(a_t|s_t) / pi_old(a_t|s_t), the ratio to the policy that sampled, and V_old the value model's value then,

    policy   max(-A_t rho_t, -A_t clip(rho_t, 1 - e, 1 + e))                              eq. 7, as a loss
    value    1/2 max((V_t - G_t)^2, (V_old + clip(V_t - V_old, -c, c) - G_t)^2)           its section 5 with the clipping of its
             code: Huang et al. 2022, "The 37 implementation details of PPO", detail 9
    entropy  - sum_a pi(a|s_t) log pi(a|s_t), of which the bonus is a part                eq. 9
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens,) each: the loss; the ratio; and where clipping took the gradient away (1, else 0)."""
    import torch

    ratio = torch.exp(logps - old_logps)
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, held), ratio, (held > free).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(tokens,) each: the loss, and where clipping took the gradient away (1, else 0)."""
    import torch

    near = old_values + (values - old_values).clamp(-clip, clip)
    free, held = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, held), (held > free).float()


def approximate_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """(tokens,): of KL(pi_old || pi), k3 of http://joschu.net/blog/kl-approx.html: rho - 1 - log rho."""
    import torch

    x = logps - old_logps
    return torch.expm1(x) - x
