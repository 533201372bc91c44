"""Tokenizers that cannot be used are told in a line, before anything is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stages.data.tokenizer import load_tokenizer, read_chat_template
from stages.errors import DataError


def test_a_tokenizer_without_a_fast_version(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="m: the tokenizer has no fast"):
        load_tokenizer(str(folder), "{{ messages }}")


def test_a_template_that_is_not_jinja(model: str) -> None:
    with pytest.raises(DataError, match="the chat template is not Jinja: line 2: Unexpected end of template"):
        load_tokenizer(model, "a\n{% for m in messages %}")


def test_a_template_is_a_built_in_one_or_a_file(tmp_path: Path) -> None:
    assert "<tool_call>" in (read_chat_template("hermes") or "")
    (tmp_path / "t.jinja").write_text("x")
    assert read_chat_template(str(tmp_path / "t.jinja")) == "x"
    with pytest.raises(DataError, match=r"no such file, and not built in \(chatml, hermes\)"):
        read_chat_template("hermse")
