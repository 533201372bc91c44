"""Models as the user names them: a folder or a hub id, checked, with its tokenizer, chat template and padding token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from stages.data.chat import BUILT_IN, ChatEncoder, tokenizer_spec
from stages.data.template import try_template
from stages.errors import DataError
from stages.storage import pull_model

# What transformers loads weights from, and what else they may be in: a pickle, which can hold code.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_model_folder(model: str, *, whole: bool = True, allow_pickle: bool = False) -> None:
    """A local model must look like one before anything is started. Hub ids (`org/name`) are not looked up here.

    Args:
        whole: weights and tokenizer are there too; a plan needs but the config.
        allow_pickle: weights may be pickles.

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
    config = _read_json(path / "config.json")
    if problem := code_problem(model, config) or weights_problem(path, config, whole, allow_pickle):
        raise DataError(problem)
    if not whole:
        return
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"{model}: there is no tokenizer in this model folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: not a JSON object")
    return value


def weights_problem(path: Path, config: Mapping[str, Any], whole: bool, allow_pickle: bool) -> str | None:
    """Why the weights of a model folder are not loaded: there are none, or they are pickles."""
    files = _weight_files(path, config)
    if odd := next((name for name in files if Path(name).name != name), None):
        return f"{path}: its weights are said to lie outside of the folder, in {odd!r}"
    pickled = [name for name in files if not name.endswith((".safetensors", ".safetensors.index.json"))]
    if pickled and not allow_pickle:
        return (
            f"{path}: its weights are pickles ({pickled[0]}), which can hold code; only safetensors are loaded. Convert them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...); or say `allow_pickle: true` at the top of the spec"
        )
    return f"{path}: not a model folder: there are no .safetensors weights in it" if whole and not files else None


def _weight_files(path: Path, config: Mapping[str, Any]) -> list[str]:
    """What transformers loads weights from, as it looks for them: what config.json names, safetensors, pickles."""
    first = config.get("transformers_weights") or next((name for name in WEIGHTS if (path / name).is_file()), None)
    if first is None:
        return [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
    shards = _read_json(path / first).get("weight_map") if str(first).endswith(".json") else None
    return [str(first), *sorted({str(name) for name in (shards or {}).values()})]


def code_problem(model: str, config: Mapping[str, Any]) -> str | None:
    """Whether a model works only with Python code of its own (`auto_map`). An architecture that transformers has needs none."""
    if not config.get("auto_map"):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING_NAMES:
        return None
    return (
        f"{model}: its architecture ({kind}) is Python code that comes with the model (auto_map), and such code is never run "
        "(trust_remote_code is off); take a model whose architecture transformers has"
    )


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
        tokenizer = _tokenizer_class(pull_model(model)).from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            why = "it is Python code that comes with the model (auto_map), and such code is never run"
        raise DataError(f"{model}: the tokenizer cannot be loaded: {why}") from error
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
        spec = tokenizer_spec(tokenizer)
        try_template(model, str(spec.chat_template), spec.variables)
        ChatEncoder(spec)
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
