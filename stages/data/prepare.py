"""Prepared data: what training streams. Made once by Ray Data tasks, content-addressed, reused by every run.

One task reads one chunk of a file, normalises and encodes its rows and writes one Parquet shard and its part of the
ledger; only counts come back, so memory is that of a chunk. (A chunk is 4 MiB of JSON Lines or a Parquet row group; gzipped,
CSV and JSON files are one chunk each, so keep those moderate.) A folder of prepared data holds
`shard-*.parquet`, `ledger-*.jsonl` and, written last, `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data import ledger
from stages.data.chat import IGNORE, ChatEncoder, Encoded, Refused, TokenizerSpec, TrainOn
from stages.data.ledger import LedgerEntry
from stages.data.records import (
    FORMATS,
    Conversation,
    Preference,
    Record,
    Rejected,
    Text,
    detect_format,
    normalise,
    rename,
)
from stages.data.source import BadRow, Chunk, DataSource, chunks, content_hash, find_files, first_row, read_chunk
from stages.errors import DataError

DATA_VERSION = 1  # raised when the same input would be prepared differently
GROUP_ROWS = 1024  # rows of a Parquet row group: the unit the trainer's feed shuffles
BATCH_ROWS = 512  # rows encoded together

Task = Literal["conversation", "preference", "evaluation"]
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
class Recipe:
    """All that decides how rows become tokens."""

    task: Task
    tokenizer: TokenizerSpec
    train_on: TrainOn = "assistant"
    max_length: int | None = None  # longer rows go to the ledger, they are never cut

    def key(self) -> dict[str, Any]:
        return {
            "version": DATA_VERSION,
            "task": self.task,
            "tokenizer": digest(self.tokenizer.json),
            "template": digest(self.tokenizer.chat_template or ""),
            "variables": self.tokenizer.variables,
            "train_on": self.train_on,
            "max_length": self.max_length,
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


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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


def encode(records: Sequence[Record], encoder: ChatEncoder, recipe: Recipe) -> list[dict[str, Any] | Refused]:
    """Rows of the recipe's schema, or why not; in order."""
    if recipe.task == "preference":
        return _encode_preferences(records, encoder, recipe)
    texts = iter(encoder.encode_text([r.text for r in records if isinstance(r, Text)]))
    answered = _answered if recipe.task == "evaluation" else lambda record: record.messages
    chats = iter(encoder.encode_batch([answered(r) for r in records if isinstance(r, Conversation)]))
    out: list[dict[str, Any] | Refused] = []
    for record in records:
        if isinstance(record, Preference):
            out.append(Refused("wrong_format", "a preference pair where a conversation is wanted"))
            continue
        encoded = next(texts) if isinstance(record, Text) else next(chats)
        if isinstance(encoded, Encoded) and (long := _too_long(len(encoded.input_ids), recipe)):
            encoded = long
        if isinstance(encoded, Refused):
            out.append(encoded)
            continue
        row: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        if recipe.task == "evaluation":
            row |= _evaluation_fields(record, encoder)
        out.append(row)
    return out


def _answered(record: Conversation) -> list[dict[str, Any]]:
    """The conversation with its expected answer as the last turn where the row ends with a question."""
    if record.expected is not None and record.messages[-1]["role"] != "assistant":
        return [*record.messages, {"role": "assistant", "content": record.expected}]
    return record.messages


def _evaluation_fields(record: Record, encoder: ChatEncoder) -> dict[str, Any]:
    """What greedy samples need: the prompt of the last answer, and the answer that is expected."""
    if not isinstance(record, Conversation):
        return {"prompt_ids": None, "prompt": None, "expected": None}
    messages = record.messages[:-1] if record.messages[-1]["role"] == "assistant" else record.messages
    if not messages:
        return {"prompt_ids": None, "prompt": None, "expected": None}
    prompt = encoder.prompt(messages)
    ids = encoder.tokenizer.encode(prompt, add_special_tokens=False).ids
    return {"prompt_ids": ids, "prompt": prompt, "expected": record.expected}


def _encode_preferences(
    records: Sequence[Record], encoder: ChatEncoder, recipe: Recipe
) -> list[dict[str, Any] | Refused]:
    pairs = [r for r in records if isinstance(r, Preference)]
    answers = [[*p.prompt, answer] for p in pairs for answer in (p.chosen, p.rejected)]
    encoded = iter(encoder.encode_batch(answers))
    out: list[dict[str, Any] | Refused] = []
    for record in records:
        if not isinstance(record, Preference):
            out.append(Refused("wrong_format", "a conversation where a preference pair is wanted"))
            continue
        chosen, rejected = next(encoded), next(encoded)
        out.append(_pair(chosen, rejected, recipe))
    return out


def _pair(chosen: Encoded | Refused, rejected: Encoded | Refused, recipe: Recipe) -> dict[str, Any] | Refused:
    """`prompt_ids` and the two answers, each to the end of its stop token."""
    split = []
    for answer in (chosen, rejected):
        if isinstance(answer, Refused):
            return answer
        if long := _too_long(len(answer.input_ids), recipe):
            return long
        at = next(i for i, label in enumerate(answer.labels) if label != IGNORE)
        end = max(i for i, label in enumerate(answer.labels) if label != IGNORE) + 1
        split.append((answer.input_ids[:at], answer.input_ids[at:end]))
    (prompt, good), (other, bad) = split
    if prompt != other:
        return Refused("different_prompts", "the tokens before the answers differ")
    if good == bad:
        return Refused("equal_answers", "the same tokens once rendered")
    return {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad}


def _too_long(tokens: int, recipe: Recipe) -> Refused | None:
    if recipe.max_length is not None and tokens > recipe.max_length:
        return Refused("too_long", f"{tokens} tokens, max_length is {recipe.max_length}")
    return None


def encoder_for(recipe: Recipe) -> ChatEncoder:
    """Answers of a pair are its last turn alone; earlier assistant turns belong to the prompt."""
    return ChatEncoder(recipe.tokenizer, "last_assistant" if recipe.task == "preference" else recipe.train_on)


def encode_rows(
    rows: Iterator[tuple[int, dict[str, Any] | BadRow]],
    *,
    file: str,
    format: str,
    columns: dict[str, str],
    recipe: Recipe,
    encoder: ChatEncoder,
) -> Iterator[tuple[int, dict[str, Any] | LedgerEntry]]:
    """(row number, encoded row or ledger entry) for every row read, in order: nothing is lost on the way."""
    while batch := list(islice(rows, BATCH_ROWS)):
        records: list[Record | Refused] = []
        for _, row in batch:
            try:
                if isinstance(row, BadRow):
                    raise Rejected(row.reason, row.detail)
                records.append(normalise(rename(row, columns), format))
            except Rejected as error:
                records.append(Refused(error.reason, error.detail))
        encoded = iter(encode([r for r in records if not isinstance(r, Refused)], encoder, recipe))
        for (number, _), record in zip(batch, records, strict=True):
            result = record if isinstance(record, Refused) else next(encoded)
            if isinstance(result, Refused):
                yield number, LedgerEntry(file, number, result.reason, result.detail)
            else:
                yield number, result | {"source": file, "row": number}


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
