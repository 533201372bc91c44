"""The order of the data: every row once an epoch, the same rows in a step whatever the workers, resumable anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from stages.errors import StageError
from stages.training import feed as feeds
from stages.training.feed import Feed, FeedLoader, Group, Position, Row, Shares, read_window, total_steps, windows


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
        for epoch in range(feed.start.epoch, feed.epochs):
            for window in windows(feed.groups, seed=feed.seed, epoch=epoch, window_rows=20):
                yield from read_window(window, feed.rank, feed.shares, feed.seed, feed.first_row(epoch))

    monkeypatch.setattr(feeds, "stream", stream)


def feeds_of(
    groups: list[Group], shares: Shares, *, epochs: float = 2, seed: int = 0, start: Position | None = None
) -> list[Feed]:
    """One feed for each worker."""
    start = start or Position()
    steps = total_steps(shares, sum(n for _, _, n in groups), epochs, start)
    return [Feed(groups, rank=r, shares=shares, steps=steps, seed=seed, start=start) for r in range(shares.workers)]


def epochs(
    groups: list[Group], shares: Shares, *, count: int = 2, seed: int = 0, start: Position | None = None
) -> list[list[list[list[Row]]]]:
    """[epoch][worker][micro-batch] -> rows, for the epochs from `start` on."""
    workers = feeds_of(groups, shares, epochs=count, seed=seed, start=start)
    return [[list(worker) for worker in workers] for _ in range(workers[0].start.epoch, workers[0].epochs)]


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


@pytest.mark.parametrize("step", [1, 12, 13, 14, 20])
def test_a_resumed_feed_goes_on_with_the_very_rows_that_were_next(tmp_path: Path, step: int) -> None:
    groups, shares = dataset(tmp_path, 101), Shares(2, 4)  # 13 steps an epoch
    whole = [steps_of(epoch, shares) for epoch in epochs(groups, shares)]
    start = feeds_of(groups, shares)[0].position(step)
    resumed = [steps_of(epoch, shares) for epoch in epochs(groups, shares, start=start)]
    assert [s for epoch in resumed for s in epoch] == [s for epoch in whole for s in epoch][step:]


@pytest.mark.parametrize("step", [3, 12, 13, 20, 26])
@pytest.mark.parametrize("later", [Shares(1, 4), Shares(3, 4), Shares(2, 2, 3)])
def test_another_number_of_workers_trains_exactly_the_rows_that_were_left(
    tmp_path: Path, step: int, later: Shares
) -> None:
    groups, before = dataset(tmp_path, 101), Shares(2, 4)
    first = feeds_of(groups, before)[0]
    start = first.position(step)
    whole = [ids(batches) for epoch in epochs(groups, Shares(1, 1)) for batches in epoch]  # the order of both epochs
    left = whole[start.epoch][start.row :] + [i for rows in whole[start.epoch + 1 :] for i in rows] if step < 26 else []
    feeds = feeds_of(groups, later, start=start)
    got: list[int] = []
    for epoch in range(feeds[0].start.epoch, feeds[0].epochs):
        batches = [list(feed) for feed in feeds]
        assert {len(each) for each in batches} == {feeds[0].steps_in(epoch) * later.accumulation}
        got += [i for step in steps_of(batches, later) for i in step]
    assert Counter(got) == Counter(left)
    assert {feed.step for feed in feeds} == {feeds[0].steps}
    spans = [first.span(s) for s in range(step)] + [feeds[0].span(s) for s in range(step, feeds[0].steps)]
    assert [row for epoch, a, b in spans for row in range(epoch * 101 + a, epoch * 101 + b)] == list(range(202))


@pytest.mark.parametrize(
    ("epochs", "start", "steps"),
    [
        (2, Position(), 26), (1.5, Position(), 20), (0.1, Position(), 2),
        (2, Position(0, 40, 10), 10 + 8 + 13), (2, Position(1, 100, 40), 41), (2, Position(2, 0, 40), 40),
        (1.5, Position(1, 50, 7), 8), (1.5, Position(1, 56, 7), 7), (0.1, Position(0, 40, 10), 10),
    ],
)  # fmt: skip
def test_total_steps(epochs: float, start: Position, steps: int) -> None:
    """101 rows in steps of 8 are 13; what is done counts as it was done, what is left is cut anew."""
    assert total_steps(Shares(1, 8), 101, epochs, start) == steps


def test_a_finished_feed_gives_nothing_more(tmp_path: Path) -> None:
    shares = Shares(1, 4)
    for start in (Position(0, 12, 3), Position(0, 31, 3), Position(1, 0, 3)):
        feed = Feed(dataset(tmp_path, 31), rank=0, shares=shares, steps=3, seed=0, start=start)
        assert list(feed) == []


def test_rows_that_are_not_the_workers_share_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = feeds.stream

    def losing(feed: Feed):  # type: ignore[no-untyped-def]
        for table in stream(feed):
            yield table.filter(pa.compute.not_equal(table["position"], 10))

    monkeypatch.setattr(feeds, "stream", losing)
    (feed,) = feeds_of(dataset(tmp_path, 31), Shares(1, 4))
    with pytest.raises(StageError, match=r"fed 3 rows for step 3 .* rows 8 to 12 of epoch 1"):
        list(feed)


@pytest.mark.parametrize("shares", [Shares(1, 4), Shares(2, 4), Shares(3, 2, 2)])
def test_every_worker_gets_as_many_micro_batches_and_placeholders_are_no_rows(tmp_path: Path, shares: Shares) -> None:
    groups = dataset(tmp_path, 31)
    seen: list[int] = []
    counts = set()
    for rank in range(shares.workers):
        feed = Feed(groups, rank=rank, shares=shares, steps=shares.steps(31), seed=0)
        batches = list(FeedLoader(feed, lambda rows: {"seen": [x["row"] for x in rows]}, {"row": -1}))
        counts.add(len(batches))
        for batch in batches:
            assert batch["rows"] == len([row for row in batch["seen"] if row >= 0])
            seen += [row for row in batch["seen"] if row >= 0]
    assert len(counts) == 1 and counts.pop() == shares.steps(31) * shares.accumulation
    assert len(seen) == len(set(seen)) == 31
