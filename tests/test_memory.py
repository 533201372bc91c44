"""Memory of a worker: known models by their configs, ZeRO's arithmetic by hand, and a dry run against itself. Nothing is allocated."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.advice import GIB, Training, advise
from stages.training import dry_run as dry
from stages.training.deepspeed import deepspeed_config
from stages.training.dry_answers import Sampling, dry_answers
from stages.training.dry_run import Shape, Unpredictable, dry_run
from stages.training.memory import Beside, both, frozen_bytes, optimizer_bytes, predict, weight_bytes

LLAMA2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_8B = LLAMA2_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN25_05B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = LLAMA2_7B | {
    "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8,
}  # fmt: skip
SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
LORA = json.dumps({"r": 8, "target_modules": ["q_proj", "v_proj"]})


def shape(config: dict[str, Any] = SMALL, **more: Any) -> Shape:
    return Shape(json.dumps(config), more.pop("head", "trained"), more.pop("rows", 2), more.pop("length", 32), **more)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (LLAMA2_7B, 6738.4),
        (LLAMA3_8B, 8030.3),
        (QWEN25_05B, 494.0),  # its embedding is its head: once
        (MIXTRAL, 46702.8),
        ({"model_type": "gpt2"}, 124.4),
    ],
    ids=["Llama-2-7B", "Llama-3-8B", "Qwen2.5-0.5B", "Mixtral-8x7B", "GPT-2"],
)
def test_parameters_of_known_models(config: dict[str, Any], millions: float) -> None:
    run = dry_run(shape(config, rows=1, length=16))
    assert run.anatomy.parameters == pytest.approx(millions * 1e6, abs=1e5)
    assert run.estimated == "" and run.series[-1, dry.GRADIENTS] == 4 * run.anatomy.parameters


@pytest.mark.parametrize(
    ("stage", "workers", "moment", "bytes_each"),
    [
        # Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes; figure 1: what stage 1 leaves is 4 + 12/N, 2: 2 + 14/N,
        # 3: 16/N. When the optimizer steps its gradients in float32, 4/N, are there besides.
        (1, 64, "backward", 4 + 12 / 64),
        (2, 64, "optimizer step", 2 + (14 + 4) / 64),
        (3, 64, "optimizer step", (16 + 4) / 64),
        (3, 1, "optimizer step", 16 + 4),
    ],
)
def test_zero_shares_sixteen_bytes_a_parameter(stage: int, workers: int, moment: str, bytes_each: float) -> None:
    config = deepspeed_config(f"zero{stage}", gpu=False)
    found = predict(shape(LLAMA2_7B, rows=1, length=16, half=True, gpu=True), workers=workers, deepspeed=config)
    assert found.moment == moment
    assert found.weights + found.gradients + found.optimizer == pytest.approx(6738.4e6 * bytes_each, rel=2e-3)


def test_full_training_in_float32_is_sixteen_bytes_a_parameter_and_ddp_adds_a_copy_of_the_gradients() -> None:
    one, two = (predict(shape(LLAMA2_7B, rows=1, length=16), workers=n) for n in (1, 2))
    assert one.weights + one.gradients + one.optimizer == pytest.approx(16 * 6738.4e6, rel=1e-3)
    assert one.activations + one.logits < 0.1 * GIB and one.buffers == 0
    assert two.total - one.total == one.gradients


def test_an_adapter_trains_little_and_four_bits_hold_linear_layers_alone() -> None:
    found = predict(shape(LLAMA2_7B, rows=1, length=16, half=True, lora=LORA), four_bits=True)
    anatomy = dry_run(shape(LLAMA2_7B, rows=1, length=16, half=True, lora=LORA)).anatomy
    assert anatomy.trainable == 32 * 2 * 8 * (4096 + 4096)
    assert anatomy.parameters == 6738415616
    assert anatomy.quantised == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 2 * 32000 * 4096  # embedding and head stay in 16 bits
    assert found.weights == pytest.approx(anatomy.quantised * 0.5159 + rest + 4 * anatomy.trainable, rel=1e-3)
    assert found.optimizer == 8 * anatomy.trainable
    assert weight_bytes(anatomy, half=True, four_bits=True, double_quant=False) > found.weights


def test_an_adapter_is_merged_into_the_base_read_once_more() -> None:
    small, half = (shape(SMALL | {"dtype": d}, rows=1, length=8, lora=LORA) for d in ("float32", "bfloat16"))
    found, again = predict(small), 4 * (dry_run(small).anatomy.parameters + 6 * 2 * 64 * 64)
    assert (found.moment, found.buffers) == ("merge", again)
    on_gpu = predict(replace(half, gpu=True))
    assert on_gpu.moment != "merge" and on_gpu.host == again + 2 * dry_run(half).anatomy.parameters


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw_torch", 8),
        ("adamw_bnb_8bit", 2),
        ("paged_adamw_8bit", 2),
        ("sgd", 0),
        ("lion_32bit", 4),
        ("my.module:Own", 8),
    ],
)
def test_optimizers_by_name(name: str, each: float) -> None:
    anatomy = dry_run(shape()).anatomy
    assert optimizer_bytes(name, anatomy) == each * anatomy.trainable


def test_adafactor_holds_rows_and_columns() -> None:
    layer = 4 * (64 + 64) + 3 * (64 + 128) + 2 * 64  # attention, mlp, norms
    assert optimizer_bytes("adafactor", dry_run(shape()).anatomy) == 4 * (6 * layer + 2 * (512 + 64) + 64)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"checkpointing": True},
        {"autocast": True},
        {"lora": LORA, "checkpointing": True},
    ],
    ids=["plain", "checkpointing", "autocast", "lora"],
)
def test_repeating_the_middle_layer_gives_what_all_layers_give(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run.cache_clear()
    short = dry_run(shape(**more))
    dry_run.cache_clear()
    monkeypatch.setattr(dry, "_alike", lambda layers: False)
    whole = dry_run(shape(**more))
    dry_run.cache_clear()
    assert short.estimated == whole.estimated == ""
    assert short.peak() == whole.peak() and short.peak(True) == whole.peak(True)
    assert (short.series[-1] == whole.series[-1]).all()


def test_checkpointing_keeps_a_layers_input_and_recomputes_the_rest() -> None:
    config = SMALL | {"num_hidden_layers": 12}
    plain, spared = (dry_run(shape(config, rows=4, length=64, checkpointing=c)).peak(True)[0] for c in (False, True))
    hidden = 4 * 64 * 64 * 4
    assert 12 * hidden < spared < plain / 3


def test_attention_without_a_matrix_needs_less() -> None:
    eager, sdpa, flash = (
        dry_run(shape(rows=1, length=512, attention=a)).peak(True)[0] for a in ("eager", "sdpa", "flash_attention_2")
    )
    assert eager > sdpa + 6 * 4 * 512 * 512 * 4 and flash < sdpa


def test_what_cannot_be_built_is_told_and_what_cannot_be_run_is_estimated() -> None:
    with pytest.raises(Unpredictable, match="nosuch"):
        dry_run(shape({"model_type": "nosuch"}))
    wrong = dry_run(shape(SMALL | {"num_key_value_heads": 3}))  # fails in the forward pass only
    assert "RuntimeError" in wrong.estimated
    assert wrong.series[0, dry.ACTIVATIONS] == 6 * 34 * 2 * (2 * 32) * 64


def test_advice_fits_and_keeps_the_rows_of_a_step() -> None:
    now = Training(json.dumps(LLAMA3_8B), "sft", batch=8, length=2048, workers=4, gpu=True, bf16=True)
    assert advise(now, 1000 * GIB) == []
    found = advise(now, 40 * GIB)
    assert found and all(a.memory <= 40 * GIB for a in found)
    for advice in found:
        train = advice.change.get("train", {})
        assert train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1) == 8
    adapters = [a.change["tuning"]["method"] for a in found if "tuning" in a.change]
    assert adapters == sorted(adapters)  # lora before qlora
    qlora = replace(now, lora=LORA, four_bits=True, workers=1, checkpointing=True)
    assert qlora.memory().weights < 7 * GIB


# ------------------------------------------------------------------------------------------------ reinforcement learning


def test_policy_and_value_model_live_at_once_and_the_policys_logits_wait() -> None:
    small, score = shape(rows=4, length=64, scored=16), shape(rows=4, length=64, head="score")
    policy, value = dry_run(small), dry_run(score)
    run = both(policy, value)
    activations = [each.series[:, dry.ACTIVATIONS].max() for each in (policy, value)]
    assert run.series[:, dry.ACTIVATIONS].max() == pytest.approx(sum(activations), rel=0.1)
    assert run.series[-1, dry.GRADIENTS] == 4 * (policy.anatomy.parameters + value.anatomy.parameters)
    assert run.series[:, dry.LOGITS].max() == pytest.approx(policy.series[:, dry.LOGITS].max(), rel=0.2)
    at = int(run.series[:, dry.ACTIVATIONS].argmax())
    assert run.series[at, dry.LOGITS] >= 4 * 16 * 512 * 4  # of the answers' tokens alone
    assert run.anatomy.trainable == policy.anatomy.trainable + value.anatomy.trainable
    assert dry_run(shape(rows=4, length=64)).peak()[1] > 3 * policy.peak()[1]


@pytest.mark.parametrize(
    ("heads", "kept"),
    [({}, 64), ({"num_key_value_heads": 2}, 32)],
)
def test_sampling_holds_keys_and_values_of_the_longest_answers(heads: dict[str, int], kept: int) -> None:
    """Between twice the answers, the cache grows by 6 layers of keys and values of `kept` numbers, and what a step adds of one."""
    one, two = (dry_answers(shape(SMALL | heads), Sampling(8, 16, answer))[0] for answer in (200, 400))
    cache = 2 * 6 * kept * 8 * 200 * 4
    assert cache < two - one < 2 * cache
    narrow = dry_answers(shape(SMALL | heads, half=True), Sampling(8, 16, 400))[0]
    assert narrow < 0.7 * two
    assert dry_answers(shape(SMALL), Sampling(8, 16, 400))[1] == 8 * 512 * 24


def test_a_rollout_can_be_what_needs_most() -> None:
    """Of many answers and small micro-batches: then the weights of all models, the optimizer's state and the cache."""
    few = Beside(value=shape(rows=1, length=600, head="score"), frozen=1000, sampling=Sampling(1, 88, 512))
    many = replace(few, sampling=Sampling(512, 88, 512))
    train, roll = (predict(shape(rows=1, length=600, scored=512), beside=beside) for beside in (few, many))
    assert (train.moment, roll.moment) == ("backward", "sampling")
    assert roll.gradients == 0 and (roll.weights, roll.optimizer) == (train.weights, train.optimizer)
    assert train.frozen == roll.frozen == 1000


def test_zero_three_shares_out_what_it_trains_gathers_the_policy_to_sample_and_leaves_frozen_models_whole() -> None:
    zero = deepspeed_config("zero3", gpu=True)
    half = shape(LLAMA2_7B, rows=1, length=64, half=True, gpu=True, scored=32)
    value = replace(half, head="score", scored=None)
    beside = Beside(value=value, frozen=frozen_bytes(half.config, reward=True), sampling=Sampling(2, 32, 32))
    found = predict(half, workers=8, deepspeed=zero, beside=beside)
    assert found.frozen == pytest.approx(4 * 6607e6, rel=1e-3)  # in float32, without the head of the language model
    assert found.weights == pytest.approx(2 * (6738e6 + 6607e6) / 8, rel=1e-3)
    assert predict(half, workers=8, deepspeed=zero, beside=Beside(shared=8000)).frozen == 1000
    sampled = replace(beside, sampling=Sampling(4096, 32, 32))
    roll = predict(half, workers=8, deepspeed=zero, beside=sampled)
    assert roll.moment == "sampling" and roll.buffers >= 2 * 6738e6


def test_frozen_models_are_as_they_are_stored() -> None:
    config = json.dumps(SMALL)
    head = 512 * 64 - 64
    whole, score = frozen_bytes(config), frozen_bytes(config, reward=True)
    assert whole - score == 4 * head
    assert frozen_bytes(json.dumps(SMALL | {"dtype": "bfloat16"}), reward=True) == pytest.approx(score / 2, rel=0.01)
    assert frozen_bytes(json.dumps(SMALL | {"dtype": "bfloat16"}), dtype="float32") == whole


@pytest.mark.slow
def test_advice_for_groups_keeps_the_answers_of_an_iteration() -> None:
    now = Training(
        json.dumps(QWEN25_05B), "grpo", batch=8, length=4096, gpu=True, bf16=True, checkpointing=True, answer=3072, sampled=8,
        whole_logits=False, generation=1, reference="shared",
    )  # fmt: skip
    found = advise(now, int(0.9 * now.memory().total), most=1)
    train = found[0].change["train"]
    assert train["gradient_accumulation_steps"] * train["per_device_train_batch_size"] == 8
    assert train["steps_per_generation"] * train["per_device_train_batch_size"] == 8
