"""What a task of the preparation does: a chunk of a file becomes a Parquet shard, its part of the ledger and a file of counts;
a window of shards becomes packs."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.data import ledger
from stages.data.chat import IGNORE, no_collection
from stages.data.chunks import Chunk, read_chunk
from stages.data.encode import Recipe, Row, encode_rows, encoder_for, record_hashes
from stages.data.ledger import LedgerEntry
from stages.data.packing import pack_table
from stages.data.source import DataSource
from stages.storage import pull, push

GROUP_ROWS = 1024  # rows of a Parquet row group: the unit the trainer's feed shuffles
GROUP_TOKENS = 1 << 20  # of a row group of packs, about

IDS = pa.list_(pa.int32())
ORIGIN = [("source", pa.string()), ("row", pa.int64())]
ENCODED = [("input_ids", IDS), ("labels", IDS), ("weights", pa.list_(pa.float32()))]
PROMPT = [("prompt_ids", IDS), ("prompt", pa.string()), ("expected", pa.string())]
MARGIN = ("margin", pa.float32())  # null where the data does not say
SCHEMAS = {
    "conversation": pa.schema([*ENCODED, *ORIGIN]),
    "preference": pa.schema([("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS), MARGIN, *ORIGIN]),
    "labelled": pa.schema([("prompt_ids", IDS), ("completion_ids", IDS), ("label", pa.bool_()), *ORIGIN]),
    "prompt": pa.schema([*PROMPT, *[(name, pa.string()) for name in ("messages", "tools", "columns")], *ORIGIN]),
    "evaluation": pa.schema([*ENCODED, *PROMPT, *ORIGIN]),
}


class _ShardWriter:
    """Rows to a Parquet file, a row group at a time; the file has its name only once it is whole."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.temporary = path.with_name(path.name + ".tmp")
        self.waiting: list[Row] = []
        self.groups: list[int] = []
        self.writer: pq.ParquetWriter | None = None

    def add(self, rows: Sequence[Row]) -> None:
        self.waiting += rows
        while len(self.waiting) >= GROUP_ROWS:
            self._write(self.waiting[:GROUP_ROWS])
            del self.waiting[:GROUP_ROWS]

    def _write(self, rows: list[Row]) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.temporary, self.schema, compression="zstd")
        columns = [pa.array([row.get(name) for row in rows], type) for name, type in _fields(self.schema)]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self.groups.append(len(rows))

    def close(self) -> dict[str, Any] | None:
        """The shard as the manifest has it, or None where there was nothing to write."""
        if self.waiting:
            self._write(self.waiting)
        if self.writer is None:
            return None
        self.writer.close()
        os.replace(self.temporary, self.path)
        push(self.path)
        return {"file": self.path.name, "rows": sum(self.groups), "groups": self.groups}


def _fields(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    return ((field.name, field.type) for field in schema)


@dataclass
class Counts:
    """What a chunk came to; kept beside its shard, so a restart does not make it again."""

    read: int = 0
    kept: int = 0  # rows of the source that are in the training data
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # tokens -> examples of so many
    held_out: int = 0
    weighted: bool = False
    margins: int = 0  # pairs that say how much better the chosen answer is
    wanted: int = 0  # labelled answers that are
    warnings: Counter[str] = field(default_factory=Counter)
    stops: set[int] = field(default_factory=set)

    def add(self, rows: Sequence[Row], copies: int) -> None:
        self.kept += 1
        for row in rows:
            length = length_of(row)
            self.longest = max(self.longest, length)
            self.lengths[length] += copies
            self.weighted = self.weighted or row.get("weights") is not None
            self.margins += copies * (row.get("margin") is not None)
            self.wanted += copies * row.get("label", False)
            self.examples += copies
            self.tokens += copies * length
            self.trained_tokens += copies * trained_of(row)


def length_of(row: Row) -> int:
    """Tokens a row costs to train on."""
    if "input_ids" in row:
        return len(row["input_ids"])
    sides = [len(row[side]) for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row]
    return max(len(sides), 1) * len(row["prompt_ids"]) + sum(sides)


def trained_of(row: Row) -> int:
    """Tokens of it that are trained."""
    if "labels" in row:
        return len(row["labels"]) - row["labels"].count(IGNORE)
    return sum(len(row[side]) for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row)


def percentiles(lengths: Mapping[int, int]) -> dict[str, int]:
    """Of lengths, each with how often it comes: median, 90%, 99% and the longest, as `raylign inspect` has them."""
    ordered = sorted(lengths)
    ends = list(accumulate(lengths[n] for n in ordered))
    if not ends:
        return {}
    at = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
    return {name: ordered[bisect_right(ends, min(ends[-1] - 1, int(share * ends[-1])))] for name, share in at.items()}


def prepare_chunk(index: int, chunk: Chunk, source: DataSource, format: str, recipe: Recipe, work: Path) -> None:
    """Read, encode and write one chunk. Writing it again gives the same files, so a retried task does no harm."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many tasks run as there are cores
    work.mkdir(parents=True, exist_ok=True)
    duplicates = pull(work / f"duplicates-{index:06}.npy")
    counts = Counts()
    train = _ShardWriter(work / f"shard-{index:06}.parquet", SCHEMAS[recipe.task])
    held = _ShardWriter(work / f"eval-{index:06}.parquet", SCHEMAS[recipe.task])
    outcomes = encode_rows(
        read_chunk(chunk),
        file=chunk.file.path,
        format=format,
        source=source,
        recipe=recipe,
        encoder=encoder_for(recipe, parallel=False),
        duplicates=frozenset(np.load(duplicates).tolist()) if duplicates.is_file() else frozenset(),
    )
    with no_collection(), (work / f"ledger-{index:06}.jsonl.tmp").open("w") as lines:
        for outcome in outcomes:
            counts.read += 1
            counts.warnings.update(outcome.warnings)
            counts.stops |= outcome.stops
            entry = outcome.entry
            rows = [row | {"source": chunk.file.path, "row": outcome.row} for row in outcome.examples]
            if entry is None and outcome.held_out:
                held.add(rows)
                counts.held_out += 1
                entry = LedgerEntry(chunk.file.path, outcome.row, "held_out", f"of eval: {source.eval}")
            elif entry is None:
                counts.add(rows, outcome.copies)
                for _ in range(outcome.copies):
                    train.add(rows)
            if entry is not None:
                lines.write(ledger.as_line(entry))
    os.replace(work / f"ledger-{index:06}.jsonl.tmp", work / f"ledger-{index:06}.jsonl")
    push(work / f"ledger-{index:06}.jsonl")
    done = vars(counts) | {
        "stops": sorted(counts.stops),
        "source": chunk.source,
        "shard": train.close(),
        "eval": held.close(),
    }
    _write_json(work / f"done-{index:06}.json", done)


def hash_chunk(index: int, chunk: Chunk, source: DataSource, format: str, seed: int, work: Path) -> None:
    """The hashes of a chunk's records: an array of (row, hash)."""
    pairs = list(record_hashes(read_chunk(chunk), source, format, seed))
    array = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / f".hashes-{index:06}.npy"
    np.save(temporary, array)
    os.replace(temporary, work / f"hashes-{index:06}.npy")
    push(work / f"hashes-{index:06}.npy")


def pack_window(index: int, groups: Sequence[tuple[str, int]], recipe: Recipe, work: Path) -> None:
    """The rows of some row groups of shards, packed, in one file."""
    assert recipe.max_length is not None
    table = pa.concat_tables([pq.ParquetFile(pull(work / file)).read_row_group(group) for file, group in groups])
    packed = pack_table(table, recipe.max_length, seed=recipe.seed if recipe.shuffle else None)
    path = work / f"packed-{index:06}.parquet"
    rows = max(16, min(GROUP_ROWS, GROUP_TOKENS // recipe.max_length))
    pq.write_table(packed, work / (path.name + ".tmp"), row_group_size=rows, compression="zstd")
    os.replace(work / (path.name + ".tmp"), path)
    push(path)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
    push(path)
