"""The order of the data: every row once an epoch, the same rows in a step whatever the workers, resumable anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.training import feed as feeds
from stages.training.feed import Feed, FeedLoader, Group, Row, Shares, read_window, windows


def dataset(folder: Path, rows: int, group: int = 7) -> list[Group]:
    table = pa.table({"input_ids": [[i] for i in range(rows)], "source": ["f"] * rows, "row": list(range(rows))})
    path = folder / "shard.parquet"
    pq.write_table(table, path, row_group_size=group)
    meta = pq.ParquetFile(path).metadata
    return [(str(path), i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is a pure function; here the windows are read in place, in tests/integration by Ray Data."""

    def stream(feed: Feed):  # type: ignore[no-untyped-def]
        first_epoch, first_step = divmod(feed.step, feed.steps_per_epoch)
        for epoch in range(first_epoch, feed.epochs):
            for window in windows(feed.groups, seed=feed.seed, epoch=epoch, window_rows=20):
                yield from read_window(
                    window, feed.rank, feed.shares, feed.seed, first_step if epoch == first_epoch else 0
                )

    monkeypatch.setattr(feeds, "stream", stream)


def epochs(
    groups: list[Group], shares: Shares, *, count: int = 2, seed: int = 0, start_step: int = 0
) -> list[list[list[list[Row]]]]:
    """[epoch][worker][micro-batch] -> rows, for the epochs from `start_step` on."""
    rows = sum(n for _, _, n in groups)
    out: list[list[list[list[Row]]]] = []
    total = count * shares.steps(rows)
    workers = [
        Feed(groups, rank=r, shares=shares, steps=total, seed=seed, start_step=start_step)
        for r in range(shares.workers)
    ]
    for _ in range(start_step // shares.steps(rows), count):
        out.append([list(worker) for worker in workers])
    return out


def ids(batches: list[list[Row]]) -> list[int]:
    return [row["row"] for batch in batches for row in batch]


@pytest.mark.parametrize("rows", [1, 31, 64, 101])
@pytest.mark.parametrize("shares", [Shares(1, 4), Shares(2, 4), Shares(3, 2, 2), Shares(8, 4)])
def test_every_row_is_seen_exactly_once_an_epoch(tmp_path: Path, rows: int, shares: Shares) -> None:
    for epoch in epochs(dataset(tmp_path, rows), shares):
        assert Counter(i for worker in epoch for i in ids(worker)) == Counter(range(rows))
        assert len({len(worker) for worker in epoch}) == 1  # every worker makes the same number of backward passes
        assert all(len(batch) <= shares.batch_size for worker in epoch for batch in worker)


def steps_of(epoch: list[list[list[Row]]], shares: Shares) -> list[set[int]]:
    per_step = shares.accumulation
    count = len(epoch[0]) // per_step
    return [{i for worker in epoch for i in ids(worker[s * per_step : (s + 1) * per_step])} for s in range(count)]


def test_a_step_holds_the_same_rows_however_it_is_shared(tmp_path: Path) -> None:
    groups = dataset(tmp_path, 101)
    splits = [Shares(1, 8), Shares(2, 4), Shares(1, 4, 2), Shares(2, 2, 2), Shares(4, 2)]
    wanted = [steps_of(epoch, splits[0]) for epoch in epochs(groups, splits[0])]
    for shares in splits[1:]:
        assert [steps_of(epoch, shares) for epoch in epochs(groups, shares)] == wanted


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path) -> None:
    groups, shares = dataset(tmp_path, 64), Shares(1, 8)
    one, again = epochs(groups, shares), epochs(groups, shares)
    other = epochs(groups, shares, seed=1)
    assert ids(one[0][0]) == ids(again[0][0])
    assert ids(one[0][0]) != ids(one[1][0]) != ids(other[0][0])
    assert ids(one[0][0]) != list(range(64))


@pytest.mark.parametrize("start", [1, 12, 13, 14, 20])
def test_a_resumed_feed_goes_on_with_the_very_rows_that_were_next(tmp_path: Path, start: int) -> None:
    groups, shares = dataset(tmp_path, 101), Shares(2, 4)  # 13 steps an epoch
    whole = [steps_of(epoch, shares) for epoch in epochs(groups, shares)]
    resumed = [steps_of(epoch, shares) for epoch in epochs(groups, shares, start_step=start)]
    assert [s for epoch in resumed for s in epoch] == [s for epoch in whole for s in epoch][start:]


def test_a_finished_feed_gives_nothing_more(tmp_path: Path) -> None:
    feed = Feed(dataset(tmp_path, 31), rank=0, shares=Shares(1, 4), steps=3, seed=0, start_step=3)
    assert list(feed) == []


@pytest.mark.parametrize("shares", [Shares(1, 4), Shares(2, 4), Shares(3, 2, 2)])
def test_row_weights_make_a_mean_of_micro_batches_the_mean_of_rows(tmp_path: Path, shares: Shares) -> None:
    """Each micro-batch's mean, weighted and averaged over workers and accumulation, is the plain mean over the step's rows."""
    groups = dataset(tmp_path, 31)
    loaders = [
        FeedLoader(
            Feed(groups, rank=r, shares=shares, steps=shares.steps(31), seed=0),
            lambda rows: {"mean": sum(x["row"] for x in rows) / len(rows), "seen": rows},
            {"row": 10**6},
        )
        for r in range(shares.workers)
    ]
    batches = [list(loader) for loader in loaders]
    for step in range(shares.steps(31)):
        micro = [b for worker in batches for b in worker[step * shares.accumulation : (step + 1) * shares.accumulation]]
        rows = [x["row"] for b in micro for x in b["seen"] if x["row"] < 10**6]
        assert sum(b["mean"] * b["row_weight"] for b in micro) / len(micro) == pytest.approx(sum(rows) / len(rows))
