"""Who stands still: beats and the times they came at."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from stages.training.feed import Shares, owned
from stages.training.watchdog import Beat, Standing, frames_of

ONE = Beat(
    0, 100, "n0", "10.0.0.1", 5, ("train (trainer.py:1)", "all_reduce (torch/distributed/distributed_c10d.py:3)")
)
TWO = Beat(1, 200, "n1", "10.0.0.2", 5, ("train (trainer.py:1)", "reward (mine.py:7)"))


def beats(standing: Standing, until: float, *workers: Beat, moving: bool = False) -> None:
    for at in range(int(until) + 1):
        for beat in workers:
            standing.note(replace(beat, step=at) if moving else beat, at)


def test_workers_that_beat_and_move_are_left_alone() -> None:
    standing = Standing()
    beats(standing, 1000, ONE, TWO, moving=True)
    assert standing.stalled(1000, 600) is None


def test_one_that_waits_for_another_is_left_alone() -> None:
    standing = Standing()
    for at in range(1001):
        standing.note(ONE, at)
        standing.note(replace(TWO, place=("export", f"write (file.py:{at})")), at)
    assert standing.stalled(1000, 600) is None


def test_a_worker_that_falls_silent_is_named_alone() -> None:
    standing = Standing()
    beats(standing, 100, ONE, TWO)
    for at in range(100, 162):
        standing.note(replace(ONE, step=at), at)
    assert standing.stalled(159, 600) is None
    what, guilty = standing.stalled(161, 600) or ("", [])
    assert guilty == [TWO] and "worker 1 (process 200 on 10.0.0.2) has not been heard of for 60 s, since step 5" in what


def test_a_short_bound_holds_for_silence_too() -> None:
    standing = Standing()
    beats(standing, 10, ONE)
    assert standing.stalled(4, 5) is None
    assert standing.stalled(16, 5) is not None


def test_where_nothing_moves_the_one_outside_collectives_is_named_and_all_are_ended() -> None:
    standing = Standing()
    beats(standing, 601, ONE, TWO)
    what, guilty = standing.stalled(601, 600) or ("", [])
    assert guilty == [ONE, TWO]
    assert "nothing has moved for 600 s, since step 5: worker 1" in what and "stands in reward (mine.py:7)" in what
    assert "worker 0" not in what


def test_a_worker_whose_checkpoint_is_on_its_way_is_left_alone() -> None:
    """Training waits for the thread that writes it; what that copies is told with the beats."""
    waits = replace(ONE, place=("wait (writer.py:1)", "join (threading.py:2)"))
    standing = Standing(2)
    for at in range(2001):
        standing.note(replace(waits, blocks=at // 500), at)  # a block in 500 s
        standing.note(TWO, at)
    assert standing.stalled(2000, 600) is None
    assert standing.stalled(2000, 400) is None and standing.stalled(2030, 20) is not None


def test_a_worker_that_was_never_heard_of_is_named_and_not_the_one_that_waits_for_it() -> None:
    standing = Standing(2)
    assert standing.stalled(1000, 600) is None, "Ray Train may be starting them"
    for at in range(1000, 1602):
        standing.note(ONE, at)
        assert at < 1601 or standing.stalled(at, 600) is not None
    what, guilty = standing.stalled(1601, 600) or ("", [])
    assert guilty == [ONE] and what.startswith("worker 1 has never been heard of, 601 s after others")
    standing.leave(0)  # it was ended
    assert standing.stalled(9999, 600) is None


def test_a_worker_that_was_never_heard_of_is_missed_though_others_move() -> None:
    standing = Standing(2)
    beats(standing, 61, ONE, moving=True)
    assert standing.stalled(60, 5) is None, "imports from a slow disk"
    what, guilty = standing.stalled(61, 5) or ("", [])
    assert "worker 1 has never been heard of, 61 s after others" in what and [beat.rank for beat in guilty] == [0]


def test_lines_for_the_terminal_are_no_movement() -> None:
    standing = Standing(1)
    for at in range(602):
        standing.note(replace(ONE, events=f"{at}\n"), at)
    assert standing.stalled(601, 600) is not None


def test_a_worker_that_is_done_is_not_missed() -> None:
    standing = Standing()
    beats(standing, 10, ONE, TWO)
    standing.leave(1)
    standing.leave(0)
    assert standing.stalled(1000, 60) is None


def test_a_new_process_of_the_same_rank_has_moved() -> None:
    standing = Standing()
    beats(standing, 10, ONE)
    standing.note(replace(ONE, pid=101), 70)
    assert standing.moved[0] == 70


def test_where_a_thread_stands() -> None:
    entered, leave = threading.Event(), threading.Event()

    def waits_here() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=waits_here)
    thread.start()
    entered.wait()
    frames = frames_of(thread.ident or 0)
    leave.set()
    thread.join()
    assert any(frame.startswith("waits_here (") for frame in frames)
    assert frames_of(0) == ()


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7, 8])
def test_the_same_steps_for_another_number_of_workers(workers: int) -> None:
    """Rows of a step, whoever shares it: all of them, once, and no more than a worker's micro-batches hold."""
    import numpy as np

    most = Shares(8, 4)
    cut = most.over(workers)
    assert cut.rows_per_step == most.rows_per_step == 32 and cut.steps(101) == most.steps(101)
    shares = [owned(np.arange(32), rank, cut, 0) for rank in range(workers)]
    assert (sum(share.astype(int) for share in shares) == 1).all()
    assert max(share.sum() for share in shares) <= cut.batch_size * cut.accumulation
