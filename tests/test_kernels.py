"""What attention, precision and libraries are used, and what is said where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.training.arguments import optimizer_names
from stages.training.kernels import (
    FLASH,
    OPTIMIZER_LIBRARIES,
    attention_for,
    flash_broken,
    flash_missing,
    installed,
    missing_libraries,
    model_dtype,
    optimizer_problem,
    precision_for,
    supported_attention,
)

BOTH = {"sdpa", FLASH}
GONE = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"


@pytest.mark.parametrize(
    ("gpu", "half", "supported", "flash", "used"),
    [
        (True, True, BOTH, None, "flash_attention_2"),
        (True, True, BOTH, GONE, f"sdpa ({GONE})"),
        (False, True, BOTH, None, "sdpa (the workers have no GPU)"),
        (True, False, BOTH, None, "sdpa (it computes in bf16 or fp16 only)"),
        (True, True, {"sdpa"}, None, "sdpa (the model has no flash attention)"),
        (True, True, set(), None, "eager (the model has no other)"),
        (False, False, set(), GONE, "eager (the model has no other)"),
    ],
)  # fmt: skip
def test_auto_takes_the_best_there_is_and_says_why_not_better(
    gpu: bool, half: bool, supported: set[str], flash: str | None, used: str
) -> None:
    assert str(attention_for("auto", gpu=gpu, half=half, supported=supported, flash=flash)) == used


def test_what_is_asked_for_by_name_is_used_or_refused() -> None:
    assert str(attention_for("eager", gpu=True, half=True, supported=BOTH)) == "eager"
    assert str(attention_for("sdpa", gpu=False, half=False, supported=BOTH, flash=GONE)) == "sdpa"
    assert str(attention_for(FLASH, gpu=True, half=True, supported=BOTH)) == FLASH
    with pytest.raises(ValueError, match=r"cannot be used: flash-attn is not installed .* write auto, or sdpa"):
        attention_for(FLASH, gpu=True, half=True, supported=BOTH, flash=GONE)
    with pytest.raises(ValueError, match="the workers have no GPU"):
        attention_for(FLASH, gpu=False, half=True, supported=BOTH)
    with pytest.raises(ValueError, match="this model has no sdpa; write auto, or eager"):
        attention_for("sdpa", gpu=False, half=False, supported=set())


def test_what_models_support_is_what_transformers_says(tmp_path: Path, model: str) -> None:
    assert supported_attention(model) == BOTH
    assert supported_attention(model, reward=True) == BOTH
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "codegen", "n_layer": 1, "n_head": 2, "n_embd": 8}))
    assert supported_attention(str(tmp_path)) == set()


@pytest.mark.skipif(installed("flash_attn"), reason="flash-attn is installed")
def test_without_the_library_it_is_named_with_its_pip_line() -> None:
    assert flash_missing() == flash_broken() == GONE


@pytest.mark.parametrize(
    ("train", "gpu", "bf16_there", "precision"),
    [
        ({}, True, True, (True, False)),
        ({}, True, False, (False, False)),
        ({}, False, True, (False, False)),
        ({"bf16": True}, False, True, (True, False)),
        ({"bf16": False}, True, True, (False, False)),
        ({"fp16": True}, True, True, (False, True)),
        ({"fp16": True, "bf16": False}, True, False, (False, True)),
    ],
)
def test_bf16_is_on_where_a_gpu_has_it(
    train: dict[str, bool], gpu: bool, bf16_there: bool, precision: tuple[bool, bool]
) -> None:
    found = precision_for(train, gpu=gpu, bf16_there=bf16_there)
    assert (found["bf16"], found["fp16"]) == precision


@pytest.mark.parametrize(
    ("train", "gpu", "bf16_there", "says"),
    [
        ({"fp16": True}, False, True, "fp16: true wants workers with GPUs"),
        ({"bf16": True}, True, False, "this GPU has no bf16"),
        ({"bf16": True, "fp16": True}, True, True, "both true"),
    ],
)
def test_precision_that_cannot_be_had_is_refused(
    train: dict[str, bool], gpu: bool, bf16_there: bool, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        precision_for(train, gpu=gpu, bf16_there=bf16_there)


def test_only_frozen_weights_are_held_in_half_precision() -> None:
    bf16, fp16, float32 = ({"bf16": b, "fp16": f} for b, f in ((True, False), (False, True), (False, False)))
    assert [model_dtype(p, frozen=True) for p in (bf16, fp16, float32)] == ["bfloat16", "float16", "float32"]
    assert {model_dtype(p, frozen=False) for p in (bf16, fp16, float32)} == {"float32"}


def test_every_optimizer_of_transformers_is_known_and_its_library_named() -> None:
    names = optimizer_names()
    assert {"adamw_torch_fused", "adafactor", "paged_adamw_8bit", "galore_adamw"} <= set(names)
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    for name in set(names) - own:
        found = dict(missing_libraries({"optim": name}, "auto", there=lambda module: False))
        assert "pip install" in found["train.optim"], name
    for name in own:
        assert not list(missing_libraries({"optim": name}, "auto", there=lambda module: False))
    assert all(any(name.startswith(start) for name in names) for start in OPTIMIZER_LIBRARIES)


def test_missing_libraries_are_told_with_what_to_do() -> None:
    asked = {"optim": "paged_adamw_8bit", "use_liger_kernel": True}
    found = dict(missing_libraries(asked, FLASH, there=lambda module: False))
    assert set(found) == {"attention", "train.optim", "train.use_liger_kernel"}
    assert (
        "pip install bitsandbytes" in found["train.optim"]
        and "pip install liger-kernel" in found["train.use_liger_kernel"]
    )
    assert not list(missing_libraries(asked, FLASH, there=lambda module: True))


def test_optimizers_by_the_trainers_names() -> None:
    names = optimizer_names()
    assert optimizer_problem("adamw_torch", names, gpu=False) is None
    assert "did you mean adafactor?" in (optimizer_problem("adafacto", names, gpu=None) or "")
    assert "runs on a GPU only" in (optimizer_problem("adamw_torch_8bit", names, gpu=False) or "")
    assert optimizer_problem("adamw_torch_8bit", names, gpu=None) is None
