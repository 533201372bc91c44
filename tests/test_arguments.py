"""The trainers' fields, read from source, are those of the installed classes; what the pipeline decides exists there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError

from stages import SFT
from stages.training.architecture import length_limit
from stages.training.arguments import MANAGED, library_fields, train_config
from stages.training.tuning import Lora


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RLOOConfig"])
def test_fields_are_those_of_the_installed_trainer(name: str) -> None:
    import trl

    wanted = {f.name for f in dataclasses.fields(getattr(trl, name)) if f.init and not f.name.startswith("_")}
    assert set(library_fields(name)) >= wanted
    assert set(library_fields(name)) - wanted <= {"framework", "default_optim"}  # not for users: no init


def test_lora_fields_are_pefts() -> None:
    from peft import LoraConfig

    assert {"r", "lora_alpha", "use_dora", "target_modules", "rank_pattern"} <= set(library_fields("LoraConfig"))
    assert set(library_fields("LoraConfig")) >= {f.name for f in dataclasses.fields(LoraConfig) if f.init} - {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    }  # fmt: skip


def test_managed_fields_exist() -> None:
    known = {
        name for config in ("SFTConfig", "DPOConfig", "GRPOConfig", "RLOOConfig") for name in library_fields(config)
    }
    # these come and go between versions of the libraries
    assert set(MANAGED) - known <= {"group_by_length", "reference_free", "resume_from_checkpoint", "truncation_mode"}


def test_types_are_checked_strictly() -> None:
    config = train_config("SFTConfig")
    assert config.model_validate({"learning_rate": 1, "max_steps": 3}).given() == {"learning_rate": 1, "max_steps": 3}
    for wrong in ({"learning_rate": "fast"}, {"max_steps": 1.5}, {"bf16": "yes"}, {"no_such": 1}):
        with pytest.raises(ValidationError):
            config.model_validate(wrong)
    with pytest.raises(ValidationError):
        Lora.model_validate({"method": "lora", "r": "16"})


def test_the_default_length_is_no_longer_than_the_model(tokenizer: Any) -> None:
    """The fixture's model has 256 positions, the default of TRL is 1,024."""
    sources = [{"path": "chats.jsonl"}]
    assert SFT.model_validate({"kind": "sft", "data": sources}).recipe(tokenizer, 0).max_length == 256
    asked = SFT.model_validate({"kind": "sft", "data": sources, "train": {"max_length": 99}})
    assert asked.recipe(tokenizer, 0).max_length == 99
    with_rope = {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}
    assert length_limit(with_rope) is None and length_limit({"n_positions": 1024}) == 1024
