"""Judges in Ray actors: the same numbers as in this process, and what errors, lost actors and a full cluster look like."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.base import Resources
from stages.errors import StageError
from stages.rewards import Answered, Scorer
from stages.rl.judging import RESTARTS, Judge, JudgeActors, Judged, JudgeOptions
from stages.training.launch import launch

from ..conftest import CODE
from ..test_judging import answered, options, write_functions

FUNCTIONS_HERE = """
import os, signal
from pathlib import Path

def obeys(completion_ids, wanted, **_):
    for one in wanted:
        if one == "nan":
            return [float("nan") if each == "nan" else 0.0 for each in wanted]
        if one is not None and not Path(one).exists():
            Path(one).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(os.getpid()) for _ in completion_ids]

def dies(completion_ids, **_):
    import torch
    if 9 in map(len, completion_ids):
        os.kill(os.getpid(), signal.SIGKILL)
    return [torch.get_num_threads() for _ in completion_ids]
"""


def started(options: JudgeOptions, **asked: Any) -> JudgeActors:
    return JudgeActors.start(options, **{"actors": 2, "cpus": 0, "gpus": 0, "timeout_s": 300} | asked)


@pytest.fixture(scope="module", autouse=True)
def _rewards() -> None:
    (CODE / "judging_in_actors.py").write_text(FUNCTIONS_HERE)
    write_functions()


def term(path: str) -> Scorer:
    return Scorer(path, 1.0, function=path)


@pytest.fixture(scope="module")
def separate(ray_address: str, model: str) -> Iterator[JudgeActors]:
    """Two actors with a reference; besides its scores each says which process it is, or does what a row wants."""
    asked = options(model)
    actors = started(replace(asked, scorers=[*asked.scorers, term("judging_in_actors:obeys")]))
    yield actors
    actors.close()


def wanting(count: int, **wanted: str) -> list[Answered]:
    """Rows; `row_7="nan"` is what the row 7 wants."""
    rows = answered(count)
    for row in rows:
        row.columns["wanted"] = wanted.get(f"row_{row.row}")
    return rows


def same(there: list[Judged], here: list[Judged]) -> None:
    assert [one.scores[:2] for one in there] == [one.scores for one in here]
    for ours, theirs in zip(here, there, strict=True):
        assert ours.ref_logps is not None and theirs.ref_logps is not None
        np.testing.assert_allclose(theirs.ref_logps, ours.ref_logps, atol=1e-5)


def test_the_same_numbers_as_in_this_process(separate: JudgeActors, model: str) -> None:
    rows = wanting(23)
    here = Judge(options(model), "cpu").submit(rows)()
    first, second = separate.submit(rows), separate.submit(rows[:5])  # both on their way at once
    there = first()
    assert [one.scores[:2] for one in second()] == [one.scores[:2] for one in there[:5]]
    same(there, here)
    processes = [one.scores[2] for one in there]
    assert len({*processes} - {os.getpid()}) == 2
    assert all(len({*processes[at : at + 4]}) == 1 for at in range(0, 23, 4))
    assert separate.submit([])() == []


def from_a_worker(config: dict[str, Any]) -> list[float]:
    return [one.scores[0] for one in config["judges"].submit(config["rows"])()]


def test_workers_of_a_training_call_the_handle(separate: JudgeActors, tmp_path: Path) -> None:
    config = {"judges": separate, "rows": wanting(6)}
    found = launch(from_a_worker, config, resources=Resources(), local=False, folder=tmp_path / "run")
    assert found == [float(len(row.answer_ids)) for row in answered(6)]


def test_a_reward_that_is_no_number_is_told_with_its_row(separate: JudgeActors) -> None:
    with pytest.raises(StageError) as error:
        separate.submit(wanting(11, row_7="nan"))()
    assert str(error.value).startswith(
        "rewards: judging_in_actors:obeys gave nan for prompts.jsonl, row 7 (the answer 'a"
    )
    assert len(separate.submit(wanting(11))()) == 11  # they go on


def test_a_lost_actor_is_replaced_and_its_chunk_judged_again(separate: JudgeActors, model: str, tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    rows = wanting(11, row_5=str(mark))
    judged = separate.submit(rows)()
    assert mark.exists()
    same(judged, Judge(options(model), "cpu").submit(rows)())


def test_one_that_is_lost_again_and_again_is_given_up(ray_address: str, model: str) -> None:
    """It has its CPUs, until it is closed."""
    import ray

    asked = options(model, scorers=[term("judging_in_actors:dies")], reference=None)
    actors = started(asked, actors=1, cpus=2, grows=False)
    assert ray.available_resources().get("CPU", 0) == 2
    assert [one.scores for one in actors.submit(answered(5))()] == [[2.0]] * 5
    with pytest.raises(StageError, match=f"was lost {RESTARTS + 1} times: out of memory"):
        actors.submit(answered(11))()
    actors.close()
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 4:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scorers": [term("nowhere_to_be_found:f")]}, "rewards: 'nowhere_to_be_found:f': No module named"),
        ({"reference": "/nothing/there"}, r"Error: .*/nothing/there"),
    ],
    ids=["function", "reference"],
)
def test_what_cannot_be_loaded_is_told_before_anything_is_judged(
    ray_address: str, model: str, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(StageError, match=says):
        started(options(model, **wrong), actors=1)


def test_more_than_the_cluster_has_is_told_quickly(ray_address: str, model: str) -> None:
    begun = time.monotonic()
    for asked, says in (
        ({"cpus": 100}, r"2 processes .* have no room: each asks for 100 CPUs and 0 GPUs, and the cluster has 4 CPUs"),
        ({"gpus": 1}, r"each asks for 0 CPUs and 1 GPUs, .* and 0 GPUs \(0 free\); ask for fewer"),
        ({"cpus": 3}, "have no room: each asks for 3 CPUs"),
    ):
        with pytest.raises(StageError, match=says):
            started(options(model), grows=False, **asked)
    assert time.monotonic() - begun < 10
    # One that may grow is waited for.
    with pytest.raises(StageError, match=r"2 of 2 processes .* are not ready after 3 s: each asks for 5 CPUs"):
        started(options(model), timeout_s=3, cpus=5)
