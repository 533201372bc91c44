"""Which weights are trained: all, or an adapter's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from stages.base import Config
from stages.training.arguments import LibraryConfig, library_fields


class Full(Config):
    """Every weight is trained."""

    method: Literal["full"] = "full"


class _Lora(LibraryConfig):
    method: Literal["lora"]

    def given(self) -> dict[str, Any]:
        return {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | {
            k: v for k, v in super().given().items() if k != "method"
        }


def _lora_fields() -> dict[str, Any]:
    return {k: (v, Field(default=None)) for k, v in library_fields("LoraConfig").items() if k != "task_type"}


Lora: type[_Lora] = create_model("Lora", __base__=_Lora, **_lora_fields())
