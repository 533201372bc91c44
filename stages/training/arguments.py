"""`train:` and `tuning:` take the libraries' own fields, by their own names, checked before anything heavy is imported.

The fields are read from the source of the installed libraries (importing trl and torch takes seconds, a typo in a spec
should be told in none), so they are always those of the installed version.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

from pydantic import Field, create_model, model_validator

from stages.base import Config
from stages.tracking import ReportTo

# class -> (package, file of its source); a base class listed here contributes its fields
_SOURCES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "RewardConfig": ("trl", "trainer/reward_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "KTOConfig": ("trl", "trainer/kto_config.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "RLOOConfig": ("trl", "trainer/rloo_config.py"),
    "LoraConfig": ("peft", "tuners/lora/config.py"),
}

# Fields that would contradict what the pipeline itself decides, and what to say instead.
MANAGED = {
    "output_dir": "the run folder decides where a stage writes",
    "run_name": "use the spec's `name`",
    "deepspeed": "write it beside `train`: `deepspeed: zero2`",
    "seed": "use the spec's `seed`",
    "data_seed": "use the spec's `seed`",
    "chat_template_path": "use the spec's `chat_template`",
    "model_init_kwargs": "use the spec's `model`, and `attention` and `tuning` beside `train`",
    "assistant_only_loss": "use `mask: {train_on: assistant}`",
    "completion_only_loss": "use `mask: {train_on: completion}`",
    "dataset_text_field": "use `columns: {text: ...}` of the data source",
    "dataset_num_proc": "Ray Data prepares the data on every core",
    "dataset_kwargs": "Ray Data prepares the data",
    "resume_from_checkpoint": "run the same command again: an interrupted stage goes on by itself",
    "push_to_hub": "write it beside `train`: `push_to_hub: org/name`",
    "project": "write it at the top of the spec",
    **{
        f"trackio_{name}": "trackers: tensorboard, mlflow, wandb"
        for name in ("space_id", "bucket_id", "static_space_id")
    },
    "hub_model_id": "write it beside `train`: `push_to_hub: org/name`",
    "hub_private_repo": "write it beside `train`, with `push_to_hub: org/name`",
    "hub_strategy": "the finished model is pushed, once: `push_to_hub: org/name` beside `train`",
    "hub_always_push": "the finished model is pushed, once: `push_to_hub: org/name` beside `train`",
    "hub_revision": "the finished model is pushed to the main branch: `push_to_hub: org/name` beside `train`",
    "hub_token": "the hub's token is read from the environment, HF_TOKEN; a spec is kept in the run folder",
    "trust_remote_code": "code that comes with a model is never run",
    "remove_unused_columns": "prepared data holds exactly what is used",
    "group_by_length": "the order of the data is the feed's",
    "packing_strategy": "`packing: true` is best fit over the whole data",
    "padding_free": "use `packing: true`",
    "truncation_mode": "use `truncation` beside `train`",
    "sync_ref_model": "the reference is the model the stage was given",
    "reference_free": "use `loss_type: simpo`, orpo or cpo, which have no reference",
    "precompute_ref_log_probs": "the reference is always run once, before training",
    "precompute_ref_batch_size": "the reference is run in micro-batches of per_device_train_batch_size",
    "train_sampling_strategy": "the order of the data is the feed's; KTO's answers to other prompts are chosen before",
    "do_eval": "use `eval_strategy: steps`, and `eval: 2%` of a data source",
    "dataloader_num_workers": "Ray Data feeds the trainer",
    "dataloader_drop_last": "every row is seen exactly once per epoch",
    "use_cpu": "use `cluster: {gpus_per_worker: 0}`",
    "ignore_data_skip": "the feed starts where the checkpoint stopped",
    "disable_tqdm": "the pipeline shows progress itself",
    "auto_find_batch_size": "the batch size decides which rows share a step, so it is fixed",
    "restore_callback_states_from_checkpoint": "an interrupted stage goes on as it was",
    "save_only_model": "an interrupted stage goes on from its whole checkpoint",
    # of GRPO and RLOO
    "max_completion_length": "write it beside `train`: `max_new_tokens: 256`",
    "temperature": "write it beside `train`: `temperature: 1.0`",
    "use_vllm": "write it beside `train`: `engine: vllm`",
    "vllm_mode": "vllm runs in the workers that train",
    "reward_weights": "write them in `rewards`: `- {reward: NAME, weight: 0.5}`",
    "generation_batch_size": "use `steps_per_generation`: of per_device_train_batch_size answers on each worker",
    "num_generations_eval": "a held-out prompt is answered once",
    "shuffle_dataset": "use `shuffle` beside `train`",
    "chat_template_kwargs": "the prompts are rendered before: use the spec's `chat_template`, and `mask` beside `train`",
    "max_tool_calling_iterations": "an answer is one turn: no tools are called",
    "log_completions": "answers are kept in samples.jsonl: use `samples` beside `train`",
    "num_completions_to_print": "use `samples: {prompts: 8}` beside `train`",
    "log_unique_prompts": "use `samples` beside `train`",
    "log_multimodal": "prompts are text",
    "log_completions_hub_repo": "answers are kept in samples.jsonl: use `samples` beside `train`",
    "ref_model_mixup_alpha": "the reference is the model the stage was given",
    "ref_model_sync_steps": "the reference is the model the stage was given",
    "use_transformers_paged": "use `use_transformers_continuous_batching`",
    "vllm_importance_sampling_cap": "use `vllm_importance_sampling_clip_max`",
    **{
        f"vllm_{name}": "vllm runs in the workers that train: there is no server"
        for name in ("server_base_url", "server_host", "server_port", "server_timeout", "group_port")
    },
}

_NAMES: dict[str, Any] = {
    "Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, "None": None,
    "bool": bool, "dict": dict, "float": float, "int": int, "list": list, "str": str, "tuple": tuple,
}  # fmt: skip


class _Types(dict[str, Any]):
    """Names an annotation may use; a library's own enums are given as strings in a spec."""

    def __missing__(self, name: str) -> Any:
        return str if name.endswith(("Type", "Names", "Strategy")) else dict


@lru_cache
def _class_node(name: str) -> ast.ClassDef:
    package, file = _SOURCES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _declarations(name: str) -> Iterator[tuple[str, ast.AnnAssign]]:
    """(field, its declaration) of a library's config dataclass; inherited ones first, so that what is said last holds."""
    node = _class_node(name)
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in _SOURCES:
            yield from _declarations(base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement


@lru_cache
def library_fields(name: str) -> dict[str, Any]:
    """Field -> type of a library's config dataclass, inherited ones included."""
    return {
        field: eval(ast.unparse(statement.annotation), {"__builtins__": {}}, _Types(_NAMES))
        for field, statement in _declarations(name)
        if not field.startswith("_")
    }


@lru_cache
def library_defaults(name: str) -> dict[str, Any]:
    """Field -> default of a library's config dataclass, inherited ones included; those that are computed are left out."""
    defaults: dict[str, Any] = {}
    for field, statement in _declarations(name):
        value = statement.value
        if isinstance(value, ast.Call):  # field(default=...)
            value = next((k.value for k in value.keywords if k.arg == "default"), None)
        try:
            defaults[field] = ast.literal_eval(value) if value is not None else None
        except ValueError:
            defaults.pop(field, None)
    return defaults


@lru_cache
def optimizer_names() -> tuple[str, ...]:
    """Values of `optim` that the installed transformers has."""
    node = _class_node("OptimizerNames")
    values = [s.value.value for s in node.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant)]
    return tuple(map(str, values))


class LibraryConfig(Config):
    """A model whose fields are a library's; `given()` is what the user said, and nothing else."""

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class TrainConfig(LibraryConfig):
    """`train:` of a stage."""

    library: ClassVar[str] = "TrainingArguments"  # the class whose fields these are

    @model_validator(mode="after")
    def _sizes(self) -> TrainConfig:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
            value = self.given().get(name, 1)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        return self


def train_config(name: str, **own: Any) -> type[TrainConfig]:
    """The pydantic model of a trainer's arguments (`SFTConfig`, `DPOConfig`, ...); `own`: fields with other types."""
    types = library_fields(name) | {"report_to": ReportTo | None} | own
    fields = {k: (v, Field(default=None)) for k, v in types.items() if k not in MANAGED}
    made: type[TrainConfig] = create_model(f"Train{name}", __base__=TrainConfig, **fields)  # type: ignore[call-overload]
    made.library = name
    return made
