"""DeepSpeed's presets, a user's own file, and what in it is told to clash with `train:`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages import KINDS
from stages.training.deepspeed import PRESETS, clashes, deepspeed_config, offload, zero_stage

TRAIN = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "bf16": False, "fp16": False,
    "learning_rate": 2e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
    "optim": "adamw_torch_fused", "lr_scheduler_type": "linear",
}  # fmt: skip


def told(config: dict[str, Any], workers: int | None = 2, gpu: bool | None = False, **given: Any) -> dict[str, str]:
    """The clashes of a user's configuration with TRAIN, in which `given` was said by the user."""
    zero = {"zero_optimization": {"stage": 2}}
    return dict(clashes(zero | config, TRAIN | given, given, workers, gpu))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_their_stage_leave_sizes_to_train_and_clash_with_nothing(name: str, gpu: bool) -> None:
    config = deepspeed_config(name, gpu=gpu)
    assert config is not None and zero_stage(config) == int(name[4])
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    zero = config["zero_optimization"]
    assert zero.get("overlap_comm", gpu) is gpu
    assert ("stage3_gather_16bit_weights_on_model_save" in zero) == (zero_stage(config) == 3)
    assert set(offload(config)) == (
        {"optimizer", "param"} if "params" in name else {"optimizer"} if "+" in name else set()
    )
    assert all(zero[f"offload_{what}"] == {"device": "cpu", "pin_memory": gpu} for what in offload(config))
    assert not list(clashes(config, TRAIN, TRAIN, 2, gpu))


def test_an_offloaded_optimizer_stays_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """accelerate would replace it by DeepSpeed's Adam for CPUs."""
    assert deepspeed_config("zero2+offload")["zero_force_ds_cpu_optimizer"] is False  # type: ignore[index]
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    assert deepspeed_config(str(file))["zero_force_ds_cpu_optimizer"] is False  # type: ignore[index]


def test_what_a_file_leaves_out_is_as_train_says(tmp_path: Path) -> None:
    """DeepSpeed's own defaults are no clipping, float32 and no accumulation, whatever the training arguments say."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"immediate_grad_update": True}}))
    config = deepspeed_config(str(file))
    assert config is not None and config["gradient_clipping"] == config["gradient_accumulation_steps"] == "auto"
    assert config["bf16"] == {"enabled": "auto", "immediate_grad_update": True}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("[]", "does not hold a JSON object"), ('{"bf16": true}', "bf16 must be a JSON object")],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        deepspeed_config(str(file))


def test_a_name_that_is_none_is_told_with_those_there_are() -> None:
    for name in ("zero4", "zero0+offload", "zero2+offload_params", "zero3-offload"):
        with pytest.raises(ValueError, match=r"neither a preset \(zero0, .*zero3\+offload_params\) nor a file"):
            deepspeed_config(name)
    data = [{"path": "x.jsonl"}]
    assert KINDS["sft"].model_validate({"kind": "sft", "data": data, "deepspeed": "zero3+offload"})


@pytest.mark.parametrize(
    ("config", "key", "says"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "8, but train.per_device_train_batch_size is 4 (by default)"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", "1, but train.gradient_accumulation_steps is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "0.5, but train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "true, but train.bf16 is false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "true, but train.fp16 is false"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.params.lr", "0.0001, but train.learning_rate is 2e-05"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas", "[0.9, 0.95], but train.adam_beta1, adam_beta2 is [0.9, 0.999]"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0}}}, "scheduler.params.warmup_max_lr", "1.0, but train.learning_rate is 2e-05"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_trains_names_both(config: dict[str, Any], key: str, says: str) -> None:
    found = told(config)
    assert list(found) == [key]
    assert says in found[key] and 'write "auto" in the file, or the same in both' in found[key]


def test_equal_values_and_auto_are_fine() -> None:
    same = {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto", "gradient_clipping": 1,
        "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": 0.00002, "betas": "auto", "weight_decay": 0}},
    }  # fmt: skip
    assert told(same) == {}


@pytest.mark.parametrize(
    ("total", "workers", "says"),
    [
        (32, 2, "32, but 4 rows x 2 accumulation steps x 2 workers are 16; write \"auto\" in the file, or set train.gradient_accumulation_steps: 4"),
        (18, 2, "set train.per_device_train_batch_size to a divisor of 9"),
        (16, 3, "16 does not divide by 3 workers"),
    ],
)  # fmt: skip
def test_a_batch_size_that_does_not_divide(total: int, workers: int, says: str) -> None:
    assert says in told({"train_batch_size": total}, workers)["train_batch_size"]
    assert told({"train_batch_size": total}, None) == {}  # the workers are not known yet


def test_a_section_of_the_file_that_would_win_over_train() -> None:
    assert "train.optim: adafactor not" in told({"optimizer": {"type": "AdamW"}}, optim="adafactor")["optimizer"]
    assert (
        "train.lr_scheduler_type: cosine not"
        in told({"scheduler": {"type": "WarmupLR"}}, lr_scheduler_type="cosine")["scheduler"]
    )
    assert told({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}) == {}


def test_what_does_not_work_under_zero() -> None:
    three = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    assert (
        "cannot be saved"
        in told({"zero_optimization": three})["zero_optimization.stage3_gather_16bit_weights_on_model_save"]
    )
    assert "flattens the weights" in told({}, optim="galore_adamw")["zero_optimization.stage"]
    assert told({"zero_optimization": {"stage": 0}}, optim="galore_adamw") == {}
    assert "not a stage of ZeRO" in told({"zero_optimization": {"stage": 4}})["zero_optimization.stage"]
    away = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert "on a GPU only" in told(away, gpu=True, optim="paged_adamw_8bit")["zero_optimization.offload_optimizer"]
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}}
    assert "needs workers with GPUs" in told(nvme)["zero_optimization"] and told(nvme, gpu=True) == {}
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    assert "only one of them" in told(both, bf16=True, fp16=True)["fp16.enabled"]
