"""Tokens that were added to a tokenizer get rows in the model's embeddings, before anything else sees the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stages.errors import StageError


def grow_vocabulary(model: str, tokenizer: Any, folder: Path) -> tuple[str, list[int]]:
    """The model with a row for every token, and the ids of the rows that are new.

    A model that has them all is used as it is. Otherwise `folder` gets a copy with longer embeddings, which every worker,
    DPO's reference and the merge of an adapter then load: all see the same rows. New rows are drawn closely around the mean
    of the old ones (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), from a fixed seed, so
    that an interrupted stage makes the same again.

    Raises:
        StageError: the model's config cannot be read.
    """
    from transformers import AutoConfig

    needed = max(tokenizer.get_vocab().values(), default=0) + 1
    try:
        rows = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise StageError(f"{model}: its config cannot be read: {str(error).splitlines()[0]}") from error
    if needed <= rows:
        return model, []
    new = list(range(rows, needed))
    if not (folder / "config.json").is_file():
        _write_grown(model, tokenizer, folder, needed)
    return str(folder), new


def _write_grown(model: str, tokenizer: Any, folder: Path, rows: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded.resize_token_embeddings(rows)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    loaded.save_pretrained(str(temporary))
    tokenizer.save_pretrained(str(temporary))
    temporary.rename(folder)
