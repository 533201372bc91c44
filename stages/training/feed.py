"""What one worker trains on: its share of every step, streamed from the prepared Parquet shards through Ray Data.

The order of an epoch is a pure function of (data, seed, epoch): the row groups are shuffled and cut into windows, and rows
are shuffled within a window, so reading stays sequential and memory is that of a window. Position p of that order belongs
to optimiser step p // global_batch, and there to worker (p % global_batch) % workers. So every row is seen exactly once an
epoch by exactly one worker, a step holds the same rows however many workers share it, and a resumed run starts at the row
where it stopped. (Ray's own `streaming_split(equal=True)` drops the rows that do not divide evenly: ray#48224.)

Every worker reads every window and keeps its own rows: token ids are small beside the work they cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WINDOW_ROWS = 16384
WINDOW_TOKENS = 1 << 25  # a window of long rows has fewer of them
PIECE_ROWS = 512  # rows of one block on its way to the worker

Group = tuple[str, int, int]  # file, row group, rows


@dataclass(frozen=True)
class Shares:
    """How steps are cut: `workers` x `accumulation` micro-batches of `batch_size` rows."""

    workers: int
    batch_size: int
    accumulation: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.workers * self.batch_size * self.accumulation

    def steps(self, rows: int) -> int:
        """Steps of an epoch; the last one may be smaller, but is not left out."""
        return -(-rows // self.rows_per_step)


@dataclass(frozen=True)
class Window:
    """Row groups that are shuffled together. Its rows have the positions `start .. start + rows` of the epoch."""

    epoch: int
    index: int
    start: int
    groups: tuple[Group, ...]

    @property
    def rows(self) -> int:
        return sum(rows for _, _, rows in self.groups)

    def order(self, seed: int | None) -> np.ndarray:
        if seed is None:
            return np.arange(self.rows)
        return np.random.default_rng([seed, self.epoch, self.index, 1]).permutation(self.rows)


def windows(groups: list[Group], *, seed: int | None, epoch: int, window_rows: int) -> list[Window]:
    """The windows of an epoch, in order; without a seed that of the data."""
    out: list[Window] = []
    start, held, size = 0, [], 0
    places = np.arange(len(groups))
    if seed is not None:
        places = np.random.default_rng([seed, epoch, 0]).permutation(places)
    for i in places:
        held.append(groups[i])
        size += groups[i][2]
        if size >= window_rows:
            out.append(Window(epoch, len(out), start, tuple(held)))
            start, held, size = start + size, [], 0
    if held:
        out.append(Window(epoch, len(out), start, tuple(held)))
    return out


def owned(positions: np.ndarray, rank: int, shares: Shares, first_step: int) -> np.ndarray:
    """Which of these positions of an epoch worker `rank` trains, from `first_step` of the epoch on."""
    mine = (positions % shares.rows_per_step) % shares.workers == rank
    return mine & (positions >= first_step * shares.rows_per_step)


def read_window(window: Window, rank: int, shares: Shares, seed: int | None, first_step: int) -> Iterator[pa.Table]:
    """The worker's rows of a window, in order, with their `position` in the epoch."""
    positions = window.start + np.arange(window.rows)
    mine = owned(positions, rank, shares, first_step)
    if not mine.any():
        return
    table = pa.concat_tables([pq.ParquetFile(file).read_row_group(group) for file, group, _ in window.groups])
    table = table.take(pa.array(window.order(seed)[mine]))
    table = table.append_column("epoch", pa.array(np.full(len(table), window.epoch)))
    table = table.append_column("position", pa.array(positions[mine]))
    for at in range(0, len(table), PIECE_ROWS):
        yield table.slice(at, PIECE_ROWS)


Row = dict[str, Any]


class Feed:
    """The training data of one worker, as micro-batches of rows.

    Iterating it once gives the rest of one epoch: `micro_batches` lists of rows, of which the last ones may be smaller or
    empty where the rows of an epoch do not divide evenly. The stream itself runs through all epochs without a pause.

    Args:
        groups: the row groups of the prepared data (`Prepared.row_groups()`).
        steps: optimiser steps in all, over all epochs; the feed ends there.
        seed: of the order of the rows; None leaves them in that of the data.
        start_step: optimiser steps already done.
        tokens_per_row: about how long rows are: it bounds the rows that are held and shuffled together.
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        rank: int,
        shares: Shares,
        steps: int,
        seed: int | None,
        start_step: int = 0,
        tokens_per_row: float = 1.0,
    ) -> None:
        self.window_rows = max(1, min(WINDOW_ROWS, int(WINDOW_TOKENS / tokens_per_row)))
        self.groups, self.rank, self.shares, self.steps, self.seed = groups, rank, shares, steps, seed
        self.rows = sum(rows for _, _, rows in groups)
        self.steps_per_epoch = shares.steps(self.rows)
        self.step = start_step
        self._stream: Iterator[Row] | None = None
        self._next: Row | None = None

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch, the same on every worker."""
        return self.steps_per_epoch * self.shares.accumulation

    def rows_in_step(self, step: int) -> int:
        """Rows of a step over all workers."""
        in_epoch = step % self.steps_per_epoch
        return min(self.shares.rows_per_step, self.rows - in_epoch * self.shares.rows_per_step)

    def __iter__(self) -> Iterator[list[Row]]:
        if self._stream is None:
            self._stream = self._rows()
            self._next = next(self._stream, None)
        epoch = self.step // self.steps_per_epoch
        while self.step < min((epoch + 1) * self.steps_per_epoch, self.steps):
            rows = self._take(epoch, self.step % self.steps_per_epoch)
            self.step += 1
            size = self.shares.batch_size
            yield from (rows[i * size : (i + 1) * size] for i in range(self.shares.accumulation))

    def _take(self, epoch: int, step: int) -> list[Row]:
        """This worker's rows of one step."""
        assert self._stream is not None
        end, out = (step + 1) * self.shares.rows_per_step, []
        while self._next is not None and self._next["epoch"] == epoch and self._next["position"] < end:
            out.append(self._next)
            self._next = next(self._stream, None)
        return out

    def _rows(self) -> Iterator[Row]:
        for table in stream(self):
            yield from table.to_pylist()


def stream(feed: Feed) -> Iterator[pa.Table]:
    """The worker's tables in order, read ahead by Ray Data tasks while the worker trains."""
    import ray.data

    first_epoch, first_step = divmod(feed.step, feed.steps_per_epoch)
    plan = [
        (window, first_step if epoch == first_epoch else 0)
        for epoch in range(first_epoch, feed.epochs)
        for window in windows(feed.groups, seed=feed.seed, epoch=epoch, window_rows=feed.window_rows)
        if epoch > first_epoch or window.start + window.rows > first_step * feed.shares.rows_per_step
    ]
    rank, shares, seed = feed.rank, feed.shares, feed.seed

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for i in batch["window"]:
            window, start = plan[int(i)]
            yield from read_window(window, rank, shares, seed, start)

    if not plan:
        return
    # num_cpus=0: on a machine whose cores all train, a reader that asked for one would wait for ever.
    dataset = ray.data.from_items([{"window": i} for i in range(len(plan))], override_num_blocks=len(plan)).map_batches(
        read, batch_size=1, num_cpus=0
    )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


Collator = Callable[[list[Row]], dict[str, Any]]


class FeedLoader:
    """The feed as the dataloader that transformers' Trainer wants: collated micro-batches, with a length.

    A micro-batch carries its number of `rows`, and `row_weight`, by which a mean over its rows must be multiplied for the
    mean over workers and accumulation steps to be the mean over all rows of the step (it is not 1 only in an epoch's last
    step). An empty one is a placeholder row of weight 0, since every worker must run the same number of backward passes.
    `ragged` says that workers may hold different numbers of rows in this step.
    """

    def __init__(self, feed: Feed, collate: Collator, placeholder: Row) -> None:
        self.feed, self.collate, self.placeholder = feed, collate, placeholder

    def __len__(self) -> int:
        return self.feed.micro_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shares = self.feed.shares
        micro_batches_per_step = shares.workers * shares.accumulation
        for rows in self.feed:
            step_rows = self.feed.rows_in_step(self.feed.step - 1)
            batch = self.collate(rows or [self.placeholder])
            batch["rows"] = len(rows)
            batch["row_weight"] = len(rows) * micro_batches_per_step / step_rows
            batch["ragged"] = step_rows < shares.rows_per_step
            yield batch
