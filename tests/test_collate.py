"""Packing does not change what is learned: the same loss and the same gradient as one document a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.data.chat import IGNORE
from stages.data.packing import best_fit, pack_table
from stages.training.collate import conversation_collator, positions

Rows = list[dict[str, Any]]


def documents(count: int, weighted: bool = False) -> Rows:
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        ids = rng.integers(3, 300, rng.integers(2, 40)).tolist()
        trained = rng.random(len(ids)) < 0.6
        labels = [i if keep else IGNORE for i, keep in zip(ids, trained, strict=True)]
        weights = rng.random(len(ids)).astype(np.float32).tolist() if weighted and n % 2 else None
        rows.append({"input_ids": ids, "labels": labels, "weights": weights, "source": "a", "row": n})
    return rows


def packed(rows: Rows, capacity: int) -> Rows:
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
                        ("weights", pa.list_(pa.float32())), ("source", pa.string()), ("row", pa.int64())])  # fmt: skip
    return pack_table(pa.Table.from_pylist(rows, schema=schema), capacity, seed=0).to_pylist()


def loss_and_gradient(model: Any, rows: Rows, weighted: bool) -> tuple[float, torch.Tensor]:
    """Sum over trained tokens of (weighted) negative log-likelihood, in one batch of these rows."""
    model.zero_grad()
    batch = conversation_collator(0, weighted=weighted)(rows)
    labels, weights = batch["labels"], batch["loss_weights"]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none")
    loss = (nll * weights[:, 1:].flatten()).sum() if weighted else nll.sum()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_and_unpacked_have_the_same_loss_and_gradient(model: str, attention: str, weighted: bool) -> None:
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).train()
    rows = documents(23, weighted)
    packs = packed(rows, 96)
    assert len(packs) < 10 and sum(len(p["lengths"]) for p in packs) == 23
    one, gradient = loss_and_gradient(llm, rows, weighted)
    other, same = loss_and_gradient(llm, packs, weighted)
    assert other == pytest.approx(one, rel=1e-5)
    assert float((same - gradient).norm() / gradient.norm()) < 1e-5
    apart = [loss_and_gradient(llm, [pack], weighted)[0] for pack in packs]  # nor does it matter what shares a batch
    assert sum(apart) == pytest.approx(one, rel=1e-5)


def test_positions_begin_anew_with_each_document_and_the_padding() -> None:
    assert positions([3, 2], 8).tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_batches_are_padded_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "weights": None},
        {"input_ids": [8], "labels": [8], "weights": [0.5]},
    ]
    batch = conversation_collator(9, weighted=True, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE], [8, IGNORE, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]  # before a first token stands nothing
    assert (batch["loss_share"], batch["tokens"]) == (2, 4)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_best_fit_places_every_document_once(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert len(packs) <= -(-11 * -(-sum(lengths) // capacity) // 9) + 4  # Johnson's bound for best-fit decreasing


def test_a_document_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 tokens does not fit into 6"):
        best_fit([3, 7], 6)
