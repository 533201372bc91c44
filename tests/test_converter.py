"""Configurations of other tools become specs that are valid, and every key of theirs is carried over or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.converter import convert, read, spec_text, write_converted
from pipeline.converter.parts import Ours, Theirs
from pipeline.spec_reader import load_spec
from stages.errors import RaylignError, SpecError

AXOLOTL_LORA = """\
base_model: {model}
load_in_8bit: true
datasets:
  - path: {data}/chats.jsonl
    type: chat_template
    field_messages: messages
    roles_to_train: [assistant]
    train_on_eos: turn
val_set_size: 0.1
output_dir: ./out
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 128
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
wandb_project: mine
wandb_entity:
special_tokens:
  pad_token: <|pad|>
shinny_new_key: 3
"""
AXOLOTL_DPO = """\
base_model: {model}
rl: ipo
datasets:
  - {{path: {data}/argilla.jsonl, type: chatml.argilla, split: train, shards: 4}}
chat_template: llama3
sequence_len: 128
micro_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 0.000005
num_epochs: 1
rl_beta: 0.2
rpo_alpha: 0.5
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
"""
FACTORY = """\
### model
model_name_or_path: {model}
trust_remote_code: true
### method
stage: {stage}
do_train: true
finetuning_type: {method}
{more}
### dataset
dataset: {dataset}
dataset_dir: {data}
template: qwen
cutoff_len: 128
max_samples: 1000
preprocessing_num_workers: 16
### output
output_dir: saves/mine
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
TRL_SFT = """\
model_name_or_path: {model}
dataset_name: {data}/chats.jsonl
output_dir: out
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
max_length: 128
assistant_only_loss: true
use_peft: true
lora_r: 32
lora_target_modules: all-linear
gradient_checkpointing: true
attn_implementation: kernels-community/flash-attn2
dataset_num_proc: 8
report_to: wandb
push_to_hub: true
"""
TRL_DPO = """\
model_name_or_path: {model}
datasets:
  - {{path: json, data_files: {data}/pairs.jsonl, columns: [prompt, chosen, rejected]}}
test_split_size: 0.1
beta: 0.05
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
max_length: 128
precompute_ref_log_probs: true
eval_strategy: steps
eval_steps: 10
accelerate_config: zero2
warmup_ratio: 0.03
"""
TRL_GRPO = """\
model_name_or_path: {model}
dataset_name: {data}/chats.jsonl
reward_funcs: [think_format_reward, my_rewards.exact]
reward_weights: [0.5, 1.0]
num_generations: 4
per_device_train_batch_size: 4
max_completion_length: 32
temperature: 0.9
beta: 0.01
use_vllm: true
max_prompt_length: 64
"""


@pytest.fixture
def there(tmp_path: Path, data: Path, model: str) -> dict[str, Any]:
    """A folder of theirs: data in their shapes, dataset_info.json, a DeepSpeed file, a reward."""
    pairs = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    plain = [
        {
            "instruction": row["prompt"][-1]["content"],
            "chosen_response": row["chosen"][0]["content"],
            "rejected_response": row["rejected"][0]["content"],
        }
        for row in pairs
    ]
    (tmp_path / "argilla.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    alpaca = [{"instruction": r["instruction"], "input": "", "output": r["chosen_response"]} for r in plain]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    turn = lambda row, side: {"from": "gpt", "value": row[side]}  # noqa: E731
    ranked = [
        {
            "conversations": [{"from": "human", "value": r["instruction"]}],
            "chosen": turn(r, "chosen_response"),
            "rejected": turn(r, "rejected_response"),
        }
        for r in plain
    ]
    (tmp_path / "ranked.json").write_text(json.dumps(ranked))
    tagged = [
        {
            "messages": [
                {"role": "user", "content": r["instruction"]},
                {"role": "assistant", "content": r["chosen_response"]},
            ],
            "good": i % 2 == 0,
        }
        for i, r in enumerate(plain)
    ]
    (tmp_path / "tagged.json").write_text(json.dumps(tagged))
    info = {
        "mine": {"file_name": "alpaca.json"},
        "ranked": {"file_name": "ranked.json", "ranking": True, "formatting": "sharegpt",
                   "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        "tagged": {"file_name": "tagged.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"},
                   "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "ds_z3_config.json").write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}')
    (tmp_path / "my_rewards.py").write_text(
        "def exact(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    for name in ("chats.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text((data / name).read_text())
    return {"data": str(tmp_path), "model": model, "folder": tmp_path}


def converted(there: dict[str, Any], name: str, text: str, **more: str) -> tuple[dict[str, Any], str, list[str]]:
    """The spec as plain data, its text, and what was said."""
    file, out = there["folder"] / name, there["folder"] / "ours.yaml"
    file.write_text(text.format(**there, **more))
    lines = write_converted(file, out)
    return YAML(typ="safe").load(out.read_text()), out.read_text(), lines


def factory(there: dict[str, Any], stage: str, dataset: str, method: str = "lora", more: str = "") -> Any:
    return converted(there, "theirs.yaml", FACTORY, stage=stage, dataset=dataset, method=method, more=more)


def test_axolotl_lora(there: dict[str, Any]) -> None:
    spec, text, lines = converted(there, "lora.yml", AXOLOTL_LORA)
    stage = spec["stages"]["sft"]
    assert stage["data"] == [{"path": "chats.jsonl", "eval": "10%"}]
    assert stage["tuning"] == {
        "method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear",
    }  # fmt: skip
    assert stage["train"] == {
        "per_device_train_batch_size": 2, "num_train_epochs": 3.0, "optim": "adamw_torch", "lr_scheduler_type": "cosine",
        "max_length": 128, "packing": True, "warmup_steps": 0.1, "eval_strategy": "epoch", "gradient_checkpointing": True,
        "gradient_accumulation_steps": 4, "learning_rate": 2e-4, "weight_decay": 0.01,
    }  # fmt: skip
    said = "\n".join(lines)
    for key in (
        "load_in_8bit",
        "pad_to_sequence_len",
        "saves_per_epoch",
        "wandb_project",
        "special_tokens",
        "train_on_eos",
    ):
        assert f"- {key}: " in said or f"datasets.{key}: " in said, key
        assert key in text
    assert "shinny_new_key: 3" in said and "not known to this converter" in said
    assert "wandb_entity" not in said  # it said nothing
    assert "to mend" not in said
    load_spec(there["folder"] / "ours.yaml")


def test_axolotl_dpo(there: dict[str, Any]) -> None:
    spec, _, lines = converted(there, "dpo.yml", AXOLOTL_DPO)
    stage = spec["stages"]["dpo"]
    assert stage["data"] == [
        {
            "path": "argilla.jsonl",
            "columns": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
        }
    ]
    assert stage["train"]["loss_type"] == ["ipo", "sft"] and stage["train"]["loss_weights"] == [1.0, 0.5]
    assert stage["train"]["beta"] == 0.2 and stage["deepspeed"] == "zero3+offload"
    said = "\n".join(lines)
    assert "chat_template: llama3: rows are rendered with the model's own" in said and "datasets.shards: 4" in said
    assert "to mend" not in said


def test_llama_factory_lora_sft(there: dict[str, Any]) -> None:
    spec, _, lines = factory(
        there, "sft", "mine", more="lora_rank: 8\nlora_target: all\nmask_history: true\nval_size: 0.05"
    )
    stage = spec["stages"]["sft"]
    assert stage["tuning"] == {
        "method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear",
    }  # fmt: skip
    assert stage["mask"] == {"train_on": "last_assistant"} and stage["truncation"] == "right"
    assert stage["data"] == [{"path": "alpaca.json", "eval": "5%"}] and stage["train"]["warmup_steps"] == 0.1
    said = "\n".join(lines)
    assert "template: qwen: rows are rendered with the model's own chat template" in said
    assert (
        "max_samples: 1000" in said and "ddp_timeout" in said and "trust_remote_code" in said and "to mend" not in said
    )


def test_llama_factory_full_sft_under_zero3(there: dict[str, Any]) -> None:
    spec, _, lines = factory(there, "sft", "mine", "full", "deepspeed: ds_z3_config.json")
    assert spec["stages"]["sft"]["deepspeed"] == "ds_z3_config.json" and spec["stages"]["sft"]["tuning"] == {
        "method": "full"
    }
    assert "to mend" not in "\n".join(lines)


def test_llama_factory_names_a_deepspeed_file_that_is_elsewhere(there: dict[str, Any]) -> None:
    spec, _, _ = factory(there, "sft", "mine", "full", "deepspeed: examples/deepspeed/ds_z2_offload_config.json")
    assert spec["stages"]["sft"]["deepspeed"] == "zero2+offload"


def test_llama_factory_dpo(there: dict[str, Any]) -> None:
    spec, _, lines = factory(
        there, "dpo", "ranked", more="pref_beta: 0.1\npref_loss: simpo\nsimpo_gamma: 0.7\npref_ftx: 0.1"
    )
    stage = spec["stages"]["dpo"]
    assert stage["train"]["loss_type"] == ["simpo", "sft"] and stage["gamma"] == 0.7 and stage["train"]["beta"] == 0.1
    assert "to mend" not in "\n".join(lines)


def test_llama_factory_kto(there: dict[str, Any]) -> None:
    spec, _, lines = factory(there, "kto", "tagged", more="kto_chosen_weight: 1.5")
    stage = spec["stages"]["kto"]
    assert stage["data"] == [{"path": "tagged.json", "columns": {"label": "good"}}]
    assert stage["train"]["desirable_weight"] == 1.5 and "to mend" not in "\n".join(lines)


def test_llama_factory_reward(there: dict[str, Any]) -> None:
    spec, _, lines = factory(there, "rm", "ranked")
    assert spec["stages"]["reward"]["data"] == [{"path": "ranked.json"}] and "to mend" not in "\n".join(lines)


def test_llama_factory_ppo(there: dict[str, Any]) -> None:
    more = f"reward_model: {there['model']}\nreward_model_type: full\nmax_new_tokens: 32\nppo_epochs: 2\ntop_p: 0.9\ntop_k: 0"
    spec, _, lines = factory(there, "ppo", "mine", more=more)
    stage = spec["stages"]["ppo"]
    assert stage["max_new_tokens"] == 32 and stage["train"]["num_ppo_epochs"] == 2 and len(stage["rewards"]) == 1
    said = "\n".join(lines)
    assert "top_p: 0.9" in said and "reward_model_type" in said and "to mend" not in said


def test_llama_factory_without_its_dataset_info(there: dict[str, Any]) -> None:
    (there["folder"] / "dataset_info.json").unlink()
    _, _, lines = factory(there, "sft", "alpaca,gone")
    said = "\n".join(lines)
    assert (
        "dataset_info.json is not in" in said and "gone.json: no such file" in said and "to mend before it runs" in said
    )


def test_trl_sft(there: dict[str, Any]) -> None:
    spec, _, lines = converted(there, "sft.yaml", TRL_SFT)
    stage = spec["stages"]["sft"]
    assert (
        stage["tuning"]["r"] == 32 and stage["tuning"]["lora_alpha"] == 32 and stage["tuning"]["lora_dropout"] == 0.05
    )
    assert (
        stage["mask"] == {"train_on": "assistant"}
        and stage["train"]["packing"] is True
        and stage["truncation"] == "right"
    )
    said = "\n".join(lines)
    assert "dataset_num_proc: 8" in said and "push_to_hub: True" in said and "to mend" not in said


def test_trl_dpo(there: dict[str, Any]) -> None:
    spec, _, lines = converted(there, "mine.yaml", TRL_DPO)
    stage = spec["stages"]["dpo"]
    assert stage["data"] == [{"path": "pairs.jsonl", "eval": "10%"}] and stage["deepspeed"] == "zero2"
    assert (
        stage["train"]["beta"] == 0.05 and stage["train"]["eval_steps"] == 10 and stage["train"]["warmup_steps"] == 0.03
    )
    said = "\n".join(lines)
    assert "precompute_ref_log_probs: True" in said and "always run once" in said and "to mend" not in said


def test_trl_grpo(there: dict[str, Any]) -> None:
    spec, _, lines = converted(there, "mine.yaml", TRL_GRPO)
    stage = spec["stages"]["grpo"]
    assert stage["rewards"] == [
        {"reward": "trl.rewards:think_format_reward", "weight": 0.5}, {"reward": "my_rewards:exact", "weight": 1.0},
    ]  # fmt: skip
    assert stage["max_new_tokens"] == 32 and stage["temperature"] == 0.9 and stage["train"]["num_generations"] == 4
    assert "max_prompt_length: 64" in "\n".join(lines) and "to mend" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("marks", "kind"),
    [
        ({"num_generations": 8}, "grpo"),
        ({"center_rewards_coefficient": 0.01}, "reward"),
        ({"desirable_weight": 1.0}, "kto"),
        ({"packing": True}, "sft"),
        ({"beta": 0.1, "output_dir": "runs/kto-1"}, "kto"),
        ({"beta": 0.1}, "dpo"),
    ],
)
def test_which_of_trls_commands(tmp_path: Path, marks: dict[str, Any], kind: str) -> None:
    config = {"model_name_or_path": "org/name", "dataset_name": "org/data", **marks}
    assert convert(config, tmp_path / "mine.yaml", tmp_path / "ours.yaml").kind == kind


@pytest.mark.parametrize(
    "config",
    [
        {"model_name_or_path": "org/name", "dataset_name": "org/data", "packing": True, "aa": 1, "bb": {"c": 1}},
        {"base_model": "org/name", "datasets": [{"path": "org/data", "aa": 1}], "bb": [1], "cc": "x"},
        {"model_name_or_path": "org/name", "stage": "sft", "dataset": "d", "aa": 1, "bb": [2]},
    ],
)  # fmt: skip
def test_unknown_keys_are_told_in_the_terminal_and_in_the_spec(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = convert(config, tmp_path / "mine.yaml", tmp_path / "ours.yaml")
    told = {what.partition(":")[0].rpartition(".")[2] for what, _ in ours.lost}
    assert {key for key in ("aa", "bb", "cc") if key in str(config)} <= told
    text = spec_text(ours, tmp_path / "mine.yaml")
    assert all(f"# - {what}" in text for what, _ in ours.lost)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: {sft: {kind: sft}}\n", "a spec of raylign needs no conversion"),
        ("learning_rate: 1\n", "whose configuration is it?"),
        ("- a\n- b\n", "a mapping of keys and values"),
        ("a: [1\n", "not YAML"),
        ("", "a mapping of keys and values"),
        ("base_model: x\nrl: bco\n", "'bco' has no stage; there are dpo"),
        ("model_name_or_path: x\nstage: xyz\ndataset: a\n", "'xyz' is none of pt, sft"),
        ("model_name_or_path: x\nstage: sft\nfinetuning_type: freeze\ndataset: a\n", "there are lora and full here"),
        ("dataset_name: x\npacking: true\n", "which model is trained?"),
        ("model_name_or_path: x\ndataset_name: y\nlearning_rate: 1\n", "put the command into its name"),
    ],
)
def test_what_cannot_be_converted_is_said(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        write_converted(tmp_path / "theirs.yaml", tmp_path / "ours.yaml")
    assert says in str(error.value) and error.value.exit_code == 2 and not (tmp_path / "ours.yaml").exists()


def test_files_that_are_not_there_or_there_already(tmp_path: Path) -> None:
    with pytest.raises(RaylignError, match="no such file"):
        write_converted(tmp_path / "gone.yaml", tmp_path / "ours.yaml")
    (tmp_path / "ours.yaml").write_text("mine")
    with pytest.raises(RaylignError, match="exists"):
        write_converted(tmp_path / "gone.yaml", tmp_path / "ours.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RaylignError, match="not YAML"):
        read(tmp_path / "bytes.yaml")


# ------------------------------------------------------------------------------------------------ nothing without a word


A, F, T = (
    {"base_model": "org/name", "datasets": [{"path": "org/data"}]},
    {"model_name_or_path": "org/name", "dataset": "mine"},
    {"model_name_or_path": "org/name", "dataset_name": "org/data"},
)
WHOLE: dict[str, dict[str, Any]] = {
    "axolotl sft": A, "axolotl qlora": A | {"adapter": "qlora", "val_set_size": 0.1}, "axolotl reward": A | {"reward_model": True},
    **{f"axolotl {rl}": A | {"rl": rl} for rl in ("dpo", "ipo", "simpo", "orpo", "kto", "grpo")},
    **{f"factory {stage}": F | {"stage": stage, "finetuning_type": "full"} for stage in ("pt", "sft", "rm", "dpo", "kto", "ppo")},
    "factory lora": F | {"stage": "sft", "finetuning_type": "lora"},
    "factory simpo": F | {"stage": "dpo", "finetuning_type": "full", "pref_loss": "simpo"},
    "trl sft": T | {"assistant_only_loss": False, "packing": True}, "trl reward": T | {"center_rewards_coefficient": 0.01},
    "trl sft lora": T | {"packing": True, "use_peft": True}, "trl sft qlora": T | {"packing": True, "use_peft": True, "load_in_4bit": True},
    "trl dpo": T | {"beta": 0.2}, "trl kto": T | {"desirable_weight": 1.5}, "trl grpo": T | {"num_generations": 4, "reward_funcs": "module.f"},
}  # fmt: skip
# What a key may hold, where any number will not do: values that are not their tool's defaults.
VALUES: dict[str, Any] = {
    "adapter": "lora", "finetuning_type": "lora", "stage": "rm", "rl": "dpo", "template": "qwen", "chat_template": "chatml",
    "flash_attn": "fa2", "attn_implementation": "flash_attention_2", "deepspeed": "zero3.json", "accelerate_config": "zero3",
    "datasets": [{"path": "org/other"}], "test_datasets": [{"path": "org/held"}], "dataset_dir": "elsewhere", "dataset": "other",
    "eval_dataset": "held", "trl": {"beta": 0.5}, "reward_funcs": "module.f", "eval_strategy": "epoch", "truncation_mode": "keep_end",
    "pref_loss": "hinge", "optimizer": "adamw_torch", "lr_scheduler": "linear", "chat_template_jinja": "{{ messages }}",
    "val_set_size": 0.2, "val_size": 0.2, "test_split_size": 0.2, "warmup_ratio": 0.3, "dataset_test_split": "held",
    "dataset_train_split": "more", "dataset_config": "en", "reward_model": "org/reward", "reward_model_name_or_path": "org/reward",
    "lora_target": "q_proj", "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"], "additional_target": "lm_head",
    "lora_target_parameters": ["x"], "peft_layers_pattern": ["x"], "peft_layers_to_transform": [1], "quantization_bit": 4, "reward_weights": [0.5],
    "gradient_checkpointing": False,
}  # fmt: skip
SAME_ANYWAY = {
    "axolotl qlora: lora_target_linear",  # all linear layers are adapted where no others are named
    "axolotl qlora: load_in_4bit",
    "factory pt: neat_packing",  # rows that share a sequence never see each other here
}


def test_every_key_that_is_read_shows_in_the_spec_or_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read_by: list[set[str]] = []
    finish = Ours.finish

    def watched(self: Ours, theirs: Theirs, reasons: Any, silent: Any = ()) -> None:
        if silent:  # the whole file's, not a section of it
            read_by.append(theirs.taken - set(silent))
        finish(self, theirs, reasons, silent)

    def text_of(name: str, config: dict[str, Any]) -> str:
        file = tmp_path / f"{name}.yaml"  # which of TRL's commands it is for, where nothing else says it
        return spec_text(convert(config, file, tmp_path / "ours.yaml"), file)

    monkeypatch.setattr(Ours, "finish", watched)
    lost, seen = [], 0
    for name, base in WHOLE.items():
        plain = text_of(name, base)
        for key in sorted(read_by[-1] - set(base)):
            seen += 1
            given = [base | {key: VALUES[key]}] if key in VALUES else [base | {key: value} for value in (7, True)]
            if all(text_of(name, each) == plain for each in given) and f"{name}: {key}" not in SAME_ANYWAY:
                lost.append(f"{name}: {key}")
    assert seen > 300 and not lost, lost


def test_lengths_that_have_no_place_here_are_told(there: dict[str, Any]) -> None:
    _, _, lines = factory(there, "ppo", "mine", more=f"reward_model: {there['model']}")
    assert "cutoff_len: 128" in "\n".join(lines)
    text = "base_model: {model}\nrl: grpo\nsequence_len: 96\ndatasets: [{{path: {data}/chats.jsonl}}]\ntrl: {{reward_funcs: my_rewards.exact}}\n"
    (there["folder"] / "ours.yaml").unlink()
    _, _, lines = converted(there, "grpo.yml", text)
    assert "sequence_len: 96" in "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sft.yaml", "model_name_or_path: models/m\ndataset_name: sets/a.jsonl\nassistant_only_loss: true\n"),
        ("a.yml", "base_model: models/m\ndatasets: [{path: json, data_files: sets/a.jsonl}]\ndeepspeed: ds.json\n"),
        ("b.yaml", "model_name_or_path: models/m\nstage: sft\ndataset: a\ndataset_dir: sets\n"),
        ("c.yaml", "model_name_or_path: ~/models/m\nstage: sft\ndataset: a\ndataset_dir: ~/sets\n"),
        ("d.yml", "base_model: ~/models/m\ndatasets: [{path: ~/sets/*.jsonl}]\ndeepspeed: ~/ds.json\n"),
    ],
)
def test_paths_are_looked_for_where_the_command_is_given_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """Of all these tools paths are relative to there; `~` is the home folder."""
    here = tmp_path / "here"
    for folder in ("here/models/m", "here/sets", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    (here / "models" / "m" / "config.json").write_text("{}")
    (here / "sets" / "a.jsonl").write_text('{"text": "x"}\n')
    (here / "sets" / "dataset_info.json").write_text('{"a": {"file_name": "a.jsonl"}}')
    (here / "ds.json").write_text("{}")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    file = tmp_path / "configs" / name
    file.write_text(text)
    ours = convert(read(file), file, tmp_path / "ours.yaml")
    path = ours.data[0]["path"]
    assert ours.model == "here/models/m" and path in ("here/sets/a.jsonl", "here/sets/*.jsonl")
    assert ours.stage.get("deepspeed") in (None, "here/ds.json")


def test_an_inline_template_is_no_path(tmp_path: Path) -> None:
    config = {
        "base_model": "org/name",
        "datasets": [{"path": "org/data"}],
        "chat_template_jinja": "{% if 1 %}" + "x" * 5000,
    }
    ours = convert(config, tmp_path / "mine.yaml", tmp_path / "ours.yaml")
    assert any(what.startswith("chat_template_jinja") for what, _ in ours.lost)
