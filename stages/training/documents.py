"""Attention document by document: for CPUs, where no kernel knows where the documents of a row end.

A batch is one row of documents end to end (`flat` of collate.py), so nothing is padded. torch's attention would need a mask
of the row's length squared and compute all of it; here it is called for each document, causal and without a mask. On a
GPU that is what flash attention's kernels for rows of several lengths do. Two answers to one prompt may share it (`parts`),
which those kernels cannot.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NAME = "raylign_documents"
ALTERING = ("softcap", "position_bias", "s_aux")  # what a layer may be given that changes the scores


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, head size) to (1, tokens, heads, head size).

    Raises:
        ValueError: the batch is not one row, the model did not say where its documents begin, or its attention is more
            than the common one (`ALTERING`).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if query.shape[0] != 1 or position_ids is None or attention_mask is not None:
        raise ValueError("wanted is one row of documents, with positions that begin anew with each, and no mask")
    if altering := [name for name in ALTERING if other.get(name) is not None]:
        raise ValueError(f"attention document by document has no {', '.join(altering)}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    known = parts(position_ids)
    # Pieces, since the gradient of a slice is as long as the row, and there is one for each part.
    pieces = (x.split([part.end - part.start for part in known], 2) for x in (query, key, value))
    out, trunk = [], (key, value)
    for part, q, k, v in zip(known, *pieces, strict=True):
        if not part.before:
            trunk = k, v
        else:
            k, v = (torch.cat([first[:, :, : part.before], own], 2) for first, own in zip(trunk, (k, v), strict=True))
        seen = band(q.shape[2], k.shape[2], sliding_window)
        out.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scaling
            )
        )
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


class Part(NamedTuple):
    """The tokens `start:end` of the row, which see each other and the first `before` tokens of their document: of the last part
    before them that begins one."""

    start: int
    end: int
    before: int


def parts(position_ids: Tensor) -> list[Part]:
    """Where positions do not go on by one a part begins: at 0 a document, at k a branch after the first k of its document.

    So two answers to a prompt are one row `prompt answer answer`, and the prompt is computed once. The list is kept with
    the tensor: every layer asks.
    """
    known: list[Part] | None = getattr(position_ids, "_raylign_parts", None)
    if known is None:
        row = position_ids[0]
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero().flatten() + 1).tolist(), len(row)]
        begins = row[starts[:-1]].tolist()
        known = [Part(*place, before) for place, before in zip(itertools.pairwise(starts), begins, strict=True)]
        position_ids._raylign_parts = known  # type: ignore[attr-defined]
    return known


@lru_cache(maxsize=64)  # of a micro-batch: every layer asks again
def band(tokens: int, seen: int, window: int | None) -> Tensor | None:
    """(tokens, seen): true where each of the last `tokens` of `seen` sees one before it or itself, at most the last `window`.

    None where that is plain causal attention.
    """
    import torch

    if tokens == seen and not (window and seen > window):
        return None
    apart = torch.arange(seen - tokens, seen)[:, None] - torch.arange(seen)
    return (apart >= 0) & (apart < (window or seen))


def use(model: Any) -> bool:
    """Switch a model that runs with sdpa to `attend`. False, and nothing is changed, where its layers do not hand on the
    positions of a row, or attend in another way."""
    from transformers import AttentionInterface

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if base.config._attn_implementation != "sdpa" or not _plain(base):
        return False
    AttentionInterface.register(NAME, attend)
    base.set_attn_implementation(NAME)
    return base.config._attn_implementation == NAME


def leave(model: Any) -> None:
    """Switch a model back to sdpa, for good."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("sdpa")


def _plain(model: Any) -> bool:
    """Whether every layer's attention is of the common kind: causal, through transformers' interface, with what else the
    layer was given (`position_ids` among it) passed on."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False  # chunked, linear, state-space
    attentions = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "o_proj")]
    if len(attentions) != config.num_hidden_layers:
        return False
    if not all(getattr(attention, "is_causal", True) for attention in attentions):
        return False
    kind = type(attentions[0])
    source = inspect.getsource(kind.forward)
    passes_on = "ALL_ATTENTION_FUNCTIONS" in source and "**kwargs" in source and "position_ids" not in source
    layers = next((m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")), None)
    return passes_on and layers is not None and "position_ids=position_ids" in inspect.getsource(type(layers).forward)


@contextmanager
def set_aside(model: Any) -> Iterator[None]:
    """For as long as the model is called with other batches than rows of documents: to generate, say."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    used = base.config._attn_implementation == NAME
    if used:
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if used:
            base.set_attn_implementation(NAME)
