"""Cut rows: never without a trained token, never a lost stop token unsaid."""

from __future__ import annotations

from typing import Any

import pytest

from stages.data.chat import IGNORE
from stages.data.spans import Refused
from stages.data.truncate import cut_both_answers, cut_to

ROW = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [IGNORE, IGNORE, 3, 4, IGNORE, IGNORE, 7, 8], "weights": None}


@pytest.mark.parametrize("how", ["refuse", "drop"])
def test_rows_are_left_out_whole(how: Any) -> None:
    assert cut_to(ROW, 7, how, None) == Refused("too_long", "8 tokens, max_length is 7")


@pytest.mark.parametrize(
    ("how", "length", "bos", "ids", "note"),
    [
        ("right", 5, None, [1, 2, 3, 4, 5], "truncated"),
        ("right", 3, None, [1, 2, 3], "stop_token_cut"),
        ("left", 3, None, [6, 7, 8], "truncated"),
        ("left", 3, 1, [1, 7, 8], "truncated"),
        ("left", 3, 2, [6, 7, 8], "truncated"),
    ],
)
def test_rows_are_cut(how: Any, length: int, bos: int | None, ids: list[int], note: str) -> None:
    row = ROW | {"weights": [float(i) for i in ROW["input_ids"]]}  # type: ignore[union-attr]
    kept, said = cut_to(row, length, how, bos)  # type: ignore[misc]
    assert kept["input_ids"] == ids and said == note
    assert kept["weights"] == [float(i) for i in ids]
    assert all(label in (IGNORE, i) for label, i in zip(kept["labels"], ids, strict=True))
    assert len(kept["labels"]) == len(ids)


def test_a_row_with_nothing_left_to_train_is_refused() -> None:
    refused = cut_to(ROW, 2, "right", None)
    assert isinstance(refused, Refused) and refused.reason == "nothing_trained_when_cut"


def test_pairs_are_cut_on_both_sides_alike() -> None:
    pair = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6], "rejected_ids": [5, 7, 8]}
    assert cut_both_answers(pair, 7, "drop", None) == (pair, "")
    assert cut_both_answers(pair, 6, "left", None) == (pair | {"prompt_ids": [2, 3, 4]}, "truncated")
    assert cut_both_answers(pair, 6, "left", 1) == (pair | {"prompt_ids": [1, 3, 4]}, "truncated")
    assert cut_both_answers(pair, 6, "right", None) == (pair | {"rejected_ids": [5, 7]}, "stop_token_cut")
    same = cut_both_answers(pair, 5, "right", None)
    assert isinstance(same, Refused) and same.reason == "equal_answers" and same.detail.startswith("once cut")


@pytest.mark.parametrize(
    ("how", "length", "reason"),
    [
        ("drop", 6, "too_long"),
        ("refuse", 5, "too_long"),
        ("drop", 4, "prompt_too_long"),  # no room for an answer
        ("refuse", 3, "prompt_too_long"),
        ("right", 4, "prompt_too_long"),
        ("left", 3, "too_long"),  # the prompt may be cut, but the answer leaves nothing of it
    ],
)
def test_a_prompt_that_leaves_no_room_is_told_from_a_long_answer(how: Any, length: int, reason: str) -> None:
    refused = cut_both_answers({"prompt_ids": [1, 2, 3, 4], "completion_ids": [5, 6, 7]}, length, how, None)
    assert isinstance(refused, Refused) and refused.reason == reason
    assert refused.detail.startswith("4 tokens" if reason == "prompt_too_long" else "7 tokens")
    assert refused.detail.endswith(f"max_length is {length}")
