"""What a worker is sent, and what a stage's trainer is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.training.feed import Group, Row

PLACEHOLDERS: dict[str, Row] = {
    "conversation": {"input_ids": [0, 0], "labels": [-100, -100], "weights": None},
    "preference": {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]},
}


@dataclass(frozen=True)
class TrainJob:
    """All a worker needs to train; sent to it by Ray."""

    task: str
    model: str
    work: Path
    groups: list[Group]
    arguments: dict[str, Any]  # of `train:`, as given
    reward: bool = False  # a score head instead of a language model's
    lora: dict[str, Any] | None = None  # of `tuning:`, for peft's LoraConfig
    deepspeed: dict[str, Any] | None = None
    chat_template: str | None = None
    stop_ids: list[int] = field(default_factory=list)  # tokens that end an answer, for the generation config
    seed: int = 0
    shuffle: bool = True
    weighted: bool = False  # the data has per-token weights
    packed: bool = False  # rows are packs of documents
    tokens_per_row: float = 1.0
    held_out: list[Group] = field(default_factory=list)  # rows to evaluate on after training

    @property
    def placeholder(self) -> Row:
        row = PLACEHOLDERS[self.task]
        return row | {"lengths": [2]} if self.packed else row


@dataclass
class TrainerParts:
    """What a stage's `build` function puts together."""

    job: TrainJob
    tokenizer: Any
    dataset: Any  # one placeholder row: TRL's constructors look at a dataset's columns
    peft_config: Any
    on_cpu: bool

    def arguments(self, config_class: Callable[..., Any], **fixed: Any) -> Any:
        """The trainer's arguments: the user's own, our defaults, and what the pipeline decides."""
        defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "logging_nan_inf_filter": False}
        if self.on_cpu:
            defaults |= {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
        decided = {
            "output_dir": str(self.job.work / "checkpoints"),
            "seed": self.job.seed,
            "use_cpu": self.on_cpu,
            "deepspeed": self.job.deepspeed,
            "disable_tqdm": True,
            "ignore_data_skip": True,  # the feed itself starts where the checkpoint stopped
            "remove_unused_columns": False,
            **fixed,
        }
        return config_class(**(defaults | self.job.arguments | decided))


Build = Callable[[TrainerParts], Any]
