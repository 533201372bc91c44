"""Configurations of axolotl (`axolotl train FILE`).

Names and defaults as in its src/axolotl/utils/schemas (config.py, datasets.py, peft.py, training.py) and, of what the types of
preference data read, src/axolotl/prompt_strategies/dpo and kto.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.converter.parts import (
    PROMPTS,
    Ours,
    Theirs,
    deepspeed_of,
    flash,
    held_out,
    model_path,
    place_of,
    source_path,
    split_names,
)
from stages.data.chat import BUILT_IN
from stages.errors import Problem, SpecError

# `rl` -> the stage, and for preference pairs the loss
KINDS = {
    "dpo": ("dpo", None),
    "ipo": ("dpo", "ipo"),
    "simpo": ("dpo", "simpo"),
    "orpo": ("dpo", "orpo"),
    "kto": ("kto", None),
    "grpo": ("grpo", None),
}
TRAIN = {
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sequence_len": "max_length",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
}
# axolotl's own defaults, where they are not the trainer's
DEFAULTS = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "lr_scheduler": "cosine",
    "sequence_len": 512,
}
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}
# Last part of a preference dataset's `type` -> columns, ours first: `chatml.intel`, `llama3.intel`, `chat_template.intel`.
DPO_TYPES: dict[str, dict[str, str]] = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "prompt_pairs": {},
    "ultra": {},
    "default": {},
}
KTO_TYPES: dict[str, dict[str, str]] = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction"},
    "argilla_chat": {},
    "prompt_pairs": {},
    "ultra": {},
}
CUSTOM = {
    "field_system": "system",
    "field_prompt": "prompt",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
OWN_TEMPLATES = ("tokenizer_default", "tokenizer_default_fallback_")
REASONS = {
    "sequence_len": PROMPTS,
    "train_on_inputs|sample_packing": "of SFT; it means nothing to this stage",
    "fsdp.*": "write `deepspeed: zero3`, which shares out the same",
    "load_in_8bit": "8-bit weights are not there; `tuning: {method: qlora}` has 4 bits",
    "gptq": "weights in GPTQ are not trained beside; `tuning: {method: qlora}`",
    "special_tokens|tokens|added_tokens_overrides|resize_token_embeddings_to_32x|eot_tokens|fix_untrained_tokens":
        "the model's own tokenizer decides; a chat template's new tokens get rows, and the pad token is never a stop token",
    "model_type|tokenizer_type|tokenizer_config|is_.*_derived_model|base_model_config|tokenizer_use_fast|tokenizer_legacy|processor_type":
        "found from the model's own files",
    "base_model_ignore_patterns|revision_of_model|model_revision": "download that revision, and name its folder",
    "wandb_.*|mlflow_.*|comet_.*|use_tensorboard|gradio_.*|trackio_.*": "write `report_to` at the top of the spec",
    "hub_model_id|hub_strategy|push_.*|hf_use_auth_token": "publish the finished model folder",
    "pad_to_sequence_len|eval_sample_packing|sample_packing_.*|multipack_.*|batch_flattening|curriculum_sampling":
        "packing is best fit over all the data, and batches are padded to their longest row",
    "unsloth_.*|lora_(mlp|qkv|o|embedding)_kernel|flash_attn_.*|xformers_attention|flex_attention|s2_attention|cut_cross_entropy":
        "not there; `attention: auto`, and `use_liger_kernel` under `train`",
    "liger_.*": "write use_liger_kernel: true under `train`",
    "plugins": "not there; stages and rewards of your own are named as module:name",
    "sequence_parallel_degree|context_parallel_size|tensor_parallel_size|heads_k_stride|ring_attn_func|dp_shard_size":
        "a sequence is on one worker; `deepspeed: zero3` shares out the weights",
    "relora.*|loftq_config|loraplus_.*|lisa_.*|peft_layer_replication|peft|bnb_config_kwargs": "not there",
    "lora_model_dir": "merge the adapter into its model first, and name that folder as `model`",
    "lora_fan_in_fan_out": "found from the layers",
    "unfrozen_parameters": "all weights are trained, or an adapter",
    "train_on_eos|train_on_eot": "the stop token of every trained turn is trained",
    "dataset_.*|skip_prepare_dataset|preprocess_.*|shuffle_merged_datasets|dataloader_.*|excess_length_strategy|min_sample_len":
        "Ray Data prepares the data; `shuffle`, `deduplicate` and `truncation` of a stage decide the rest",
    "pretraining_dataset|pretrain_.*": "name it under `datasets`, as plain text (type: completion)",
    "evals_per_epoch|eval_table_size|eval_max_new_tokens|do_(causal_lm|bench)_eval|eval_causal_lm_metrics|bench_.*":
        "an evaluate stage answers held-out prompts",
    "saves_per_epoch": "write save_steps; a stage goes on from its newest checkpoint by itself",
    "loss_watchdog_.*": "a loss that explodes stops the stage by itself",
    "lr_quadratic_warmup|cosine_.*|lr_groups|embedding_lr.*|torchdistx_path|adam_(beta3|epsilon2)":
        "a schedule or optimizer of your own: `optim: module:Class`, `lr_scheduler_type: module:function` under `train`",
    "device_map|max_memory|gpu_memory_limit|low_cpu_mem_usage|ddp.*|world_size|local_rank|device|num_gpus":
        "`cluster:` says how many workers there are",
    "rl_adapter_ref_model|reference_model": "the reference is the model that the stage was given",
    "trust_remote_code": "code that comes with a model is never run",
    "max_prompt_len|max_prompt_length": "a prompt may have what the answer leaves of max_length",
    "vllm": "vllm runs in the workers that train",
    "debug|strict|gc_steps|profiler_.*|use_ray|ray_.*|axolotl_config_path|s3_.*|gcs_.*|auto_resume_.*|resume_from_checkpoint":
        "not used here; an interrupted stage goes on by itself",
    "default_system_message": "put it into the rows, as their `system` column",
    "process_reward_model": "there is no reward for each step of an answer",
    "quantization|qat|fp8|bfloat16|float16|float32|embeddings_skip_upcast": "bf16 under autocast, or fp16",
    "lora_.*|peft_.*|load_in_4bit": "without `adapter` it means nothing",
    "rl_beta|simpo_gamma|rpo_alpha|orpo_alpha|cpo_alpha|kto_.*|dpo_.*|trl|reward_model": "it means nothing to this stage",
    "torch_compile|merge_lora|use_pose|pose_.*|chat_template_kwargs": "not carried over",
}  # fmt: skip
SILENT = ("output_dir", "dataset_prepared_path", "lora_on_cpu")


def is_theirs(config: Mapping[str, Any]) -> bool:
    return "base_model" in config


def convert(config: Mapping[str, Any], file: Path, out: Path) -> Ours:
    """
    Raises:
        SpecError: a way of training that there is not.
    """
    theirs, folder = Theirs(config), file.parent
    rl = theirs.take("rl")
    if rl is not None and rl not in KINDS:
        raise SpecError([Problem("rl", f"{rl!r} has no stage; there are {', '.join(KINDS)}")], str(file))
    kind, loss = KINDS[rl] if rl else ("reward" if theirs.take("reward_model") else "sft", None)
    ours = Ours("axolotl", kind, file.stem, model_path(str(theirs.take("base_model")), folder, out))
    if not rl:
        theirs.take("reward_model")
    for key, into in (("datasets", ours.data), ("test_datasets", ours.heldout)):
        for entry in theirs.take(key) or []:
            into.append(_source(Theirs(entry), ours, folder, out))
    if (share := theirs.take("val_set_size")) is not None and share:
        held_out(ours, "val_set_size", share)
    unused = ("sequence_len",) if kind == "grpo" else ()
    for name, value in DEFAULTS.items():
        if name not in unused:
            theirs.values[name] = theirs.values.get(name) if theirs.values.get(name) is not None else value
    ours.trains(theirs, {name: to for name, to in TRAIN.items() if name not in unused}, _as_ours)
    _losses(theirs, ours, loss)
    if kind == "grpo":
        _rewards(theirs, ours)
    _tuning(theirs, ours)
    _mask(theirs, ours, folder, out)
    _schedule(theirs, ours)
    _precision(theirs, ours)
    if (value := theirs.take("deepspeed")) is not None:
        deepspeed_of(value, folder, out, ours)
    if (value := theirs.take("early_stopping_patience")) is not None:
        ours.stage["early_stopping"] = {"patience": value}
    if theirs.take("dataset_exact_deduplication"):
        ours.stage["deduplicate"] = True
    if (value := theirs.take("seed")) is not None:
        ours.head["seed"] = value
    if kind in ("sft", "dpo", "kto", "reward"):
        ours.differs.append(
            "sequence_len: longer rows are left out, as there; here more than 1% of them stop the run (max_dropped)"
        )
    ours.finish(theirs, REASONS, SILENT)
    return ours


def _as_ours(name: str, value: Any) -> Any:
    return float(value) if name == "num_train_epochs" else value


# ------------------------------------------------------------------------------------------------ data


def _source(entry: Theirs, ours: Ours, folder: Path, out: Path) -> dict[str, Any]:
    path, files = str(entry.take("path", "")), entry.take("data_files")
    if files is not None:
        first = files if isinstance(files, str) else files[0]
        if isinstance(files, list) and len(files) > 1:
            ours.drop("datasets.data_files", files[1:], "one file for each data source: write the others beside it")
        path = first if place_of(first, folder).exists() or path in ("json", "csv", "parquet", "text") else path
    source: dict[str, Any] = {"path": source_path(path, folder, out)}
    entry.take("ds_type")
    for name in ("split", "name", "revision"):
        value = entry.take(name)
        if value is not None and source["path"].startswith("hf://") and (name, value) != ("split", "train"):
            source[name] = value
    _type(entry, source, ours)
    for key, value in entry.left().items():
        ours.drop(f"datasets.{key}", value, OF_DATA.get(key, "not carried over"))
    return source


OF_DATA = {
    "shards": "write `filter` for a part of the rows",
    "shards_idx": "write `filter` for a part of the rows",
    "preprocess_shards": "Ray Data streams the rows",
    "trust_remote_code": "scripts that come with a dataset are never run",
    "conversation": "the model's own chat template decides",
    "roles": "roles that are known are those of messages and ShareGPT; rename others in the file",
    "train_on_eos": "the stop token of every trained turn is trained",
    "message_field_training": "name the key `train` in the messages",
    "message_field_training_detail": "whole turns are trained: `train` and `weight` of a message",
    "drop_system_message": "leave it out of the rows, or `filter` them",
    "chat_template": "the model's own; write `chat_template` at the top of the spec",
    "chat_template_jinja": "write `chat_template: FILE` at the top of the spec",
    "field_thinking": "name the key reasoning_content",
    "split_thinking": "name the reasoning reasoning_content in the rows",
    "input_format": "make `messages` of the columns, with Jinja",
}


def _type(entry: Theirs, source: dict[str, Any], ours: Ours) -> None:
    """The columns and the format that a dataset's `type` stands for."""
    kind, columns = entry.take("type"), dict[str, str]()
    first, _, last = kind.partition(".") if isinstance(kind, str) else ("", "", "")
    if isinstance(kind, dict):
        custom = Theirs(kind)
        columns = {ours_name: v for name, ours_name in CUSTOM.items() if (v := custom.take(name)) is not None}
        for key, value in custom.left().items():
            ours.drop(
                f"datasets.type.{key}",
                value,
                "make `messages` of the columns, with Jinja: messages: [{role: user, content: ...}]",
            )
    elif ours.kind in ("dpo", "reward") and last in DPO_TYPES:
        columns = dict(DPO_TYPES[last])
    elif ours.kind == "kto" and last in KTO_TYPES:
        columns = dict(KTO_TYPES[last])
    elif first in ("chat_template", "sharegpt", "alpaca", "alpaca_chat", "completion", "pretrain") or kind is None:
        pass  # the rows say it themselves
    elif first not in ("bradley_terry",):
        ours.drop(
            "datasets.type",
            kind,
            "not known here: the format is found from the rows; name `columns`, or make `messages`",
        )
    if (text := entry.take("field")) is not None and text != "text":
        columns["text"] = text
    messages = entry.take("field_messages")
    mapping = entry.take("message_property_mappings") or {}
    role = entry.take("message_field_role", mapping.get("role", "role"))
    content = entry.take("message_field_content", mapping.get("content", "content"))
    turns = {("role", "content"): "messages", ("from", "value"): "conversations"}.get((role, content))
    if turns is None:
        ours.drop(
            "datasets.message_property_mappings",
            mapping,
            "turns are {role, content} or {from, value}; rename the keys in the file",
        )
    elif messages is not None and messages not in ("messages", "conversations"):
        columns[turns] = messages
    if (tools := entry.take("field_tools", "tools")) != "tools":
        columns["tools"] = tools
    trained = entry.take("roles_to_train")
    if trained is not None and set(trained) - {"assistant", "gpt"}:
        ours.drop(
            "datasets.roles_to_train", trained, "assistant turns are trained, or everything: `mask: {train_on: all}`"
        )
    columns = {new: old for new, old in columns.items() if new != old}
    if columns:
        source["columns"] = columns


# ------------------------------------------------------------------------------------------------ the rest


def _losses(theirs: Theirs, ours: Ours, loss: str | None) -> None:
    beta, gamma = theirs.take("rl_beta"), theirs.take("simpo_gamma")
    sft, orpo, cpo = theirs.take("rpo_alpha"), theirs.take("orpo_alpha"), theirs.take("cpo_alpha")
    if beta is None and orpo is not None:
        beta, ours.was["beta"] = orpo, "orpo_alpha"
    elif beta is not None:
        ours.was["beta"] = "rl_beta"
        theirs.give_back("orpo_alpha")
    if beta is not None:
        ours.train["beta"] = float(beta)
    if ours.kind != "dpo":
        theirs.give_back("simpo_gamma", "rpo_alpha", "cpo_alpha")
        return
    if loss:
        ours.train["loss_type"], ours.was["loss_type"] = loss, f"rl: {loss}"
    if weight := sft or (cpo if loss == "simpo" else None):
        ours.train |= {"loss_type": [loss or "sigmoid", "sft"], "loss_weights": [1.0, float(weight)]}
    if sft or loss != "simpo":
        theirs.give_back("cpo_alpha")
    if loss != "simpo":
        theirs.give_back("simpo_gamma")
    if gamma is not None and loss == "simpo":
        ours.stage["gamma"], ours.was["gamma"] = float(gamma), "simpo_gamma"
        ours.differs.append(
            "simpo_gamma: TRL's CPOTrainer takes it within the sigmoid as beta x gamma / beta, the same number here"
        )


def _rewards(theirs: Theirs, ours: Ours) -> None:
    trl = Theirs(theirs.take("trl") or {})
    rewards: list[Any] = []
    for name in split_names(trl.take("reward_funcs")):
        module, _, function = name.rpartition(".")
        rewards.append(f"{module}:{function}" if module else name)
    for i, weight in enumerate((trl.take("reward_weights") or [])[: len(rewards)]):
        rewards[i] = {"reward": rewards[i], "weight": float(weight)}
    ours.stage["rewards"] = rewards
    for name, stage_name in (("max_completion_length", "max_new_tokens"), ("temperature", "temperature")):
        if (value := trl.take(name)) is not None:
            ours.stage[stage_name] = float(value) if name == "temperature" else value
            ours.was[stage_name] = f"trl.{name}"
    if trl.take("use_vllm"):
        ours.stage["engine"], ours.was["engine"] = "auto", "trl.use_vllm"
    ours.trains(trl, {"beta": "beta", "num_generations": "num_generations"})
    ours.finish(trl, {"vllm_.*": "vllm runs in the workers that train: there is no server"})


def _tuning(theirs: Theirs, ours: Ours) -> None:
    adapter, four = theirs.take("adapter"), theirs.take("load_in_4bit")
    everywhere = theirs.take("lora_target_linear")
    options = {name: theirs.take(key) for key, name in LORA.items()}
    if adapter not in (None, "lora", "qlora"):
        ours.drop("adapter", adapter, "there are lora and qlora")
    if adapter not in ("lora", "qlora"):
        theirs.give_back(*LORA, "load_in_4bit", "lora_target_linear")
        return
    ours.tuning = {"method": "qlora" if adapter == "qlora" or four else "lora"}
    ours.tuning |= {name: value for name, value in options.items() if value is not None}
    if "lora_dropout" in ours.tuning:
        ours.tuning["lora_dropout"] = float(ours.tuning["lora_dropout"])
    if everywhere or "target_modules" not in ours.tuning:
        ours.tuning["target_modules"] = "all-linear"


def _mask(theirs: Theirs, ours: Ours, folder: Path, out: Path) -> None:
    everything, packing = theirs.take("train_on_inputs"), theirs.take("sample_packing")
    template, text = theirs.take("chat_template"), theirs.take("chat_template_jinja")
    if ours.kind == "sft":
        ours.mask["train_on"] = "all" if everything else "assistant"
        if packing:
            ours.train["packing"], ours.was["packing"] = True, "sample_packing"
            ours.differs.append("micro_batch_size: of packed sequences, there as here; a step has as many sequences")
    else:
        theirs.give_back("train_on_inputs", "sample_packing")
    if text is not None and "{" not in str(text) and place_of(str(text), folder).is_file():
        ours.head["chat_template"] = source_path(str(text), folder, out)
    elif text is not None:
        ours.drop("chat_template_jinja", text, "write it to a file, and `chat_template: FILE` at the top of the spec")
    elif template in BUILT_IN:
        ours.head["chat_template"] = template
        ours.was["chat_template"] = "theirs may add a default system message; this one adds nothing"
    elif template is not None and not str(template).startswith(OWN_TEMPLATES):
        ours.differs.append(
            f"chat_template: {template}: rows are rendered with the model's own chat template, which may differ from "
            "axolotl's of that name; `raylign inspect` shows it"
        )


def _schedule(theirs: Theirs, ours: Ours) -> None:
    ratio, per_epoch = theirs.take("warmup_ratio"), theirs.take("evals_per_epoch")
    if ratio is not None:
        ours.train["warmup_steps"], ours.was["warmup_steps"] = float(ratio), "warmup_ratio"
    evaluates = any("eval" in source for source in ours.data)
    if per_epoch and evaluates:
        ours.train["eval_strategy"], ours.was["eval_strategy"] = "epoch", f"evals_per_epoch: {per_epoch}"
    elif per_epoch:
        ours.drop("evals_per_epoch", per_epoch, "nothing is held out: give a data source `eval: 2%`")
    if not evaluates:
        for name in ("eval_strategy", "eval_steps"):
            if (value := theirs.take(name)) not in (None, "no"):
                ours.drop(name, value, "nothing is held out: give a data source `eval: 2%`")
    elif "eval_steps" in theirs.values and theirs.values.get("eval_strategy") is None and not per_epoch:
        ours.train["eval_strategy"] = "steps"


def _precision(theirs: Theirs, ours: Ours) -> None:
    for name in ("bf16", "fp16"):
        value = theirs.take(name)
        if value is True:
            ours.train[name] = True
    checkpointing = theirs.take("gradient_checkpointing")
    if checkpointing is not None:
        ours.train["gradient_checkpointing"] = bool(checkpointing)
        if not isinstance(checkpointing, bool):
            ours.drop("gradient_checkpointing", checkpointing, "recomputed, and not offloaded")
    for name, value in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if theirs.take(name):
            flash(ours, name, value)
