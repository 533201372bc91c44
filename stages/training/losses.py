"""The loss of supervised fine-tuning, as pure functions beside their formulas, and log-probabilities of tokens.

With y_n the trained tokens of example n (a conversation, or a document of a pack) and w_t their weights (1 if not said),
over all examples of an optimiser step, on whatever workers and in whatever micro-batches they are:

    token      L = - sum_n sum_t w_t log p(y_n,t | before) / sum_n sum_t w_t
    sequence   L = - 1/B sum_n  ( sum_t w_t log p(y_n,t | before) / sum_t w_t )      B examples with a trained token

`token` is what TRL and transformers compute: long answers count for more. `sequence` is the SFT objective as papers write
it, where each example counts the same. Both are a sum of `c_t * -log p_t` over the step, divided by a number that is known
before the step: `loss_weights` gives c and a micro-batch's part of that number, so the sum may be cut anywhere.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from stages.data.chat import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

Normalization = Literal["token", "sequence"]
BLOCK = 1 << 22  # logits of one block of rows: what is held in float32 at a time


def loss_weights(
    labels: Tensor, weights: Tensor | None, documents: Tensor | None, normalization: Normalization
) -> tuple[Tensor, float]:
    """(c, share): what each token's -log p is multiplied by, and this batch's part of what the step's sum is divided by.

    Args:
        labels: (rows, tokens), IGNORE where a token is not trained. The first of a row never is: nothing stands before it.
        weights: (rows, tokens), of the data; None: all 1.
        documents: (rows, tokens), the number of the document in its row, for packs; None: a row is one document.

    Returns:
        c (rows, tokens) float32, 0 where not trained, and the sum of weights (`token`) or the number of examples with
        weight above 0 (`sequence`).
    """
    import torch

    c = labels.ne(IGNORE).float()
    c[:, 0] = 0
    if weights is not None:
        c = c * weights
    if normalization == "token":
        return c, float(c.sum())
    of = torch.zeros_like(labels) if documents is None else documents
    most = int(of.max()) + 1
    example = of + most * torch.arange(len(labels))[:, None]
    sums = torch.zeros(len(labels) * most).index_add_(0, example.flatten(), c.flatten())
    each = torch.where(sums > 0, 1 / sums.clamp(min=torch.finfo(sums.dtype).tiny), sums)
    return c * each[example], float((sums > 0).sum())


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float = 0.0, dft: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_t c_t * l_t over tokens, where l_t = -log p_t, or with label smoothing e (Szegedy et al. 2016, section 7)

        l_t = (1 - e) * -log p_t + e * mean over the vocabulary of -log p_v

    or, with `dft` (Wu et al. 2025, eq. 9), l_t = p_t * -log p_t with no gradient through the factor.

    The gradient is written over `logits` while they are in the cache, so nothing else of their size is held: do not use
    them afterwards (autograd notices where an earlier step still needs them).

    Args:
        logits: (tokens, vocabulary), of any float type.
        targets: (tokens,) ids.
        weights: (tokens,) float32, the c_t.

    Returns:
        The sum, a scalar with a gradient; the unweighted sum of -log p_t and the number of tokens that are the most
        likely one, without.
    """
    return _function().apply(logits, targets, weights, label_smoothing, dft)


@cache
def _function() -> Any:
    """The autograd function; made when it is first used, since plans and spec checks do without torch."""
    import torch

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, dft: bool
        ) -> tuple[Tensor, Tensor, Tensor]:
            total, nll_sum, right = (torch.zeros((), device=logits.device) for _ in range(3))
            wanted = ctx.needs_input_grad[0]
            size = max(1, BLOCK // max(logits.shape[-1], 1))
            for block, target, weight in zip(logits.split(size), targets.split(size), weights.split(size), strict=True):
                log_p = torch.log_softmax(block, -1, dtype=torch.float32)
                nll = -log_p.gather(1, target[:, None]).squeeze(1)
                nll_sum += nll.sum()
                right += (-nll >= log_p.amax(-1)).sum()
                if dft:
                    weight = weight * nll.neg().exp()
                total += (1 - smoothing) * (weight * nll).sum()
                if smoothing:
                    total -= smoothing * (weight * log_p.mean(-1)).sum()
                if wanted:  # d l_t / d logits = p - (1 - e) onehot - e / V
                    gradient = log_p.exp_().mul_(weight[:, None])
                    gradient.scatter_add_(1, target[:, None], ((smoothing - 1) * weight)[:, None])
                    if smoothing:
                        gradient -= (smoothing / logits.shape[-1]) * weight[:, None]
                    block.copy_(gradient)
            if wanted:
                ctx.gradient = logits
            ctx.mark_non_differentiable(nll_sum, right)
            return total, nll_sum, right

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                raise RuntimeError("the gradient of this loss was already used: it can be taken once")
            return gradient.mul_(upstream), None, None, None, None

    return CrossEntropy


def token_logps(
    logits: Tensor, targets: Tensor, *, squares: bool = False, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log p_t of each token, and one thing more of its distribution where that is wanted: of `squares` log sum_v p_v^2,
    without a gradient, of `entropy` - sum_v p_v log p_v, with one.

    As `cross_entropy`, the gradient is written over `logits`: nothing else of their size is held.

    Args:
        logits: (tokens, vocabulary), of any float type.
        targets: (tokens,) ids.

    Returns:
        (tokens,) float32, and the same again or, where nothing more is wanted, nothing: (0,).
    """
    return _logps_function().apply(logits, targets, squares, entropy)


@cache
def _logps_function() -> Any:
    import torch

    class TokenLogps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, targets: Tensor, squares: bool, entropy: bool) -> tuple[Tensor, Tensor]:
            size = max(1, BLOCK // max(logits.shape[-1], 1))
            norms, logps, more = [], [], [logits.new_empty(0, dtype=torch.float32)]
            for block, target in zip(logits.split(size), targets.split(size), strict=True):
                whole = block.float()
                norm = whole.logsumexp(-1)
                norms.append(norm)
                logps.append(whole.gather(1, target[:, None]).squeeze(1) - norm)
                if squares:
                    more.append((2 * whole).logsumexp(-1) - 2 * norm)
                elif entropy:
                    log_p = whole - norm[:, None]  # no `vecdot`: under autocast that is in half precision
                    more.append(-log_p.exp().mul_(log_p).sum(-1))
            norm, logp, second = (torch.cat(parts) for parts in (norms, logps, more))
            if ctx.needs_input_grad[0]:
                ctx.logits, ctx.norm, ctx.targets, ctx.size = logits, norm, targets, size
                ctx.entropy = second if entropy else None
            ctx.set_materialize_grads(False)
            if not entropy:
                ctx.mark_non_differentiable(second)
            return logp, second

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Tensor | None, of_entropy: Tensor | None) -> tuple[Any, ...]:
            logits, ctx.logits = ctx.logits, None
            if logits is None:
                raise RuntimeError("the gradient of these log-probabilities was already used: it can be taken once")
            if upstream is None:
                upstream = torch.zeros_like(ctx.norm)
            wanted = (upstream,) if of_entropy is None else (upstream, of_entropy, ctx.entropy)
            parts = (x.split(ctx.size) for x in (logits, ctx.norm, ctx.targets, *wanted))
            for block, norm, target, g, *more in zip(*parts, strict=True):  # d log p_t / d logits = onehot - p
                log_p = block.float().sub_(norm[:, None])
                if more:  # d H / d logits = - p (log p + H)
                    of, entropy = more
                    gradient = log_p.exp() * (-g[:, None] - of[:, None] * (log_p + entropy[:, None]))
                else:
                    gradient = log_p.exp_().mul_(-g[:, None])
                gradient.scatter_add_(1, target[:, None], g[:, None])
                block.copy_(gradient)
            return logits, None, None, None

    return TokenLogps
