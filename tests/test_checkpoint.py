"""Folders of checkpoints without a trainer: whole or damaged, newest, pruned, full disks; and the consumption ledger."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState

from stages import storage
from stages.base import Reporter
from stages.errors import StageError
from stages.training import writer as writing
from stages.training.checkpoint import (
    Record,
    best_of,
    checkpoints,
    damage,
    find_best,
    newest_sound,
    prune,
    publish,
    saved,
    step_of,
    sweep,
)
from stages.training.consumption import check_consumption
from stages.training.feed import Position
from stages.training.saving import identity, random_state, set_random_state, stopped_early, trained_weights
from stages.training.unpickling import load
from stages.training.writer import Writer, listed_files, sees, snapshot, write_state


def record(step: int, workers: int = 1) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "row": 8 * step, "workers": workers, "zero": None, "identity": "m"}


def make(folder: Path, step: int) -> Path:
    making = folder / f".saving-{step}"
    making.mkdir(parents=True)
    files = {
        name: write_state(making / name, state) for name, state in (("weights.pt", torch.arange(100)), ("sub/a", "x"))
    }
    return publish(making, Record(**record(step), files=files))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------ folders


def test_a_checkpoint_that_was_published_is_sound_and_says_where_it_stands(tmp_path: Path) -> None:
    path = make(tmp_path, 12)
    found = saved(path)
    assert names(tmp_path) == ["checkpoint-12"] and found is not None
    assert damage(found) is None and found.record.position == Position(0, 96, 12)
    assert torch.equal(torch.load(path / "weights.pt"), torch.arange(100))


def truncate(path: Path) -> None:
    (path / "weights.pt").write_bytes((path / "weights.pt").read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray((path / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "weights.pt").write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (truncate, r"weights.pt has \d+ bytes of \d+"),
        (flip, "weights.pt has changed since it was written"),
        (lambda path: (path / "sub" / "a").unlink(), "sub/a is missing"),
        (lambda path: (path / "complete.json").unlink(), "no readable complete.json"),
        (lambda path: (path / "complete.json").write_text('{"step": 9'), "no readable complete.json"),
        (lambda path: (path / "complete.json").write_text('{"step": 9, "files": {}}'), "no readable complete.json"),
    ],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, harm: Any, why: str) -> None:
    make(tmp_path, 6), make(tmp_path, 9)
    harm(tmp_path / "checkpoint-9")
    told: list[str] = []
    chosen = newest_sound(tmp_path, told.append)
    assert chosen is not None and chosen.path.name == "checkpoint-6"
    assert len(told) == 2 and told[1] == "training goes on from checkpoint-6"
    assert re.fullmatch(rf"checkpoint-9 is damaged \({why}\) and is not used", told[0])
    harm(tmp_path / "checkpoint-6")
    assert newest_sound(tmp_path, told.append) is None
    assert told[-1] == "no checkpoint is sound: training starts from the beginning"


def test_what_is_half_made_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    make(tmp_path, 100), make(tmp_path, 20)
    for name in (".saving-120", ".removed-10", ".universal-20"):
        (tmp_path / name).mkdir()
    (tmp_path / ".saving-120" / "weights.pt").write_bytes(b"half")
    (tmp_path / ".saving-130.error").write_text("why")
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]  # by number, not by letter
    sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-best"]
    assert newest_sound(tmp_path / "nowhere", print) is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, (), [9, 12]), (1, (), [12]), (0, (), [12]), (None, (), [3, 6, 9, 12]), (9, (), [3, 6, 9, 12]),
        (2, ("/elsewhere/checkpoint-3",), [3, 9, 12]), (1, ("checkpoint-12",), [12]),
        (1, ("checkpoint-3", "checkpoint-6"), [3, 6, 12]),
    ],
)  # fmt: skip
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: int | None, best: tuple[str, ...], left: list[int]
) -> None:
    for step in (3, 6, 9, 12):
        make(tmp_path, step)
    prune(tmp_path, keep, best)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)


def test_the_best_before_stays_while_the_best_is_the_newest(tmp_path: Path) -> None:
    state, left = TrainerState(), {}
    for step in range(1, 8):
        if step in (1, 4, 6):
            state.best_global_step, state.best_metric = step, 1 / step
        best = best_of(tmp_path, state, step)
        make(tmp_path, step)
        prune(tmp_path, 1, best)
        left[step] = [step_of(path) for path in checkpoints(tmp_path)]
    assert left == {1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 4], 5: [4, 5], 6: [4, 6], 7: [6, 7]}
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


@pytest.mark.parametrize(
    ("best", "wanted", "left"),
    [
        (3, True, ("checkpoint-3", 3, 0.5)),
        (6, True, (None, None, None)),  # its checkpoint is damaged: another best has to be found
        (9, True, (None, None, None)),
        (9, False, (None, 9, 0.5)),  # nobody wants its weights, and early stopping compares with its metric
        (None, True, (None, None, None)),
    ],
)
def test_a_best_without_its_checkpoint_is_none(
    tmp_path: Path, best: int | None, wanted: bool, left: tuple[str | None, int | None, float | None]
) -> None:
    make(tmp_path, 3), make(tmp_path, 6)
    (tmp_path / "checkpoint-6" / "complete.json").unlink()
    state = TrainerState(best_global_step=best, best_metric=0.5 if best else None)
    state.best_model_checkpoint = f"/where/the/folder/was/checkpoint-{best}" if best else None
    find_best(tmp_path, state, wanted)
    path, step, metric = left
    assert state.best_model_checkpoint == (str(tmp_path / path) if path else None)
    assert (state.best_global_step, state.best_metric) == (step, metric)


def test_a_damaged_checkpoint_is_replaced_when_training_comes_to_its_step_again(tmp_path: Path) -> None:
    flip(make(tmp_path, 9))
    made = saved(make(tmp_path, 9))
    assert made is not None and damage(made) is None and names(tmp_path) == ["checkpoint-9"]


# ------------------------------------------------------------------------------------------------ writing


def test_a_snapshot_does_not_change_with_the_original(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    shared = nn.Parameter(torch.ones(3))
    state = {
        "view": base[10:20],
        "tied": [shared, shared],
        "order": OrderedDict(a=1),
        "many": defaultdict(list, b=[base]),
    }
    copy = snapshot(state)
    base += 1
    with torch.no_grad():
        shared += 1
    assert torch.equal(copy["view"], torch.arange(10.0, 20.0)) and torch.equal(
        copy["many"]["b"][0], torch.arange(1000.0)
    )
    assert copy["tied"][0] is copy["tied"][1] and torch.equal(copy["tied"][0], torch.ones(3))
    assert type(copy["order"]) is OrderedDict and type(copy["many"]) is defaultdict and copy["many"]["new"] == []
    size, _ = write_state(tmp_path / "view.pt", {"view": copy["view"]})
    assert size < 2000  # ten numbers, not the thousand they were part of


def writers(folder: Path, workers: int) -> list[Writer]:
    return [Writer(folder, rank, workers) for rank in range(workers)]


def begin(writer: Writer, step: int, keep: int = 2) -> None:
    writer.begin(step, {f"rank-{writer.rank}.pt": torch.full((5,), step)}, record(step, writer.workers), keep, ())


def test_a_checkpoint_appears_when_every_workers_part_is_on_the_disk(tmp_path: Path) -> None:
    first, second, third = writers(tmp_path, 3)
    begin(first, 4), begin(third, 4)
    third.wait()
    time.sleep(0.2)
    assert names(tmp_path) == [".saving-4"]
    begin(second, 4)
    for each in (second, first):
        each.wait()
    found = saved(tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4"] and found is not None and damage(found) is None
    assert sorted(found.record.files) == ["rank-0.pt", "rank-1.pt", "rank-2.pt"] and first.saved == 1


def test_training_is_not_held_up_by_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = writing.write_state
    monkeypatch.setattr(writing, "write_state", lambda *args: (gate.wait(10), original(*args))[1])
    (writer,) = writers(tmp_path, 1)
    begin(writer, 1)
    writer.check()
    assert not checkpoints(tmp_path)
    gate.set()
    writer.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_checkpoint_that_is_being_written_is_seen_to_move(tmp_path: Path) -> None:
    before = storage.blocks()
    write_state(tmp_path / "state.pt", {name: torch.ones(1000) for name in "abc"})
    assert storage.blocks() - before >= 3  # a tensor is a block, however large


def on_a_full_disk(path: Path, state: Any) -> Any:
    """What our function does where the disk is full: /dev/full takes nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")
    return write_state(path, state)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    make(tmp_path, 3)
    both = writers(tmp_path, 2)
    monkeypatch.setattr(writing, "write_state", on_a_full_disk)
    begin(both[rank], 6)
    with pytest.raises(
        StageError, match=r"the disk is full .*checkpoint of step 6 .*Earlier checkpoints stay; make room"
    ):
        both[rank].wait()
    monkeypatch.setattr(writing, "write_state", write_state)
    begin(both[1 - rank], 6)
    if rank:  # the first worker waits for the other's part in vain, and says the same
        with pytest.raises(StageError, match="the disk is full"):
            both[0].wait()
    else:
        both[1].wait()
    sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_worker_that_writes_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "listed_files", lambda making, rank: listed_files(making, rank, patience=0.3))
    (first, _) = writers(tmp_path, 2)
    begin(first, 4)
    for i in range(4):  # it has begun another file: it is alive
        time.sleep(0.2)
        (tmp_path / ".saving-4" / f"shard-{i}").write_text("x")
        first.check()
    with pytest.raises(StageError, match=r"step 4 could not be written to .*: worker 1 has written nothing for"):
        first.wait()


def test_a_file_of_another_worker_is_looked_for_a_while(tmp_path: Path) -> None:
    late = threading.Timer(0.2, (tmp_path / "late").touch)
    late.start()
    assert sees(tmp_path / "late") and not sees(tmp_path / "never", 0.1)
    late.join()


def test_an_error_in_the_thread_reaches_the_training_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = Writer(tmp_path / "file" / "checkpoints", 0, 1)
    begin(writer, 1)
    deadline = time.time() + 5
    with pytest.raises(StageError, match=r"step 1 could not be written to .*Not a directory"):
        while time.time() < deadline:
            writer.check()
    writer.wait()  # told once


# ------------------------------------------------------------------------------------------------ the model's part


def test_a_models_identity_is_in_names_shapes_and_tuning_but_not_in_values() -> None:
    def model(width: int = 3) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))

    frozen = model()
    frozen[0].requires_grad_(False)
    prints = [identity(m) for m in (model(), model(), model(5), frozen, nn.Linear(4, 3))]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_the_weights_that_train_and_buffers_are_saved_once_each() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(7, 4), "norm": nn.BatchNorm1d(4), "out": nn.Linear(4, 7, bias=False)})
    model["out"].weight = model["in"].weight
    model["norm"].weight.requires_grad_(False)
    assert sorted(trained_weights(model)) == [
        "in.weight", "norm.bias", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var",
    ]  # fmt: skip


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    write_state(tmp_path / "rng.pt", snapshot(random_state()))
    wanted = draw()
    set_random_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == wanted


class OwnSchedule(torch.optim.lr_scheduler.LambdaLR):
    """A user's, with numpy's values in its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.factor, self.table = np.float32(0.1), np.linspace(1, 0, 7)
        super().__init__(optimizer, lambda step: self.factor * self.table[step % 7])


def test_a_state_with_values_of_numpy_is_read_back_as_it_was(tmp_path: Path) -> None:
    def schedule() -> OwnSchedule:
        return OwnSchedule(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.3))

    made, again = schedule(), schedule()
    made.factor = np.float32(0.7)
    made.optimizer.step()
    made.step()
    state = {"scheduler": made.state_dict(), "half": np.float16(0.1), "flags": np.array([True, False])}
    write_state(tmp_path / "state.pt", snapshot(state))
    read = load(tmp_path / "state.pt")
    again.load_state_dict(read["scheduler"])
    assert (type(again.factor), again.factor, again.table.tolist()) == (np.float32, made.factor, made.table.tolist())
    assert again.get_last_lr() == made.get_last_lr() and again.last_epoch == 1
    assert type(read["half"]) is np.float16 and read["flags"].dtype == bool
    write_state(tmp_path / "other.pt", {"path": re.compile("x")})
    with pytest.raises(StageError, match=r"other.pt holds more than tensors, .*re._compile"):
        load(tmp_path / "other.pt")


@pytest.mark.parametrize(("counter", "stopped"), [(1, False), (3, True)])
def test_early_stopping_goes_on_counting(counter: int, stopped: bool) -> None:
    before, callback = EarlyStoppingCallback(3, 0.1), EarlyStoppingCallback(3, 0.1)
    before.early_stopping_patience_counter = counter
    assert stopped_early([callback], {"EarlyStoppingCallback": before.state(), "TrainerControl": {}}) is stopped
    assert callback.early_stopping_patience_counter == counter
    assert not stopped_early([EarlyStoppingCallback(3)], {}) and not stopped_early([], {"EarlyStoppingCallback": {}})


# ------------------------------------------------------------------------------------------------ the ledger


def ledger(*spans: tuple[int, int, int], first: int = 1) -> list[dict[str, Any]]:
    return [{"step": i, "epoch": e, "from": a, "to": b, "workers": 1} for i, (e, a, b) in enumerate(spans, first)]


def test_a_ledger_proves_epochs_whatever_the_steps() -> None:
    whole = check_consumption(ledger((0, 0, 40), (0, 40, 101), (1, 0, 101)), 101)
    assert whole.as_dict() == {"steps": 3, "epochs": 2, "rows_after": 0, "problems": []}
    ended = check_consumption(ledger((0, 0, 101), (1, 0, 8), (1, 8, 24)), 101)  # max_steps in the middle of an epoch
    assert (ended.epochs, ended.rows_after, ended.problems) == (1, 24, [])
    assert check_consumption([], 5).problems == []


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (ledger((0, 0, 8), (0, 16, 24)), "step 2: rows 8 to 16 of epoch 1 were not trained"),
        (ledger((0, 8, 16)), "step 1: rows 0 to 8 of epoch 1 were not trained"),
        (ledger((0, 0, 8), (0, 4, 12)), "step 2: rows 4 to 8 of epoch 1 were trained again"),
        (ledger((0, 0, 8), (0, 0, 8)), "step 2: rows 0 to 8 of epoch 1 were trained again"),
        (ledger((0, 0, 20), (1, 0, 8)), "step 2: rows 20 to 24 of epoch 1 were not trained"),
        (ledger((0, 0, 24), (2, 0, 8)), "step 2: rows 24 to 24 of epoch 1 were not trained"),
        (ledger((0, 0, 24), (1, 0, 24), (0, 0, 8)), "step 3: epoch 1 again after epoch 2"),
        (ledger((0, 0, 24), first=2), "step 2 follows step 0"),
        (ledger((0, 0, 30)), "step 1: rows 0 to 30 are not rows of 24"),
    ],
)  # fmt: skip
def test_a_ledger_names_gaps_and_overlaps(lines: list[dict[str, Any]], problem: str) -> None:
    assert check_consumption(lines, 24).problems[0] == problem


def test_what_is_measured_after_training_is_told_once_however_often_it_ends(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path)
    for loss in (0.5, 0.4):
        reporter.rewind(2)
        if loss == 0.5:
            reporter.metrics(2, {"loss": 1.0, "epoch": 1.0})
            reporter.metrics(2, {"eval_loss": 0.6, "eval_rows": 4, "epoch": 1.0})  # while training
        reporter.final(2, {"eval_loss": loss, "eval_rows": 4})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line.get("eval_loss") for line in lines] == [None, 0.6, 0.4]


def test_the_ledger_is_rewound_with_the_metrics(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path)
    for step in (1, 2, 3):
        reporter.metrics(step, {"loss": 1.0})
        reporter.consumed(step, 0, 8 * step - 8, 8 * step, 1)
    with (tmp_path / "consumed.jsonl").open("a") as out:
        out.write('{"step": 4, "epo')  # torn
    reporter.rewind(2)
    for name in ("metrics.jsonl", "consumed.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).open()] == [1, 2]
    assert not os.path.exists(tmp_path / "consumed.tmp")
