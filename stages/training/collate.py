"""Prepared rows of conversations to padded tensors, packed or not. (Answers to prompts: answers.py.)"""

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
    flat: bool = False,
) -> Callable[[list[Row]], Batch]:
    """A function of rows that gives `input_ids` and `labels` (rows, longest), padded on the right, and

    - `attention_mask` for rows that are one document each, or, for packs, `position_ids` that begin anew with each
      document and no mask: from those transformers makes masks in which documents (and padding) do not see each other,
      but only where the model is called with `use_cache=False`, as trainers do;
    - `loss_weights` and `loss_share`: what stages/training/losses.py multiplies and divides by;
    - `tokens`: how many there are, padding not counted.

    `flat` lays all rows end to end in a single one, with `position_ids`: nothing is padded. It is for flash attention,
    which needs no mask for it; with another attention the mask of so long a row would cost more than the padding.
    """

    def collate(rows: list[Row]) -> Batch:
        import torch

        lines = [rows] if flat else [[row] for row in rows]  # the rows of each line of the batch
        sizes = [sum(len(row["input_ids"]) for row in line) for line in lines]
        longest = max(sizes)
        if pad_to_multiple_of:
            longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

        def padded(name: str, fill: float, dtype: Any) -> Any:
            out = np.full((len(lines), longest), fill, dtype)
            for values, line in zip(out, lines, strict=True):
                at = 0
                for row in line:
                    end = at + len(row["input_ids"])
                    values[at:end] = 1 if row[name] is None else row[name]
                    at = end
            return torch.from_numpy(out)

        batch = {"input_ids": padded("input_ids", pad_id, np.int64), "labels": padded("labels", IGNORE, np.int64)}
        documents = None
        if flat or "lengths" in rows[0]:
            lengths = [[n for row in line for n in row.get("lengths") or [len(row["input_ids"])]] for line in lines]
            batch["position_ids"] = torch.stack([positions(each, longest) for each in lengths])
            starts = batch["position_ids"].eq(0)
            batch["labels"][starts] = IGNORE  # what stands before is another document
            documents = starts.cumsum(1) - 1
        else:
            batch["attention_mask"] = torch.arange(longest).lt(torch.tensor(sizes)[:, None]).long()
        weights = padded("weights", 0, np.float32) if weighted else None
        batch["loss_weights"], batch["loss_share"] = loss_weights(batch["labels"], weights, documents, normalization)
        batch["tokens"] = sum(sizes)
        return batch

    return collate


def positions(lengths: Sequence[int], longest: int) -> Any:
    """(longest,): 0, 1, 2 ... for each document of a line, and for the padding as if it were one more."""
    import torch

    return torch.cat([torch.arange(n) for n in (*lengths, longest - sum(lengths))])
