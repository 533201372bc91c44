"""The losses of preference tuning, as pure functions beside their formulas.

For a pair (x, y_w, y_l) of a prompt, its chosen and its rejected answer, with policy pi and reference pi_0,

    w = log pi(y_w|x) - log pi_0(y_w|x)        l = log pi(y_l|x) - log pi_0(y_l|x)        d = w - l

and s the logistic function, the loss of a pair is, by `loss_type` (the names are TRL's, and simpo, orpo and cpo besides):

    sigmoid       -log s(b d)                                   Rafailov et al. 2023 (DPO), eq. 7
    hinge         max(0, 1 - b d)                               Zhao et al. 2023 (SLiC), eq. 2
    ipo           (w/|y_w| - l/|y_l| - 1/(2 b))^2               Azar et al. 2023, eq. 17, of means over tokens
    robust        (-(1-e) log s(b d) + e log s(-b d))/(1-2e)    Chowdhury et al. 2024, eq. 12
    exo_pair      KL of (s(b d), s(-b d)) from (1-e, e)         Ji et al. 2024, eq. 16
    nca_pair      -log s(b w) - (log s(-b w) + log s(-b l))/2   Chen et al. 2024
    bco_pair      -log s(b w) - log s(-b l)                     Jung et al. 2024, without the shift of its rewards
    sppo_hard     (w - 1/(2 b))^2 + (l + 1/(2 b))^2             Wu et al. 2024, eq. 4.7 with P of 1 and 0
    aot, aot_unpaired                                           Melnyk et al. 2024: sigmoid of what a micro-batch sorts
    apo_zero      1 - s(b w) + s(b l)                           D'Oosterlinck et al. 2024, eq. 7
    apo_down      s(b w) + 1 - s(b d)                           the same, eq. 8
    discopop      the mix of -log s(b d) and exp(-b d)          Lu et al. 2024, eq. 5
    sigmoid_norm  -log s(b (w/|y_w| - l/|y_l|))                 length-normalised DPO: Lambert et al. 2024 (Tulu 3)
    sft           -log pi(y_w|x), a mean over tokens            to be combined with another
  without a reference, of the policy's own log-probabilities:
    simpo         -log s(b (mean_w - mean_l) - gamma)           Meng et al. 2024, eq. 6; mean over tokens
    orpo          -log s(log odds_w - log odds_l)               Hong et al. 2024, eq. 7; odds of means over tokens
    cpo           -log s(b (log pi_w - log pi_l))               Xu et al. 2024, eq. 3

e is `label_smoothing` (of sigmoid, simpo, cpo and aot too: the loss of the pair turned round, weighed by e: Mitchell 2023,
"A note on DPO with noisy preferences", eq. 3). Several are added up, by `loss_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from stages.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_FREE = ("simpo", "orpo", "cpo", "sft")
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sigmoid_norm", *REFERENCE_FREE,
)  # fmt: skip
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
# Those that are functions of a divergence's own scores, rather than of log ratios (Wang et al. 2023, f-DPO).
OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class PairLoss:
    """What is minimised; fields as in TRL's DPOConfig, and `gamma`, SimPO's target margin."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    use_weighting: bool = False
    gamma: float = 0.5

    @classmethod
    def of(cls, given: Mapping[str, Any], gamma: float) -> PairLoss:
        """From `train:` as given.

        Raises:
            ValueError: they contradict each other.
        """
        own = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
        if isinstance(own.get("loss_type"), str):
            own["loss_type"] = [own["loss_type"]]
        loss = cls(**own | {"gamma": gamma})
        if problem := loss.problem():
            raise ValueError(problem)
        return loss

    @property
    def needs_reference(self) -> bool:
        return not set(self.loss_type) <= set(REFERENCE_FREE)

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        types = set(self.loss_type)
        if unknown := [t for t in self.loss_type if t not in LOSS_TYPES]:
            return f"loss_type: {unknown[0]} is not one of {', '.join(LOSS_TYPES)}{nearest(unknown[0], LOSS_TYPES)}"
        if not self.loss_type:
            return "loss_type: at least one loss is wanted"
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            return f"loss_weights: {len(self.loss_weights)} weights for {len(self.loss_type)} losses of loss_type"
        if types == {"sft"}:
            return "loss_type: sft alone does not look at the rejected answers; combine it, or make it an sft stage"
        if self.beta <= 0:
            return f"beta must be above 0, not {self.beta:g}"
        if self.f_divergence_type not in DIVERGENCES:
            return f"f_divergence_type: {self.f_divergence_type} is not one of {', '.join(DIVERGENCES)}"
        if self.f_divergence_type != "reverse_kl" and not types <= set(OF_SCORES):
            return f"f_divergence_type: only with {', '.join(OF_SCORES)}"
        if self.use_weighting and types & {"aot", "aot_unpaired"}:
            return "use_weighting: not with aot, which sorts the pairs its weights belong to"
        if "exo_pair" in types and not 0 < self.label_smoothing < 1:
            return "exo_pair wants a label_smoothing above 0 (its paper takes 1e-3)"
        if not 0 <= self.label_smoothing < 0.5:
            return f"label_smoothing must be at least 0 and under 0.5, not {self.label_smoothing:g}"
        return None


def pair_loss(
    loss: PairLoss, logps: Tensor, reference: Tensor | None, lengths: Tensor, means: Tensor, agreement: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss of each pair, -log p of its chosen answer where `sft` is among the losses), both (pairs,).

    The step's loss is the sum of the first over all its pairs divided by their number, and of the second divided by the
    number of tokens of their chosen answers.

    Args:
        logps: (2, pairs): of chosen and rejected answers, sums over tokens.
        reference: the same of the reference; None where no loss needs one.
        lengths: (2, pairs), tokens.
        means: (2, pairs), plain means over tokens.
        agreement: (2, pairs), of `use_weighting` (Zhou et al. 2024, WPO, eq. 2): means over tokens of
            log p_t - log sum_v p_v^2.
    """
    import torch

    ratios = logps - (reference if reference is not None else torch.zeros_like(logps))
    each, tokens = torch.zeros_like(logps[0]), torch.zeros_like(logps[0])
    weights = loss.loss_weights or [1.0] * len(loss.loss_type)
    for name, weight in zip(loss.loss_type, weights, strict=True):
        if name == "sft":
            tokens = tokens - weight * means[0] * lengths[0]
        else:
            each = each + weight * _one(name, loss, logps, ratios, lengths, means)
    if loss.use_weighting:
        assert agreement is not None
        certain = agreement.detach().sum(0).exp()
        each, tokens = each * certain, tokens * certain
    return each, tokens


def _one(name: str, loss: PairLoss, logps: Tensor, ratios: Tensor, lengths: Tensor, means: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import logsigmoid

    beta, smooth = loss.beta, loss.label_smoothing
    w, l = ratios  # noqa: E741 - as in the formulas
    scores = divergence_scores(ratios, loss.f_divergence_type, loss.f_alpha_divergence_coef)
    d = scores[0] - scores[1]

    def smoothed(x: Tensor) -> Tensor:
        return -(1 - smooth) * logsigmoid(x) - smooth * logsigmoid(-x)

    if name == "sigmoid":
        return smoothed(beta * d)
    if name == "hinge":
        return torch.relu(1 - beta * d)
    if name == "robust":
        return (-(1 - smooth) * logsigmoid(beta * d) + smooth * logsigmoid(-beta * d)) / (1 - 2 * smooth)
    if name == "ipo":
        return (scores[0] / lengths[0] - scores[1] / lengths[1] - 1 / (2 * beta)) ** 2
    if name == "sigmoid_norm":
        return -logsigmoid(beta * (scores[0] / lengths[0] - scores[1] / lengths[1]))
    if name == "exo_pair":
        q, r = logsigmoid(beta * d), logsigmoid(-beta * d)
        return q.exp() * (q - math.log1p(-smooth)) + r.exp() * (r - math.log(smooth))
    if name == "nca_pair":
        return -logsigmoid(beta * w) - (logsigmoid(-beta * w) + logsigmoid(-beta * l)) / 2
    if name == "bco_pair":
        return -logsigmoid(beta * w) - logsigmoid(-beta * l)
    if name == "sppo_hard":
        return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
    if name == "aot":
        reference = logps - ratios
        return smoothed(beta * ((logps[0] - logps[1]).sort().values - (reference[0] - reference[1]).sort().values))
    if name == "aot_unpaired":
        return smoothed(beta * (w.sort().values - l.sort().values))
    if name == "apo_zero":
        return 1 - torch.sigmoid(beta * w) + torch.sigmoid(beta * l)
    if name == "apo_down":
        return torch.sigmoid(beta * w) + 1 - torch.sigmoid(beta * (w - l))
    if name == "discopop":
        mix = torch.sigmoid(beta * d / loss.discopop_tau)
        return -logsigmoid(beta * d) * (1 - mix) + torch.exp(-beta * d) * mix
    if name == "simpo":
        return smoothed(beta * (means[0] - means[1]) - loss.gamma)
    if name == "orpo":
        odds = means - torch.log1p(-means.exp().clamp(max=1 - 1e-6))  # log p/(1-p); p of 1 has none
        return -logsigmoid(odds[0] - odds[1])
    if name == "cpo":
        return smoothed(beta * (logps[0] - logps[1]))
    raise ValueError(f"no loss is called {name}")


def divergence_scores(ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(pi/pi_0) of log ratios, for the divergence that holds the policy near (Wang et al. 2023, f-DPO, table 1)."""
    import torch
    from torch.nn.functional import logsigmoid

    if divergence == "forward_kl":
        return 1 - torch.exp(-ratios)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return (torch.exp(((alpha - 1) * ratios).clamp(max=80)) - 1) / (alpha - 1)  # so that it stays finite
    return ratios


def kto_loss(
    ratios: Tensor,
    wanted: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    loss_type: str,
) -> Tensor:
    """(answers,): the loss of each, with z the KL of policy and reference, s the logistic function and r the log ratio,

        kto                 wanted: l_D (1 - s(b (r - z)))      not: l_U (1 - s(b (z - r)))     Ethayarajh et al. 2024, eq. 8
        apo_zero_unpaired   wanted: l_D (1 - s(b r))            not: l_U s(b r)                 D'Oosterlinck et al. 2024, eq. 7

    Args:
        ratios: (answers,), log pi(y|x) - log pi_0(y|x), sums over tokens.
        wanted: (answers,), 1 for desirable ones, else 0.
        kl: z, a scalar, at least 0.
    """
    import torch

    z = kl if loss_type == "kto" else torch.zeros_like(kl)
    pull = torch.where(wanted > 0, ratios - z, z - ratios)
    weight = torch.where(wanted > 0, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * pull))


def bradley_terry(rewards: Tensor, margins: Tensor | None, center: float | None) -> Tensor:
    """(pairs,): -log s(r_w - r_l - m) (Ouyang et al. 2022, eq. 1; with margins Touvron et al. 2023, eq. 2), and with `center`
    c (r_w + r_l)^2, which holds the mean of rewards at 0 (Eisenstein et al. 2023, eq. 2).

    Args:
        rewards: (2, pairs), of chosen and rejected answers.
        margins: (pairs,), 0 where none is given.
    """
    from torch.nn.functional import logsigmoid

    apart = rewards[0] - rewards[1]
    loss = -logsigmoid(apart if margins is None else apart - margins)
    return loss if center is None else loss + center * (rewards[0] + rewards[1]) ** 2
