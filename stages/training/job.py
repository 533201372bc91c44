"""What a worker is sent, and what a stage's trainer is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.own import is_own
from stages.training.answers import Layout, best_layout
from stages.training.checkpoint import Saved
from stages.training.feed import Group, Row
from stages.training.kernels import Attention, Kernels, worker_kernels
from stages.training.tuning import quantization_config

PLACEHOLDERS: dict[str, Row] = {
    "conversation": {"input_ids": [0, 0], "labels": [-100, -100], "weights": None},
    "preference": {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0], "placeholder": True},
    "labelled": {
        "prompt_ids": [0],
        "completion_ids": [0],
        "kl_completion_ids": [0],
        "label": True,
        "placeholder": True,
    },
    "prompt": {"prompt_ids": [0], "completion_ids": [0], "placeholder": True},
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
    quantization: dict[str, Any] | None = None  # of `tuning:`, for transformers' BitsAndBytesConfig
    given_model: str | None = None  # where `model` is a copy of it with rows for added tokens
    template_hash: str | None = None  # of the chat template the masks were made with
    deepspeed: dict[str, Any] | None = None
    attention: Attention = "auto"
    chat_template: str | None = None
    stop_ids: list[int] = field(default_factory=list)  # tokens that end an answer, for the generation config
    seed: int = 0
    shuffle: bool = True
    weighted: bool = False  # the data has per-token weights
    packed: bool = False  # rows are packs of documents
    tokens_per_row: float = 1.0
    held_out: list[Group] = field(default_factory=list)  # rows to evaluate on, as `eval_strategy` says and at the end
    resume: Saved | None = None  # the checkpoint to go on from
    rows_per_step: int | None = None  # where it does not follow from workers, batch size and accumulation
    early_stopping: dict[str, Any] | None = None  # patience and threshold
    options: dict[str, Any] = field(default_factory=dict)  # what one kind of stage tells its own `build`

    @property
    def single_placeholder(self) -> Row:
        """As a row that is no pack: held-out rows are none."""
        return PLACEHOLDERS[self.task]

    @property
    def placeholder(self) -> Row:
        return self.single_placeholder | ({"lengths": [2]} if self.packed else {})


@dataclass
class TrainerParts:
    """What a stage's `build` function puts together."""

    job: TrainJob
    tokenizer: Any
    dataset: Any  # one placeholder row: TRL's constructors look at a dataset's columns
    peft_config: Any
    on_cpu: bool

    @cached_property
    def kernels(self) -> Kernels:
        job = self.job
        return worker_kernels(
            job.model, job.arguments, job.attention, gpu=not self.on_cpu, frozen=job.lora is not None,
            reward=job.reward,
        )  # fmt: skip

    def arguments(self, config_class: Callable[..., Any], **fixed: Any) -> Any:
        """The trainer's arguments: the user's own, our defaults, and what the pipeline decides."""
        defaults: dict[str, Any] = {"save_total_limit": 2, "logging_nan_inf_filter": False}
        if self.on_cpu:
            defaults |= {"gradient_checkpointing": False, "dataloader_pin_memory": False}
        decided = {
            "output_dir": str(self.job.work / "checkpoints"),
            "seed": self.job.seed,
            "use_cpu": self.on_cpu,
            "deepspeed": self.job.deepspeed,
            "disable_tqdm": True,
            "report_to": "none",  # trackers are told by the process that carries the run out
            "ignore_data_skip": True,  # the feed itself starts where the checkpoint stopped
            "remove_unused_columns": False,
            "model_init_kwargs": self.kernels.load_options() | self.quantization(),
            **self.kernels.precision,
            **fixed,
        }
        own = {name for name in ("optim", "lr_scheduler_type") if is_own(self.job.arguments.get(name))}
        given = {k: v for k, v in self.job.arguments.items() if k not in own}
        return config_class(**(defaults | given | decided))

    def quantization(self) -> dict[str, Any]:
        if self.job.quantization is None:
            return {}
        return {"quantization_config": quantization_config(self.job.quantization, self.on_cpu)}

    def multiple(self) -> int | None:
        """Of what rows are padded to; TRL's default `auto` is a matter of GPUs' tensor cores, which we leave to the user."""
        given = self.job.arguments.get("pad_to_multiple_of")
        return given if isinstance(given, int) else None

    def layout(self, model: Any) -> Layout:
        """How answers are laid out for this model; it may be switched to attention by documents."""
        return best_layout(model, self.kernels.attention.name, self.on_cpu, self.job.attention)

    def eval_dataset(self, args: Any) -> Any:
        """Something that transformers takes for a dataset to evaluate on; the rows come from the feed."""
        return self.dataset if args.eval_strategy != "no" else None


Build = Callable[[TrainerParts], Any]
