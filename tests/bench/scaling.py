"""Rates that do not depend on how busy the machine is (per processor second), for the paper in cluster_configs/README.md.

    python tests/bench/scaling.py questions.jsonl [--rows 40000] [--workers 64]

Data as in preparation.py: two-turn chats of GSM8K's questions. One process, one core: what a task of the preparation does, what
its Parquet takes on disk, and what the reader of one of many training workers does. Every worker reads all of the data and
keeps its rows, so the reader's rate is a bound on the tokens that the whole cluster trains in a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from preparation import tokenizer, write  # beside this file

from stages.data.chat import tokenizer_spec
from stages.data.chunks import chunks
from stages.data.encode import Recipe
from stages.data.prepare import prepare
from stages.data.shards import prepare_chunk
from stages.data.source import DataSource, find_files
from stages.training.feed import WINDOW_ROWS, Shares, read_window, windows


@contextmanager
def processor(what: str, amounts: dict[str, float]) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds = time.process_time() - started
    print(
        f"{what:42} {seconds:6.1f} s   " + "   ".join(f"{n / seconds:12,.0f} {unit}/s" for unit, n in amounts.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--workers", type=int, default=64)
    given = parser.parse_args()
    pa.set_cpu_count(1)
    recipe = Recipe("conversation", tokenizer_spec(tokenizer(given.data)))
    with tempfile.TemporaryDirectory() as folder:
        source = DataSource(path=str(write(given.data, Path(folder) / "chats.jsonl", given.rows)))
        size = Path(source.path).stat().st_size
        prepared = prepare([source], recipe, Path(folder) / "prepared")
        tokens = prepared.tokens
        stored = sum(f.stat().st_size for f in prepared.path.rglob("*.parquet"))
        print(
            f"{given.rows:,} rows, {tokens:,} tokens; text {size / tokens:.2f}, prepared {stored / tokens:.2f} bytes a token"
        )
        (file,) = find_files(source)
        with processor("prepare", {"rows": given.rows, "tokens": tokens}):
            for index, chunk in enumerate(chunks(0, file)):
                prepare_chunk(index, chunk, source, "messages", recipe, Path(folder))
        shares = Shares(given.workers, 1)
        for shuffled in (0, None):
            with processor(
                f"read by 1 of {given.workers}, {'shuffled' if shuffled == 0 else 'in order'}", {"tokens": tokens}
            ):
                for window in windows(prepared.row_groups(), seed=shuffled, epoch=0, window_rows=WINDOW_ROWS):
                    for table in read_window(window, 0, shares, shuffled, 0):
                        table.to_pylist()


if __name__ == "__main__":
    main()
