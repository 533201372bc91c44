"""`raylign init`: a complete, commented spec from a model and data files."""

from __future__ import annotations

import json
from pathlib import Path

from stages.data.records import RECORD_OF, Conversation, Preference, Text, Tokens
from stages.data.source import DataSource, resolve_formats
from stages.data.tokenizer import check_model_folder
from stages.errors import DataError, Problem, SpecError
from stages.training.architecture import length_limit, read_config

SFT = """\
  sft:                                   # supervised fine-tuning on conversations
    kind: sft
    data:
{data}
    mask: {{train_on: assistant}}          # every assistant turn and its stop token; also last_assistant, completion, all
    train:                               # TRL's SFTConfig, by its own names
      learning_rate: 2.0e-5
      num_train_epochs: 1
      per_device_train_batch_size: 8
      gradient_accumulation_steps: 2
      lr_scheduler_type: cosine
      max_length: {length:<23}# longer rows go to the ledger; truncation: left or right cuts them
      # packing: true                    # several conversations in a row, which do not see each other
    tuning: {{method: full}}               # or {{method: lora, r: 16}}
    # deepspeed: zero2                   # zero0 .. zero3, zero3+offload, or a DeepSpeed JSON file
"""
PREFERENCE = """\
  reward:                                # a reward model from the SFT model
    kind: reward
    model: stages.sft
    data:
{data}
    train: {{learning_rate: 1.0e-5, num_train_epochs: 1, per_device_train_batch_size: 8, max_length: {length}}}
  dpo:                                   # direct preference optimisation of the SFT model, beside the reward model
    kind: dpo
    model: stages.sft
    data:
{data}
    train: {{learning_rate: 1.0e-6, beta: 0.1, num_train_epochs: 1, per_device_train_batch_size: 8, max_length: {length}}}
"""
EVALUATE = """\
  # eval:                                # compare the models on rows that were held out
  #   kind: evaluate
  #   models: [{models}]
  #   data: [{{path: heldout.jsonl}}]
"""


def write_spec(out: Path, model: str, data: list[str], preference: list[str]) -> None:
    """Write a spec that runs.

    Raises:
        SpecError: the spec file exists already.
        DataError: a file cannot be read, or its rows have no known format.
    """
    if out.exists():
        raise SpecError([Problem("", f"{out} exists; name another file with --out")])
    if Path(model).exists():
        check_model_folder(model)
        model = str(Path(model).resolve())
    chats, pairs = _sources(data, "conversations"), _sources(preference, "preference pairs")
    length = min(2048, length_limit(read_config(model) or {}) or 2048)
    stages = SFT.format(data=_yaml(chats), length=length)
    models = ["stages.sft"]
    if pairs:
        stages += PREFERENCE.format(data=_yaml(pairs), length=length)
        models += ["stages.reward", "stages.dpo"]
    head = (
        f"# Written by `raylign init`. Paths are relative to this file.\nname: {out.stem}\n"
        f"model: {json.dumps(model)}\nstorage: runs\nseed: 0\n"
        "# cluster: {workers: 8, gpus_per_worker: 1}   # default: what this machine has\nstages:\n"
    )
    out.write_text(head + stages + EVALUATE.format(models=", ".join(models)))


def _sources(paths: list[str], wanted: str) -> list[tuple[str, str]]:
    """(path, format) of each, checked."""
    found = []
    for path in paths:
        format = resolve_formats([DataSource(path=path)])[0]
        if not issubclass(
            RECORD_OF[format], Preference if wanted == "preference pairs" else Conversation | Text | Tokens
        ):
            raise DataError(f"{path}: these rows are {format}, {wanted} are wanted here")
        found.append((path if "://" in path else str(Path(path).resolve()), format))
    return found


def _yaml(sources: list[tuple[str, str]]) -> str:
    return "\n".join(f"      - {{path: {json.dumps(path)}, format: {format}}}" for path, format in sources)
