"""Prepared rows of conversations to padded tensors, packed or not. (Pairs are collated by TRL.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.data.chat import IGNORE
from stages.training.losses import Normalization, loss_weights

Row = dict[str, Any]
Batch = dict[str, Any]


def conversation_collator(
    pad_id: int,
    *,
    weighted: bool = False,
    normalization: Normalization = "token",
    pad_to_multiple_of: int | None = None,
) -> Callable[[list[Row]], Batch]:
    """A function of rows that gives `input_ids` and `labels` (rows, longest), padded on the right, and

    - `attention_mask` for rows that are one document each, or, for packs, `position_ids` that begin anew with each
      document and no mask: from those transformers makes masks in which documents (and padding) do not see each other,
      but only where the model is called with `use_cache=False`, as trainers do;
    - `loss_weights` and `loss_share`: what stages/training/losses.py multiplies and divides by;
    - `tokens`: how many there are, padding not counted.
    """

    def collate(rows: list[Row]) -> Batch:
        import torch

        sizes = [len(row["input_ids"]) for row in rows]
        longest = max(sizes)
        if pad_to_multiple_of:
            longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

        def padded(values: Sequence[Any], fill: float, dtype: Any) -> Any:
            out = np.full((len(rows), longest), fill, dtype)
            for line, value, size in zip(out, values, sizes, strict=True):
                line[:size] = 1 if value is None else value
            return torch.from_numpy(out)

        labels = padded([row["labels"] for row in rows], IGNORE, np.int64)
        batch = {"input_ids": padded([row["input_ids"] for row in rows], pad_id, np.int64), "labels": labels}
        documents = None
        if "lengths" in rows[0]:
            batch["position_ids"] = torch.stack([positions(row["lengths"], longest) for row in rows])
            documents = batch["position_ids"].eq(0).cumsum(1) - 1
        else:
            batch["attention_mask"] = padded([1] * len(rows), 0, np.int64)
        weights = padded([row["weights"] for row in rows], 0, np.float32) if weighted else None
        batch["loss_weights"], batch["loss_share"] = loss_weights(labels, weights, documents, normalization)
        batch["tokens"] = sum(sizes)
        return batch

    return collate


def positions(lengths: Sequence[int], longest: int) -> Any:
    """(longest,): 0, 1, 2 ... for each document of a pack, and for the padding as if it were one more."""
    import torch

    return torch.cat([torch.arange(n) for n in (*lengths, longest - sum(lengths))])
