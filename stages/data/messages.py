"""Messages as chat templates take them, from any of the shapes that data has them in.

A turn is OpenAI's `{"role", "content", ...}` or ShareGPT's `{"from", "value", ...}`. Every function here raises `Rejected`,
and nothing else, whatever it is given.
"""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MAX_DEPTH = 64  # of nesting in a tool call, far below what json, pickle and templates recurse to
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
THINK = re.compile(r"</?(?:think|thinking|thought|reasoning)>")


class Rejected(Exception):
    """The row cannot be used: a short stable reason, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = detail if len(detail) <= 200 else detail[:199] + "…"
        detail = detail.encode(errors="backslashreplace").decode()  # a ledger is UTF-8
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[Rejected], tuple[str, str]]:
        return Rejected, (self.reason, self.detail)


def wrong_type(field: str, value: Any, wanted: str) -> Rejected:
    return Rejected("wrong_type", f"{field} is {seen(value)}, not {wanted}")


def seen(value: Any) -> str:
    """A value in a few words; never its whole text, which may be huge or too deep to print."""
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return repr(value) if isinstance(value, bool | float | None) else f"a {type(value).__name__}"


def valid(value: Any, field: str) -> Any:
    """The value itself, if every string in it is Unicode and it is not nested without end."""
    todo = [(value, 0)]
    while todo:
        node, depth = todo.pop()
        if isinstance(node, str):
            if not node.isascii():
                _encodable(node, field)
        elif isinstance(node, dict | list | tuple):
            if depth == MAX_DEPTH:
                raise Rejected("too_deep", f"{field} is nested more than {MAX_DEPTH} deep")
            todo += [(child, depth + 1) for child in node]  # of a dict: its keys
            if isinstance(node, dict):
                todo += [(child, depth + 1) for child in node.values()]
    return value


def _encodable(value: str, field: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of an emoji, or bytes of another encoding
        raise Rejected("invalid_unicode", f"{field}: {error.reason} at character {error.start}") from None


def text(value: Any, field: str) -> str:
    """A string that is not blank."""
    if not isinstance(value, str):
        raise wrong_type(field, value, "a string")
    if not value.strip():
        raise Rejected("empty_content", field)
    return str(valid(value, field))


def parsed(value: Any, field: str) -> Any:
    """The value of a column that may hold JSON as a string (Parquet and CSV cannot hold every shape otherwise)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Rejected("malformed_json", f"{field}: {error}") from None


def turns(value: Any, role: str, field: str) -> list[Message]:
    """A string is one message of `role`; a message or a list of them is taken as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": text(value, field)}]
    return messages([value] if isinstance(value, dict) else value, field)


def messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise wrong_type(field, value, "a list of messages")
    if not value:
        raise Rejected("empty_content", f"{field} has no messages")
    return [message(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def message(turn: Any, where: str) -> Message:
    """One turn with the role's usual name, content as a string and tool calls in OpenAI's shape.

    Keys that are None are as good as absent: Parquet gives every struct of a list the same fields.
    """
    if not isinstance(turn, dict):
        raise wrong_type(where, turn, "a message")
    out = {key: value for key, value in turn.items() if value is not None}
    given = out.pop("from", None) if "role" not in out else out["role"]
    if not isinstance(given, str) or given not in ROLE_OF:
        raise Rejected("unknown_role", f"{where} has the role {seen(given)}; known: {', '.join(ROLE_OF)}")
    content = out.pop("value", None) if "content" not in out else out["content"]
    calls = _calls(out, where)
    if given == "function_call":
        calls, content = _tool_calls(parsed(content, where), where), None
    if calls:
        out["tool_calls"] = calls
    out = {**out, "role": ROLE_OF[given], "content": _content(content, ROLE_OF[given], calls, where)}
    _check_options(out, where)
    return out


def _content(content: Any, role: str, calls: list[Any], where: str) -> str:
    content = _joined(content, where)
    if content is None:
        if not calls:
            raise Rejected("empty_content", f"{where} has no content")
        return ""
    if not isinstance(content, str):
        raise wrong_type(f"{where}.content", content, "a string")
    if not content.strip() and (role == "user" or (role == "assistant" and not calls)):
        raise Rejected("empty_content", where)
    return str(valid(content, where))


def _joined(content: Any, where: str) -> Any:
    """A content that is given in parts as one text; any other as it is."""
    if not isinstance(content, list):
        return content
    return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        shown = f"of the type {seen(kind)}" if isinstance(part, dict) else seen(part)
        raise Rejected("unsupported_content", f"{where} is {shown}; only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise wrong_type(f"{where}.text", part.get("text"), "a string")
    return str(part["text"])


def _calls(out: Message, where: str) -> list[Message]:
    """What a message calls: `tool_calls`, or the older `function_call`. Takes both out of the message."""
    calls, old = out.pop("tool_calls", []), out.pop("function_call", None)
    if not isinstance(calls, list):
        raise wrong_type(f"{where}.tool_calls", calls, "a list")
    return _tool_calls(calls or ([] if old is None else [old]), where)


def _tool_calls(value: Any, where: str) -> list[Message]:
    """`[{"type": "function", "function": {"name", "arguments"}, ...}]`; arguments stay as they are given."""
    out = []
    for i, call in enumerate(value if isinstance(value, list) else [value]):
        field = f"{where}.tool_calls[{i}]"
        if not isinstance(call, dict):
            raise wrong_type(field, call, "a tool call")
        nested = call.get("function") is not None
        function = call["function"] if nested else call
        if not isinstance(function, dict):
            raise wrong_type(f"{field}.function", function, "an object")
        if not isinstance(function.get("name"), str):
            raise wrong_type(f"{field}.name", function.get("name"), "a string")
        if not isinstance(function.get("arguments"), dict | str):
            raise wrong_type(f"{field}.arguments", function.get("arguments"), "an object or a string")
        rest = {key: v for key, v in call.items() if v is not None and key not in ("function", "name", "arguments")}
        called = {key: v for key, v in function.items() if nested or key in ("name", "arguments")}
        out.append(valid({"type": "function", **rest, "function": called}, field))
    return out


LEAST_WEIGHT = 1e-6  # of a turn's loss: what float32 sums bear


def _check_options(out: Message, where: str) -> None:
    """The keys with a meaning have the right type; others are kept for the template, if they are sound."""
    for key, value in out.items():
        field = f"{where}.{key}" if isinstance(key, str) else where
        if key in STRINGS and not isinstance(value, str):
            raise wrong_type(field, value, "a string")
        if key == "train" and not isinstance(value, bool):
            raise wrong_type(field, value, "true or false")
        if key == "weight":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise wrong_type(field, value, "a number")
            if value != 0 and not LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT:  # also of nan
                raise Rejected("out_of_range", f"{field} must be 0, or between 1e-6 and 1e6")
        if key not in ("role", "content", "tool_calls"):  # those have been looked at
            valid(key, field)
            valid(value, field)


def transcript(value: Any, field: str, *, open_end: bool = False) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH), without the spaces round them.

    Args:
        open_end: the text is a prompt, which may end with "\\n\\nAssistant:".
    """
    before, *parts = SPEAKER.split(text(value, field))
    if before.strip() or not parts:
        raise Rejected("not_a_transcript", f"{field} does not start with Human:")
    spoken = list(zip(parts[::2], parts[1::2], strict=True))
    if open_end and spoken[-1][0] == "Assistant" and not spoken[-1][1].strip():
        spoken = spoken[:-1]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": text(said.strip(), f"{field}, turn {i}")}
        for i, (speaker, said) in enumerate(spoken)
    ]


def says_nothing(answer: Any, field: str) -> bool:
    """Whether an answer is blank and calls no tool: a text, a message, or the last of several or of a transcript.

    Empty tags of reasoning say nothing either.
    """
    if isinstance(answer, list):
        if not answer:
            return True
        answer, field = answer[-1], f"{field}[{len(answer) - 1}]"
    elif is_transcript(answer):
        answer = SPEAKER.split(answer)[-1]
    if isinstance(answer, dict):
        if answer.get("tool_calls") or answer.get("function_call"):
            return False
        content = answer.get("value") if answer.get("content") is None else answer["content"]
        answer = "" if content is None else _joined(content, field)
    return isinstance(answer, str) and not THINK.sub("", answer).strip()


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")
