"""The pool with real Ray: order, errors, what a lost actor costs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from stages.base import Resources, StageContext
from stages.errors import StageError
from stages.pool import run_pool


class Squares:
    """Squares, later ones sooner; `wrong` names what goes wrong at 5."""

    def __init__(self, wrong: str = "", mark: Path | None = None) -> None:
        if wrong == "start":
            raise StageError("there is no such model")
        self.wrong, self.mark = wrong, mark

    def __call__(self, task: int) -> tuple[int, int, int]:
        import torch

        time.sleep(0.05 * (8 - task))
        if task == 5 and self.wrong == "told":
            raise StageError("row 5 is wrong\n  mend it")
        if task == 5 and self.wrong == "bug":
            raise KeyError("x")
        if task == 5 and self.mark is not None and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task, os.getpid(), torch.get_num_threads()


def context(work: Path, workers: int) -> StageContext:
    return StageContext("stage", work, work, {}, resources=Resources(workers=workers))


def test_results_are_in_order_and_made_by_two_processes(ray_address: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = run_pool(
        Squares, {}, range(8), ctx=context(tmp_path, 2), progress=lambda done, total: seen.append((done, total))
    )
    assert [result for result, _, _ in done] == [n * n for n in range(8)]
    assert len({pid for _, pid, _ in done} - {os.getpid()}) == 2
    assert {threads for _, _, threads in done} == {1}
    assert seen == [(n, 8) for n in range(1, 9)]


def test_little_is_done_here(tmp_path: Path) -> None:
    for options in ({"ctx": context(tmp_path, 1)}, {"ctx": context(tmp_path, 2), "little": True}):
        done = run_pool(Squares, {}, range(6, 8), **options)
        assert [(result, pid) for result, pid, _ in done] == [(36, os.getpid()), (49, os.getpid())]
    assert run_pool(Squares, {"wrong": "start"}, [], ctx=context(tmp_path, 2)) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("told", "row 5 is wrong\n  mend it"), ("bug", "KeyError: 'x'"), ("start", "there is no such model")],
)
def test_errors_are_told_in_a_line_or_two(ray_address: str, tmp_path: Path, wrong: str, says: str) -> None:
    with pytest.raises(StageError) as error:
        run_pool(Squares, {"wrong": wrong}, range(8), ctx=context(tmp_path, 2))
    assert str(error.value) == says


def test_a_lost_actor_costs_nothing_but_time(ray_address: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mark": tmp_path / "killed"}
    done = run_pool(Squares, options, range(8), ctx=context(tmp_path, 2))
    assert (tmp_path / "killed").exists() and [result for result, _, _ in done] == [n * n for n in range(8)]
