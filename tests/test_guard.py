"""When a training is stopped, and what is kept of the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from stages.errors import StageError
from stages.training.guard import Guard, rows_of
from stages.training.optimizers import is_own, load, options

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, 6, 7, -100]]),
}


def test_a_training_that_learns_badly_is_left_alone(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    for step, loss in enumerate([4.0, 9.0, 9.0, 9.0, 9.0, 7.9, 9.0, 0.1, 3.0, 0.2], 1):
        guard.step(loss, step, BATCH)
    assert not guard.file.exists()


def test_a_loss_that_stays_high_has_exploded(tmp_path: Path) -> None:
    guard = Guard(tmp_path)
    for step in range(1, 6):
        guard.step(4.0 if step == 1 else 8.5, step, BATCH)
    with pytest.raises(
        StageError, match=r"exploded: 8.5 at step 6, more than twice the 4 of the first step, for 5 steps"
    ):
        guard.step(8.5, 6, BATCH)
    assert [json.loads(line) for line in guard.file.open()] == [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stops_at_once(tmp_path: Path, value: float) -> None:
    with pytest.raises(StageError, match="loss of step 3"):
        Guard(tmp_path).micro_batch(value, 3, BATCH)
    with pytest.raises(StageError, match="gradient of step 3"):
        Guard(tmp_path).gradient(value, 3, BATCH)


def test_pairs_are_kept_with_their_answers_marked() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
             "completion_mask": torch.tensor([[0, 1, 1], [0, 1, 0]])}  # fmt: skip
    assert rows_of(batch) == [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 8], "labels": [-100, 8]},
    ]


def test_own_optimizers_are_told_from_the_trainers() -> None:
    assert is_own("torch.optim:SGD") and is_own("torch.optim.SGD") and not is_own("adamw_torch") and not is_own(None)
    assert load("torch.optim:SGD") is load("torch.optim.SGD") is torch.optim.SGD
    assert options("betas=(0.9, 0.95), fused=True, mode='x'") == {"betas": (0.9, 0.95), "fused": True, "mode": "x"}
    for wrong, told in (
        ("nowhere.at:all", "No module named 'nowhere'"),
        ("torch.optim:Sgd", "has no 'Sgd'"),
        ("math:pi", "is a float"),
    ):
        with pytest.raises(ValueError, match=told):
            load(wrong)
