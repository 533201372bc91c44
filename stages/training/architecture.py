"""What a model is made of, from its config alone: no weights are read, nothing is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.errors import DataError

HUB_TIMEOUT = 5.0  # seconds
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length")  # names configs have for them


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
        config = AutoConfig.from_pretrained(fields, trust_remote_code=False)
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


# ------------------------------------------------------------------------------------------------ config.json, without torch


def read_config(model: str) -> dict[str, Any] | None:
    """config.json of a folder, or of a hub model that has been downloaded before; None where it is not here.

    Raises:
        ValueError: it is not JSON.
    """
    if "://" in model:
        return None
    file = Path(model) / "config.json" if Path(model).exists() else cached(model, "config.json")
    config = json.loads(file.read_text()) if file is not None and file.is_file() else None
    return config if isinstance(config, dict) else None


def cached(model: str, file: str) -> Path | None:
    """A file of a hub model, where it has been downloaded before. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, file)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


@lru_cache
def fetch_config(model: str) -> dict[str, Any]:
    """config.json of a hub model.

    Raises:
        DataError: it is neither in the cache nor given by the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(model, "config.json", etag_timeout=HUB_TIMEOUT)
        return json.loads(Path(file).read_text())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"config.json of {model} is neither in the cache nor given by the hub ({what[:120]})"
        ) from error


def length_limit(config: Mapping[str, Any]) -> int | None:
    """Positions of a model; None where they have no end, or are rotary and scaled to more than the config says."""
    text = config.get("text_config") or config
    limit = next((text[name] for name in POSITIONS if text.get(name)), None)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return limit if isinstance(limit, int) and not scaled else None


def positions(model: str) -> int | None:
    """`length_limit` of a model folder, or of a hub id whose config can be had."""
    try:
        config = read_config(model)
        if config is None and not Path(model).exists():
            config = fetch_config(model)
    except (DataError, ValueError):  # loading the model tells what is wrong with it
        return None
    return length_limit(config or {})
