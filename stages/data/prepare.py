"""Prepared data: what training streams. Made once by Ray Data tasks, content-addressed, reused by every run.

One task reads one chunk of a file, normalises and encodes its rows, and writes one Parquet shard and its part of the
ledger; only counts come back, so memory is that of a few hundred rows whatever the input. Where it is asked for, duplicates
are found before (from hashes of the rows) and rows are packed afterwards (a window of shards at a time).

A task's last act is a small file of its counts, so what was interrupted goes on with the chunks that are left. A folder
of prepared data holds `shard-*.parquet`, `eval-*.parquet` (rows held out), `ledger-*.jsonl` and `manifest.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock

from stages import own
from stages.base import Reporter
from stages.capacity import Need
from stages.cluster import data_cpus, data_resources, on_cluster, wait_for_room, while_there_are_nodes
from stages.data import ledger
from stages.data.chunks import chunks
from stages.data.encode import Recipe, Row, digest
from stages.data.mixing import mark_duplicates
from stages.data.shards import Counts, hash_chunk, pack_window, percentiles, prepare_chunk
from stages.data.source import DataSource, content_hash, find_files, resolve_formats
from stages.errors import DataError, RaylignError
from stages.storage import mirrored, names, pull, push, remove, there

PACK_ROWS = 65_536  # rows that are packed together ...
PACK_TOKENS = 1 << 26  # ... or as many tokens


@dataclass(frozen=True)
class Prepared:
    path: Path
    manifest: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows the trainer sees: examples, or packs of them."""
        return self.manifest["rows"]

    @property
    def tokens(self) -> int:
        return self.manifest["tokens"]

    def row_groups(self, part: str = "shards") -> list[tuple[str, int, int]]:
        """(file, row group, rows) of the whole dataset, in order; `part="eval"` for the rows held out."""
        return [
            (str(self.path / shard["file"]), group, rows)
            for shard in self.manifest[part]
            for group, rows in enumerate(shard["groups"])
        ]

    def read(self) -> list[Row]:
        """Every row, in order. For evaluation sets and tests; training streams instead (stages/training/feed.py)."""
        return [
            row
            for shard in self.manifest["shards"]
            for row in pq.read_table(pull(self.path / shard["file"])).to_pylist()
        ]


def sources_key(sources: Sequence[DataSource]) -> list[dict[str, Any]]:
    """What identifies the data: the contents of the files, not their names or dates."""
    return [
        {
            "files": [[content_hash(file), file.kind, file.gzipped] for file in find_files(source)],
            **options_key(source),
        }
        for source in sources
    ]


def options_key(source: DataSource) -> dict[str, Any]:
    """What a source's options make of its rows."""
    options = source.model_dump(mode="json", exclude={"path", "format", "split", "name", "revision"}, exclude_none=True)
    mine = source.format if own.is_named(source.format) else None
    return options | ({"function": [mine, own.key(mine)]} if mine else {})


def prepare(
    sources: Sequence[DataSource],
    recipe: Recipe,
    root: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Reporter | None = None,
) -> Prepared:
    """The prepared data of these sources, made by Ray Data where it is not there yet.

    Args:
        root: the folder of all prepared data; the result is a folder in it, named by the hash of all that decides it.
        progress: called with (tasks done, tasks in all).
        report: where it is said that a cluster has no node for it.

    Raises:
        DataError: a file cannot be used.
        StageError: a cluster had no node for it in the time allowed, or one that does not see `root`.
    """
    key = _key(sources, recipe)
    target = root / digest(json.dumps(key, sort_keys=True))
    if not there(target / "manifest.json"):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".lock-{target.name}"):  # a stage beside this one may want the same
            if not there(target / "manifest.json"):
                _Making(sources, key["formats"], recipe, target, key, progress, report).run()
    return Prepared(target, json.loads((target / "manifest.json").read_text()))


def find_prepared(sources: Sequence[DataSource], recipe: Recipe, root: Path) -> Prepared | None:
    """As `prepare`, but None where it is not there yet."""
    target = root / digest(json.dumps(_key(sources, recipe), sort_keys=True))
    file = target / "manifest.json"
    return Prepared(target, json.loads(file.read_text())) if there(file) else None


def _key(sources: Sequence[DataSource], recipe: Recipe) -> dict[str, Any]:
    """All that decides the prepared data."""
    drawn = any(source.eval or source.weight % 1 for source in sources)
    return {"recipe": recipe.key(drawn), "sources": sources_key(sources), "formats": resolve_formats(sources)}


# ------------------------------------------------------------------------------------------------ making it


def missing(work: Path, name: str, count: int) -> list[int]:
    """Which of the files numbered 0 .. count are not there yet."""
    found = names(work)
    return [i for i in range(count) if name.format(i) not in found]


class _Making:
    """One folder of prepared data being made, with what an interrupted attempt left of it."""

    def __init__(
        self,
        sources: Sequence[DataSource],
        formats: list[str],
        recipe: Recipe,
        target: Path,
        key: dict[str, Any],
        progress: Callable[[int, int], None],
        report: Reporter | None = None,
    ) -> None:
        self.report = report
        self.sources, self.formats, self.recipe, self.target = list(sources), formats, recipe, target
        self.key, self.progress = key, progress
        # In an object store nothing can be renamed: there it is the manifest, which comes last, that makes the folder whole.
        self.work = target if mirrored(target) else target.parent / f".making-{target.name}"

    def run(self) -> None:
        sources, formats, recipe, work = self.sources, self.formats, self.recipe, self.work
        todo = [chunk for i, source in enumerate(sources) for file in find_files(source) for chunk in chunks(i, file)]
        self._keep_or_clear(repr((sorted(Counts.__dataclass_fields__), todo)))
        if recipe.deduplicate:
            self._map(
                missing(work, "hashes-{:06}.npy", len(todo)),
                lambda i, todo: hash_chunk(
                    i, todo[i], sources[todo[i].source], formats[todo[i].source], recipe.seed, work
                ),
                todo,
            )
            pull(work, only="hashes-*")
            mark_duplicates(work, len(todo))
            push(work)
        self._map(
            missing(work, "done-{:06}.json", len(todo)),
            lambda i, todo: prepare_chunk(i, todo[i], sources[todo[i].source], formats[todo[i].source], recipe, work),
            todo,
        )
        if sources_key(sources) != self.key["sources"]:
            self._clear()
            raise DataError("the data changed while it was being prepared; run the same command again")
        pull(work, only="done-*")
        pull(work, only="ledger-*")
        done = [json.loads((work / f"done-{i:06}.json").read_text()) for i in range(len(todo))]
        packed = self._pack(done) if recipe.packing else None
        self._write_manifest(done, packed)
        for pattern in ("hashes-*", "duplicates-*", "done-*", "chunks"):
            for leftover in work.glob(pattern):
                leftover.unlink()
                remove(leftover)
        if work != self.target:
            shutil.rmtree(self.target, ignore_errors=True)  # without a manifest: not ours
            os.rename(work, self.target)
        push(self.target, last="manifest.json")

    def _keep_or_clear(self, todo: str) -> None:
        """What an interrupted attempt had made is of use only where the files are cut, and counted, as they were then."""
        cut = pull(self.work / "chunks")
        if not cut.is_file() or cut.read_text() != todo:
            self._clear()
            self.work.mkdir(parents=True)
            cut.write_text(todo)
            push(cut)

    def _clear(self) -> None:
        remove(self.work)
        shutil.rmtree(self.work, ignore_errors=True)

    def _map(self, indices: list[int], task: Callable[[int, Any], None], shared: Any) -> None:
        """`task(i, shared)` for every index, by Ray Data."""
        if not indices:
            return
        import ray
        import ray.data

        job = ray.put((task, shared))

        def one(row: dict[str, Any]) -> dict[str, Any]:
            task, shared = ray.get(job)
            try:
                task(row["index"], shared)
            except RaylignError as error:  # for the user: Ray would wrap it in a trace, and lose what it was
                return row | {"error": str(error)}
            return row | {"error": ""}

        cpus = data_cpus() if on_cluster() else int(ray.cluster_resources().get("CPU", 1))
        blocks = min(len(indices), 2 * cpus)  # few blocks with several chunks each: a block costs tens of milliseconds
        where = data_resources() if on_cluster() else {}
        need = Need(1, {"CPU": 1, **where})
        wait_for_room([need], self.report, shared=None if mirrored(self.work) else self.work)
        items = [{"index": i} for i in indices]
        results = ray.data.from_items(items, override_num_blocks=blocks).map(one, resources=where).iter_rows()
        for count, result in enumerate(while_there_are_nodes(results, need, self.report), 1):
            if result["error"]:
                raise DataError(result["error"])
            self.progress(count, len(indices))

    def _pack(self, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The shards' rows in packs, a window of consecutive row groups at a time."""
        windows: list[list[tuple[str, int]]] = [[]]
        rows = tokens = 0
        for chunk in done:
            for group, size in enumerate(chunk["shard"]["groups"] if chunk["shard"] else []):
                long = round(chunk["tokens"] * size / chunk["shard"]["rows"])
                if windows[-1] and (rows + size > PACK_ROWS or tokens + long > PACK_TOKENS):
                    windows.append([])
                    rows = tokens = 0
                windows[-1].append((chunk["shard"]["file"], group))
                rows, tokens = rows + size, tokens + long
        windows = [window for window in windows if window]
        recipe, work = self.recipe, self.work
        left = missing(work, "packed-{:06}.parquet", len(windows))
        self._map(left, lambda i, windows: pack_window(i, windows[i], recipe, work), windows)
        shards = []
        for i in range(len(windows)):
            meta = pq.ParquetFile(pull(work / f"packed-{i:06}.parquet")).metadata
            groups = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            shards.append({"file": f"packed-{i:06}.parquet", "rows": sum(groups), "groups": groups})
        return shards

    def _write_manifest(self, done: list[dict[str, Any]], packed: list[dict[str, Any]] | None) -> None:
        shards = [chunk["shard"] for chunk in done if chunk["shard"]]
        if packed is not None:
            for shard in shards:
                (self.work / shard["file"]).unlink(missing_ok=True)
                remove(self.work / shard["file"])
            shards = packed
        rows, tokens = sum(shard["rows"] for shard in shards), sum(chunk["tokens"] for chunk in done)
        lengths: Counter[int] = Counter()
        for chunk in done:
            lengths.update({int(length): count for length, count in chunk["lengths"].items()})
        warnings: Counter[str] = sum((Counter(chunk["warnings"]) for chunk in done), Counter())
        read, kept = sum(chunk["read"] for chunk in done), sum(chunk["kept"] for chunk in done)
        manifest = {
            "rows": rows,
            "examples": sum(chunk["examples"] for chunk in done),
            "tokens": tokens,
            "trained_tokens": sum(chunk["trained_tokens"] for chunk in done),
            "longest": max((chunk["longest"] for chunk in done), default=0),
            "lengths": percentiles(lengths),
            "fill": tokens / (rows * self.recipe.max_length) if packed and self.recipe.max_length else None,
            "weighted": any(chunk["weighted"] for chunk in done),
            **self._preferences(done),
            "stop_ids": sorted({stop for chunk in done for stop in chunk["stops"]}),
            "warnings": dict(warnings.most_common()),
            "ledger": ledger.summary(read, kept, ledger.read_entries(self.work)),
            "sources": [self._mixture(i, source, done, tokens) for i, source in enumerate(self.sources)],
            "key": self.key,
            "shards": shards,
            "eval": [chunk["eval"] for chunk in done if chunk["eval"]],
        }
        (self.work / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def _preferences(self, done: list[dict[str, Any]]) -> dict[str, Any]:
        """Of pairs and labelled answers, how many say what: examples, as often as they are drawn."""
        if self.recipe.task == "preference":
            return {"margins": sum(chunk["margins"] for chunk in done)}
        if self.recipe.task == "labelled":
            wanted = sum(chunk["wanted"] for chunk in done)
            return {"labels": {"true": wanted, "false": sum(chunk["examples"] for chunk in done) - wanted}}
        return {}

    def _mixture(self, i: int, source: DataSource, done: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """What was asked of a source, and what of it is really there."""
        mine = [chunk for chunk in done if chunk["source"] == i]
        total = {
            name: sum(chunk[name] for chunk in mine) for name in ("read", "kept", "held_out", "examples", "tokens")
        }
        share = {"share_of_tokens": total["tokens"] / tokens if tokens else 0.0}
        return source.model_dump(mode="json", exclude_none=True) | {"format": self.formats[i]} | total | share
