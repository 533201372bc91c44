"""A model's head, where a token is predicted that counts, and a reward or value model's at every token.

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
        self.index: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.picked = False
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    def _pick(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.index is None or not args or args[0].shape[:2] != self.shape:
            return None
        self.picked = True
        return (args[0].flatten(0, 1).index_select(0, self.index)[None], *args[1:])

    def logits(self, model: Any, inputs: dict[str, Any], index: Tensor) -> tuple[Tensor, Any]:
        """Logits of the tokens that follow those at `index`, as (picked, vocabulary), and the outputs.

        `model` may be wrapped. A model whose head is called in a way of its own gives all logits; they are picked here.

        Args:
            index: (picked,) places in the batch's rows laid end to end; a place may come up more than once.
        """
        self.index, self.shape, self.picked = index, inputs["input_ids"].shape, False
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            self.index = None
        logits = outputs.logits
        return (logits[0] if self.picked else logits.flatten(0, 1)[index]), outputs


class ScoreHead:
    """The score of every token of a `ForSequenceClassification` model, which itself gives only the last one's of each line."""

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.module = base.score
        self.kept: Any = None

    def _keep(self, _: Any, __: Any, scores: Any) -> None:
        self.kept = scores

    def scores(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Float32, of the tokens of all lines laid end to end, and the outputs. `model` may be wrapped."""
        # Hooked for the call alone, so that it comes after the hooks of ZeRO-3, which fetch the weights for the backward pass
        # by what they return.
        hook = self.module.register_forward_hook(self._keep)
        try:
            outputs = model(**inputs, use_cache=False)
        finally:
            hook.remove()
        scores, self.kept = self.kept, None
        return scores.flatten().float(), outputs
