"""Rows to records: every format, and every reason for which a row is rejected."""

from __future__ import annotations

from typing import Any

import pytest

from stages.data.records import Conversation, Preference, Rejected, Text, detect_format, normalise, rename

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion"),
        ({"text": "Once"}, "text"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "preference"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No"}]}, "preference"),
    ],
)
def test_formats_are_detected_and_normalised(row: dict[str, Any], format: str) -> None:
    assert detect_format(row) == format
    record = normalise(row, format)
    if isinstance(record, Text):
        assert record.text == "Once"
    elif isinstance(record, Conversation):
        assert record.messages == [USER, ANSWER]
    else:
        assert record == Preference([USER], ANSWER, {"role": "assistant", "content": "No"})


def test_unknown_columns_have_no_format() -> None:
    assert detect_format(["question", "answer"]) is None
    assert (
        detect_format(rename({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}))
        is not None
    )


def test_rename_can_swap_columns_and_keeps_the_others() -> None:
    assert rename({"a": 1, "b": 2, "c": 3}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "c": 3}


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"messages": [USER]}, "messages", "no_assistant_turn"),
        ({"messages": []}, "messages", "empty_content"),
        ({"messages": "Hi"}, "messages", "wrong_type"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages", "empty_content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown_role"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "messages", "wrong_type"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "messages", "unsupported_field"),
        ({"prompt": "Hi", "completion": None}, "prompt_completion", "missing_field"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "preference", "equal_answers"),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "preference", "empty_content"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "preference", "different_prompts"),
        ({"prompt": "Hi", "chosen": [ANSWER, USER], "rejected": "b"}, "preference", "not_one_answer"),
        ({"text": 3}, "text", "wrong_type"),
    ],
)
def test_rejected_with_a_reason(row: dict[str, Any], format: str, reason: str) -> None:
    with pytest.raises(Rejected) as error:
        normalise(row, format)
    assert error.value.reason == reason
