"""Files of held-out rows for the evaluation: those that `eval: 2%` of a data source keeps out of training, by their content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.starter.seen import Seen
from stages.data.chunks import BadRow
from stages.data.messages import Message
from stages.data.mixing import draw
from stages.data.records import Conversation, Labelled, Preference, Record, Rejected, Text, Tokens, normalise
from stages.data.source import find_files, read_file, shaped

MOST = 500  # rows: more make an evaluation longer, and hardly surer
SHORT = 60  # characters of answers for which it means something that a sample is the very same


def held_out(seen: Seen, share: str, seed: int) -> Iterator[Record]:
    """The first rows of a source that a spec with this share and seed holds out."""
    source = seen.source.model_validate(seen.source.model_dump() | {"eval": share})
    left = MOST
    for file in find_files(source):
        for _, row in read_file(file):
            if isinstance(row, BadRow):
                continue
            try:
                record = normalise(shaped(row, source), seen.format)
            except Rejected:
                continue
            if draw(record, source, seed)[1]:
                yield record
                left -= 1
                if not left:
                    return


def as_row(record: Record) -> dict[str, Any] | None:
    """A row that an evaluation reads; None of an answer that is not wanted."""
    match record:
        case Conversation():
            row: dict[str, Any] = {"messages": [_plain(m) for m in record.messages]}
            expected = record.expected or _short_answer(record.messages)
            row |= {"expected": expected} if expected else {}
        case Preference():
            row = {"prompt": record.prompt, "chosen": [record.chosen], "rejected": [record.rejected]}
        case Labelled():
            if not record.label:
                return None
            row = {"messages": [*record.prompt, record.completion]}
        case Text():
            return {"text": record.text}
        case Tokens():
            labels = {"labels": record.labels} if record.labels is not None else {}
            return {"input_ids": record.input_ids} | labels
        case _:
            return None
    return row | ({"tools": record.tools} if record.tools else {})


def _plain(message: Message) -> Message:
    """Without what says how it is trained: held-out answers are scored as they are."""
    return {k: v for k, v in message.items() if k not in ("train", "weight")}


def _short_answer(messages: list[Message]) -> str | None:
    last = messages[-1]
    short = last["role"] == "assistant" and 0 < len(last["content"]) <= SHORT and not last.get("tool_calls")
    return str(last["content"]) if short else None


def write(path: Path, records: list[Record]) -> int:
    """How many rows were written; no file where there are none."""
    rows = [row for row in map(as_row, records) if row is not None]
    if rows:
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)
