"""Prepared data: what training streams. Made once by Ray Data tasks, content-addressed, reused by every run.

One task reads one chunk of a file, normalises and encodes its rows and writes one Parquet shard and its part of the
ledger; only counts come back, so memory is that of a chunk. (A chunk is 4 MiB of JSON Lines or a Parquet row group; gzipped,
CSV and JSON files are one chunk each, so keep those moderate.) A folder of prepared data holds
`shard-*.parquet`, `ledger-*.jsonl` and, written last, `manifest.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data import ledger
from stages.data.chat import IGNORE
from stages.data.encode import Recipe, digest, encode_rows, encoder_for
from stages.data.ledger import LedgerEntry
from stages.data.records import (
    FORMATS,
    detect_format,
    rename,
)
from stages.data.source import Chunk, DataSource, chunks, content_hash, find_files, first_row, read_chunk
from stages.errors import DataError

GROUP_ROWS = 1024  # rows of a Parquet row group: the unit the trainer's feed shuffles

IDS = pa.list_(pa.int32())
ORIGIN = [("source", pa.string()), ("row", pa.int64())]
SCHEMAS = {
    "conversation": pa.schema([("input_ids", IDS), ("labels", IDS), *ORIGIN]),
    "preference": pa.schema([("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS), *ORIGIN]),
    "evaluation": pa.schema(
        [
            ("input_ids", IDS),
            ("labels", IDS),
            ("prompt_ids", IDS),
            ("prompt", pa.string()),
            ("expected", pa.string()),
            *ORIGIN,
        ]
    ),
}


@dataclass(frozen=True)
class Prepared:
    path: Path
    manifest: dict[str, Any]

    @property
    def rows(self) -> int:
        return self.manifest["rows"]

    @property
    def tokens(self) -> int:
        return self.manifest["tokens"]

    def row_groups(self) -> list[tuple[str, int, int]]:
        """(file, row group, rows) of the whole dataset, in order."""
        return [
            (str(self.path / shard["file"]), group, rows)
            for shard in self.manifest["shards"]
            for group, rows in enumerate(shard["groups"])
        ]

    def read(self) -> list[dict[str, Any]]:
        """Every row, in order. For evaluation sets and tests; training streams instead (stages/training/feed.py)."""
        return [
            row for shard in self.manifest["shards"] for row in pq.read_table(self.path / shard["file"]).to_pylist()
        ]


def resolve_formats(sources: Sequence[DataSource]) -> list[str]:
    """The format of each source, from its first readable row where it is not named.

    Raises:
        DataError: no such file, or columns that are no known format.
    """
    return [_format_of(source) for source in sources]


def _format_of(source: DataSource) -> str:
    if source.format is not None and source.format not in FORMATS:
        raise DataError(f"{source.path}: unknown format {source.format!r}; known: {', '.join(FORMATS)}")
    for file in find_files(source.path):
        row = first_row(file)
        if row is None:
            continue
        absent = [old for old in source.columns.values() if old not in row]
        if absent:
            raise DataError(f"{file.path}: `columns` names {', '.join(absent)}, but rows have {', '.join(row)}")
        columns = list(rename(row, source.columns))
        if found := source.format or detect_format(columns):
            return found
        raise DataError(
            f"{file.path}: rows have the columns {', '.join(columns)}, which is none of the formats "
            f"{', '.join(FORMATS)}; rename them with `columns: {{prompt: ..., completion: ...}}` or name the `format`"
        )
    raise DataError(f"{source.path}: no row can be read, so the format is unknown")


def sources_key(sources: Sequence[DataSource]) -> list[dict[str, Any]]:
    """What identifies the data: the contents of the files, not their names or dates."""
    return [
        {
            "files": [content_hash(file) for file in find_files(source.path)],
            "columns": source.columns,
            "format": source.format,
        }
        for source in sources
    ]


def prepare_chunk(
    index: int, chunk: Chunk, source: DataSource, format: str, recipe: Recipe, out: Path
) -> dict[str, Any]:
    """Read, encode and write one chunk. Writing it again gives the same files, so a retried task does no harm."""
    file = chunk.file.path
    kept: list[dict[str, Any]] = []
    entries: list[LedgerEntry] = []
    rows = encode_rows(
        read_chunk(chunk), file=file, format=format, columns=source.columns, recipe=recipe, encoder=encoder_for(recipe)
    )
    for _, result in rows:
        if isinstance(result, LedgerEntry):
            entries.append(result)
        else:
            kept.append(result)
    if entries:
        ledger.write_entries(out / f"ledger-{index:06}.jsonl", entries)
    name = f"shard-{index:06}.parquet"
    if kept:
        table = pa.Table.from_pylist(kept, schema=SCHEMAS[recipe.task])
        pq.write_table(table, out / (name + ".tmp"), row_group_size=GROUP_ROWS, compression="zstd")
        os.replace(out / (name + ".tmp"), out / name)
    lengths = [_length(row) for row in kept]
    return {
        "index": index,
        "file": name,
        "rows": len(kept),
        "dropped": len(entries),
        "tokens": sum(lengths),
        "trained_tokens": sum(_trained(row) for row in kept),
        "longest": max(lengths, default=0),
    }


def _length(row: dict[str, Any]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _trained(row: dict[str, Any]) -> int:
    if "labels" in row:
        return sum(label != IGNORE for label in row["labels"])
    return len(row["chosen_ids"]) + len(row["rejected_ids"])


def prepare(
    sources: Sequence[DataSource],
    recipe: Recipe,
    root: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """The prepared data of these sources, made by Ray Data where it is not there yet.

    Args:
        root: the folder of all prepared data; the result is a folder in it, named by the hash of all that decides it.
        progress: called with (chunks done, chunks in all).

    Raises:
        DataError: a file cannot be used, or not one row reached training.
    """
    formats = resolve_formats(sources)
    key = {"recipe": recipe.key(), "sources": sources_key(sources)}
    target = root / digest(json.dumps(key, sort_keys=True))
    if not (target / "manifest.json").is_file():
        _make(sources, formats, recipe, target, key, progress)
    prepared = Prepared(target, json.loads((target / "manifest.json").read_text()))
    if not prepared.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in prepared.manifest["ledger"]["reasons"].items())
        first = next(iter(prepared.manifest["ledger"]["examples"]), None)
        example = f"; for example {first['source']}, row {first['row']}: {first['detail']}" if first else ""
        raise DataError(f"none of the {prepared.manifest['ledger']['read']} rows can be used: {reasons}{example}")
    return prepared


def _make(
    sources: Sequence[DataSource],
    formats: list[str],
    recipe: Recipe,
    target: Path,
    key: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    import ray
    import ray.data

    todo = [chunk for i, source in enumerate(sources) for file in find_files(source.path) for chunk in chunks(i, file)]
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        job = ray.put((todo, list(sources), formats, recipe, work))

        def one(row: dict[str, Any]) -> dict[str, Any]:
            todo, sources, formats, recipe, work = ray.get(job)
            chunk = todo[row["index"]]
            return prepare_chunk(row["index"], chunk, sources[chunk.source], formats[chunk.source], recipe, work)

        cpus = int(ray.cluster_resources().get("CPU", 1))
        blocks = min(len(todo), 2 * cpus)  # few blocks with several chunks each: a block costs tens of milliseconds
        items = [{"index": i} for i in range(len(todo))]
        results = []
        for result in ray.data.from_items(items, override_num_blocks=blocks).map(one).iter_rows():
            results.append(result)
            progress(len(results), len(todo))
        results.sort(key=lambda r: r["index"])
        _write_manifest(work, results, key, formats, sources)
        try:
            os.rename(work, target)
        except OSError:  # a stage beside this one was quicker: its folder holds the same
            if not (target / "manifest.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(
    work: Path, results: list[dict[str, Any]], key: dict[str, Any], formats: list[str], sources: Sequence[DataSource]
) -> None:
    shards = []
    for result in results:
        if result["rows"]:
            meta = pq.ParquetFile(work / result["file"]).metadata
            groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            shards.append({"file": result["file"], "rows": result["rows"], "groups": groups})
    rows = sum(shard["rows"] for shard in shards)
    read = rows + sum(result["dropped"] for result in results)
    manifest = {
        "rows": rows,
        "tokens": sum(result["tokens"] for result in results),
        "trained_tokens": sum(result["trained_tokens"] for result in results),
        "longest": max((result["longest"] for result in results), default=0),
        "ledger": ledger.summary(read, rows, ledger.read_entries(work)),
        "sources": [{"path": s.path, "format": f, "columns": s.columns} for s, f in zip(sources, formats, strict=True)],
        "key": key,
        "shards": shards,
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
