"""What one worker trains on: its share of every step, streamed from the prepared Parquet shards through Ray Data.

The order of an epoch is a pure function of (data, seed, epoch): the row groups are shuffled and cut into windows, and rows
are shuffled within a window, so reading stays sequential and memory is that of a window. Optimiser steps are cut from that
order one after the other, and the k-th row of a step belongs to worker k % workers. So every row is seen exactly once an
epoch by exactly one worker, a step holds the same rows however many workers share it, and a resumed run starts at the row
where it stopped, with as many workers as it likes. (Ray's own `streaming_split(equal=True)` drops the rows that do not
divide evenly: ray#48224.)

Every worker reads every window and keeps its own rows: token ids are small beside the work they cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stages.data.groups import Group, read_group
from stages.errors import StageError
from stages.training.meter import Meter

WINDOW_ROWS = 16384
WINDOW_TOKENS = 1 << 25  # a window of long rows has fewer of them
PIECE_ROWS = 512  # rows of one block on its way to the worker


@dataclass(frozen=True)
class Shares:
    """How steps are cut: `workers` x `accumulation` micro-batches of `batch_size` rows.

    `rows`, where it is given, is what a step has whatever the workers: each has its share of them, and the last of its
    micro-batches may be smaller, or empty.
    """

    workers: int
    batch_size: int
    accumulation: int = 1
    rows: int | None = None

    @property
    def rows_per_step(self) -> int:
        return self.rows or self.workers * self.batch_size * self.accumulation

    def over(self, workers: int) -> Shares:
        """The same steps, shared by another number of workers."""
        if workers == self.workers:
            return self
        accumulation = -(-self.rows_per_step // (workers * self.batch_size))
        return Shares(workers, self.batch_size, accumulation, self.rows_per_step)

    def steps(self, rows: int) -> int:
        """Steps of an epoch; the last one may be smaller, but is not left out."""
        return -(-rows // self.rows_per_step)


@dataclass(frozen=True)
class Position:
    """How far a training has come: `step` optimiser steps in all, and `row` rows of epoch `epoch` (counted from 0)."""

    epoch: int = 0
    row: int = 0
    step: int = 0


def total_steps(shares: Shares, rows: int, epochs: float, start: Position) -> int:
    """Steps of the whole training: those done at `start`, and what is left of `epochs` epochs in steps of these shares.

    The last epoch may be part of one: 1.5 epochs of 13 steps are 20 steps.
    """
    whole, each = math.floor(epochs), shares.steps(rows)
    part = min(rows, (math.ceil(epochs * each) - whole * each) * shares.rows_per_step)  # rows of the last epoch
    ends = [rows] * whole + [part]
    left = [shares.steps(max(0, end - start.row)) for end in ends[start.epoch : start.epoch + 1]]
    return start.step + sum(left) + sum(shares.steps(end) for end in ends[start.epoch + 1 :])


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


def owned(positions: np.ndarray, rank: int, shares: Shares, first_row: int) -> np.ndarray:
    """Which of these positions of an epoch worker `rank` trains, where steps are cut from `first_row` on."""
    mine = ((positions - first_row) % shares.rows_per_step) % shares.workers == rank
    return mine & (positions >= first_row)


def read_window(window: Window, rank: int, shares: Shares, seed: int | None, first_row: int) -> Iterator[pa.Table]:
    """The worker's rows of a window, in order, with their `position` in the epoch."""
    positions = window.start + np.arange(window.rows)
    mine = owned(positions, rank, shares, first_row)
    if not mine.any():
        return
    table = pa.concat_tables([read_group(file, group) for file, group, _ in window.groups])
    table = table.take(pa.array(window.order(seed)[mine]))
    table = table.append_column("epoch", pa.array(np.full(len(table), window.epoch)))
    table = table.append_column("position", pa.array(positions[mine]))
    for at in range(0, len(table), PIECE_ROWS):
        yield table.slice(at, PIECE_ROWS)


Row = dict[str, Any]


def length(row: Row) -> int:
    """Tokens of a row: of a pair its prompt and both answers."""
    names = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
    return sum(len(row[name]) for name in names if name in row)


class Feed:
    """The training data of one worker, as micro-batches of rows.

    Iterating it once gives the rest of one epoch: `micro_batches` lists of rows, of which the last ones may be smaller or
    empty where the rows of an epoch do not divide evenly. The stream itself runs through all epochs without a pause.

    Args:
        groups: the row groups of the prepared data (`Prepared.row_groups()`).
        steps: optimiser steps in all, over all epochs and with those that are done; the feed ends there.
        seed: of the order of the rows; None leaves them in that of the data.
        start: where training goes on.
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
        start: Position = Position(),
        tokens_per_row: float = 1.0,
    ) -> None:
        self.window_rows = max(1, min(WINDOW_ROWS, int(WINDOW_TOKENS / tokens_per_row)))
        self.groups, self.rank, self.shares, self.steps, self.seed = groups, rank, shares, steps, seed
        self.rows = sum(rows for _, _, rows in groups)
        self.steps_per_epoch = shares.steps(self.rows)
        self.start = start if start.row < self.rows else Position(start.epoch + 1, 0, start.step)
        self.step = start.step
        self._stream: Iterator[Row] | None = None
        self._next: Row | None = None

    @property
    def epochs(self) -> int:
        """Epochs that are begun when the feed ends."""
        end = self.position(self.steps)
        return end.epoch + (end.row > 0)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a whole epoch, the same on every worker."""
        return self.steps_per_epoch * self.shares.accumulation

    def first_row(self, epoch: int) -> int:
        return self.start.row if epoch == self.start.epoch else 0

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with (the first one here: goes on with)."""
        if epoch == self.start.epoch:
            return self.start.step
        first = self.shares.steps(self.rows - self.start.row)
        return self.start.step + first + (epoch - self.start.epoch - 1) * self.steps_per_epoch

    def steps_in(self, epoch: int) -> int:
        """Steps the feed gives in an epoch: the last may end early, the first may have begun before."""
        return max(0, min(self.first_step(epoch + 1), self.steps) - self.first_step(epoch))

    def span(self, step: int) -> tuple[int, int, int]:
        """(epoch, from, to): the rows of a step over all workers, as positions in the order of that epoch."""
        begun = step - self.first_step(self.start.epoch + 1)
        epoch = self.start.epoch if begun < 0 else self.start.epoch + 1 + begun // self.steps_per_epoch
        start = self.first_row(epoch) + (step - self.first_step(epoch)) * self.shares.rows_per_step
        return epoch, start, min(start + self.shares.rows_per_step, self.rows)

    def position(self, step: int) -> Position:
        """Where training stands when `step` steps are done."""
        if step == self.start.step:
            return self.start
        epoch, _, row = self.span(step - 1)
        return Position(epoch, row, step) if row < self.rows else Position(epoch + 1, 0, step)

    def ends(self, step: int) -> bool:
        """Whether training may be interrupted when `step` steps are done: always. (stages/rl/iterations.py)"""
        return True

    def rows_in_step(self, step: int) -> int:
        """Rows of a step over all workers."""
        _, start, end = self.span(step)
        return end - start

    def __iter__(self) -> Iterator[list[Row]]:
        if self._stream is None:
            self._stream = self._rows()
            self._next = next(self._stream, None)
        epoch = self.position(self.step).epoch
        while self.step < min(self.first_step(epoch + 1), self.steps):
            rows = self._take(*self.span(self.step))
            self.step += 1
            size = self.shares.batch_size
            if self.shares.accumulation > 1:
                rows.sort(key=length)  # the same step with less padding: what shares a micro-batch does not matter
            yield from (rows[i * size : (i + 1) * size] for i in range(self.shares.accumulation))

    def _take(self, epoch: int, start: int, end: int) -> list[Row]:
        """This worker's rows of one step.

        Raises:
            StageError: they are not exactly the rows that are its share.
        """
        assert self._stream is not None
        out: list[Row] = []
        while self._next is not None and self._next["epoch"] == epoch and self._next["position"] < end:
            out.append(self._next)
            self._next = next(self._stream, None)
        taken = [row["position"] for row in out]
        if taken != list(range(start + self.rank, end, self.shares.workers)):
            raise StageError(
                f"worker {self.rank} was fed {len(taken)} rows for step {self.step + 1} that are not its share of rows {start} "
                f"to {end} of epoch {epoch + 1}; the prepared data has changed under the run: remove it and run again"
            )
        return out

    def _rows(self) -> Iterator[Row]:
        for table in stream(self):
            yield from table.to_pylist()


def stream(feed: Feed) -> Iterator[pa.Table]:
    """The worker's tables in order, read ahead by Ray Data tasks while the worker trains."""
    import ray
    import ray.data
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    plan = [
        (window, feed.first_row(epoch))
        for epoch in range(feed.start.epoch, feed.epochs)
        for window in windows(feed.groups, seed=feed.seed, epoch=epoch, window_rows=feed.window_rows)
        if window.start + window.rows > feed.first_row(epoch)
    ]
    rank, shares, seed = feed.rank, feed.shares, feed.seed

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for i in batch["window"]:
            window, start = plan[int(i)]
            yield from read_window(window, rank, shares, seed, start)

    if not plan:
        return
    # num_cpus=0: on a machine whose cores all train, a reader that asked for one would wait for ever. Read where it is trained:
    # on other nodes it would keep them from being given back.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    dataset = ray.data.from_items([{"window": i} for i in range(len(plan))], override_num_blocks=len(plan)).map_batches(
        read, batch_size=1, num_cpus=0, scheduling_strategy=here
    )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


Collator = Callable[[list[Row]], dict[str, Any]]


# What a batch carries besides the model's inputs.
OF_THE_FEED = ("rows", "tokens", "loss_share")


class FeedLoader:
    """The feed as the dataloader that transformers' Trainer wants: collated micro-batches, with a length.

    A micro-batch carries its number of `rows`. An empty one is a placeholder row, which weighs nothing in the loss, since every
    worker must run the same number of backward passes.
    """

    def __init__(self, feed: Feed, collate: Collator, placeholder: Row) -> None:
        self.feed, self.collate, self.placeholder = feed, collate, placeholder
        self.meter: Meter | None = None  # counts what is trained, and the time that training waits for it

    def __len__(self) -> int:
        return self.feed.micro_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.feed)
        if self.meter is not None and not any(self.meter.counts.values()):
            self.meter.since = time.perf_counter()  # what was done before the first batch is not training
        while True:
            asked = time.perf_counter()
            rows = next(batches, None)
            if rows is None:
                return
            batch = self.collate(rows or [self.placeholder])
            batch["rows"] = len(rows)
            if self.meter is not None:
                self.meter.batch(batch)
                self.meter.wait(time.perf_counter() - asked)
            yield batch
