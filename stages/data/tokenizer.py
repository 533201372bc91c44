"""Models as the user names them: a folder or a hub id, checked, with its tokenizer, chat template and padding token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from stages.data.chat import BUILT_IN, ChatEncoder
from stages.errors import DataError
from stages.storage import pull_model


def check_model_folder(model: str, *, whole: bool = True) -> None:
    """A local model must look like one before anything is started. Hub ids (`org/name`) are not looked up here.

    `whole`: weights and tokenizer are there too; a plan needs but the config.

    Raises:
        DataError: the folder lacks what `from_pretrained` needs, or the path does not exist.
    """
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise DataError(f"{model}: no such model folder")
        return
    if not path.is_dir():
        raise DataError(f"{model}: a model is a folder with config.json, weights and a tokenizer, this is a file")
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path") or "its base"
        raise DataError(
            f"{model}: a LoRA adapter of {base}, not a model; merge it first: peft's AutoPeftModelForCausalLM"
            ".from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    if not (path / "config.json").is_file():
        raise DataError(f"{model}: not a model folder: there is no config.json in it")
    try:
        json.loads((path / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{model}/config.json: not JSON: {error}") from error
    if not whole:
        return
    if not any(path.glob("*.safetensors")):
        hint = "; only safetensors are loaded, never pickled weights" if any(path.glob("*.bin")) else ""
        raise DataError(f"{model}: not a model folder: there are no .safetensors weights in it{hint}")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"{model}: there is no tokenizer in this model folder")


def read_chat_template(setting: str | None) -> str | None:
    """The text of the spec's `chat_template`: the name of a built-in one, or a file."""
    if setting is None or setting in BUILT_IN:
        return BUILT_IN[setting] if setting else None
    path = Path(setting)
    if not path.is_file():
        raise DataError(f"chat_template: {setting}: no such file, and not built in ({', '.join(BUILT_IN)})")
    return path.read_text()


def _tokenizer_class(model: str) -> Any:
    """AutoTokenizer, or the generic class itself where the folder names it: the same object without importing torch."""
    config = Path(model) / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (Path(model) / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_tokenizer(model: str, chat_template: str | None = None) -> Any:
    """The model's tokenizer with the chat template that will be used and saved, and a pad token that is not a stop token.

    Raises:
        DataError: no tokenizer, a slow one, no chat template or a broken one, or no token that can be used for padding.
    """
    try:
        tokenizer = _tokenizer_class(pull_model(model)).from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"{model}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    if chat_template:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise DataError(
            f"{model}: the tokenizer has no chat template; set `chat_template: chatml` or a file in the spec"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{model}: the tokenizer has no fast (Rust) version, which masks need: tokens that can be traced to characters"
        )
    try:
        ChatEncoder(tokenizer)
    except TemplateSyntaxError as error:
        raise DataError(f"{model}: the chat template is not Jinja: line {error.lineno}: {error.message}") from error
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # Padding with a stop token makes saved models stop early and hides the last token from a reward head.
        spare = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        known = [t for t in ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]") if t in tokenizer.get_vocab()]
        choice = next(iter(known + [t for t in spare if t == tokenizer.unk_token] + spare), None)
        if choice is None:
            raise DataError(
                f"{model}: no token can be used for padding but the stop token; add a pad token to the tokenizer"
            )
        tokenizer.pad_token = choice
    tokenizer.padding_side = "right"
    return tokenizer
