"""What the columns of a table mean: which format its rows have, or would have with other names for their columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
CONTEXT = ("input", "context", "passage", "background")  # what a question is about
SUBJECT = ("document", "article", "source", "text")  # asked by itself; beside a question mostly where it came from
SYSTEM = ("system", "systemprompt", "systemmessage", "sys")
CHOSEN = ("chosen", "preferred", "accepted", "better", "winner", "responsechosen", "chosenresponse", "positive", "win")
REJECTED = (
    "rejected", "dispreferred", "notpreferred", "worse", "loser", "responserejected", "rejectedresponse", "negative",
    "lose",
)  # fmt: skip
LABEL = ("label", "thumbsup", "thumbs", "liked", "like", "isgood", "good", "desirable", "wanted", "kto", "ktotag")
TRUTHS = ("true", "false", "0", "1", "-1", "yes", "no", "good", "bad", "up", "down")
# Formats that a row has whatever its other columns are called; `text` and `prompt` are guesses.
SURE = ("messages", "sharegpt", "alpaca", "prompt_completion", "tokens", "transcript", "preference", "kto")


@dataclass(frozen=True)
class Reading:
    """How rows are to be read. `columns` and `messages` as a data source has them; `notes`: what else is to be known."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, str]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Some rows of a file, with its columns named as the user said; what is said of them has the file's own names."""

    where: str  # for messages
    rows: Sequence[Mapping[str, Any]]
    names: list[str]
    given: Mapping[str, str]  # new name -> the file's own

    def own(self, name: str) -> str:
        return self.given.get(name, name)

    def listed(self, names: Sequence[str]) -> str:
        return ", ".join(map(self.own, names))

    def option(self, **columns: str) -> str:
        return " ".join(f"--columns {new}={shlex.quote(self.own(name))}" for new, name in columns.items())

    def find(self, known: tuple[str, ...], among: Sequence[str]) -> str | None:
        """The column that has one of the known names, of which the first is its own.

        Raises:
            DataError: there are several.
        """
        found = [name for name in among if _bare(name) in known]
        if len(found) > 1:
            exact = [name for name in found if _bare(name) == known[0]]
            if len(exact) == 1:
                return exact[0]
            raise DataError(
                f"{self.where}: {' and '.join(map(self.own, found))} could {'both' if len(found) == 2 else 'all'} be the "
                f"{known[0]}; say which: {self.option(**{known[0]: found[0]})}"
            )
        return found[0] if found else None

    def system(self, columns: Mapping[str, str]) -> dict[str, str]:
        found = self.find(SYSTEM, [n for n in self.names if n not in columns.values()])
        return {"system": found} if found else {}


def read_columns(where: str, rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> Reading:
    """How the rows of a file are to be read, from a few of them.

    Args:
        where: the file, for messages.
        given: what the user said of the columns, new name first.

    Raises:
        DataError: they are of no format, or it could be one of several.
    """
    rows = [rename(dict(row), dict(given)) for row in rows]
    table = Table(where, rows, list(dict.fromkeys(name for row in rows for name in row)), given)
    reading = _numbers(table, _not_used(table, _labelled(table, _formatted(table))))
    columns = {new: table.own(name) for new, name in reading.columns.items()}
    columns |= {new: old for new, old in given.items() if new not in reading.columns.values()}
    return replace(reading, columns=_whole(columns))


def _formatted(table: Table) -> Reading:
    # what most rows are: one odd row first does not decide
    formats = [detect_format(dict(row)) for row in table.rows]
    format = max(dict.fromkeys(formats), key=formats.count)
    chosen, rejected = table.find(CHOSEN, table.names), table.find(REJECTED, table.names)
    said = bool(table.given) and format in SURE and format != "preference"  # more than what names let guess
    if chosen and rejected and not said:
        return _pairs(table, chosen, rejected)
    if format in SURE:
        return Reading(str(format), table.system({}))
    return _answers(table, format)


def _answers(table: Table, format: str | None) -> Reading:
    """Of tables whose columns have names of their own."""
    if chat := _chat_column(table):
        return Reading(*chat)
    answered = table.find(ANSWERED, table.names)
    others = [n for n in table.names if n != answered]
    asked = table.find(ASKED, [n for n in others if _bare(n) != "input"]) or table.find(("input",), others)
    context: str | None = None
    notes: tuple[str, ...] = ()
    if asked is not None:
        context = next((n for known in CONTEXT for n in others if _bare(n) == known and n != asked), None)
    elif answered is not None and (asked := table.find(("prompt", *CONTEXT, *SUBJECT), others)):
        notes = (f"{table.own(asked)} is taken as what is asked and {table.own(answered)} as the answer",)
    if asked is None or answered is None:
        return _plain(table, format, asked or answered)
    columns = {"prompt": asked, "completion": answered}
    if context is not None:
        columns = {"instruction": asked, "input": context, "output": answered}
    columns |= table.system(columns)
    return Reading("alpaca" if context else "prompt_completion", columns, None, notes)


def _pairs(table: Table, chosen: str, rejected: str) -> Reading:
    columns = {"chosen": chosen, "rejected": rejected}
    first = table.rows[0].get(chosen)
    whole = not isinstance(first, str) or first.startswith("\n\nHuman:")
    if not {"prompt", "messages", "conversations"} & set(table.names) and not whole:
        asked = table.find(ASKED, [n for n in table.names if n not in columns.values()])
        if asked is None:
            raise DataError(
                f"{table.where}: pairs of {table.listed([chosen, rejected])}, and no column with what was asked among "
                f"{table.listed(table.names)}; say which: --columns prompt=COLUMN"
            )
        columns["prompt"] = asked
    return Reading("preference", columns | table.system(columns))


def _plain(table: Table, format: str | None, known: str | None) -> Reading:
    """Plain text, prompts, or nothing that is known."""
    texts = [n for n in table.names if all(isinstance(row.get(n), str) for row in table.rows)]
    if format == "text" and known is None:
        others = [n for n in texts if n != "text"]
        if not others:
            return Reading("text")
        answers = table.option(prompt="text", completion=others[0])
        note = f"trained as plain text; not used: {table.listed(others)}. For answers: {answers}"
        return Reading("text", {}, None, (note,))
    others = [n for n in texts if n != known]
    if known is None and len(table.names) == 1 and texts:
        return Reading("text", {"text": texts[0]}, None, (f"{table.own(texts[0])} is trained as plain text",))
    if format == "prompt" and not others:
        return Reading("prompt")
    listed = table.listed(table.names)
    if len(others) >= (1 if known else 2):
        asked, answered = (known, others[0]) if known and _bare(known) in ASKED else (others[0], known or others[1])
        raise DataError(
            f"{table.where}: the columns are {listed}, and it cannot be told which is asked and which the answer; say which "
            f"with --columns, new name first: {table.option(prompt=asked, completion=answered)}"
        )
    raise DataError(
        f"{table.where}: the columns are {listed}, which is no known format; wanted are for example prompt and completion, "
        "messages, or text (README, `Data`); rename columns with --columns NEW=OLD"
    )


def _chat_column(table: Table) -> tuple[str, dict[str, str]] | None:
    """A column that holds lists of turns, whatever its name."""
    for name in table.names:
        value = next((row[name] for row in table.rows if row.get(name)), None)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if {"role", "content"} <= value[0].keys():
                return "messages", {"messages": name}
            if {"from", "value"} <= value[0].keys():
                return "sharegpt", {"conversations": name}
    return None


# ------------------------------------------------------------------------------------------------ what else they hold


def _labelled(table: Table, reading: Reading) -> Reading:
    """For a KTO stage where a column says which answers are wanted: SFT would learn all of them alike.

    Raises:
        DataError: it says so in another way than `kto` reads, or beside what `kto` has no place for.
    """
    label = _label(table, reading)
    if label is None:
        return reading
    columns = reading.columns
    if reading.format == "alpaca" and not {"input", "history"} & {*table.names, *columns}:
        columns = {"prompt": "instruction", "completion": "output"} | columns
    elif reading.format not in ("prompt_completion", "messages", "sharegpt"):
        raise DataError(
            f"{table.where}: the column {table.own(label)} says whether an answer is wanted, and a KTO stage reads that beside "
            f"a prompt and its completion, or messages; with columns as these are ({reading.format}) wanted and unwanted "
            f"answers would be trained alike. Make one column of all that is asked, or {_otherwise(table, label)}"
        )
    return Reading("kto", columns | {"label": label}, None, reading.notes)


def _label(table: Table, reading: Reading) -> str | None:
    """The column that says which answers are wanted.

    Raises:
        DataError: not as `kto` reads it; a table of text cannot say it otherwise.
    """
    if reading.format in ("kto", "preference", "prompt"):
        return None
    for name in table.names:
        values = [row[name] for row in table.rows if row.get(name) is not None]
        a_class = _bare(name) == "label" and reading.format in ("text", "tokens")
        told = all(str(v).strip().lower().removesuffix(".0") in TRUTHS for v in values)
        if _bare(name) not in LABEL or name in reading.columns.values() or a_class or not values or not told:
            continue
        if all(isinstance(v, bool | int) and v in (0, 1) for v in values):
            return name
        shown = ", ".join(list(dict.fromkeys(map(str, values)))[:3])
        kind = "text" if any(isinstance(v, str) for v in values) else "numbers"
        raise DataError(
            f"{table.where}: the column {table.own(name)} seems to say whether an answer is wanted, but as {kind} "
            f"({shown}), and wanted and unwanted answers would be trained alike; store it as true and false, in JSON Lines or "
            f"Parquet, for a KTO stage, or {_otherwise(table, name)}"
        )
    return None


def _otherwise(table: Table, label: str) -> str:
    return f"leave the unwanted answers and the column out of the file; if it says something else: {table.option(other=label)}"


def _not_used(table: Table, reading: Reading) -> Reading:
    """With a note on a column that may belong to the question."""
    columns = reading.columns
    if reading.format not in ("prompt_completion", "alpaca", "kto"):
        return reading
    used = {*columns.values()} | ({"input"} if reading.format == "alpaca" else set())
    left = [n for n in table.names if _bare(n) in CONTEXT + SUBJECT and n not in used]
    if not left:
        return reading
    note = f"not used: {table.listed(left)}"
    if reading.format == "prompt_completion":
        asked, answered = columns.get("prompt", "prompt"), columns.get("completion", "completion")
        note += f"; where the question is about it: {table.option(instruction=asked, input=left[0], output=answered)}"
    return replace(reading, notes=(*reading.notes, note))


def _numbers(table: Table, reading: Reading) -> Reading:
    """Numbers that are asked or answered become text, by templates over the renamed columns."""
    columns, parts = reading.columns, TEMPLATES.get(reading.format, {})
    values = [row.get(columns.get(n, n)) for row in table.rows for n in parts]
    plain = all(isinstance(v, str | int | float | None) for v in values) and "history" not in table.names
    if not plain or not any(isinstance(v, int | float) for v in values):
        return reading
    asked, answered = "".join([*parts.values()][:-1]), [*parts.values()][-1]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    if "system" in columns:
        turns = [{"role": "system", "content": "{{ system | default('', true) }}"}, *turns]
    return Reading("messages", columns, turns, (*reading.notes, "numbers are written out as text"))


TEMPLATES = {  # format -> column -> its text; the last is the answer
    "prompt_completion": {"prompt": "{{ prompt }}", "completion": "{{ completion }}"},
    "alpaca": {
        "instruction": "{{ instruction }}",
        "input": "{% if input | default('') %}\n{{ input }}{% endif %}",
        "output": "{{ output }}",
    },
}


def _whole(columns: Mapping[str, str]) -> dict[str, str]:
    """`columns` without those that have the name already."""
    return {new: old for new, old in columns.items() if new != old}


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).lower()
