"""What the columns of a table mean: which format its rows have, or would have with other names for their columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.records import detect_format, rename
from stages.errors import DataError

# What a column is -> names it goes by, written small and without spaces, `_` and `-`.
ASKED = (
    "prompt", "question", "query", "instruction", "input", "user", "human", "problem", "request", "ask", "usermessage",
    "questiontext",
)  # fmt: skip
ANSWERED = (
    "completion", "answer", "response", "output", "reply", "assistant", "target", "solution", "summary", "translation",
    "bot", "gpt", "assistantmessage", "answertext", "expectedoutput",
)  # fmt: skip
CONTEXT = ("context", "passage", "document", "article", "background", "input", "source")
SYSTEM = ("systemprompt", "systemmessage", "sys")
CHOSEN = ("chosen", "preferred", "accepted", "better", "winner", "responsechosen", "chosenresponse", "positive", "win")
REJECTED = (
    "rejected", "dispreferred", "notpreferred", "worse", "loser", "responserejected", "rejectedresponse", "negative",
    "lose",
)  # fmt: skip
LABEL = ("label", "thumbsup", "thumbs", "liked", "like", "isgood", "good", "desirable", "wanted", "kto", "ktotag")
TRUTHS = ("true", "false", "0", "1", "yes", "no", "good", "bad", "up", "down")
# Formats that a row has whatever its other columns are called; `text` and `prompt` are guesses.
SURE = ("messages", "sharegpt", "alpaca", "prompt_completion", "tokens", "transcript", "preference", "kto")
HOW = "say which with --columns, new name first: --columns prompt={0} --columns completion={1}"


@dataclass(frozen=True)
class Reading:
    """How rows are to be read. `columns` and `messages` as a data source has them; `notes`: what else is to be known."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, str]] | None = None
    notes: tuple[str, ...] = ()


def read_columns(where: str, rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> Reading:
    """How the rows of a file are to be read, from a few of them.

    Args:
        where: the file, for messages.
        given: what the user said of the columns, new name first.

    Raises:
        DataError: they are of no format, or it could be one of several.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    if given:
        return _as_given(where, rows, names, given)
    _one_column(where, names)
    # what most rows are: one odd row first does not decide
    formats = [detect_format(dict(row)) for row in rows]
    format = max(dict.fromkeys(formats), key=formats.count)
    chosen, rejected = _find(where, names, CHOSEN), _find(where, names, REJECTED)
    if chosen and rejected:
        return _pairs(where, rows, names, chosen, rejected)
    if format == "prompt_completion" and (truth := _in_words(rows, "label")):
        raise DataError(_label_says(where, "label", truth))
    if format in SURE:
        system = _system(where, names, {})
        return Reading(str(format), _whole(names, system) if system else {})
    return _answers(where, rows, names, format)


def _answers(where: str, rows: Sequence[Mapping[str, Any]], names: list[str], format: str | None) -> Reading:
    """Of tables whose columns have names of their own."""
    if chat := _chat_column(rows, names):
        return Reading(*chat)
    answered = _find(where, names, ANSWERED)
    context = next((n for n in names if _bare(n) in CONTEXT and n != answered), None)
    asked = _find(where, [n for n in names if n not in (answered, context)], ASKED)
    if asked is None and context is not None and _bare(context) in ASKED:  # `input` alone is a question
        asked, context = context, None
    notes: tuple[str, ...] = ()
    if asked is None and answered is not None:
        asked = context or next((n for n in names if _bare(n) == "text"), None)
        context = None
        if asked is not None:
            notes = (f"{asked} is taken as what is asked and {answered} as the answer",)
    if asked is None or answered is None:
        return _plain(where, rows, names, format, asked or answered)
    columns = (
        {"instruction": asked, "input": context, "output": answered}
        if context is not None
        else {"prompt": asked, "completion": answered}
    )
    columns |= _system(where, names, columns)
    label = next((n for n in names if _bare(n) in LABEL and n not in columns.values()), None)
    if label is not None and context is None:
        values = [row[label] for row in rows if row.get(label) is not None]
        if values and all(isinstance(v, bool | int) and v in (0, 1) for v in values):
            return Reading("kto", _whole(names, columns | {"label": label}))
        if truth := _in_words(rows, label):
            raise DataError(_label_says(where, label, truth))
    if any(isinstance(row.get(n), int | float) for row in rows for n in (asked, answered)):  # numbers become text
        content = "{{ %s }}" % asked if context is None else "{{ %s }}\n{{ %s }}" % (asked, context)  # noqa: UP031
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "{{ %s }}" % answered}]  # noqa: UP031
        return Reading("messages", {}, turns, (*notes, "numbers are written out as text"))
    return Reading("alpaca" if context else "prompt_completion", _whole(names, columns), None, notes)


def _as_given(where: str, rows: Sequence[Mapping[str, Any]], names: list[str], given: Mapping[str, str]) -> Reading:
    absent = [old for old in given.values() if old not in names]
    if absent:
        raise DataError(f"{where}: --columns names {', '.join(absent)}, but rows have {', '.join(names)}")
    formats = [detect_format(rename(dict(row), dict(given))) for row in rows]
    format = max(dict.fromkeys(formats), key=formats.count)
    if format is None:
        renamed = ", ".join(rename(dict.fromkeys(names), dict(given)))
        raise DataError(f"{where}: with --columns the rows have {renamed}, which is no known format; {_formats()}")
    return Reading(format, dict(given))


def _pairs(where: str, rows: Sequence[Mapping[str, Any]], names: list[str], chosen: str, rejected: str) -> Reading:
    columns = {"chosen": chosen, "rejected": rejected}
    whole = not isinstance(rows[0].get(chosen), str) or str(rows[0][chosen]).startswith("\n\nHuman:")
    if not {"prompt", "messages", "conversations"} & set(names) and not whole:
        asked = _find(where, [n for n in names if n not in columns.values()], ASKED)
        if asked is None:
            raise DataError(
                f"{where}: pairs of {chosen} and {rejected}, and no column with what was asked among "
                f"{', '.join(names)}; say which: --columns prompt=COLUMN --columns chosen={chosen} "
                f"--columns rejected={rejected}"
            )
        columns["prompt"] = asked
    return Reading("preference", _whole(names, columns | _system(where, names, columns)))


def _plain(
    where: str, rows: Sequence[Mapping[str, Any]], names: list[str], format: str | None, known: str | None
) -> Reading:
    """Plain text, prompts, or nothing that is known."""
    texts = [n for n in names if all(isinstance(row.get(n), str) for row in rows)]
    if format == "text" and known is None:
        others = [n for n in texts if n != "text"]
        note = f"trained as plain text; not used: {', '.join(others)}. For answers: --columns prompt=text "
        return Reading("text", {}, None, (note + f"--columns completion={others[0]}",) if others else ())
    others = [n for n in texts if n != known]
    if known is None and len(names) == 1 and texts:
        return Reading("text", _whole(names, {"text": texts[0]}), None, (f"{texts[0]} is trained as plain text",))
    if format == "prompt" and not others:
        return Reading("prompt")
    listed = ", ".join(names)
    if len(others) >= (1 if known else 2):
        asked, answered = (known, others[0]) if known and _bare(known) in ASKED else (others[0], known or others[1])
        raise DataError(
            f"{where}: the columns are {listed}, and it cannot be told which is asked and which the answer; "
            + HOW.format(shlex.quote(asked), shlex.quote(answered))
        )
    raise DataError(f"{where}: the columns are {listed}, which is no known format; {_formats()}")


def _formats() -> str:
    return (
        "wanted are for example prompt and completion, messages, or text (README, `Data`); "
        "rename columns with --columns NEW=OLD"
    )


def _one_column(where: str, names: list[str]) -> None:
    """A table whose separator is none that is read."""
    for mark, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and mark in names[0] and "," not in names[0]:
            raise DataError(
                f"{where}: its columns are separated by {called}, commas are read; write it again with\n"
                f'  python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={mark!r}))" '
                f"< {shlex.quote(where)} > commas.csv"
            )


def _in_words(rows: Sequence[Mapping[str, Any]], label: str) -> list[str]:
    """What a column says where that is true or false in words: a table of text cannot say it otherwise."""
    values = [row.get(label) for row in rows if row.get(label) is not None]
    told = all(isinstance(v, str) and v.strip().lower() in TRUTHS for v in values)
    return list(dict.fromkeys(map(str, values))) if told else []


def _label_says(where: str, label: str, values: list[str]) -> str:
    return (
        f"{where}: the column {label} seems to say whether an answer is wanted, but as text ({', '.join(values[:3])}), and "
        "wanted and unwanted answers would be trained alike; store it as true and false, in JSON Lines or Parquet, for a "
        "KTO stage, or leave the unwanted answers and the column out of the file"
    )


def _chat_column(rows: Sequence[Mapping[str, Any]], names: list[str]) -> tuple[str, dict[str, str]] | None:
    """A column that holds lists of turns, whatever its name."""
    for name in names:
        value = next((row[name] for row in rows if row.get(name)), None)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if {"role", "content"} <= value[0].keys():
                return "messages", _whole(names, {"messages": name})
            if {"from", "value"} <= value[0].keys():
                return "sharegpt", _whole(names, {"conversations": name})
    return None


def _system(where: str, names: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    found = None if "system" in names else _find(where, [n for n in names if n not in columns.values()], SYSTEM)
    return {"system": found} if found else {}


def _whole(names: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """`columns` without those that have the name already."""
    return {new: old for new, old in columns.items() if new != old}


def _find(where: str, names: Sequence[str], known: tuple[str, ...]) -> str | None:
    """The column that has one of the known names.

    Raises:
        DataError: there are several.
    """
    found = [name for name in names if _bare(name) in known]
    if len(found) > 1:
        exact = [name for name in found if _bare(name) == known[0]]
        if len(exact) == 1:
            return exact[0]
        raise DataError(
            f"{where}: {' and '.join(found)} could both be the {known[0]}; say which, and name the other columns "
            f"the same way: --columns {known[0]}={shlex.quote(found[0])}"
        )
    return found[0] if found else None


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).lower()
