"""The model a spec is written for: its size and its limits by its config, its tokenizer where that can be had."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.reach import hub_silence
from stages.data.chat import BUILT_IN
from stages.data.source import DataSource
from stages.data.tokenizer import check_model_folder, code_problem, load_tokenizer
from stages.errors import DataError
from stages.init import train_tokenizer
from stages.training.architecture import fetch_config, length_limit, read_config
from stages.training.dry_run import Shape, Unpredictable, dry_run

TINY = "tiny"
TINY_VOCABULARY = 2048
TRAINED_ON = 64 << 20  # bytes of data that a fresh tokenizer is trained on here, to measure rows
# Of a fresh model: 1.1 million parameters with a vocabulary of 2,048.
TINY_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    name: str  # as the spec has it
    fresh: bool = False
    config: dict[str, Any] | None = None
    parameters: int | None = None
    limit: int | None = None  # positions
    tokenizer: Any = None
    chat_template: str | None = None  # the spec's, where the model has none of its own
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        if self.fresh:
            return f"a fresh model of {said(self.parameters or 0)} parameters, which knows nothing yet"
        size = "of unknown size" if self.parameters is None else f"{said(self.parameters)} parameters"
        positions = f", {self.limit:,} positions" if self.limit else ""
        return f"{self.name}: {size}{positions}"


def said(parameters: int) -> str:
    """`1.5 billion`, `130 million`."""
    value, unit = (parameters / 1e9, "billion") if parameters >= 1e9 else (parameters / 1e6, "million")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def fresh(sources: Sequence[DataSource], size: int, tools: bool) -> Base:
    """`--model tiny`: a model with random weights and a tokenizer trained on the data.

    Args:
        size: bytes of the data; of more than `TRAINED_ON` the tokenizer is left to the run.
    """
    name = "hermes" if tools else None
    tokenizer = None
    if size <= TRAINED_ON:
        tokenizer = train_tokenizer(sources, TINY_VOCABULARY, BUILT_IN[name or "chatml"])
    config = TINY_CONFIG | {"vocab_size": TINY_VOCABULARY}
    return Base(TINY, True, config, _parameters(config), None, tokenizer, name)


def look_at(model: str, tools: bool) -> Base:
    """A folder, or a model of the hub.

    Raises:
        DataError: it is none that can be trained.
    """
    if Path(model).expanduser().exists():
        model = os.path.expanduser(model)
    check_model_folder(model)
    local = Path(model).exists()
    notes: list[str] = []
    config = read_config(model)
    if config is None:
        config = _of_the_hub(model, notes)
    parameters = _parameters(config) if config else _by_name(model)
    if config is None and parameters is not None:
        notes.append(f"its size is read from its name: {said(parameters)} parameters")
    tokenizer, template = _tokenizer(model, tools, notes) if config is not None else (None, None)
    name = model if not local else os.path.abspath(model)
    return Base(name, False, config, parameters, length_limit(config or {}), tokenizer, template, tuple(notes))


def _of_the_hub(model: str, notes: list[str]) -> dict[str, Any] | None:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if silence := hub_silence():
        notes.append(
            f"the hub does not answer ({silence}), and the model is not in its cache: lengths are estimated from "
            "characters, memory from its size; write the spec again where there is a network, or name a folder"
        )
        return None
    try:
        config = fetch_config(model)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, GatedRepoError):
            raise DataError(
                f"{model} is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
            ) from error
        if isinstance(cause, RepositoryNotFoundError | HFValidationError):
            raise DataError(
                f"{model} is neither a folder here nor a model on the hub (of a private one: set HF_TOKEN); "
                f"without a model, --model {TINY} trains a fresh small one"
            ) from error
        notes.append(str(error))
        return None
    if problem := code_problem(model, config):
        raise DataError(problem)
    return config


def _tokenizer(model: str, tools: bool, notes: list[str]) -> tuple[Any, str | None]:
    """The tokenizer, and the name of a chat template where the model has none."""
    try:
        return load_tokenizer(model), None
    except DataError as error:
        if "no chat template" not in str(error):
            notes.append(str(error))
            return None, None
    template = "hermes" if tools else "chatml"
    try:
        return load_tokenizer(model, BUILT_IN[template]), template
    except DataError as error:
        notes.append(str(error))
        return None, template


def _parameters(config: dict[str, Any]) -> int | None:
    try:
        return dry_run(Shape(json.dumps(config, sort_keys=True), "trained", rows=1, length=8)).anatomy.parameters
    except Unpredictable:
        return None


def _by_name(model: str) -> int | None:
    """`Qwen/Qwen2.5-0.5B-Instruct`: half a billion."""
    found = SIZE.findall(model.rpartition("/")[2].replace("-", " ").replace("_", " "))
    return int(float(found[-1][0]) * (1e9 if found[-1][1].lower() == "b" else 1e6)) if found else None
