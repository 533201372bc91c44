"""Rows of every format become one of three records; what does not fit is rejected with a reason.

| format | a row |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}` |
| prompt_completion | `{"prompt": "2+2?", "completion": "4"}` (strings are one turn each; lists of messages also) |
| text | `{"text": "Once upon a time ..."}` (plain language modelling: every token is trained) |
| preference | `{"prompt": "2+2?", "chosen": "4", "rejected": "5"}` (strings or messages; without `prompt`, lists sharing it) |

A conversation may carry `expected`: the answer an evaluation compares greedy samples with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
NOT_YET = ("tool_calls", "function_call", "reasoning_content", "train", "weight")  # refused, never dropped unseen
FORMATS = ("messages", "prompt_completion", "text", "preference")
NEEDS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}


class Rejected(Exception):
    """The row cannot be used: a short stable reason, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    expected: str | None = None


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Preference:
    """`chosen` and `rejected` are one assistant message each; `prompt` is what stands before both."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


Record = Conversation | Text | Preference


def detect_format(columns: Iterable[str]) -> str | None:
    """The format that rows with these columns have, or None."""
    names = set(columns)
    for name in ("preference", "messages", "prompt_completion", "text"):
        if names.issuperset(NEEDS[name]):
            return name
    return None


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Apply `columns` (new name -> name in the file); the other columns keep their names."""
    if not columns:
        return row
    renamed = {new: row[old] for new, old in columns.items() if old in row}
    return {k: v for k, v in row.items() if k not in set(columns.values())} | renamed


def normalise(row: dict[str, Any], format: str) -> Record:
    """One row as a record.

    Raises:
        Rejected: with the reason for the ledger.
    """
    missing = [name for name in NEEDS[format] if row.get(name) is None]
    if missing:
        raise Rejected("missing_field", ", ".join(missing))
    if format == "text":
        return Text(_text(row["text"], "text"))
    if format == "messages":
        return _conversation(_messages(row["messages"], "messages"), row)
    if format == "prompt_completion":
        prompt = _turns(row["prompt"], "user", "prompt")
        return _conversation([*prompt, *_turns(row["completion"], "assistant", "completion")], row)
    return _preference(row)


def _preference(row: dict[str, Any]) -> Preference:
    chosen = _turns(row["chosen"], "assistant", "chosen")
    rejected = _turns(row["rejected"], "assistant", "rejected")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "user", "prompt")
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise Rejected("different_prompts", "chosen and rejected differ before their last message")
        chosen, rejected = chosen[-1:], rejected[-1:]
    if not prompt:
        raise Rejected("no_prompt", "nothing stands before the answers")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise Rejected("not_one_answer", f"{name} must be one assistant message after the prompt")
        if not str(answer[0].get("content") or "").strip():
            raise Rejected("empty_answer", name)
    if chosen == rejected:
        raise Rejected("equal_answers", str(chosen[0]["content"])[:80])
    return Preference(prompt, chosen[0], rejected[0])


def _conversation(messages: list[Message], row: dict[str, Any]) -> Conversation:
    expected = row.get("expected")
    if expected is not None and not isinstance(expected, str):
        raise Rejected("wrong_type", f"expected is a {type(expected).__name__}, not a string")
    _unicode(expected or "", "expected")
    if expected is None and not any(m["role"] == "assistant" for m in messages):
        raise Rejected("no_assistant_turn", f"roles: {', '.join(m['role'] for m in messages)}")
    return Conversation(messages, expected)


def _turns(value: Any, role: str, field: str) -> list[Message]:
    """A string is one message of `role`; a message or a list of them is taken as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, field)}]
    return _messages([value] if isinstance(value, dict) else value, field)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Rejected("wrong_type", f"{field} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise Rejected("empty_content", field)
    return _unicode(value, field)


def _unicode(value: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of an emoji, or bytes of another encoding
        raise Rejected("invalid_unicode", f"{field}: {error.reason}") from None
    return value


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"{field} is a {type(value).__name__}, not a list of messages")
    if not value:
        raise Rejected("empty_content", f"{field} has no messages")
    out = []
    for i, message in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise Rejected("wrong_type", f"{where} is a {type(message).__name__}, not a message")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise Rejected("unknown_role", f"{where} has role {role!r}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise Rejected("wrong_type", f"{where}.content is a {type(content).__name__}, not a string")
        if role == "assistant" and not content.strip():
            raise Rejected("empty_content", where)
        _unicode(content, where)
        unsupported = [key for key in NOT_YET if message.get(key) is not None]
        if unsupported:
            raise Rejected("unsupported_field", f"{where}.{unsupported[0]} cannot be rendered and masked yet")
        out.append(message)
    return out
