"""Configurations of LLaMA-Factory (`llamafactory-cli train FILE`), and its dataset_info.json where it lies beside.

Names and defaults as in its src/llamafactory/hparams (data_args.py, model_args.py, finetuning_args.py) and data/README.md.
"""

from __future__ import annotations

import json
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
from stages.errors import DataError, Problem, SpecError

STAGES = {"pt": "sft", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
# theirs -> ours, of `train`
TRAIN = {
    "pref_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "ld_alpha": "ld_alpha",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
}
OF_KIND = {
    "dpo": ("pref_beta", "dpo_label_smoothing", "ld_alpha"),
    "kto": ("pref_beta", "kto_chosen_weight", "kto_rejected_weight"),
}
PPO = {
    "ppo_epochs": "num_ppo_epochs",
    "ppo_buffer_size": "num_mini_batches",
    "ppo_target": "kl_target",
    "ppo_whiten_rewards": "whiten_rewards",
}
LOSSES = {name: name for name in ("sigmoid", "hinge", "ipo", "orpo", "simpo")}
# columns of dataset_info.json -> ours, by the format the rows then have
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
REASONS = {
    "cutoff_len": PROMPTS,
    "packing|neat_packing": "of SFT; it means nothing to this stage",
    "train_on_prompt|mask_history": "of conversations in SFT; it means nothing to this stage",
    "template": "plain text is trained on, without a chat template",
    "freeze_.*|use_llama_pro": "parts of a model cannot be frozen; `tuning` is full, lora or qlora",
    "use_galore|galore_.*": "write `optim: galore_adamw` and `optim_target_modules` under `train`",
    "use_apollo|apollo_.*": "write `optim: apollo_adamw` and `optim_target_modules` under `train`",
    "use_badam|badam_.*|use_adam_mini|use_muon": "an optimizer of your own: `optim: module:Class` under `train`",
    "loraplus_.*": "LoRA+ is not there; one learning rate for both matrices",
    "pissa_.*": "an adapter starts so that the model is unchanged",
    "oft_.*|module_dropout": "OFT is not there; `tuning` is full, lora or qlora",
    "ref_model.*": "the reference is the model that the stage was given",
    "reward_model_(adapters|quantization_bit|type)": "a whole reward model is wanted, or `rewards: [stages.reward]`",
    "adapter_name_or_path": "merge the adapter into its model first, and name that folder as `model`",
    "quantization_(method|type)|double_quantization|bnb_.*": "`tuning: {method: qlora}` has NF4 with double quantisation",
    "swanlab_.*|use_swanlab|ray_.*|llamaboard.*": "not used here; the report is in the run folder",
    "vllm_.*|infer_.*": "of inference, which is not part of training",
    "top_p|top_k|num_beams|do_sample|repetition_penalty|length_penalty": "answers are drawn from all probabilities",
    "temperature": "of sampling; ppo has it beside `train`",
    "image_.*|video_.*|audio_.*|media_dir|crop_to_patches": "text alone is trained on",
    "streaming|buffer_size|preprocessing_.*|tokenized_path|dataloader_.*|data_shared.*": "Ray Data prepares the data",
    "mix_strategy|interleave_probs": "`weight` of a data source says how often its rows come up",
    "eval_on_each_dataset": "an evaluate stage has a table of models; give each dataset its own",
    "rope_scaling": "write it into the model's config.json",
    "shift_attn|mixture_of_depths|use_unsloth.*|upcast_.*|pure_bf16|use_reentrant_gc|disable_gradient.*": "not there",
    "moe_aux_loss_coef": "write `router_aux_loss_coef` into the model's config.json",
    "tool_format": "tools are rendered by the model's own chat template",
    "resize_vocab|add_(special_)?tokens|new_special_.*|split_special_tokens": "add them to the tokenizer, and name that folder",
    "default_system": "put it into the rows, as their `system` column",
    "enable_thinking|use_fast_tokenizer|low_cpu_mem_usage|cache_dir|hf_hub_token|.*_hub_token|use_cache": "decided here",
    "max_samples": "write `filter` for fewer rows, or `max_steps` under `train` for a shorter run",
    "ddp_.*|fsdp.*": "`cluster:` says how many workers there are, `deepspeed:` how memory is shared",
    "lora_.*|additional_target|use_(rslora|dora)|quantization_bit": "all weights are trained, so it means nothing",
    "pref_.*|simpo_gamma|dpo_.*|kto_.*|ppo_.*|ld_alpha|reward_model": "it means nothing to this stage",
    "plot_loss|include_.*tokens.*|compute_accuracy|predict_with_generate|do_(eval|predict)": "the report has it",
}
SILENT = (
    "do_train",
    "output_dir",
    "overwrite_output_dir",
    "overwrite_cache",
    "logging_dir",
    "run_name",
    "save_only_model",
)


def is_theirs(config: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in config and (
        "finetuning_type" in config or ("stage" in config and "dataset" in config) or "cutoff_len" in config
    )


def convert(config: Mapping[str, Any], file: Path, out: Path) -> Ours:
    """
    Raises:
        SpecError: a stage or a method that there is not.
    """
    theirs, folder = Theirs(config), file.parent
    stage = theirs.take("stage", "sft")
    if stage not in STAGES:
        raise SpecError([Problem("stage", f"{stage!r} is none of {', '.join(STAGES)}")], str(file))
    kind = STAGES[stage]
    model = model_path(str(theirs.take("model_name_or_path")), folder, out)
    ours = Ours("LLaMA-Factory", kind, file.stem, model)
    _data(theirs, ours, folder, out, stage)
    _tuning(theirs, ours, str(file))
    _mask(theirs, ours, stage)
    length = theirs.take("cutoff_len", 2048)
    if kind != "ppo":
        ours.train["max_length"], ours.was["max_length"] = length, "cutoff_len"
        ours.stage["truncation"] = "right"
        ours.differs.append(
            "cutoff_len: LLaMA-Factory shortens both question and answer; here the end is cut (truncation: right)"
        )
    else:
        theirs.give_back("cutoff_len")
    ours.trains(theirs, {name: TRAIN[name] for name in OF_KIND.get(kind, ())})
    _losses(theirs, ours)
    if kind == "ppo":
        _ppo(theirs, ours, folder, out)
    if (value := theirs.take("deepspeed")) is not None:
        deepspeed_of(value, folder, out, ours)
    if (value := theirs.take("flash_attn")) not in (None, "auto"):
        flash(ours, "flash_attn", {"disabled": "eager"}.get(value, value))
    if (value := theirs.take("enable_liger_kernel")) is not None:
        ours.train["use_liger_kernel"], ours.was["use_liger_kernel"] = value, "enable_liger_kernel"
    if (value := theirs.take("seed")) is not None:
        ours.head["seed"] = value
    if (value := theirs.take("warmup_ratio")) is not None:
        ours.train["warmup_steps"], ours.was["warmup_steps"] = float(value), "warmup_ratio"
    if not any("eval" in source for source in ours.data):
        for name in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
            if (value := theirs.take(name)) not in (None, "no"):
                ours.drop(name, value, "no rows of the training data are held out: give a source `eval: 2%`")
    ours.finish(theirs, REASONS, SILENT)
    return ours


# ------------------------------------------------------------------------------------------------ data


def _data(theirs: Theirs, ours: Ours, folder: Path, out: Path, stage: str) -> None:
    name = str(theirs.take("dataset_dir", "data"))
    place = place_of(name, folder)
    places = [folder / name, Path.cwd() / name, folder]
    info_file = next((p / "dataset_info.json" for p in places if (p / "dataset_info.json").is_file()), None)
    info = _info(info_file)
    where = info_file.parent if info_file is not None else place
    for key, into in (("dataset", ours.data), ("eval_dataset", ours.heldout)):
        for name in split_names(theirs.take(key)):
            into.append(_source(name, info.get(name), where, out, stage, ours))
    if info_file is None and ours.data:
        ours.differs.append(
            f"dataset_info.json is not in {place} or beside the file: names of datasets are taken for files there, and their "
            "columns are found from the rows"
        )
    if (value := theirs.take("val_size")) is not None:
        held_out(ours, "val_size", value)


def _info(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _source(name: str, entry: Any, where: Path, out: Path, stage: str, ours: Ours) -> dict[str, Any]:
    """A dataset by its entry in dataset_info.json."""
    if not isinstance(entry, dict):
        files = sorted(where.glob(f"{name}.*"))
        return {
            "path": source_path(
                str(files[0].resolve()) if files else str((where / f"{name}.json").resolve()), where, out
            )
        }
    each = Theirs(entry)
    file, hub = each.take("file_name"), each.take("hf_hub_url")
    source: dict[str, Any] = {"path": source_path(str((where / file).resolve()), where, out) if file else f"hf://{hub}"}
    if not file and not hub:
        source["path"] = str(each.take("cloud_file_name") or name)
        ours.drop(
            f"{name}.script_url", entry.get("script_url"), "scripts are not run; name files, or a dataset of the hub"
        )
    each.take("ms_hub_url"), each.take("om_hub_url"), each.take("script_url")
    for theirs_name, option in (("subset", "name"), ("split", "split")):
        if (value := each.take(theirs_name)) is not None and not file and (option, value) != ("split", "train"):
            source[option] = value
    _columns(each, source, stage, ours, name)
    for key, value in each.left().items():
        why = "write `filter` for fewer rows" if key == "num_samples" else "not carried over"
        ours.drop(f"{name}.{key}", value, why)
    return source


def _columns(each: Theirs, source: dict[str, Any], stage: str, ours: Ours, name: str) -> None:
    columns, tags = dict(each.take("columns") or {}), dict(each.take("tags") or {})
    sharegpt = each.take("formatting", "alpaca") == "sharegpt"
    ranking = bool(each.take("ranking"))
    openai = tags.get("role_tag") == "role"
    table = dict(SHAREGPT if sharegpt else ALPACA)
    if openai:
        table["messages"] = "messages"
    if sharegpt and "messages" not in columns and not openai:
        columns["messages"] = "conversations"
    if ranking:
        table |= PAIR
    if ranking and not sharegpt:
        table["prompt"] = "prompt"
        columns = {"prompt": "instruction", "query": "input"} | columns
        query = columns.pop("query")
        ours.differs.append(
            f"{name}: of pairs the column {query} is not joined to the question here; join them in the file"
        )
    if "kto_tag" in columns:
        table["kto_tag"] = "label"
        if not sharegpt:
            table |= {"prompt": "prompt", "response": "completion"}
            columns = {"prompt": "instruction", "response": "output"} | columns
            columns.pop("query", None)
    if stage == "pt":
        table = {"prompt": "text"}
        columns = {"prompt": columns.get("prompt", "text")}
    renamed: dict[str, str] = {}
    for theirs_name, column in columns.items():
        if theirs_name in table:
            renamed |= {table[theirs_name]: column} if table[theirs_name] != column else {}
        else:
            ours.drop(
                f"{name}.columns.{theirs_name}",
                column,
                "text alone is trained on" if theirs_name.endswith("s") else "not known",
            )
    if renamed:
        source["columns"] = renamed
    usual = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
    for tag, value in tags.items():
        if tag in usual and value not in usual[tag]:
            ours.drop(
                f"{name}.tags.{tag}", value, "turns are {role, content} or {from, value}; rename the keys in the file"
            )
        elif tag not in usual and value not in ROLES:
            ours.drop(f"{name}.tags.{tag}", value, f"roles that are known: {', '.join(ROLES)}; rename them in the file")


ROLES = (
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "tool",
    "observation",
    "function_call",
    "function",
    "model",
    "bot",
)


# ------------------------------------------------------------------------------------------------ the rest


def _tuning(theirs: Theirs, ours: Ours, file: str) -> None:
    method, bits = theirs.take("finetuning_type", "lora"), theirs.take("quantization_bit")
    rank, target = theirs.take("lora_rank", 8), theirs.take("lora_target", "all")
    alpha, dropout = theirs.take("lora_alpha", 2 * rank), theirs.take("lora_dropout", 0.0)
    saved = split_names(theirs.take("additional_target"))
    more = {name: theirs.take(name) for name in ("use_rslora", "use_dora")}
    if method not in ("lora", "full"):
        raise SpecError([Problem("finetuning_type", f"{method!r}: there are lora and full here")], file)
    if method == "full":
        theirs.give_back(
            "lora_rank", "lora_target", "lora_alpha", "lora_dropout", "additional_target", "quantization_bit", *more
        )
        return
    if bits == 8:
        ours.drop("quantization_bit", bits, "8-bit weights are not there; `tuning: {method: qlora}` has 4 bits")
    elif bits not in (None, 4):
        ours.drop("quantization_bit", bits, "`tuning: {method: qlora}` has 4 bits")
    target = "all-linear" if target == "all" else split_names(target)
    ours.tuning = {"method": "qlora" if bits == 4 else "lora", "r": rank, "lora_alpha": alpha}
    ours.tuning |= {"lora_dropout": float(dropout), "target_modules": target}
    ours.tuning |= {"modules_to_save": saved} if saved else {}
    ours.tuning |= {name: value for name, value in more.items() if value}


def _mask(theirs: Theirs, ours: Ours, stage: str) -> None:
    template, packing = theirs.take("template"), theirs.take("packing")
    neat, prompt, last = (theirs.take(name) for name in ("neat_packing", "train_on_prompt", "mask_history"))
    if ours.kind == "sft" and stage != "pt":
        ours.mask["train_on"] = "last_assistant" if last else "all" if prompt else "assistant"
    else:
        theirs.give_back("train_on_prompt", "mask_history")
    if ours.kind != "sft":
        theirs.give_back("packing", "neat_packing")
    elif packing or neat or (stage == "pt" and packing is None):
        ours.train["packing"] = True
    if stage == "pt":
        theirs.give_back("template")
    if ours.kind == "sft" and packing and not neat:
        ours.differs.append(
            "packing: there rows that share a sequence see each other, unless neat_packing; here they never do"
        )
    if template is not None and stage != "pt":
        ours.differs.append(
            f"template: {template}: rows are rendered with the model's own chat template, which may differ from "
            "LLaMA-Factory's of that name (its default system message, its slots); `raylign inspect` shows it. Where a base "
            "model has none: "
            "chat_template: chatml, or a file"
        )


def _losses(theirs: Theirs, ours: Ours) -> None:
    loss, share, gamma = (theirs.take(name) for name in ("pref_loss", "pref_ftx", "simpo_gamma"))
    mixed = theirs.take("pref_bco_weight")
    if ours.kind != "dpo":
        theirs.give_back("pref_loss", "pref_ftx", "simpo_gamma", "pref_bco_weight")
        return
    if loss is not None and loss not in LOSSES:
        ours.drop("pref_loss", loss, "a kto stage takes pairs too, each as two answers: `kind: kto`")
    elif loss is not None and loss != "sigmoid":
        ours.train["loss_type"], ours.was["loss_type"] = LOSSES[loss], "pref_loss"
    names, weights = [LOSSES.get(str(loss), "sigmoid")], [1.0]
    for name, value in (("sft", share), ("bco_pair", mixed)):
        if value:
            names, weights = [*names, name], [*weights, float(value)]
    if len(names) > 1:
        ours.train |= {"loss_type": names, "loss_weights": weights}
        ours.was |= {"loss_type": "pref_loss, pref_ftx, pref_bco_weight"}
    if gamma is not None and loss == "simpo":
        ours.stage["gamma"], ours.was["gamma"] = float(gamma), "simpo_gamma"
    elif gamma is not None:
        theirs.give_back("simpo_gamma")


def _ppo(theirs: Theirs, ours: Ours, folder: Path, out: Path) -> None:
    reward = theirs.take("reward_model")
    if reward is not None:
        ours.stage["rewards"] = [model_path(str(reward), folder, out)]
        if theirs.values.get("reward_model_type", "lora") == "lora":
            ours.differs.append(
                f"reward_model: {reward} is an adapter there (reward_model_type: lora): merge it, or train one here and write "
                "rewards: [stages.reward]"
            )
    ours.trains(theirs, PPO)
    if "kl_target" in ours.train:
        ours.train["kl_target"] = float(ours.train["kl_target"])
    else:
        ours.differs.append(
            "the penalty for leaving the reference is adapted to 6 nats there (ppo_target), and constant here: kl_target"
        )
    if (value := theirs.take("max_new_tokens")) is not None:
        ours.stage["max_new_tokens"] = value
    if (value := theirs.take("temperature")) is not None:
        ours.stage["temperature"] = float(value)
    if theirs.take("ppo_score_norm"):
        ours.differs.append(
            "ppo_score_norm: the rewards of a reward stage are normalised by the mean and spread it found"
        )
    ours.differs.append(
        "per_device_train_batch_size x gradient_accumulation_steps: answers of a step; num_mini_batches steps an iteration"
    )
