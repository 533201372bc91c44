"""A conversation in the other shapes that chat templates know: arguments as text or as a dict, contents as parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress

from stages.data.records import Message


def shapes(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation as it is given, then in other shapes that mean the same."""
    yield list(messages)
    seen = [list(messages)]

    def fresh(candidate: list[Message]) -> bool:
        if candidate in seen:
            return False
        seen.append(candidate)
        return True

    parts = [[{"type": "text", "text": m["content"]}] if isinstance(m.get("content"), str) else None for m in messages]
    if any(m.get("tool_calls") for m in messages):
        for as_text in (False, True):
            for flat in (False, True):
                for content in ("", None):
                    candidate = [_with_calls(m, as_text, flat, content) for m in _with_ids(messages)]
                    if fresh(candidate):
                        yield candidate
    candidate = [m if part is None else {**m, "content": part} for m, part in zip(messages, parts, strict=True)]
    if fresh(candidate):
        yield candidate


def _with_calls(message: Message, as_text: bool, flat: bool, content: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or call)
        arguments = function.get("arguments", {})
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            with suppress(ValueError):  # not JSON: then text is the only shape it has
                arguments = json.loads(arguments)
        body = {"name": function.get("name"), "arguments": arguments}
        identity = {"id": call["id"]} if "id" in call else {}
        calls.append({**identity, "type": "function", **(body if flat else {"function": body})})
    return {**message, "tool_calls": calls, "content": message.get("content") or content}


def _with_ids(messages: Sequence[Message]) -> list[Message]:
    """Calls and results numbered where they have no id: some templates insist on nine letters or digits."""
    out: list[Message] = []
    made, waiting = 0, []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                made += 1
                calls.append({**call, "id": call.get("id") or f"call{made:05}"})
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and not message.get("tool_call_id") and waiting:
            message = {**message, "tool_call_id": waiting.pop(0)}
        out.append(message)
    return out
