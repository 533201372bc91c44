"""ZeRO with offload, gradient checkpointing, bf16 and attention on real workers: the same training, held otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages import KINDS
from stages.data.tokenizer import load_tokenizer
from stages.errors import StageError
from stages.training.answers import PAIR
from stages.training.job import PLACEHOLDERS, TrainerParts, TrainJob
from stages.training.preference import PairLoss
from stages.training.reference import References, ReferenceWorker

from .test_training import LOSS_TOLERANCE, WEIGHT_TOLERANCE, run, train, weights

pytestmark = pytest.mark.usefixtures("ray_address")

STEPS = 4


def short(batch: int, **more: Any) -> dict[str, Any]:
    return train(batch, **{"max_steps": STEPS, "max_length": 200, **more})


def worst(a: Path, b: Path) -> float:
    """The greatest difference of two models' weights."""
    first, second = weights(a), weights(b)
    assert set(first) == set(second)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("plain") / "sft"
    result, losses = run(folder, model, "sft", data / "chats.jsonl", train=short(8))
    assert result.details["kernels"] == {
        "attention": "sdpa (the workers have no GPU), each document alone", "precision": "float32", "weights": "float32",
    }  # fmt: skip
    assert len(losses) == STEPS
    return folder, losses


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"deepspeed": "zero1"}, marks=pytest.mark.slow),
        pytest.param({"deepspeed": "zero2+offload"}, marks=pytest.mark.slow),
        pytest.param(
            {"deepspeed": "zero3+offload_params", "train": short(4, gradient_checkpointing=True)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["zero1", "zero2+offload", "zero3+offload_params"],
)
def test_zero_and_offload_change_nothing(
    tmp_path: Path, model: str, data: Path, plain: tuple[Path, list[float]], config: dict[str, Any]
) -> None:
    """Two workers without GPUs: offload moves nothing there, and runs."""
    folder, wanted = plain
    _, losses = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", 2, {"train": short(4)} | config)
    assert losses == pytest.approx(wanted, rel=LOSS_TOLERANCE)
    assert worst(folder, tmp_path / "sft") < WEIGHT_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [{}, {"tuning": {"method": "lora", "r": 4}}, {"train": short(8, packing=True)}],
    ids=["full", "lora", "packed"],
)
def test_gradient_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, model: str, data: Path, config: dict[str, Any]
) -> None:
    losses = {}
    for on in (False, True):
        arguments = config.get("train", short(8)) | {"gradient_checkpointing": on}
        _, losses[on] = run(
            tmp_path / str(on), model, "sft", data / "chats.jsonl", config=config | {"train": arguments}
        )
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert losses[True][-1] < losses[True][0]  # under LoRA nothing would be learned without gradients of the inputs
    assert worst(tmp_path / "True", tmp_path / "False") < 1e-6


def test_bf16_on_a_cpu_where_it_is_asked_for(
    tmp_path: Path, model: str, data: Path, plain: tuple[Path, list[float]]
) -> None:
    arguments = short(8, bf16=True, max_steps=1)
    result, (loss,) = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", train=arguments)
    assert result.details["kernels"]["precision"] == "bf16"
    assert loss != plain[1][0] and loss == pytest.approx(plain[1][0], rel=0.01)
    assert all(
        torch.isfinite(tensor).all() and tensor.dtype == torch.float32 for tensor in weights(tmp_path / "sft").values()
    )


def job_of(kind: str, model: str, work: Path, **job: Any) -> TrainJob:
    return TrainJob(
        task=KINDS[kind].task, model=model, work=work, groups=[], arguments={}, reward=kind == "reward",
        options={"loss_normalization": "token", "loss": PairLoss()}, **job,
    )  # fmt: skip


def build(job: TrainJob, kind: str) -> Any:
    """The trainer that a worker of a stage would build."""
    import datasets

    from stages import dpo, reward, sft

    rows = datasets.Dataset.from_list([{k: v for k, v in PLACEHOLDERS[job.task].items() if v is not None}])
    parts = TrainerParts(job, load_tokenizer(job.model), rows, None, on_cpu=True)
    return {"sft": sft, "dpo": dpo, "reward": reward}[kind].build_trainer(parts)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_the_attention_that_is_asked_for_is_that_of_the_model_and_its_reference(
    tmp_path: Path, model: str, kind: str
) -> None:
    for asked in ("eager", "sdpa"):
        job = job_of(kind, model, tmp_path, attention=asked)
        trainer = build(job, kind)
        models = [trainer.model]
        if kind == "dpo":
            assert trainer.ref_model is None
            models.append(ReferenceWorker(job, References(PAIR), None, gpu=False).model)
        assert {m.config._attn_implementation for m in models} == {asked}
        assert {m.dtype for m in models} == {torch.float32}


def test_flash_attention_by_name_is_refused_where_it_cannot_be(tmp_path: Path, model: str) -> None:
    with pytest.raises(StageError, match=r"flash.attn|flash_attention_2"):
        build(job_of("sft", model, tmp_path, attention="flash_attention_2"), "sft")
