"""The evaluation of preference-tuned and reward models on real Ray: against their references, by any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages import Evaluate, StageContext
from stages.base import Artifact, Resources, StageResult

from ..conftest import prepared_beside

pytestmark = pytest.mark.usefixtures("ray_address")


def changed(model: Any, by: float) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += by * torch.randn(weights.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model: str, tokenizer: Any) -> list[Artifact]:
    """A model, one that was tuned from it, by the manifest, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tuned = changed(AutoModelForCausalLM.from_pretrained(model), 0.01)
    reward = changed(AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0), 0.01)
    for name, made in (("dpo", tuned), ("reward", reward)):
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lineage = {"kind": "dpo", "inputs": {"model": [{"stage": "sft", "model": model}]}}
    return [
        Artifact("sft", "model", model, {"kind": "sft"}),
        Artifact("dpo", "model", str(folder / "dpo"), lineage),
        Artifact("reward", "reward model", str(folder / "reward"), {"kind": "reward"}),
    ]


def evaluate(folder: Path, models: list[Artifact], data: list[Path], workers: int = 1, **config: Any) -> StageResult:
    work = folder / f"{workers}-{len(list(folder.iterdir()))}"
    work.mkdir()
    common = {"models": ["m"], "data": [{"path": str(path)} for path in data], "max_new_tokens": 8, "batch_size": 4}
    stage = Evaluate.model_validate(common | config)
    with prepared_beside(folder) as prepared:
        context = StageContext(
            "eval", work, prepared, {"models": models}, resources=Resources(workers=workers), local=workers == 1
        )
        return stage.run(context)


def floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, float)}


@pytest.mark.slow
def test_two_workers_give_the_figures_of_one(tmp_path: Path, models: list[Artifact], data: Path) -> None:
    """20 conversations, 37 pairs and 13 samples do not divide by two; every row counts once."""
    files = [data / "heldout.jsonl", data / "pairs.jsonl"]
    results = [evaluate(tmp_path, models, files, workers, kl_samples=13) for workers in (1, 2)]
    one, two = (result.metrics for result in results)
    assert (one["sft"]["answers"], one["sft"]["pairs"], results[0].rows) == (20, 37, 57)
    assert results[0].details["samples"] == results[1].details["samples"]
    for name, wanted in {
        "sft": {"loss", "exact_match", "stopped", "answer_tokens", "preference_accuracy", "margin"},
        "dpo": {"loss", "exact_match", "stopped", "answer_tokens", "preference_accuracy", "margin", "kl", "kl_stderr"},
        "reward": {"preference_accuracy", "margin", "calibration_error", "length_accuracy", "length_correlation"},
    }.items():
        assert floats(one[name]).keys() == wanted
        assert floats(one[name]) == pytest.approx(floats(two[name]), rel=1e-4, abs=1e-6)
    assert one["dpo"]["kl_answers"] == two["dpo"]["kl_answers"] == 13
    assert one["dpo"]["kl"] > 0 and one["dpo"]["kl_stderr"] > 0
    assert one["dpo"]["preference_by"] == "implicit reward"


def test_the_reference_is_that_of_the_lineage(tmp_path: Path, models: list[Artifact], data: Path) -> None:
    """A model tuned from itself, by its manifest, has not moved."""
    _, dpo, _ = models
    same = Artifact("same", "model", dpo.model, {"kind": "kto", "inputs": {"model": [{"model": dpo.model}]}})
    metrics = evaluate(tmp_path, [dpo, same], [data / "pairs.jsonl"], kl_samples=5).metrics
    assert (metrics["same"]["kl"], metrics["same"]["margin"], metrics["same"]["preference_accuracy"]) == (0.0, 0.0, 0.0)
    assert metrics["dpo"]["kl"] != 0 and metrics["dpo"]["margin"] != 0  # pairs have prompts to sample for, too
    assert metrics["dpo"]["kl_answers"] == 5


def test_kl_can_be_left_out(tmp_path: Path, models: list[Artifact], data: Path) -> None:
    metrics = evaluate(tmp_path, models[1:2], [data / "pairs.jsonl"], kl_samples=0).metrics["dpo"]
    assert "kl" not in metrics and metrics["preference_by"] == "implicit reward"


def test_a_reference_without_the_new_tokens_gets_their_rows(
    tmp_path: Path, models: list[Artifact], data: Path, tokenizer: Any, model: str
) -> None:
    """As a training whose template brings tokens gives them to its model before it starts."""
    from stages.data.tokenizer import load_tokenizer
    from stages.training.vocabulary import grow_vocabulary

    more = load_tokenizer(model)
    more.add_tokens([f"<|new{i}|>" for i in range(400)])
    grown, new = grow_vocabulary(model, more, tmp_path / "grown")
    assert new and Path(grown) != Path(model)
    lineage = {"kind": "dpo", "inputs": {"model": [{"model": model}]}}
    metrics = evaluate(tmp_path, [Artifact("dpo", "model", grown, lineage)], [data / "pairs.jsonl"]).metrics["dpo"]
    assert (metrics["kl"], metrics["margin"]) == (0.0, 0.0)
    assert not list(tmp_path.glob("*/reference-*"))


def test_answers_that_run_away_are_told(tmp_path: Path, models: list[Artifact], data: Path, tokenizer: Any) -> None:
    """A model that never stops, tuned by its manifest from one that does."""
    sft = models[0]
    endless = AutoModelForCausalLM.from_pretrained(sft.model)
    endless.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    stopping = AutoModelForCausalLM.from_pretrained(sft.model)
    stopping.generation_config.eos_token_id = list(range(len(tokenizer)))
    for name, made in (("endless", endless), ("stopping", stopping)):
        made.save_pretrained(tmp_path / "models" / name)
        tokenizer.save_pretrained(tmp_path / "models" / name)
    stops = Artifact("sft", "model", str(tmp_path / "models" / "stopping"), {"kind": "sft"})
    lineage = {"kind": "dpo", "inputs": {"model": [{"model": stops.model}]}}
    runs = Artifact("dpo", "model", str(tmp_path / "models" / "endless"), lineage)
    result = evaluate(tmp_path, [stops, runs], [data / "heldout.jsonl"], kl_samples=0)
    assert result.metrics["sft"]["answer_tokens"] == 1 and result.metrics["dpo"]["answer_tokens"] == 8
    assert [said.split(",")[0][:40] for said in result.details["evaluation_warnings"]] == [
        "answers of dpo are 8 times as long as th",
        "0% of the answers of dpo end by themselv",
    ]
