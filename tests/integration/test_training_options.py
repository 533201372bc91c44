"""What may be asked of a training besides its data: evaluation on the way, early stopping, own optimizers, guards, losses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.errors import StageError
from stages.scoring import trained_token_loss

from ..conftest import write_jsonl
from .test_training import run, train, weights

pytestmark = pytest.mark.usefixtures("ray_address")


def evaluations(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_the_best_model_on_the_way_is_the_one_that_is_kept(tmp_path: Path, model: str, data: Path) -> None:
    """A rate that grows from step to step: the evaluation becomes better, then worse; training stops and goes back."""
    split = [{"path": str(data / "chats.jsonl"), "eval": "20%"}]
    options = train(
        4, num_train_epochs=8, learning_rate=0.08, lr_scheduler_type="constant_with_warmup", warmup_steps=150,
        eval_strategy="steps", logging_steps=10,
    )  # fmt: skip
    config = {"data": split, "train": options, "early_stopping": {"patience": 2}}
    result, _ = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", config=config)
    seen = evaluations(tmp_path / "sft")
    best = min(seen, key=lambda step: seen[step])
    steps = sorted(seen)
    assert steps[0] == 10 and result.steps == steps[-1] < 8 * 20, "it stopped early"
    assert best < steps[-1] and steps.index(best) == len(steps) - 3, seen
    assert result.metrics["eval_loss"] == pytest.approx(seen[best], rel=1e-5), "the best model is what is exported"
    import pyarrow.parquet as pq

    held = [r for f in Path(result.details["prepared"]).glob("eval-*.parquet") for r in pq.read_table(f).to_pylist()]
    sums = trained_token_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model"), held, 0, 8)
    assert sums["nll"] / sums["tokens"] == pytest.approx(seen[best], rel=1e-4)


def halves(optimizer: Any, num_warmup_steps: int, num_training_steps: int, every: int = 4) -> Any:
    """A user's own schedule: the rate halves every few steps."""
    assert num_training_steps == 13
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // every))


def test_a_users_own_optimizer_and_schedule(tmp_path: Path, model: str, data: Path) -> None:
    own = train(
        8, optim="torch.optim:SGD", optim_args="momentum=0.5, nesterov=True", learning_rate=0.25,
        lr_scheduler_type="tests.integration.test_training_options:halves", lr_scheduler_kwargs={"every": 5},
    )  # fmt: skip
    run(tmp_path / "sft", model, "sft", data / "chats.jsonl", train=own)
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").open()]
    assert [line["learning_rate"] for line in lines] == [0.25] * 5 + [0.125] * 5 + [0.0625] * 3
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_batch(tmp_path: Path, model: str, data: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="loss of step 1 is nan") as told:
        run(tmp_path / "sft", str(broken), "sft", data / "chats.jsonl", train=train(8))
    kept = [json.loads(line) for line in (tmp_path / "sft" / "bad_batch.jsonl").open()]
    assert "bad_batch.jsonl" in str(told.value) and len(kept) == 8
    assert all(len(row["input_ids"]) == len(row["labels"]) and max(row["labels"]) > 0 for row in kept)
    # what was kept can be looked at, and trained, as it is
    result, _ = run(tmp_path / "again", model, "sft", tmp_path / "sft" / "bad_batch.jsonl", train=train(8))
    assert result.rows == 8


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_of_two_workers_stops_both(tmp_path: Path, model: str, data: Path) -> None:
    """A token of no number in row 2, which the second worker trains; the first learns of it and does not wait for ever."""
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.config.tie_word_embeddings = False
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.detach().clone())
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("Z", add_special_tokens=False)["input_ids"][-1]] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    rows = [{"prompt": f"{'Z' if i == 1 else 'a'} {i}", "completion": "b"} for i in range(12)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(StageError, match=r"loss of step 1 is nan[^,]*bad_batch-1.jsonl: look"):
        run(tmp_path / "sft", str(tmp_path / "broken"), "sft", path, 2, train=train(2), shuffle=False)
    assert [p.name for p in (tmp_path / "sft").glob("bad_batch*")] == ["bad_batch-1.jsonl"]
    kept = [json.loads(line) for line in (tmp_path / "sft" / "bad_batch-1.jsonl").open()]
    assert any("Z 1" in tokenizer.decode(row["input_ids"]) for row in kept) and len(kept) == 2


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path, model: str, data: Path) -> None:
    wild = train(4, learning_rate=3.0, max_grad_norm=1e9, num_train_epochs=4)
    with pytest.raises(StageError, match=r"the loss has exploded|is nan|is inf"):
        run(tmp_path / "wild", model, "sft", data / "chats.jsonl", train=wild)
    assert (tmp_path / "wild" / "bad_batch.jsonl").stat().st_size > 100
    assert not (tmp_path / "wild" / "model").exists()


def test_losses_by_name_reach_the_trainer(tmp_path: Path, model: str, data: Path) -> None:
    """One step over all rows, at a rate of nothing: the loss is the formula's over the prepared rows."""
    from ..test_losses import formula

    still = train(101, learning_rate=1e-30, weight_decay=0.0)
    llm = AutoModelForCausalLM.from_pretrained(model)
    import pyarrow.parquet as pq

    for normalization, smoothing in (("token", 0.0), ("sequence", 0.1)):
        folder = tmp_path / f"{normalization}-{smoothing}"
        options = still | {"label_smoothing_factor": smoothing}
        result, (loss,) = run(
            folder, model, "sft", data / "chats.jsonl", train=options, loss_normalization=normalization
        )
        rows = [
            r for f in Path(result.details["prepared"]).glob("shard-*.parquet") for r in pq.read_table(f).to_pylist()
        ]
        with torch.no_grad():
            assert loss == pytest.approx(formula(llm, rows, normalization, smoothing), rel=1e-5)


def test_what_a_training_tells_of_its_speed(tmp_path: Path, model: str, data: Path) -> None:
    result, _ = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", train=train(8))
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").open()]
    for line in lines:
        assert line["tokens_per_second"] > line["trained_tokens_per_second"] > 0
        assert 0 <= line["padding_share"] < 0.7 and 0 <= line["data_wait_share"] <= 1
        assert 0 <= line["mean_token_accuracy"] <= 1
    assert "mfu" not in lines[0], "the peak of a CPU is not known"
    before = weights(tmp_path / "sft")
    assert before and result.metrics["mean_token_accuracy"] > 0
