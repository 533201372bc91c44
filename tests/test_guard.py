"""When a training is stopped, and what is kept of the batch."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import StageError
from stages.own import is_own, load, options, problem, source, use
from stages.training.answers import answer_collator
from stages.training.guard import Guard, rows_of
from stages.training.launch import first_cause

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, 6, 7, -100]]),
}


def steps(guard: Guard, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        guard.step([loss], step, [BATCH])


@pytest.mark.parametrize(
    "losses",
    [
        [4.0] * 10 + [7.0] * 30,  # worse, less than twice
        [0.2] + [0.9] * 40,  # an easy first batch
        [0.3] * 20 + [1.2] * 40,  # harder data later: no worse than guessing
        [8.0] * 10 + [40.0] * 2 + [8.0] * 30,  # spikes
        [9.5] * 30,  # from scratch a little above guessing
    ],
)
def test_a_training_that_learns_badly_is_left_alone(tmp_path: Path, losses: list[float]) -> None:
    guard = Guard(tmp_path, hopeless=math.log(4096))
    steps(guard, losses)
    assert not guard.file(0).exists()


def test_a_loss_that_stays_high_has_exploded(tmp_path: Path) -> None:
    guard = Guard(tmp_path, hopeless=math.log(4096))
    with pytest.raises(StageError, match=r"exploded: 8\.4 over the 10 steps to 17, 4 at the start"):
        steps(guard, [4.0] * 9 + [4.0] + [10.285714285714286] * 20)
    assert [json.loads(line) for line in guard.file(0).open()] == [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stops_at_once(tmp_path: Path, value: float) -> None:
    with pytest.raises(StageError, match=f"loss of step 3 is {value}"):
        Guard(tmp_path, 5.0).step([value], 3, [BATCH, BATCH])
    assert len((tmp_path / "bad_batch.jsonl").read_text().splitlines()) == 2, "both micro-batches"
    with pytest.raises(StageError, match="gradient of step 3"):
        Guard(tmp_path, 5.0).gradient(value, 3, [BATCH])


def test_of_several_workers_the_one_whose_loss_is_no_number_keeps_its_rows(tmp_path: Path) -> None:
    for rank in range(3):
        with pytest.raises(StageError, match=r"bad_batch-1.jsonl: look"):
            Guard(tmp_path, 5.0, rank, 3).step([4.0, math.nan, 4.0], 1, [BATCH])
    assert [p.name for p in tmp_path.iterdir()] == ["bad_batch-1.jsonl"]
    for rank in range(3):
        with pytest.raises(StageError):
            Guard(tmp_path, 5.0, rank, 3).gradient(math.nan, 1, [BATCH])
    assert len(list(tmp_path.iterdir())) == 3


def test_packs_are_kept_as_their_documents() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 0, 0]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
             "labels": torch.tensor([[-100, 6, 7, -100, 9, -100, -100]])}  # fmt: skip
    assert rows_of(batch) == [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]


@pytest.mark.parametrize("layout", ["padded", "flat", "shared"])
def test_pairs_are_kept_with_their_answers_marked(layout: Any) -> None:
    pair = {"prompt_ids": [5, 4], "chosen_ids": [6, 7], "rejected_ids": [8]}
    rows = rows_of(answer_collator(0, ("chosen_ids", "rejected_ids"), layout=layout, pad_to_multiple_of=8)([pair] * 2))
    apart = [
        {"input_ids": [5, 4, 6, 7], "labels": [-100, -100, 6, 7]},
        {"input_ids": [5, 4, 8], "labels": [-100, -100, 8]},
    ]
    together = [{"input_ids": [5, 4, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]}]
    assert sorted(rows, key=str) == sorted((together if layout == "shared" else apart) * 2, key=str)


def test_own_optimizers_are_told_from_the_trainers() -> None:
    assert is_own("torch.optim:SGD") and is_own("torch.optim.SGD") and not is_own("adamw_torch") and not is_own(None)
    assert load("torch.optim:SGD") is load("torch.optim.SGD") is torch.optim.SGD
    assert options("betas=(0.9, 0.95), fused=True, mode='x'") == {"betas": (0.9, 0.95), "fused": True, "mode": "x"}
    assert problem("torch.optim:SGD") is None and "no module 'nowhere'" in str(problem("nowhere.at:all"))
    for bad in ("a=b", "1, 2", "a=", "momentum"):
        with pytest.raises(ValueError, match="wanted are keyword arguments"):
            options(bad)
    for wrong, told in (
        ("nowhere.at:all", "No module named 'nowhere'"),
        ("torch.optim:Sgd", "has no 'Sgd'"),
        ("math:pi", "is a float"),
    ):
        with pytest.raises(ValueError, match=told):
            load(wrong)


def test_the_failure_that_is_told_is_the_cause() -> None:
    """Where one worker ends, the others' process groups break: that is an echo."""
    echo, cause = RuntimeError("[gloo/tcp/pair.cc:537] Read error: Connection reset by peer."), ValueError("no")
    ours = StageError("the loss of step 3 is nan")
    assert first_cause([echo, cause]) is cause and first_cause([cause, ours, echo]) is ours
    assert "a worker was lost" in str(first_cause([echo]))


def test_modules_of_another_spec_are_not_taken(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name_in_a_test.py").write_text(f"def f(): return {name!r}\n")
    use(str(tmp_path / "one"))
    assert load("same_name_in_a_test:f")() == "one"
    use(str(tmp_path / "two"))
    found = source("same_name_in_a_test:f")
    assert found is not None and found.parent.name == "two" and str(tmp_path / "one") not in sys.path
