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
    assert changed(model, tmp_path / "sft" / "model") == {
        n for n in parameters(model) if any(t in n for t in ATTENTION)
    }
    assert result.details["tuning"]["merge_difference"] < 1e-4 and result.details["tuning"]["merged_into"] == "base"


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------ weights in 4 bits


def test_a_qlora_export_is_the_function_that_was_trained(tmp_path: Path, model: str, data: Path) -> None:
    """Merged into what the trainer saw, the base in 4 bits and back; every quantised weight differs from the base."""
    pytest.importorskip("bitsandbytes")
    tuning = {"method": "qlora", "r": 4, "bnb_4bit_use_double_quant": True}
    result, losses = run(tmp_path / "sft", model, "sft", data / "chats.jsonl", train=train(8), tuning=tuning)
    assert losses[-1] < losses[0]
    facts = handed_over(tmp_path / "sft")
    assert facts["logits_difference"] < 1e-4 and facts["dtype"] == "float32"
    assert result.details["tuning"]["merged_into"] == "dequantized base"
    config = json.loads((tmp_path / "sft" / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    linear = {n for n in parameters(model) if "_proj" in n}
    assert changed(model, tmp_path / "sft" / "model") == linear
    adapter = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


@pytest.mark.slow
def test_a_qlora_reward_model_of_two_workers(tmp_path: Path, model: str, data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tuning = {"method": "qlora", "r": 4, "use_dora": True}
    run(tmp_path / "reward", model, "reward", data / "pairs.jsonl", 2, train=train(4), tuning=tuning, deepspeed="zero2")
    assert handed_over(tmp_path / "reward", "reward model")["logits_difference"] < 1e-4
    adapter = load_file(tmp_path / "reward" / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in adapter)


# ------------------------------------------------------------------------------------------------ added tokens


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The model with two tokens more in its tokenizer than its embedding has rows."""
    folder = tmp_path_factory.mktemp("grown") / "model"
    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if not request.param:
        loaded.config.tie_word_embeddings = False
        loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone())
        loaded.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["a b", "c d"], special_tokens=False) == 2
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tuning", [{"method": "full"}, LORA], ids=["full", "lora"])
def test_added_tokens_are_trained_and_exported(tmp_path: Path, grown: Path, data: Path, tuning: dict[str, Any]) -> None:
    result, _ = run(
        tmp_path / "sft", str(grown), "sft", data / "chats.jsonl", train=train(8, learning_rate=1e-2), tuning=tuning
    )
    assert handed_over(tmp_path / "sft")["logits_difference"] < 1e-4
    assert result.details["tuning"]["new_tokens"] == 2
    made, base = tmp_path / "sft" / "model", parameters(grown)
    stored = load_file(made / "model.safetensors")
    names = ["model.embed_tokens.weight"] if len(base) == len(stored) and "lm_head.weight" not in base else [
        "model.embed_tokens.weight", "lm_head.weight"
    ]  # fmt: skip
    assert ("lm_head.weight" in stored) == (len(names) == 2)
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer("a bc d").input_ids
    for name in names:
        old, new = base[name], stored[name]
        assert new.shape[0] == old.shape[0] + 2 == max(ids) + 1
        mean = old.mean(0)
        moved = (new[-2:] - mean).norm(dim=1)
        assert (moved > 0.01).all(), "the new rows were not trained"
        if tuning["method"] == "lora":  # of the embeddings, nothing but the new rows
            assert torch.equal(new[:-2], old)
    assert not (tmp_path / "sft" / "base").exists()
    if tuning["method"] == "lora":
        adapter = json.loads((tmp_path / "sft" / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(grown)


def test_an_export_has_the_dtype_of_its_base(tmp_path: Path, model: str, data: Path) -> None:
    """DPO with an adapter on a base in bfloat16: trained in float32 on a CPU, rounded once, held to the same logits."""
    base = tmp_path / "base-bf16"
    shutil.copytree(model, base)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(base)
    _, losses = run(tmp_path / "dpo", str(base), "dpo", data / "pairs.jsonl", train=ONE_STEP, tuning=LORA)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # with the adapter off, the policy is its reference
    facts = handed_over(tmp_path / "dpo")
    assert facts["dtype"] == "bfloat16" and 0 < facts["logits_difference"] < facts["logits_allowed"]
    stored = load_file(tmp_path / "dpo" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16} and "lm_head.weight" not in stored
    assert json.loads((tmp_path / "dpo" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
