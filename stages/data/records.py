r"""Rows of every format become one of a few records; what does not fit is rejected with a reason.

`messages`: a conversation as chat templates take it. `tools` (here and below: a list, or JSON in a string) and `expected`, the
answer an evaluation compares greedy samples with, may stand beside every conversation; `system` is its first message.
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"messages": [..., {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "tools": [...]}
`sharegpt`: the same with other names.
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."}
    {"conversations": [..., {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"}, ...], "tools": "[...]"}
`alpaca`: an instruction, what it is about, and the answer; `history` holds earlier questions and answers.
    {"instruction": "Translate to German.", "input": "Good day", "output": "Guten Tag"}
    {"instruction": "And in French?", "output": "Bonjour", "history": [["Translate: Good day", "Guten Tag"]]}
`prompt_completion`: strings are one turn each.
    {"prompt": "2+2?", "completion": "4"}
    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
`text`: plain language modelling, every token is trained.
    {"text": "Once upon a time ..."}
    {"text": "def f(x): ...", "lang": "python"}
`transcript`: turns in one string, in `text` or `transcript`.
    {"text": "\n\nHuman: Hi\n\nAssistant: Hello"}
    {"transcript": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Bye"}
`tokens`: tokenised already; where a label is -100 the token is not trained.
    {"input_ids": [5, 6, 7]}
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
`preference`: two answers to one prompt. Without `prompt` both are whole conversations (or transcripts) that share it.
`margin` says how much better the chosen one is.
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.5}
    {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": {...}}
`kto`: an answer and whether it is good (true, false, 1, 0).
    {"prompt": "2+2?", "completion": "4", "label": true}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}], "label": false}
`prompt`: what samples are drawn for; the other columns go to reward functions.
    {"prompt": "2+2?", "expected": "4"}
    {"prompt": [{"role": "user", "content": "2+2?"}], "difficulty": 1}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stages.data.messages import (
    Message,
    Rejected,
    is_transcript,
    messages,
    parsed,
    says_nothing,
    text,
    transcript,
    turns,
    valid,
    wrong_type,
)

__all__ = [
    "FORMATS", "RECORD_OF", "Conversation", "Labelled", "Message", "Preference", "Prompt", "Record", "Rejected", "Text",
    "Tokens", "detect_format", "normalise", "rename",
]  # fmt: skip

UNTRAINED = -100  # a label, as torch's cross-entropy has it
MAX_TOKEN = 2**31 - 1  # prepared data holds int32 ...
MAX_MARGIN = 3e38  # ... and float32


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    expected: str | None = None
    prompt_messages: int = 0  # leading messages that came from the `prompt` of a prompt_completion row


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Tokens:
    input_ids: list[int]
    labels: list[int] | None = None


@dataclass(frozen=True)
class Preference:
    """`chosen` and `rejected` are one assistant message each; `prompt` is what stands before both.

    `margin`: how much better `chosen` is, 0 or more, in whatever unit the data has; None where it does not say.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Labelled:
    """One assistant message and whether it is wanted."""

    prompt: list[Message]
    completion: Message
    label: bool
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Prompt:
    """What samples are drawn for. `extra` holds the row's other columns."""

    prompt: list[Message]
    tools: list[dict[str, Any]] | None = None
    expected: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


Record = Conversation | Text | Tokens | Preference | Labelled | Prompt


def detect_format(row: dict[str, Any]) -> str | None:
    """The format of a row by its columns and what is in them, or None."""
    has = row.keys()
    chat = "messages" if "messages" in has else "sharegpt" if "conversations" in has else None
    answered = {"prompt", "completion"} <= has
    if {"chosen", "rejected"} <= has:
        return "preference"
    if (answered or chat) and _label(row.get("label")) is not None:
        return "kto"
    if chat:
        return chat
    if {"instruction", "output"} <= has:
        return "alpaca"
    if answered:
        return "prompt_completion"
    if isinstance(row.get("input_ids"), list):
        return "tokens"
    if is_transcript(row.get("transcript", row.get("text"))):
        return "transcript"
    return next((name for name in ("text", "prompt") if name in has), None)


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Apply `columns` (new name -> name in the file); the other columns keep their names."""
    if not columns:
        return row
    renamed = {new: row[old] for new, old in columns.items() if old in row}
    return {k: v for k, v in row.items() if k not in set(columns.values())} | renamed


def normalise(row: dict[str, Any], format: str) -> Record:
    """One row as a record of its format (one of `FORMATS`).

    Raises:
        Rejected: with the reason for the ledger, whatever is in the row.
    """
    return READERS[format](row)


# ---------------------------------------------------------------------------------------------- one reader per format


def _messages(row: dict[str, Any]) -> Conversation:
    return _conversation(messages(_need(row, "messages"), "messages"), row)


def _sharegpt(row: dict[str, Any]) -> Conversation:
    return _conversation(messages(_need(row, "conversations"), "conversations"), row)


def _alpaca(row: dict[str, Any]) -> Conversation:
    instruction, output = _need(row, "instruction"), _need(row, "output")
    parts = {"instruction": instruction, "input": row.get("input") or ""}
    for name, part in parts.items():
        if not isinstance(part, str):
            raise wrong_type(name, part, "a string")
    turns: list[Message] = []
    for i, (question, answer) in enumerate(_history(row.get("history"))):
        turns += _exchange(question, f"history[{i}][0]", answer, f"history[{i}][1]")
    question = "\n".join(part for part in parts.values() if part.strip())
    return _conversation([*turns, *_exchange(question, "instruction", output, "output")], row)


def _exchange(question: Any, where: str, answer: Any, where_answer: str) -> list[Message]:
    return [
        {"role": "user", "content": text(question, where)},
        {"role": "assistant", "content": text(answer, where_answer)},
    ]


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    prompt, completion = _need(row, "prompt"), _need(row, "completion")
    before = _with_system(turns(prompt, "user", "prompt"), row)
    return _checked([*before, *turns(completion, "assistant", "completion")], row, len(before))


def _text(row: dict[str, Any]) -> Text:
    return Text(text(_need(row, "text"), "text"))


def _transcript(row: dict[str, Any]) -> Conversation:
    column = "transcript" if row.get("transcript") is not None else "text"
    return _conversation(transcript(_need(row, column), column), row)


def _tokens(row: dict[str, Any]) -> Tokens:
    ids, labels = _need(row, "input_ids"), row.get("labels")
    _check_ids(ids, "input_ids", 0)
    if not ids:
        raise Rejected("empty_content", "input_ids")
    if labels is not None:
        _check_ids(labels, "labels", UNTRAINED)
        if len(labels) != len(ids):
            raise Rejected("different_lengths", f"{len(ids)} input_ids, {len(labels)} labels")
        if all(label == UNTRAINED for label in labels):
            raise Rejected("no_trained_token", f"{len(ids)} tokens")
        if bad := next((label for label in labels if UNTRAINED < label < 0), None):
            raise Rejected("out_of_range", f"labels holds {bad}; a label is a token or {UNTRAINED}")
    return Tokens(ids, labels)


def _preference(row: dict[str, Any]) -> Preference:
    answers = {name: _pair_side(_answer(row, name), "assistant", name) for name in ("chosen", "rejected")}
    column = next((name for name in ("prompt", "conversations", "messages") if row.get(name) is not None), None)
    prompt = _pair_side(row[column], "user", column) if column else answers["chosen"][:-1]
    whole = [answer[:-1] for answer in answers.values()]
    if column is None and whole[0] != whole[1]:
        raise Rejected("different_prompts", "chosen and rejected differ before their last message")
    if whole == [prompt, prompt]:  # also where a prompt is given and both answers repeat it
        answers = {name: answer[-1:] for name, answer in answers.items()}
    if not prompt:
        raise Rejected("no_prompt", "nothing stands before the answers")
    chosen, rejected = (_one_answer(answer, name) for name, answer in answers.items())
    if chosen == rejected:
        raise Rejected("equal_answers", str(chosen["content"])[:80])
    return Preference(_with_system(prompt, row), chosen, rejected, _tools(row), _margin(row))


def _kto(row: dict[str, Any]) -> Labelled:
    label = _label(_need(row, "label"))
    if label is None:
        raise wrong_type("label", row["label"], "true or false")
    if row.get("completion") is not None:
        prompt = turns(_need(row, "prompt"), "user", "prompt")
        answer = turns(_answer(row, "completion"), "assistant", "completion")
    else:
        column = next((name for name in ("messages", "conversations") if row.get(name) is not None), "completion")
        both = messages(_answer(row, column), column)
        prompt, answer = both[:-1], both[-1:]
    if not prompt:
        raise Rejected("no_prompt", "nothing stands before the answer")
    return Labelled(_with_system(prompt, row), _one_answer(answer, "completion"), label, _tools(row))


def _prompt(row: dict[str, Any]) -> Prompt:
    column = next((name for name in ("prompt", "messages", "conversations") if row.get(name) is not None), "prompt")
    prompt = _pair_side(_need(row, column), "user", column)
    if prompt[-1]["role"] == "assistant":
        raise Rejected("ends_with_answer", f"the last message of {column} is the assistant's: nothing is left to say")
    extra = {k: valid(v, str(k)) for k, v in row.items() if k not in (column, "tools", "expected", "system")}
    return Prompt(_with_system(prompt, row), _tools(row), _expected(row), valid(extra, "columns"))


READERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "transcript": _transcript,
    "tokens": _tokens,
    "preference": _preference,
    "kto": _kto,
    "prompt": _prompt,
}
FORMATS = tuple(READERS)
SPECIAL: dict[str, type] = {"text": Text, "tokens": Tokens, "preference": Preference, "kto": Labelled, "prompt": Prompt}
RECORD_OF: dict[str, type] = {format: SPECIAL.get(format, Conversation) for format in FORMATS}


# ---------------------------------------------------------------------------------------------- parts of rows


def _need(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise Rejected("missing_field", column)
    return row[column]


def _conversation(turns: list[Message], row: dict[str, Any]) -> Conversation:
    return _checked(_with_system(turns, row), row, 0)


def _checked(turns: list[Message], row: dict[str, Any], prompt_messages: int) -> Conversation:
    expected = _expected(row)
    if expected is None and not any(turn["role"] == "assistant" for turn in turns):
        raise Rejected("no_assistant_turn", f"roles: {', '.join(turn['role'] for turn in turns)}")
    return Conversation(turns, _tools(row), expected, prompt_messages)


def _with_system(turns: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages, after that of a `system` column."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return turns
    first = {"role": "system", "content": text(system, "system")}
    if turns[0]["role"] != "system":
        return [first, *turns]
    if turns[0]["content"] != first["content"]:
        raise Rejected("two_system_messages", "the column `system` and the first message differ")
    return turns


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    given = row.get("tools")
    if isinstance(given, str) and not given.strip():
        return None
    tools = parsed(given, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise wrong_type("tools", tools, "a list of objects")
    return valid(tools, "tools") or None


def _expected(row: dict[str, Any]) -> str | None:
    expected = row.get("expected")
    if expected is not None and not isinstance(expected, str):
        raise wrong_type("expected", expected, "a string")
    return valid(expected, "expected")


def _history(history: Any) -> list[Any]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise wrong_type("history", history, "a list of question and answer")
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong_type(f"history[{i}]", pair, "a question and its answer")
    return history


def _check_ids(value: Any, field: str, least: int) -> None:
    if not isinstance(value, list):
        raise wrong_type(field, value, "a list of integers")
    for i, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int):
            raise wrong_type(f"{field}[{i}]", token, "an integer")
        if not least <= token <= MAX_TOKEN:
            raise Rejected("out_of_range", f"{field}[{i}] is not between {least} and {MAX_TOKEN}")


def _pair_side(value: Any, role: str, field: str) -> list[Message]:
    """A side of a pair, or a prompt: as `turns`, and transcripts."""
    return transcript(value, field, open_end=role == "user") if is_transcript(value) else turns(value, role, field)


def _answer(row: dict[str, Any], column: str) -> Any:
    """A column that holds an answer, or a conversation that ends with it."""
    value = _need(row, column)
    if says_nothing(value, column):
        raise Rejected("empty_answer", f"{column} says nothing and calls no tool")
    return value


def _one_answer(answer: list[Message], name: str) -> Message:
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise Rejected("not_one_answer", f"{name} must be one assistant message after the prompt")
    return answer[0]


def _margin(row: dict[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise wrong_type("margin", margin, "a number")
    if not 0 <= margin <= MAX_MARGIN:  # also of nan
        raise Rejected("out_of_range", "margin must be a number, 0 or more")
    return float(margin)


def _label(value: Any) -> bool | None:
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None
