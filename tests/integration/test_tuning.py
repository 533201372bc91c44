"""Adapters, weights in 4 bits and added tokens through real trainers: what is exported is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.handoff import Checker
from stages.base import StageResult
from stages.errors import StageError

from .test_training import run, train

pytestmark = pytest.mark.usefixtures("ray_address")

LORA = {"method": "lora", "r": 4}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ONE_STEP = train(8, max_steps=1)


def handed_over(folder: Path, produces: str = "model") -> dict[str, Any]:
    """The facts of a folder that keeps the whole contract: it says, in another process, what the trainer said."""
    checked = Checker(folder / "handoff.log").check(folder / "model", produces, trained=True)
    assert checked["problems"] == []
    return checked["facts"]


def parameters(model: str | Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())


def changed(base: str | Path, made: Path) -> set[str]:
    before, after = parameters(base), parameters(made)
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_kept_and_merged_into_a_plain_model(tmp_path: Path, model: str, data: Path, dora: bool) -> None:
    tuning = LORA | {"use_dora": dora}
    result, losses = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", train=train(8), tuning=tuning)
    assert losses[-1] < losses[0]
    assert handed_over(tmp_path / "sft")["logits_difference"] < 1e-4
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert any("magnitude" in name for name in adapter) == dora
    assert changed(model, tmp_path / "sft" / "model") == {n for n in parameters(model) if any(t in n for t in ATTENTION)}
    assert result.details["tuning"]["merge_difference"] < 1e-4 and result.details["tuning"]["merged_into"] == "base"


def test_a_lora_reward_model_keeps_its_score_head_under_zero3(tmp_path: Path, model: str, data: Path) -> None:
    from peft import PeftModel

    run(tmp_path / "reward", model, "reward", data / "pairs.jsonl", 2, train=train(4), tuning=LORA, deepspeed="zero3")
    facts = handed_over(tmp_path / "reward", "reward model")
    assert facts["logits_difference"] < 1e-4
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "model")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    kept = PeftModel.from_pretrained(base, str(tmp_path / "reward" / "adapter"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(made.eval()(input_ids=ids).logits, kept.eval()(input_ids=ids).logits, atol=1e-5)
