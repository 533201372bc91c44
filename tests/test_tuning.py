"""What can be wrong with `tuning:` is told from the model's config alone; what is right becomes peft's own options."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stages import SFT, Reward
from stages.data.tokenizer import check_model_folder
from stages.errors import DataError, StageError
from stages.training import tuning as module
from stages.training.architecture import read_architecture
from stages.training.tuning import (
    Full,
    Lora,
    QLora,
    adapter_options,
    checked_architecture,
    default_targets,
    matched,
    missing_library,
    quantization_config,
    rows_problem,
    tuning_problems,
)

from .conftest import LLAMA

TIED = read_architecture(LLAMA | {"vocab_size": 320})
UNTIED = read_architecture(LLAMA | {"vocab_size": 320, "tie_word_embeddings": False})
SCORE = read_architecture(LLAMA | {"vocab_size": 320}, reward=True)


def lora(**options: Any) -> Any:
    return TypeAdapter(Lora).validate_python({"method": "lora", **options})


def qlora(**options: Any) -> Any:
    return TypeAdapter(QLora).validate_python({"method": "qlora", **options})


def told(tuning: Any, architecture: Any = TIED, **more: Any) -> dict[str, str]:
    return dict(tuning_problems(tuning, architecture, **more))


def test_an_architecture_is_read_without_weights() -> None:
    assert (TIED.model_type, TIED.input_embedding, TIED.output_embedding) == ("llama", "model.embed_tokens", "lm_head")
    assert (TIED.tied, UNTIED.tied, TIED.rows) == (True, False, 320)
    assert TIED.modules["model.layers.1.self_attn.q_proj"] == "Linear"
    assert SCORE.output_embedding is None and not SCORE.tied and "score" in SCORE.modules
    large = read_architecture(
        {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192}
    )  # of 70B: no memory
    assert len([n for n in large.modules if n.endswith("q_proj")]) == 80


def test_nothing_is_wrong_with_what_peft_takes() -> None:
    fine = [
        Full(),
        lora(),
        lora(r=8, use_dora=True, target_modules="all-linear"),
        lora(target_modules=r".*layers\.[01]\.mlp\.(up|down)_proj"),
        lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        lora(modules_to_save=["norm"], init_lora_weights="gaussian"),
        qlora(bnb_4bit_quant_type="fp4"),
    ]
    for tuning in fine:
        assert told(tuning) == {}, tuning
    assert told(lora(modules_to_save=["lm_head", "embed_tokens"]), UNTIED) == {}
    assert told(lora(modules_to_save=["score"]), SCORE, reward=True) == {}


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules", "'v_prj' matches nothing in this model; did you mean v_proj?"),
        ({"target_modules": ["zzz"]}, "target_modules", "it has down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj"),
        ({"target_modules": "q_proj"}, "target_modules", "a regular expression for whole paths, 'q_proj' matches nothing"),
        ({"target_modules": ["mlp"]}, "target_modules", "'mlp' is a LlamaMLP, which LoRA cannot adapt; name its layers: down_proj"),
        ({"target_modules": ["lm_head"]}, "target_modules", "is the output layer, which the loss multiplies by directly"),
        ({"target_modules": ["embed_tokens"]}, "target_modules", "input and output embedding of this model are one tensor"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save", "'lm_hed' matches nothing in this model; did you mean lm_head?"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "are one tensor; add `ensure_weight_tying: true`"),
        ({"modules_to_save": ["score"]}, "modules_to_save", "'score' matches nothing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "'pissa' changes the frozen weights too"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_training(options: dict[str, Any], field: str, message: str) -> None:
    assert message in told(lora(**options))[field]


def test_what_does_not_depend_on_the_model_is_told_without_it() -> None:
    assert set(told(lora(target_modules=["zzz"], init_lora_weights="olora"), None)) == {"init_lora_weights"}
    assert "use zero2" in told(qlora(), None, zero_stage=3)["method"]
    assert told(qlora(), None, zero_stage=2) == told(lora(), None, zero_stage=3) == {}


def test_a_missing_bitsandbytes_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert missing_library(qlora()) == "qlora needs bitsandbytes: pip install 'raylign[qlora]'"
    assert missing_library(lora()) is missing_library(Full()) is None


def test_all_is_told_at_once_when_a_stage_starts(model: str) -> None:
    with pytest.raises(StageError) as error:
        checked_architecture(lora(target_modules=["x"], modules_to_save=["y"]), model, reward=False, zero_stage=0)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "tuning.target_modules",
        "tuning.modules_to_save",
    ]
    assert checked_architecture(Full(), "/no/such/model", reward=False, zero_stage=0) is None
    with pytest.raises(StageError, match="its config cannot be read"):
        checked_architecture(lora(), "/no/such/model", reward=False, zero_stage=0)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("qwen2", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi", ["q_proj", "k_proj", "v_proj"]),  # its last projection is called dense
        ("gpt2", ["c_attn"]),  # peft's
        ("gpt_neox", ["query_key_value"]),
        ("phi3", "all-linear"),  # neither
    ],
)
def test_default_targets_are_those_the_model_has(model_type: str, targets: Any) -> None:
    architecture = read_architecture({"model_type": model_type})
    assert default_targets(architecture) == targets
    assert adapter_options(lora(), lora().given(), architecture) == {"target_modules": targets}
    asked = lora(target_modules=["dense"])
    assert adapter_options(asked, asked.given(), architecture)["target_modules"] == ["dense"]


def test_peft_takes_the_modules_that_are_said_to_match() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**(LLAMA | {"vocab_size": 320}))
    for targets in (["q_proj", "mlp.up_proj"], r"model\.layers\.0\..*_proj", ["layers.1.self_attn.v_proj"]):
        made = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=targets))
        taken = {n.removeprefix("base_model.model.") for n, m in made.named_modules() if isinstance(m, LoraLayer)}
        assert taken == set(matched(targets, TIED.modules))


def test_rows_of_new_tokens_are_trained_where_they_stand() -> None:
    def rows(architecture: Any, **options: Any) -> Any:
        tuning = lora(**options)
        return adapter_options(tuning, tuning.given(), architecture, [320, 321]).get("trainable_token_indices")

    assert rows(TIED) == {"model.embed_tokens": [320, 321]}
    assert rows(UNTIED) == {"model.embed_tokens": [320, 321], "lm_head": [320, 321]}
    assert rows(SCORE) == {"model.embed_tokens": [320, 321]}
    assert rows(TIED, trainable_token_indices=[5]) == {"model.embed_tokens": [5, 320, 321]}
    assert rows(TIED, trainable_token_indices={"embed_tokens": [5]}) == {"embed_tokens": [5, 320, 321]}
    assert rows(UNTIED, modules_to_save=["lm_head"]) == {"model.embed_tokens": [320, 321]}
    assert rows(UNTIED, modules_to_save=["lm_head", "embed_tokens"]) is None


def test_rows_are_trained_under_zero3_on_gpus_only() -> None:
    options = {"trainable_token_indices": {"embed_tokens": [320]}}
    assert "use zero2, or `method: full`" in str(rows_problem(options, 3, gpu=False))
    assert (
        rows_problem(options, 3, gpu=True)
        is rows_problem(options, 2, gpu=False)
        is rows_problem({}, 3, gpu=False)
        is None
    )


def test_qlora_is_nf4_with_double_quantisation_unless_asked_otherwise() -> None:
    config = quantization_config(qlora(r=2).quantization(), on_cpu=True)
    assert config == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    asked = qlora(bnb_4bit_compute_dtype="bfloat16", bnb_4bit_use_double_quant=False, llm_int8_skip_modules=["o_proj"])
    config = quantization_config(asked.quantization(), on_cpu=True)
    assert (config["bnb_4bit_compute_dtype"], config["llm_int8_skip_modules"]) == ("bfloat16", ["o_proj"])
    assert not config["bnb_4bit_use_double_quant"]
    assert qlora(r=2, bnb_4bit_quant_type="fp4").given() == {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "r": 2,
    }
    with pytest.raises(ValidationError, match="bnb_4bit_quant_type"):
        lora(bnb_4bit_quant_type="nf4")


def test_stages_take_every_method() -> None:
    data = [{"path": "chats.jsonl"}]
    sft = SFT.model_validate({"data": data, "tuning": {"method": "qlora", "r": 4}})
    assert sft.lora() == {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 4}
    assert Reward.model_validate({"data": data, "tuning": {"method": "lora"}}).lora()["modules_to_save"] == ["score"]
    assert SFT.model_validate({"data": data}).lora() is None


def test_an_adapter_given_as_a_model_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="a LoRA adapter of org/base, not a model; merge it first"):
        check_model_folder(str(tmp_path))
