"""What a model is made of, from its config alone: no weights are read, nothing is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The modules of a model by their paths, and its embeddings."""

    model_type: str
    modules: dict[str, str]  # path -> name of its class
    input_embedding: str
    output_embedding: str | None  # None for a reward model
    tied: bool
    rows: int  # of the input embedding


def read_architecture(model: str | Mapping[str, Any], *, reward: bool = False) -> Architecture:
    """Of a model folder, a hub id (its config is fetched), or the fields of a config.

    Raises:
        OSError: there is no such config.
        ValueError: transformers has no such architecture.
    """
    if isinstance(model, str):
        file = Path(model) / "config.json"
        fields = json.loads(file.read_text()) if file.is_file() else model
    else:
        fields = dict(model)
    return _read(json.dumps(fields, sort_keys=True), reward)


@lru_cache
def _read(config_json: str, reward: bool) -> Architecture:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    fields = json.loads(config_json)
    if isinstance(fields, str):
        config = AutoConfig.from_pretrained(fields)
    else:
        config = AutoConfig.for_model(**({"model_type": "llama"} | fields))
    if reward:
        config.num_labels = 1
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_config(config)
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in modules.items()}
    return Architecture(
        config.model_type,
        {name: type(module).__name__ for name, module in modules.items()},
        paths[id(embedding)],
        paths.get(id(head)) if head is not None else None,
        head is not None and bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
        embedding.weight.shape[0],
    )


def length_limit(config: Mapping[str, Any]) -> int | None:
    """Positions of a model; None where they have no end, or are rotary and scaled to more than the config says."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return limit if isinstance(limit, int) and not scaled else None


def positions(model: str) -> int | None:
    """`length_limit` of a model folder, or of a hub id whose config can be had."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):  # loading the model tells what is wrong with it
        return None
    return length_limit(config)
