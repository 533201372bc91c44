"""The language-model head, only where a token is trained.

With masks about half of the tokens, and of padded batches fewer, need logits at all, and the logits are the largest tensor of
a step. The hidden states are picked before the head, inside the model's own forward pass, so whatever a model does to its
logits (a scale, a soft cap, a LoRA adapter on the head, parameters gathered by ZeRO-3) is done by the model itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class TrainedHead:
    """Made once for a model; `logits` then calls it."""

    def __init__(self, model: Any) -> None:
        """`model`: the model itself (not wrapped by DDP or DeepSpeed), with its adapter if it has one."""
        self.mask: Tensor | None = None
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    def _pick(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.mask is None or not args or args[0].shape[:2] != self.mask.shape:
            return None
        picked = args[0].flatten(0, 1).index_select(0, self.mask.flatten().nonzero().squeeze(1))
        return (picked[None], *args[1:])

    def logits(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Any]:
        """Logits of the tokens that follow where `mask` (rows, tokens) is true, as (tokens, vocabulary), and the outputs.

        `model` may be wrapped. A model whose head is called in a way of its own gives all logits; they are picked here.
        """
        self.mask = mask
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            self.mask = None
        logits = outputs.logits
        return (logits[mask] if logits.shape[:2] == mask.shape else logits[0]), outputs
