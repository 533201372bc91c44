"""Files to chunks, chunks to rows that know their row number. A chunk is what one Ray task reads, in constant memory.

A row that cannot be read is yielded as a `BadRow` with its number, never skipped; nothing that is in a file raises.

| kind | chunk (`start:end`) | row number |
|---|---|---|
| jsonl | bytes, at the ends of lines | line of the file |
| csv | bytes, at the ends of records | record after the header |
| parquet | row groups | row of the file |
| json | the whole file | place in the list |
| hf | the whole shard | row of the shard |

Bytes of gzipped files are those of the decompressed stream, which a task has to decompress up to its start. So they are cut
into few chunks; very large data is better split into several files, or stored as Parquet.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data import hub
from stages.data.files import BROKEN, BUFFER, DataFile, open_file, open_stream, short, size

CHUNK_BYTES = 4 << 20
GZIP_CHUNKS = 16  # a gzipped file gets no more chunks than this ...
GZIP_MERGE = 16  # ... unless they would be larger than this many times CHUNK_BYTES
BATCH_ROWS = 512  # rows of Parquet decoded at once
BOM = codecs.BOM_UTF8
WHITE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
ANY_SIZE = json.JSONDecoder(parse_int=len)  # to find the end of a row with an integer that Python will not convert
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """What one task reads; by default the whole file. `end` is None where it goes to the end, `first_row` is 1-based."""

    source: int
    file: DataFile
    start: int = 0
    end: int | None = None
    first_row: int = 1
    header: tuple[str, ...] | None = None  # of a CSV file, for chunks that do not begin with it


Row = dict[str, Any] | BadRow
Rows = Iterator[tuple[int, Row]]


def read_chunk(chunk: Chunk) -> Rows:
    """(row number, row) for every row of a chunk; the numbers rise.

    Raises:
        DataError: the file is gone, or an object store or hub cannot be reached.
    """
    file = chunk.file
    if file.kind == "parquet":
        yield from _parquet_rows(chunk)
    elif file.kind == "hf":
        yield from _hub_rows(file)
    else:
        with open_stream(file, chunk.start) as data:
            if file.kind == "jsonl":
                yield from _json_lines(data, chunk)
            elif file.kind == "csv":
                yield from _csv_rows(data, chunk)
            else:
                yield from _json_rows(data)


def read_file(file: DataFile) -> Rows:
    """Every row of a file, as one stream."""
    return read_chunk(Chunk(0, file))


def chunks(source: int, file: DataFile) -> list[Chunk]:
    """Cut a file into what one task reads. A damaged file is cut up to the damage, which is told when it is read."""
    whole = Chunk(source, file)
    if file.kind == "parquet":
        return _row_groups(whole)
    if file.kind in ("json", "hf") or size(file) <= CHUNK_BYTES:
        return [whole]
    cuts = _cuts(whole)
    if file.gzipped:
        merge = min(GZIP_MERGE, -(-len(cuts) // GZIP_CHUNKS))
        cuts = [
            replace(part[0], end=part[-1].end) for part in (cuts[i : i + merge] for i in range(0, len(cuts), merge))
        ]
    return cuts


def _cuts(whole: Chunk) -> list[Chunk]:
    """Chunks of about CHUNK_BYTES: one pass over the lines of a file, or the records of a CSV file."""
    out = [whole]
    with open_stream(whole.file) as data:
        header, ends = _csv_ends(data) if whole.file.kind == "csv" else (None, _line_ends(data))
        try:
            for row, end in ends:
                if end - out[-1].start >= CHUNK_BYTES:
                    out[-1] = replace(out[-1], end=end)
                    out.append(replace(whole, start=end, first_row=row + 1, header=header))
        except BROKEN:
            return out  # the last chunk goes to the end, and meets the damage there
    if len(out) > 1 and out[-1].start == end:
        out.pop()
    return out


# ---------------------------------------------------------------------------------------------- JSON Lines


def _line_ends(data: BinaryIO) -> Iterator[tuple[int, int]]:
    end = 0
    for row, line in enumerate(data, 1):
        end += len(line)
        yield row, end


def _json_lines(data: BinaryIO, chunk: Chunk) -> Rows:
    number, at, end = chunk.first_row, chunk.start, chunk.end
    try:
        for line in data:
            at += len(line)
            if not line.isspace():  # a blank line is not a row
                yield number, _json_line(line, first=number == 1)
            number += 1
            if end is not None and at >= end:
                return
    except BROKEN as error:
        yield number, BadRow("truncated_file", short(error))


def _json_line(line: bytes, first: bool) -> Row:
    try:
        return _object(json.loads(line.removeprefix(BOM).decode() if first else line.decode()))
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", short(error))


def _object(row: Any) -> Row:
    return row if isinstance(row, dict) else BadRow("not_an_object", f"a {type(row).__name__}")


# ---------------------------------------------------------------------------------------------- JSON


def _json_rows(data: BinaryIO) -> Rows:
    """The objects of a list, or objects one after another, decoded as they come."""
    number = 1
    try:
        for value in _json_values(data):
            yield number, value if isinstance(value, BadRow) else _object(value)
            number += 1
    except BROKEN as error:
        yield number, BadRow("truncated_file", short(error))
    except (ValueError, RecursionError) as error:  # where the next row starts cannot be known
        yield number, BadRow("malformed_json", f"{short(error)}; nothing after it can be read")


def _json_values(data: BinaryIO) -> Iterator[Any]:
    window = _Window(data)
    first = window.skip()
    if first == "":
        raise ValueError("there is nothing in it")
    if first != "[":
        while window.skip():
            yield window.value()
        return
    separator = first
    while separator != "]":
        window.at += 1
        if separator == "," or window.skip() != "]":
            yield window.value()
        separator = window.skip()
        if separator not in (",", "]"):
            raise ValueError(f"a comma is wanted after the row, not {separator or 'the end of the file'!r}")
    window.at += 1
    if window.skip():
        raise ValueError("something stands after the list")


class _Window:
    """The part of a JSON text that is being decoded."""

    def __init__(self, data: BinaryIO) -> None:
        self.data, self.text, self.at, self.ended = data, "", 0, False
        head = data.read1(BUFFER)  # type: ignore[attr-defined]
        encoding = json.detect_encoding(head)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"  # a bad byte rejects its row alone
        self.decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)(errors)
        self._add(head)

    def _add(self, block: bytes) -> None:
        self.ended = not block
        self.text, self.at = self.text[self.at :] + self.decoder.decode(block, final=self.ended), 0

    def more(self) -> bool:
        """Read as much again as there is, so that a row of any length is decoded a few times at most."""
        wanted = len(self.text) - self.at
        while not self.ended:
            self._add(self.data.read1(BUFFER))  # type: ignore[attr-defined]
            if len(self.text) > 2 * wanted:
                break
        return len(self.text) - self.at > wanted

    def skip(self) -> str:
        """The next character that is not white space; nothing at the end."""
        while True:
            self.at = WHITE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The next value, or a `BadRow` for it. Raises ValueError or RecursionError where its end cannot be found."""
        self.skip()
        while True:
            try:
                value, end = _decode(self.text, self.at)
                length = end - self.at
                if end < len(self.text) or not self.more():  # a number may go on
                    self.at += length
                    return value
            except json.JSONDecodeError as error:
                # Far from the end of what is there it is wrong whatever comes; only a string may be long.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if not cut or not self.more():
                    raise


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        return BadRow("malformed_json", short(error)), ANY_SIZE.raw_decode(text, at)[1]


# ---------------------------------------------------------------------------------------------- CSV


def _csv_records(data: BinaryIO, at: int) -> Iterator[tuple[int, list[str] | BadRow]]:
    """(offset of its end, fields) of every record that is not blank.

    Bytes that are not UTF-8 stay in the text as surrogates, for which the row is rejected (records.py).
    """

    def lines() -> Iterator[str]:
        nonlocal at
        for block in data:
            for line in block.splitlines(keepends=True):  # also at a bare \\r, as spreadsheets of old wrote
                text = (line.removeprefix(BOM) if at == 0 else line).decode(errors="surrogateescape")
                at += len(line)
                yield text

    reader = csv.reader(lines(), strict=True)  # a quote that does not belong there is told, not guessed at
    while True:
        try:
            fields: list[str] | BadRow = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = BadRow("malformed_csv", short(error))
        if fields:
            yield at, fields


def _csv_ends(data: BinaryIO) -> tuple[tuple[str, ...] | None, Iterator[tuple[int, int]]]:
    """The header, and (row, end) of every record after it."""
    records = _csv_records(data, 0)
    try:
        _, header = next(records, (0, []))
    except BROKEN:
        return None, iter(())
    ends = ((row, end) for row, (end, _) in enumerate(records, 1))
    return (None, iter(())) if isinstance(header, BadRow) else (tuple(header), ends)


def _csv_rows(data: BinaryIO, chunk: Chunk) -> Rows:
    records, header, number = _csv_records(data, chunk.start), chunk.header, chunk.first_row
    try:
        if header is None:
            _, first = next(records, (0, []))
            if isinstance(first, BadRow):
                yield number, BadRow("malformed_csv", f"the header: {first.detail}")
                return
            header = tuple(first)
        for end, fields in records:
            if isinstance(fields, BadRow):
                yield number, fields
            elif len(fields) != len(header):
                yield number, BadRow("malformed_csv", f"{len(fields)} fields, the header has {len(header)}")
            else:
                yield number, dict(zip(header, fields, strict=True))
            number += 1
            if chunk.end is not None and end >= chunk.end:
                return
    except BROKEN as error:
        yield number, BadRow("truncated_file", short(error))


# ---------------------------------------------------------------------------------------------- Parquet and datasets

# What pyarrow raises of a damaged file or a value that Python has no type for; an OSError says that pages do not add up.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, UnicodeDecodeError)


OBJECTS = "ray.data.arrow_pickled_object"  # Ray's Arrow type for Python objects: reading a value unpickles it


def _open_parquet(data: BinaryIO) -> pq.ParquetFile:
    """Raises ValueError where a column holds pickles, besides what pyarrow raises."""
    file = pq.ParquetFile(data, buffer_size=BUFFER, pre_buffer=False)  # pages are read as they are wanted
    for field in file.schema_arrow:
        if _has_objects(field):
            raise ValueError(f"the column {field.name} holds pickled Python objects, which are not loaded")
    return file


def _has_objects(field: pa.Field) -> bool:
    """The type is known by its name where Ray's types are registered, and by the field's metadata elsewhere."""
    name = (
        getattr(field.type, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    )
    return name == OBJECTS or any(_has_objects(field.type.field(i)) for i in range(field.type.num_fields))


def parquet_rows(file: DataFile) -> int | None:
    """Rows by the file's own account; None where it cannot be read."""
    with open_file(file.path) as data:
        try:
            return int(_open_parquet(data).metadata.num_rows)
        except UNREADABLE:
            return None


def _row_groups(whole: Chunk) -> list[Chunk]:
    with open_file(whole.file.path) as data:
        try:
            metadata = _open_parquet(data).metadata
        except UNREADABLE:
            return [whole]
        out, row = [], 1
        for i in range(metadata.num_row_groups):
            out.append(replace(whole, start=i, end=i + 1, first_row=row))
            row += metadata.row_group(i).num_rows
        return out


def _parquet_rows(chunk: Chunk) -> Rows:
    with open_file(chunk.file.path) as data:
        try:
            file = _open_parquet(data)
        except UNREADABLE as error:
            yield chunk.first_row, BadRow("damaged_file", short(error))
            return
        number = chunk.first_row
        for group in range(chunk.start, file.metadata.num_row_groups if chunk.end is None else chunk.end):
            after = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                    for row in _python_rows(batch):
                        yield number, row
                        number += 1
            except UNREADABLE as error:
                damage = BadRow("damaged_file", f"row group {group}: {short(error)}")
                yield from ((lost, damage) for lost in range(number, after))
            number = after


def _python_rows(batch: pa.RecordBatch) -> list[Row]:
    try:
        return batch.to_pylist()
    except UNREADABLE as error:
        if batch.num_rows == 1:
            return [BadRow("unreadable_value", short(error))]
        return [row for i in range(batch.num_rows) for row in _python_rows(batch.slice(i, 1))]


def _hub_rows(file: DataFile) -> Rows:
    number = 1
    try:
        for row in hub.stream(file):
            yield number, row
            number += 1
    except ValueError as error:
        yield number, BadRow("damaged_file", f"{short(error)}; nothing after it in this shard can be read")
