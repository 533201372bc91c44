"""Configurations of TRL's command line (`trl sft --config FILE`): its trainers' fields are ours, by the same names.

Fields as in TRL 1.16: trl/scripts/utils.py (ScriptArguments, DatasetMixtureConfig), trl/trainer/model_config.py (ModelConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.converter.parts import NOTHING, Ours, Theirs, fields_of, flash, model_path, source_path, split_names
from stages.errors import Problem, SpecError

KINDS = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
MARKS = {"model_name_or_path", "dataset_name", "datasets"}  # keys that a file of theirs has
# ModelConfig -> peft's LoraConfig, with TRL's defaults
LORA = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", None),
    "lora_target_parameters": ("target_parameters", None),
    "lora_modules_to_save": ("modules_to_save", None),
    "use_rslora": ("use_rslora", None),
    "use_dora": ("use_dora", None),
}
FOUR_BITS = {
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage": "bnb_4bit_quant_storage",
}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # by name; others are dotted paths
ACCELERATE = {"zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
REASONS = {
    "model_revision": "download that revision, and name its folder",
    "torch_dtype|dtype": "weights that are trained are held in float32 and computed in bf16 on GPUs; see `raylign doctor`",
    "load_in_8bit": "8-bit weights are not there; `tuning: {method: qlora}` has 4 bits",
    "lora_task_type": "decided by the stage",
    "dataset_streaming|streaming": "Ray Data streams by itself",
    "ignore_bias_buffers": "of an old torch",
    "num_processes|num_machines|machine_rank|main_process_.*|mixed_precision": "`cluster:` says how many workers there are",
    "lora_.*|use_rslora|use_dora|load_in_4bit": "without use_peft it means nothing",
    "bnb_.*|use_bnb_.*": "without use_peft and load_in_4bit it means nothing",
    "accelerate_config": "`cluster:` says how many workers there are, `deepspeed:` how memory is shared",
    "env": "set the variables in the environment",
}
NOTHING_HELD_OUT = "no rows of the training data are held out: give a source `eval: 2%`"
SILENT = ("output_dir", "overwrite_output_dir", "logging_dir", "run_name")


def is_theirs(config: Mapping[str, Any]) -> bool:
    return bool(MARKS & config.keys()) and "stage" not in config and "base_model" not in config


def convert(config: Mapping[str, Any], file: Path, out: Path, kind: str | None = None) -> Ours:
    """
    Raises:
        SpecError: it cannot be told for which of TRL's commands it is.
    """
    kind = kind or kind_of(config, file)
    theirs, folder = Theirs(config), file.parent
    model = theirs.take("model_name_or_path")
    if not isinstance(model, str):
        raise SpecError([Problem("model_name_or_path", "is missing: which model is trained?")], str(file))
    ours = Ours("TRL", kind, file.stem, model_path(model, folder, out))
    _data(theirs, ours, folder, out)
    _tuning(theirs, ours)
    _lengths(theirs, ours)
    if kind in ("grpo", "rloo"):
        _rewards(theirs, ours, folder, out)
    if (value := theirs.take("accelerate_config")) is not None:
        if value in ACCELERATE:
            ours.stage["deepspeed"] = ACCELERATE[value]
            ours.was["deepspeed"] = f"accelerate_config: {value}"
        else:
            ours.drop("accelerate_config", value, REASONS["accelerate_config"])
    if (value := theirs.take("attn_implementation")) is not None:
        flash(ours, "attn_implementation", value)
    if (value := theirs.take("seed")) is not None:
        ours.head["seed"] = value
    if theirs.take("assistant_only_loss"):
        ours.mask["train_on"] = "assistant"
    elif theirs.take("completion_only_loss"):
        ours.mask["train_on"] = "completion"
    elif kind == "sft":
        ours.differs.append(
            "of conversations TRL trains every token unless assistant_only_loss says otherwise; here every answer is, and no "
            "question: `mask: {train_on: all}` for the other"
        )
    held_out = any("eval" in source for source in ours.data)
    if not held_out:  # else they are the trainer's own fields
        for name in ("eval_strategy", "eval_steps"):
            if (value := theirs.take(name)) not in (None, "no"):
                ours.drop(name, value, NOTHING_HELD_OUT)
    ratio = theirs.take("warmup_ratio")
    if ratio is not None:
        ours.train["warmup_steps"], ours.was["warmup_steps"] = float(ratio), "warmup_ratio"
    ours.finish(theirs, REASONS, SILENT)
    return ours


def kind_of(config: Mapping[str, Any], file: Path) -> str:
    """By the fields that only one trainer has, else by the name of the file or of what it writes."""
    given = {k for k, v in config.items() if v not in NOTHING}
    if {"reward_funcs", "reward_model_name_or_path"} & given and "num_generations" not in given:
        given.add("num_generations")
    common = set.intersection(*(set(fields_of(kind)) for kind in KINDS))
    extra = {"sft": {"assistant_only_loss", "completion_only_loss", "dataset_text_field", "padding_free"}}
    fit = {kind: len(given & (set(fields_of(kind)) | extra.get(kind, set())) - common) for kind in KINDS}
    best = max(fit.values())
    found = [kind for kind, count in fit.items() if count == best]
    if best and len(found) == 1:
        return found[0]
    words = f"{file.stem} {config.get('output_dir') or ''} {config.get('run_name') or ''}".lower()
    named = [kind for kind in (found if best else KINDS) if kind in words]
    if len(named) == 1:
        return named[0]
    if best and set(found) <= {"grpo", "rloo"}:
        return "grpo"
    if "beta" in given and "dpo" in found:
        return "dpo"
    what = "it cannot be told for which of TRL's commands this file is: nothing in it belongs to one of them alone"
    raise SpecError(
        [Problem("", f"{what}; put the command into its name, for example sft.yaml or dpo.yaml")], str(file)
    )


def _data(theirs: Theirs, ours: Ours, folder: Path, out: Path) -> None:
    entries = theirs.take("datasets")
    name, config, split = (theirs.take(k) for k in ("dataset_name", "dataset_config", "dataset_train_split"))
    test = theirs.take("dataset_test_split")
    if entries is None and name is not None:
        entries = [{"path": name, "name": config, "split": split}]
    for entry in entries or []:
        each = Theirs(entry if isinstance(entry, dict) else {"path": entry})
        files = each.take("data_files")
        path = str(each.take("path", ""))
        for one in split_names(files) if files is not None and not isinstance(files, dict) else [path]:
            source: dict[str, Any] = {"path": source_path(one, folder, out)}
            if source["path"].startswith("hf://"):
                source |= {
                    k: v for k in ("split", "name") if (v := each.take(k)) is not None and (k, v) != ("split", "train")
                }
            ours.data.append(source)
        each.take("split"), each.take("name")
        for key, value in each.left().items():
            ours.drop(
                f"datasets.{key}", value, "`weight`, `columns` and `filter` of a data source have their own form here"
            )
    share = theirs.take("test_split_size")
    if share is not None:
        for source in ours.data:
            source["eval"] = f"{100 * float(share):g}%"
    elif test is not None and ours.data and ours.data[0]["path"].startswith("hf://"):
        ours.heldout.append(ours.data[0] | {"split": test})
    elif test is not None:
        ours.drop("dataset_test_split", test, "files have no splits: name the held-out file in an evaluate stage")


def _tuning(theirs: Theirs, ours: Ours) -> None:
    used, four = theirs.take("use_peft"), theirs.take("load_in_4bit")
    for name, (option, default) in LORA.items():
        value = theirs.take(name, default)
        if used and value is not None:
            ours.tuning[option] = value
    for name, option in FOUR_BITS.items():
        value = theirs.take(name)
        if used and four and value is not None:
            ours.tuning[option] = value
    if used:
        ours.tuning = {"method": "qlora" if four else "lora"} | ours.tuning
        if ours.tuning.get("target_modules") in ("all-linear", ["all-linear"]):
            ours.tuning["target_modules"] = "all-linear"
    else:
        theirs.give_back(*LORA, "load_in_4bit")
    if not (used and four):
        theirs.give_back(*FOUR_BITS)


def _lengths(theirs: Theirs, ours: Ours) -> None:
    if ours.kind in ("sft", "reward", "dpo", "kto"):
        ours.stage["truncation"] = "left" if theirs.take("truncation_mode") == "keep_end" else "right"
        ours.was["truncation"] = "TRL cuts rows that are longer than max_length; `drop` leaves them out"
    packing = theirs.take("packing")
    if packing is not None and ours.kind == "sft":
        ours.train["packing"] = packing
    if packing:
        ours.differs.append("packing: rows that share a sequence do not see each other here, whatever the attention")


def _rewards(theirs: Theirs, ours: Ours, folder: Path, out: Path) -> None:
    rewards: list[Any] = []
    if (model := theirs.take("reward_model_name_or_path")) is not None:
        rewards.append(model_path(model, folder, out))
    for name in split_names(theirs.take("reward_funcs")):
        module, _, function = name.rpartition(".")
        rewards.append(f"trl.rewards:{name}" if name in REWARDS else f"{module}:{function}" if module else name)
    weights = theirs.take("reward_weights") or []
    for i, weight in enumerate(weights[: len(rewards)]):
        rewards[i] = {"reward": rewards[i], "weight": float(weight)}
    ours.stage["rewards"] = rewards
    names = {"max_completion_length": "max_new_tokens", "temperature": "temperature"}
    for theirs_name, name in names.items():
        if (value := theirs.take(theirs_name)) is not None:
            ours.stage[name] = float(value) if name == "temperature" else value
            ours.was[name] = theirs_name
    if theirs.take("use_vllm"):
        ours.stage["engine"] = "auto"
        ours.was["engine"] = "use_vllm: vllm where it is installed and there are GPUs"
    if (value := theirs.take("max_prompt_length")) is not None:
        ours.drop("max_prompt_length", value, "a prompt has the model's positions, less max_new_tokens")
