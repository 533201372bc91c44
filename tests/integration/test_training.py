"""Real trainers on real Ray: the same loss and weights however a step is shared, and every row once an epoch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import KINDS, StageContext
from stages.base import Artifact, Resources, StageResult
from stages.scoring import trained_token_loss
from stages.training import fed as fed_module
from stages.training import recovery
from stages.training import trainer as trainer_module
from stages.training.feed import FeedLoader

from ..conftest import prepared_beside, write_jsonl

pytestmark = pytest.mark.usefixtures("ray_address")

# Summing in another order changes float32 losses in the seventh digit; AdamW divides by a root of squared gradients, which
# makes of that up to a few 1e-4 in weights where a gradient is near zero.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 2e-4


def run(
    folder: Path, model: str, kind: str, data: Path, workers: int = 1, config: dict[str, Any] | None = None, **more: Any
) -> tuple[StageResult, list[float]]:
    """A stage in the folder, and the losses of its steps. One worker without DeepSpeed runs in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (config or {}) | more
    stage = KINDS[kind].model_validate({"kind": kind, "data": [{"path": str(data)}]} | config)
    with prepared_beside(folder) as prepared:
        context = StageContext(
            "stage", folder, prepared, {"model": [Artifact("base", "model", model)]},
            resources=Resources(workers=workers), local=workers == 1 and "deepspeed" not in config,
        )  # fmt: skip
        result = stage.run(context)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return result, [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def train(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "logging_steps": 1,
        **more,
    }


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> tuple[Path, list[float]]:
    """SFT by one worker, 101 rows in steps of 8: 13 steps, the last of 5 rows."""
    folder = tmp_path_factory.mktemp("one") / "sft"
    result, losses = run(folder, model, "sft", data / "chats.jsonl", train=train(8))
    assert (result.rows, result.steps, len(losses)) == (101, 13, 13)
    assert losses[-1] < losses[0]
    return folder, losses


@pytest.mark.parametrize(
    ("workers", "config"),
    [
        (1, {"train": train(4, gradient_accumulation_steps=2)}),
        (2, {"train": train(4)}),
        pytest.param(2, {"train": train(4), "deepspeed": "zero2"}, marks=pytest.mark.slow),
        pytest.param(
            2, {"train": train(2, gradient_accumulation_steps=2), "deepspeed": "zero3"}, marks=pytest.mark.slow
        ),
    ],
    ids=["accumulated", "two workers", "two workers, zero2", "two workers, accumulated, zero3"],
)
def test_a_step_is_the_same_however_it_is_shared(
    tmp_path: Path, model: str, data: Path, one_worker: tuple[Path, list[float]], workers: int, config: dict[str, Any]
) -> None:
    folder, wanted = one_worker
    _, losses = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", workers, **config)
    assert losses == pytest.approx(wanted, rel=LOSS_TOLERANCE)
    expected, got = weights(folder), weights(tmp_path / "sft")
    assert set(got) == set(expected)
    worst = max(float((got[name] - expected[name]).abs().max()) for name in expected)
    assert worst < WEIGHT_TOLERANCE
    start = load_file(Path(model) / "model.safetensors")
    assert max(float((got[name] - start[name]).abs().max()) for name in start) > 10 * WEIGHT_TOLERANCE  # it did train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_pairs_weigh_the_same_however_a_step_is_shared(tmp_path: Path, model: str, data: Path, kind: str) -> None:
    """37 pairs in steps of 8: the last step has 5, so two workers get 3 and 2."""
    one, wanted = run(tmp_path / "one", model, kind, data / "pairs.jsonl", train=train(8))
    _, losses = run(tmp_path / "two", model, kind, data / "pairs.jsonl", 2, train=train(4))
    assert one.steps == len(wanted) == 5
    assert losses == pytest.approx(wanted, rel=1e-5)
    if kind == "dpo":
        assert wanted[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy still is its reference
        expected, got = weights(tmp_path / "one"), weights(tmp_path / "two")
        assert max(float((got[n] - expected[n]).abs().max()) for n in expected) < WEIGHT_TOLERANCE


def train_and_record(config: dict[str, Any]) -> Any:
    """The worker's own function, with every row that reaches the trainer written down."""

    rank, _ = trainer_module.worker_rank()
    out = (config["job"].work / f"seen-{rank}.jsonl").open("a")

    def loader(feed: Any, collate: Any, placeholder: Any) -> FeedLoader:
        def noting(rows: list[dict[str, Any]]) -> Any:
            out.writelines(json.dumps([feed.step, row["row"]]) + "\n" for row in rows if "row" in row)
            out.flush()
            return collate(rows)

        return FeedLoader(feed, noting, placeholder)

    fed_module.FeedLoader = loader  # type: ignore[assignment, misc]
    try:
        return trainer_module.train_on_worker(config)
    finally:
        fed_module.FeedLoader = FeedLoader  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_reaches_the_trainer_once_an_epoch(
    tmp_path: Path, model: str, data: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "train_on_worker", train_and_record)
    run(tmp_path / "sft", model, "sft", data / "chats.jsonl", workers, train=train(4, num_train_epochs=2))
    seen = [json.loads(line) for file in tmp_path.glob("sft/seen-*.jsonl") for line in file.open()]
    steps = -(-101 // (4 * workers))
    for epoch in range(2):
        rows = Counter(row for step, row in seen if (step - 1) // steps == epoch)
        assert rows == Counter(range(1, 102))
    assert len(list(tmp_path.glob("sft/seen-*.jsonl"))) == workers


@pytest.mark.slow
def test_packed_weighted_rows_train_and_held_out_rows_are_evaluated(tmp_path: Path, model: str, data: Path) -> None:
    """With a learning rate of 0 nothing is learned: the loss of every way to see the data is the same."""
    rows = [json.loads(line) for line in (data / "chats.jsonl").open()]
    for row in rows:
        row["messages"][-1]["weight"] = 0.5
    path = write_jsonl(tmp_path / "weighted.jsonl", rows)
    still = train(101, learning_rate=1e-30, weight_decay=0.0)
    _, (plain,) = run(tmp_path / "a", model, "sft", path, train=still | {"max_length": 400})
    _, (packed,) = run(tmp_path / "b", model, "sft", path, train=still | {"max_length": 400, "packing": True})
    assert packed == pytest.approx(plain, rel=1e-6)
    _, (unweighted,) = run(tmp_path / "c", model, "sft", data / "chats.jsonl", train=still)
    assert abs(unweighted - plain) > 1e-4
    split = [{"path": str(data / "chats.jsonl"), "eval": "20%"}]
    for name, workers, packing in (("d", 1, True), ("e", 2, False)):
        config = {
            "data": split,
            "train": still | {"per_device_train_batch_size": 3, "max_length": 400, "packing": packing},
        }
        result, _ = run(tmp_path / name, model, "sft", data / "chats.jsonl", workers, config)
        held = result.metrics["eval_rows"]
        assert 10 < held < 32 and result.details["ledger"]["reasons"] == {"held_out": held}
        evaluated = [
            r for f in Path(result.details["prepared"]).glob("eval-*.parquet") for r in pq.read_table(f).to_pylist()
        ]
        sums = trained_token_loss(AutoModelForCausalLM.from_pretrained(model), evaluated, 0, 8)
        assert result.metrics["eval_loss"] == pytest.approx(sums["nll"] / sums["tokens"], rel=1e-5)


@pytest.mark.slow
def test_held_out_pairs_are_evaluated_by_any_number_of_workers(tmp_path: Path, model: str, data: Path) -> None:
    split = [{"path": str(data / "pairs.jsonl"), "eval": "30%"}]
    losses = []
    for workers in (1, 2):
        result, _ = run(
            tmp_path / str(workers),
            model,
            "dpo",
            data / "pairs.jsonl",
            workers,
            {"data": split, "train": train(4 // workers)},
        )
        losses.append(result.metrics["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < math.log(2)
