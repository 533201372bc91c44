"""Rows to records: every format, and every reason for which a row is rejected."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from stages.data.records import (
    Conversation,
    Labelled,
    Preference,
    Prompt,
    Record,
    Rejected,
    Text,
    Tokens,
    detect_format,
    normalise,
    rename,
)
from stages.data.turns import Turn, check_filter, check_turns, keep, templated

USER, ANSWER, NO = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "No")))
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
CALL = {"name": "f", "arguments": {"x": 1}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "2"}
TOOLS = [{"name": "f", "parameters": {}}]
CHAT = "\n\nHuman: Hi\n\nAssistant: Hello"


@pytest.mark.parametrize(
    ("row", "format", "record"),
    [
        ({"messages": [USER, ANSWER]}, "messages", Conversation([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "expected": "x"}, "messages", Conversation([USER, ANSWER], expected="x")),
        ({"messages": [USER, ANSWER], "system": "Be kind."}, "messages", Conversation([SYSTEM, USER, ANSWER])),
        ({"messages": [USER, CALLING, RESULT, ANSWER], "tools": json.dumps(TOOLS)}, "messages", Conversation([USER, CALLING, RESULT, ANSWER], TOOLS)),
        ({"conversations": [HUMAN, GPT], "tools": "[]"}, "sharegpt", Conversation([USER, ANSWER])),
        ({"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "2"}, GPT], "system": "Be kind."}, "sharegpt", Conversation([SYSTEM, USER, CALLING, RESULT, ANSWER])),
        ({"conversations": [HUMAN, GPT | {"train": False, "weight": 0.5}]}, "sharegpt", Conversation([USER, ANSWER | {"train": False, "weight": 0.5}])),
        ({"instruction": "Hi", "input": " ", "output": "Hello"}, "alpaca", Conversation([USER, ANSWER])),
        ({"instruction": "a", "input": "b", "output": "c", "history": [["Hi", "Hello"]]}, "alpaca", Conversation([USER, ANSWER, {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}])),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", Conversation([USER, ANSWER], prompt_messages=1)),
        ({"prompt": [SYSTEM, USER], "completion": ANSWER}, "prompt_completion", Conversation([SYSTEM, USER, ANSWER], prompt_messages=2)),
        ({"prompt": "Hi", "completion": "Hello", "label": "spam"}, "prompt_completion", Conversation([USER, ANSWER], prompt_messages=1)),
        ({"text": "Once"}, "text", Text("Once")),
        ({"text": CHAT}, "transcript", Conversation([USER, ANSWER])),
        ({"transcript": CHAT}, "transcript", Conversation([USER, ANSWER])),
        ({"input_ids": [1, 2]}, "tokens", Tokens([1, 2])),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens", Tokens([1, 2], [-100, 2])),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "preference", Preference([USER], ANSWER, NO)),
        ({"chosen": [USER, ANSWER], "rejected": [USER, NO]}, "preference", Preference([USER], ANSWER, NO)),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, NO]}, "preference", Preference([USER], ANSWER, NO)),
        ({"chosen": CHAT, "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "preference", Preference([USER], ANSWER, NO)),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "No"}, "preference", Preference([USER], ANSWER, NO)),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No"}}, "preference", Preference([USER], ANSWER, NO)),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No", "margin": 2}, "preference", Preference([USER], ANSWER, NO, margin=2.0)),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No", "margin": None}, "preference", Preference([USER], ANSWER, NO)),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": [CALLING]}, "preference", Preference([USER], ANSWER, CALLING)),
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "kto", Labelled([USER], ANSWER, True)),
        ({"messages": [USER, ANSWER], "label": 0}, "kto", Labelled([USER], ANSWER, False)),
        ({"prompt": "Hi", "expected": "x", "level": 2}, "prompt", Prompt([USER], expected="x", extra={"level": 2})),
    ],
)  # fmt: skip
def test_formats_are_detected_and_normalised(row: dict[str, Any], format: str, record: Record) -> None:
    assert detect_format(row) == format
    assert normalise(row, format) == record


@pytest.mark.parametrize(
    ("message", "record"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, CALLING),
        ({"role": "assistant", "content": None, "function_call": CALL, "name": None}, CALLING),
        ({"role": "assistant", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]}, ANSWER),
        ({"role": "function", "content": "2"}, RESULT),
        ({"role": "tool", "content": "", "tool_call_id": "1"}, {"role": "tool", "content": "", "tool_call_id": "1"}),
        (ANSWER | {"reasoning": "Greet.", "tool_calls": [], "x": None}, ANSWER | {"reasoning": "Greet."}),
    ],
)
def test_messages_of_every_shape(message: dict[str, Any], record: dict[str, Any]) -> None:
    assert normalise({"messages": [USER, message, ANSWER]}, "messages") == Conversation([USER, record, ANSWER])


def test_a_conversation_may_be_a_prompt_where_that_is_said() -> None:
    assert normalise({"messages": [USER], "x": 1}, "prompt") == Prompt([USER], extra={"x": 1})


def test_unknown_columns_have_no_format() -> None:
    assert detect_format({"question": "a", "answer": "b"}) is None
    assert detect_format(rename({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}))


def test_rename_can_swap_columns_and_keeps_the_others() -> None:
    assert rename({"a": 1, "b": 2, "c": 3}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "c": 3}


def said(**options: Any) -> dict[str, Any]:
    return {"messages": [USER, ANSWER | options]}


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"messages": [USER]}, "messages", "no_assistant_turn"),
        ({"messages": []}, "messages", "empty_content"),
        ({"messages": "Hi"}, "messages", "wrong_type"),
        (said(content=" "), "messages", "empty_content"),
        (said(content=None), "messages", "empty_content"),
        ({"messages": [USER | {"content": ""}, ANSWER]}, "messages", "empty_content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "unknown_role"),
        (said(content=3), "messages", "wrong_type"),
        (said(content=[{"type": "image_url"}]), "messages", "unsupported_content"),
        (said(tool_calls=[{}]), "messages", "wrong_type"),
        (said(tool_calls=[{"name": "f", "arguments": {"x": ["\ud83d"]}}]), "messages", "invalid_unicode"),
        (said(content="\ud83d"), "messages", "invalid_unicode"),
        (said(train=1), "messages", "wrong_type"),
        (said(weight=True), "messages", "wrong_type"),
        (said(weight=-1), "messages", "out_of_range"),
        (said(weight=float("nan")), "messages", "out_of_range"),
        (said(weight=10**400), "messages", "out_of_range"),
        (said(reasoning=3), "messages", "wrong_type"),
        (said() | {"tools": "{"}, "messages", "malformed_json"),
        (said() | {"tools": {"name": "f"}}, "messages", "wrong_type"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be rude."}, "messages", "two_system_messages"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}]}, "sharegpt", "malformed_json"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "alpaca", "wrong_type"),
        ({"instruction": "a", "output": ""}, "alpaca", "empty_content"),
        ({"prompt": "Hi", "completion": None}, "prompt_completion", "missing_field"),
        ({"text": 3}, "text", "wrong_type"),
        ({"text": "Hi"}, "transcript", "not_a_transcript"),
        ({"input_ids": [1, True]}, "tokens", "wrong_type"),
        ({"input_ids": [-1]}, "tokens", "out_of_range"),
        ({"input_ids": [2**40]}, "tokens", "out_of_range"),
        ({"input_ids": [1, 2], "labels": [1]}, "tokens", "different_lengths"),
        ({"input_ids": [1], "labels": [-100]}, "tokens", "no_trained_token"),
        ({"input_ids": [1], "labels": [-1]}, "tokens", "out_of_range"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "preference", "equal_answers"),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "preference", "empty_answer"),
        ({"prompt": "Hi", "chosen": " \n", "rejected": "b"}, "preference", "empty_answer"),
        ({"prompt": "Hi", "chosen": [], "rejected": "b"}, "preference", "empty_answer"),
        ({"prompt": "Hi", "chosen": "<think>\n\n</think>\n\n", "rejected": "b"}, "preference", "empty_answer"),
        ({"prompt": "Hi", "chosen": "a", "rejected": {"from": "gpt", "value": ""}}, "preference", "empty_answer"),
        (
            {
                "prompt": "Hi",
                "chosen": "a",
                "rejected": {"role": "assistant", "content": [{"type": "text", "text": " "}]},
            },
            "preference",
            "empty_answer",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": None}]}, "preference", "empty_answer"),
        ({"chosen": [USER, ANSWER], "rejected": [USER | {"content": ""}, ANSWER]}, "preference", "empty_content"),
        ({"chosen": CHAT, "rejected": "\n\nHuman: Hi\n\nAssistant: "}, "preference", "empty_answer"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "preference", "empty_content"),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "preference", "missing_field"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "2"}, "preference", "wrong_type"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": True}, "preference", "wrong_type"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": -0.1}, "preference", "out_of_range"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("nan")}, "preference", "out_of_range"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("inf")}, "preference", "out_of_range"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 10**400}, "preference", "out_of_range"),
        ({"prompt": "Hi", "completion": "\t", "label": True}, "kto", "empty_answer"),
        ({"messages": [USER, ANSWER | {"content": ""}], "label": True}, "kto", "empty_answer"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "preference", "different_prompts"),
        ({"chosen": "a", "rejected": "b"}, "preference", "no_prompt"),
        ({"prompt": "Hi", "chosen": [ANSWER, USER], "rejected": "b"}, "preference", "not_one_answer"),
        ({"prompt": "Hi", "completion": "a", "label": "true"}, "kto", "wrong_type"),
        ({"messages": [ANSWER], "label": True}, "kto", "no_prompt"),
        ({"messages": [USER, ANSWER]}, "prompt", "ends_with_answer"),
    ],
)
def test_rejected_with_a_reason(row: dict[str, Any], format: str, reason: str) -> None:
    with pytest.raises(Rejected) as error:
        normalise(row, format)
    assert error.value.reason == reason
    assert pickle.loads(pickle.dumps(error.value)).detail == error.value.detail


TURNS = [
    Turn(role="system", content="{{ system or '' }}"),
    Turn(role="user", content="Q: {{ question }}\n"),
    Turn(role="assistant", content="{{ answer }}", weight=2),
]


def test_turn_templates_make_messages() -> None:
    row = {"system": None, "question": "{{ 1 }}", "answer": "b", "expected": "b"}
    turns = [{"role": "user", "content": "Q: {{ 1 }}\n"}, {"role": "assistant", "content": "b", "weight": 2.0}]
    assert templated(row, TURNS) == {"messages": turns, "expected": "b"}
    for bad in ({"answer": None}, {"question": None}):
        with pytest.raises(Rejected, match="missing_field"):
            templated(row | bad, TURNS)
    with pytest.raises(Rejected, match="missing_field"):
        templated({"system": "x"}, TURNS)
    with pytest.raises(Rejected, match="template_error"):
        templated({"x": "a"}, [Turn(role="user", content="{{ x.__class__.__mro__ }}{{ 1 / 0 }}")])


def test_filters() -> None:
    expression = "messages|length < 2 and lang == 'en'"
    assert keep({"messages": [1], "lang": "en"}, expression) and not keep(
        {"messages": [1, 2], "lang": "en"}, expression
    )
    with pytest.raises(Rejected, match="filter_error"):
        keep({"messages": [1]}, expression)


def test_templates_and_filters_are_checked_before_anything_starts() -> None:
    check_turns(TURNS)
    for wrong in (lambda: check_filter("a <"), lambda: Turn(role="user", content="{{ a")):
        with pytest.raises(ValueError, match="not Jinja"):
            wrong()
