"""What is in the data a spec is to be written for: its format, its rows, how long they are, and what would be left out."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.inspection.looking import percentiles
from pipeline.starter.columns import Reading, read_columns
from pipeline.starter.unread import check_name, check_text
from stages.data import files
from stages.data.chunks import BadRow
from stages.data.encode import Recipe, Task, encode_rows, encoder_for
from stages.data.messages import valid
from stages.data.mixing import hash_of
from stages.data.records import Conversation, Labelled, Preference, Record, Rejected, Text, Tokens, normalise
from stages.data.source import DataFile, DataSource, count_rows, find_files, read_file, shaped
from stages.errors import DataError

SAMPLE = 2000  # rows of a source that are looked at
LOOKED_AT = 100  # of these for what the columns mean
COUNTED = 256 << 20  # bytes of files whose rows are counted; of larger ones they are estimated
SECONDS = 20.0  # for which rows are encoded to learn their lengths
CHARACTERS = 4  # of a token, about, where there is no tokenizer
TASK: dict[type, Task] = {Preference: "preference", Labelled: "labelled"}

Numbered = tuple[DataFile, int, dict[str, Any] | BadRow]


@dataclass(frozen=True)
class Seen:
    """One `--data` or `--preference`."""

    given: str  # as it was given
    source: DataSource  # as it is read: absolute path, columns
    reading: Reading
    files: list[DataFile]
    names: list[str]  # of the columns
    rows: int | None  # in all files; None where they would have to be downloaded
    exact: bool  # whether that was counted
    sample: list[Numbered]
    records: list[Record]  # those rows of the sample that are
    broken: Counter[str]  # the others, by reason
    example: dict[str, str]  # reason -> where, and what was seen

    @property
    def format(self) -> str:
        return self.reading.format

    @property
    def task(self) -> Task:
        kinds = {TASK.get(type(record), "conversation") for record in self.records}
        return "preference" if "preference" in kinds else "labelled" if "labelled" in kinds else "conversation"

    @property
    def whole(self) -> bool:
        """Whether the sample is all there is."""
        return self.rows is not None and self.exact and len(self.sample) >= self.rows


@dataclass(frozen=True)
class Looked:
    """The first rows behind a path, before it is known what they are."""

    given: str
    source: DataSource
    files: list[DataFile]
    sample: list[Numbered]
    rows: list[dict[str, Any]]  # some of the sample, for what the columns mean
    names: list[str]  # of their columns


def see(given: Sequence[str], columns: Mapping[str, str]) -> list[Seen]:
    """Look at the data behind each path.

    Args:
        columns: a file's own name -> what the column is; of each file that has it.

    Raises:
        DataError: nothing there, no format, or no row that can be used.
    """
    looked = [_look(each) for each in given]
    if absent := [name for name in columns if not any(name in each.names for each in looked)]:
        there = "; ".join(f"{', '.join(each.names)} ({each.given})" for each in looked)
        raise DataError(f"--columns names {', '.join(absent)}, but rows have {there}")
    return [_seen(each, columns) for each in looked]


def _look(given: str) -> Looked:
    check_name(given)
    source = DataSource(path=given if "://" in given else os.path.abspath(os.path.expanduser(given)))
    found = find_files(source)
    each = max(1, SAMPLE // len(found))
    check_text(given, found[:SAMPLE])
    sample = [(file, number, row) for file in found[:SAMPLE] for number, row in islice(read_file(file), each)]
    good = [row for _, _, row in sample if isinstance(row, dict)][:LOOKED_AT]
    if not good:
        raise DataError(_nothing(given, sample))
    names = list(dict.fromkeys(name for row in good for name in row))
    try:
        valid(names, "the name of a column")
    except Rejected as error:
        raise DataError(f"{given}: {error}; a spec cannot name it") from error
    return Looked(given, source, found, sample, good, names)


def _seen(looked: Looked, columns: Mapping[str, str]) -> Seen:
    given, found, sample = looked.given, looked.files, looked.sample
    named: dict[str, str] = {}  # as `columns` of a source has it, new name first
    for old in (old for old in columns if old in looked.names):
        if (other := named.setdefault(columns[old], old)) != old:
            raise DataError(f"{given}: it has both {other} and {old}, and --columns makes each the {columns[old]}")
    reading = read_columns(given, looked.rows, named)
    told = {"messages": reading.messages} if reading.messages else {"format": reading.format}
    source = DataSource.model_validate({"path": looked.source.path, "columns": reading.columns, **told})
    records, broken, example = records_of(sample, source, reading.format)
    if not records:
        reason = broken.most_common(1)[0][0]
        raise DataError(
            f"{given}: none of the {len(sample):,} rows that were looked at can be used as {reading.format}: {reason}, for "
            f"example {example[reason]}\n  name the columns with --columns NEW=OLD (README, `Data`), or mend the file"
        )
    counted = sum(file.kind != "hf" and files.size(file) for file in found) <= COUNTED
    rows = count_rows(source) if counted else _about(found, sample)
    return Seen(given, source, reading, found, looked.names, rows, counted, sample, records, broken, example)


def records_of(
    sample: Sequence[Numbered], source: DataSource, format: str
) -> tuple[list[Record], Counter[str], dict[str, str]]:
    records: list[Record] = []
    broken: Counter[str] = Counter()
    example: dict[str, str] = {}
    for file, number, row in sample:
        try:
            if isinstance(row, BadRow):
                raise Rejected(row.reason, row.detail)
            records.append(normalise(shaped(row, source), format))
        except Rejected as error:
            broken[error.reason] += 1
            example.setdefault(error.reason, f"{Path(file.path).name}, row {number}: {error.detail}")
    return records, broken, example


def _about(found: Sequence[DataFile], sample: Sequence[Numbered]) -> int | None:
    """Rows of files that are too large to count, by the characters of those that were read."""
    parquet = [file for file in found if file.kind == "parquet"]
    if len(parquet) == len(found):
        return count_rows(DataSource(path=found[0].path)) if len(found) == 1 else None
    read = sum(len(str(row)) for _, _, row in sample)
    packed = 4 if any(file.gzipped for file in found) else 1
    return round(packed * sum(map(files.size, found)) / max(1, read / len(sample)))


def _nothing(given: str, sample: Sequence[Numbered]) -> str:
    bad = next((row for _, _, row in sample if isinstance(row, BadRow)), None)
    if bad is None:
        return f"{given}: there are no rows in it"
    hint = "; is it UTF-8, and what its name says?" if bad.reason.startswith("malformed") else ""
    return f"{given}: no row can be read: {bad.reason}: {bad.detail}{hint}"


# ------------------------------------------------------------------------------------------------ in tokens


@dataclass(frozen=True)
class Measured:
    """Rows of one task as a tokenizer makes them, or by their characters where there is none (`exact` false)."""

    lengths: list[int] = field(default_factory=list)  # tokens of what `max_length` bounds
    answers: list[int] = field(default_factory=list)  # trained tokens
    lost: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    read: int = 0
    exact: bool = True

    @property
    def quantiles(self) -> dict[str, int]:
        return percentiles(self.lengths)

    @property
    def share_lost(self) -> float:
        return sum(self.lost.values()) / self.read if self.read else 0.0

    def longer(self, length: int) -> int:
        return sum(n > length for n in self.lengths)


def measure(seen: Seen, recipe: Recipe) -> Measured:
    """The sample as a model will see it, nothing cut."""
    recipe = replace(recipe, max_length=None, task=seen.task)
    encoder, begun = encoder_for(recipe), time.monotonic()
    out = Measured()
    lengths, answers, read = [], [], 0
    by_file: dict[str, list[tuple[int, Any]]] = {}
    for file, number, row in seen.sample:
        by_file.setdefault(file.path, []).append((number, row))
    for name, rows in by_file.items():
        outcomes = encode_rows(
            iter(rows), file=name, format=seen.format, source=seen.source, recipe=recipe, encoder=encoder
        )
        for outcome in outcomes:
            read += 1
            out.warnings.update(outcome.warnings)
            if outcome.entry is not None:
                out.lost[outcome.entry.reason] += 1
                where = f"{Path(name).name}, row {outcome.row}: {outcome.entry.detail}"
                out.example.setdefault(outcome.entry.reason, where)
            for row in outcome.examples:
                lengths.append(_bounded(row))
                answers.append(_trained(row))
        if time.monotonic() - begun > SECONDS:
            break
    return replace(out, lengths=lengths, answers=answers, read=read)


def _bounded(row: Mapping[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row[side]) for side in _SIDES if side in row)


def _trained(row: Mapping[str, Any]) -> int:
    if "labels" in row:
        return sum(label != -100 for label in row["labels"])
    return max(len(row[side]) for side in _SIDES if side in row)


_SIDES = ("chosen_ids", "rejected_ids", "completion_ids")


def measure_roughly(seen: Seen) -> Measured:
    """As `measure`, where there is no tokenizer: of the characters."""
    lengths, answers = [], []
    for record in seen.records:
        match record:
            case Conversation():
                whole = [str(m["content"]) for m in record.messages]
                said = [str(m["content"]) for m in record.messages if m["role"] == "assistant"]
            case Preference():
                both = [str(record.chosen["content"]), str(record.rejected["content"])]
                said = [max(both, key=len)]
                whole = [*(str(m["content"]) for m in record.prompt), *said]
            case Labelled():
                said = [str(record.completion["content"])]
                whole = [*(str(m["content"]) for m in record.prompt), *said]
            case Text():
                whole = said = [record.text]
            case Tokens():
                lengths.append(len(record.input_ids))
                answers.append(len(record.input_ids))
                continue
            case _:
                continue
        lengths.append(sum(map(len, whole)) // CHARACTERS + 8 * len(whole))  # eight tokens of the template round each
        answers.append(sum(map(len, said)) // CHARACTERS + 1)
    return Measured(lengths, answers, seen.broken, seen.example, Counter(), len(seen.sample), exact=False)


# ------------------------------------------------------------------------------------------------ in words


def duplicates(seen: Seen) -> int:
    """Rows of the sample that stand in it already."""
    hashes = Counter(map(hash_of, seen.records))
    return sum(count - 1 for count in hashes.values())


def turns_of(seen: Seen) -> tuple[Counter[int], int, int]:
    """(number of assistant turns -> conversations, those with a system message, those with tools)."""
    turns: Counter[int] = Counter()
    system = tools = 0
    for record in seen.records:
        if isinstance(record, Conversation):
            messages = record.messages
            turns[sum(m["role"] == "assistant" for m in messages)] += 1
        elif isinstance(record, Preference | Labelled):
            messages = record.prompt
        else:
            continue
        system += any(m["role"] in ("system", "developer") for m in messages)
        tools += bool(record.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    return turns, system, tools
