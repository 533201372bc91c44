"""Prepared rows of conversations to padded tensors, packed or not. (Pairs are collated by TRL.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stages.data.chat import IGNORE

Row = dict[str, Any]
Batch = dict[str, Any]


def conversation_collator(
    pad_id: int, *, weighted: bool, pad_to_multiple_of: int | None = None
) -> Callable[[list[Row]], Batch]:
    """A function of rows that gives `input_ids` and `labels` (rows, longest), padded on the right, and

    - `attention_mask` for rows that are one document each, or, for packs, `position_ids` that begin anew with each
      document and no mask: from those transformers makes masks in which documents (and padding) do not see each other,
      but only where the model is called with `use_cache=False`, as trainers do;
    - `loss_weights` where the data is `weighted`.
    """

    def collate(rows: list[Row]) -> Batch:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        if pad_to_multiple_of:
            longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

        def padded(values: Sequence[Sequence[Any]], fill: Any) -> Any:
            return torch.tensor([[*value, *[fill] * (longest - len(value))] for value in values])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], pad_id),
            "labels": padded([row["labels"] for row in rows], IGNORE),
        }
        if "lengths" in rows[0]:
            batch["position_ids"] = torch.stack([positions(row["lengths"], longest) for row in rows])
        else:
            batch["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in rows], 0)
        if weighted:
            each = [row["weights"] or [1.0] * len(row["input_ids"]) for row in rows]
            batch["loss_weights"] = padded(each, 0.0)
        return batch

    return collate


def positions(lengths: Sequence[int], longest: int) -> Any:
    """(longest,): 0, 1, 2 ... for each document of a pack, and for the padding as if it were one more."""
    import torch

    return torch.cat([torch.arange(n) for n in (*lengths, longest - sum(lengths))])
