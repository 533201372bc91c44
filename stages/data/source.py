"""Where rows come from: paths to files, files to chunks, chunks to rows that know their file and row number.

Files are JSON Lines (`.jsonl`, `.jsonl.gz`, also `.ndjson`), JSON (one list of objects), CSV and Parquet. A chunk is what
one Ray task reads: a byte range of a JSON Lines file, some row groups of a Parquet file, or a whole file of the others.
A row that cannot be read is yielded as a `BadRow` with its number, never skipped.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from stages.base import Config
from stages.errors import DataError

CHUNK_BYTES = 4 << 20
BROKEN = (EOFError, OSError, zlib.error)  # what a damaged gzip raises
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class DataSource(Config):
    """One entry of `data:`."""

    path: str = Field(description="A file, a glob or a folder: .jsonl, .jsonl.gz, .json, .csv or .parquet.")
    format: str | None = Field(
        default=None,
        description="messages, prompt_completion, text or preference; detected from the columns if absent.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames columns, new name first: {prompt: question, completion: answer}."
    )


@dataclass(frozen=True)
class DataFile:
    path: str
    kind: str  # jsonl, json, csv, parquet
    gzipped: bool


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """What one task reads. `start:end` are bytes (jsonl) or row groups (parquet); `first_row` is 1-based."""

    source: int
    file: DataFile
    start: int = 0
    end: int = 0
    first_row: int = 1


def classify(path: str) -> DataFile | None:
    """The kind of a file by its name, or None where it is not a data file."""
    name = path.lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name[:-3] if gzipped else name).suffix
    kind = SUFFIXES.get(suffix)
    return DataFile(path, kind, gzipped) if kind and not (gzipped and kind == "parquet") else None


def find_files(path: str) -> list[DataFile]:
    """The data files behind a path, in a fixed order.

    Raises:
        DataError: nothing there, a file of an unknown kind, or an empty file.
    """
    target = Path(path)
    if target.is_dir():
        found = [p for p in sorted(target.rglob("*")) if p.is_file() and not _hidden(p.relative_to(target))]
        files = [f for f in (classify(str(p)) for p in found) if f]
        if not files:
            raise DataError(f"{path}: no data files in this folder (looked for {', '.join(SUFFIXES)}, also .gz)")
    else:
        names = [path] if target.is_file() else sorted(n for n in glob.glob(path, recursive=True) if Path(n).is_file())
        if not names:
            wild = any(c in path for c in "*?[")
            raise DataError(f"{path}: {'no file matches' if wild else 'no such file'}; check `path` under `data`")
        files = []
        for name in names:
            file = classify(name)
            if file is None:
                raise DataError(f"{name}: not a kind of file that can be read ({', '.join(SUFFIXES)}, also .gz)")
            files.append(file)
    for file in files:
        if Path(file.path).stat().st_size == 0:
            raise DataError(f"{file.path}: the file is empty")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def content_hash(file: DataFile) -> str:
    """Hash of the file's bytes: with the options it decides the prepared data."""
    with open(file.path, "rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def chunks(source: int, file: DataFile) -> list[Chunk]:
    """Cut a file into what one task reads."""
    if file.kind == "parquet":
        groups, row, out = pq.ParquetFile(file.path).metadata, 1, []
        for i in range(groups.num_row_groups):
            out.append(Chunk(source, file, i, i + 1, row))
            row += groups.row_group(i).num_rows
        return out
    if file.kind != "jsonl" or file.gzipped:
        return [Chunk(source, file)]
    out, start, row = [], 0, 1
    with open(file.path, "rb") as data:
        while block := data.read(CHUNK_BYTES):
            block += data.readline()  # up to the end of the line
            out.append(Chunk(source, file, start, start + len(block), row))
            start += len(block)
            row += block.count(b"\n")
    return out


def _json_lines(lines: Iterator[bytes], first_row: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(lines, first_row):
        if not line.strip():
            continue  # a blank line is not a row
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadRow("malformed_json", str(error))
            continue
        yield number, row if isinstance(row, dict) else BadRow("not_an_object", f"a {type(row).__name__}")


def read_chunk(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(row number, row) for every row of a chunk; row numbers are 1-based (lines of a JSON Lines file)."""
    file = chunk.file
    if file.kind == "parquet":
        table = pq.ParquetFile(file.path).read_row_groups(list(range(chunk.start, chunk.end)))
        for number, row in enumerate(table.to_pylist(), chunk.first_row):
            yield number, row
        return
    raw = gzip.open(file.path) if file.gzipped else open(file.path, "rb")  # noqa: SIM115 - closed below
    with raw:
        if file.kind == "jsonl" and not file.gzipped:
            raw.seek(chunk.start)
            yield from _json_lines(iter(raw.read(chunk.end - chunk.start).split(b"\n")), chunk.first_row)
        elif file.kind == "jsonl":
            number = 0
            try:
                for number, line in enumerate(raw, 1):
                    yield from _json_lines(iter([line]), number)
            except BROKEN as error:
                yield number + 1, BadRow("truncated_file", str(error))
        elif file.kind == "json":
            try:
                rows = json.loads(raw.read())
            except (ValueError, RecursionError, *BROKEN) as error:
                yield 1, BadRow("malformed_json", str(error))
                return
            for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
                yield number, row if isinstance(row, dict) else BadRow("not_an_object", f"a {type(row).__name__}")
        else:
            yield from _csv_rows(io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=""))


def _csv_rows(lines: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Bytes that are not UTF-8 stay in the text as surrogates, for which the row is rejected (records.py)."""
    reader = csv.DictReader(lines)
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, BadRow("malformed_csv", str(error))
            continue
        except BROKEN as error:
            yield number, BadRow("truncated_file", str(error))
            return
        if None in row or None in row.values():
            yield number, BadRow("malformed_csv", f"expected {len(reader.fieldnames or [])} fields")
        else:
            yield number, dict(row)


def first_row(file: DataFile) -> dict[str, Any] | None:
    """The first readable row of a file, for detecting its format. Raises `DataError` where the file cannot be opened."""
    try:
        head = chunks(0, file)[:1]
        for chunk in head:
            for number, row in read_chunk(chunk):
                if isinstance(row, dict):
                    return row
                if number > 100:
                    break
    except (pa.ArrowInvalid, *BROKEN) as error:
        raise DataError(f"{file.path}: cannot be read as {file.kind}: {error}") from error
    return None


def count_rows(source: DataSource) -> int:
    """Rows of a source as its files have them, before any is left out."""
    total = 0
    for file in find_files(source.path):
        if file.kind == "parquet":
            total += pq.ParquetFile(file.path).metadata.num_rows
        elif file.kind == "jsonl" and not file.gzipped:
            with open(file.path, "rb") as data:
                total += sum(1 for line in data if line.strip())
        else:
            total += sum(1 for chunk in chunks(0, file) for _ in read_chunk(chunk))
    return total
