"""TRL's trainers on our feed: the mixin they share, what builds them, and the function each worker runs.

Private hooks of TRL 1.16 and transformers 5.23 relied on here: `get_train_dataloader` is used as it is returned,
`_prepare_dataset` is where TRL tokenises, `compute_loss` gives a micro-batch mean (DPO, reward) or a loss already divided by
the global count of trained tokens (SFT). tests/integration/test_training.py fails where a version changes one of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.base import Reporter
from stages.training.deepspeed import init_deepspeed
from stages.training.feed import Feed, FeedLoader, Group, Row, Shares
from stages.training.launch import join_single_process_group, quiet_ray, worker_rank

PLACEHOLDERS: dict[str, Row] = {
    "conversation": {"input_ids": [0, 0], "labels": [-100, -100], "weights": None},
    "preference": {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]},
}


OF_THE_FEED = ("rows", "row_weight", "ragged")  # what a batch carries besides the model's inputs


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


class Fed:
    """Mixin before a TRL trainer: batches come from the feed, already tokenised.

    `token_normalised` says that the trainer's loss is divided by the trained tokens of the whole step. Otherwise it is a
    mean over the micro-batch, which is weighted here so that a step's loss is the mean over all its rows, whatever the
    micro-batches (transformers#34191).
    """

    token_normalised = False
    loader: FeedLoader

    def get_train_dataloader(self) -> FeedLoader:
        return self.loader

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, uneven = inputs.get("row_weight", 1.0), inputs.get("ragged", False)
        inputs = {k: v for k, v in inputs.items() if k not in OF_THE_FEED}
        with ragged_gathers(self.accelerator, weight > 0) if uneven else nullcontext():  # type: ignore[attr-defined]
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.token_normalised or weight == 1.0:
            return loss
        return (loss[0] * weight, loss[1]) if return_outputs else loss * weight


@contextmanager
def ragged_gathers(accelerator: Any, real: bool) -> Iterator[None]:
    """Let TRL gather its metrics from workers that hold different numbers of rows.

    Its compute_loss gathers (rows, ...) tensors, which crashes gloo where the rows differ between workers. Here each is
    padded for the way and cut again; a worker without `real` rows adds none.
    """
    import torch

    gather = accelerator.gather

    def ragged(tensor: Any) -> Any:
        if tensor.ndim == 0 or accelerator.num_processes == 1:
            return gather(tensor)
        rows = tensor.shape[0] if real else 0
        sizes = gather(torch.tensor([rows], device=tensor.device)).tolist()
        if not max(sizes):
            return tensor
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[:rows] = tensor[:rows]
        parts = gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    accelerator.gather = accelerator.gather_for_metrics = ragged
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


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


def import_trainers() -> None:
    """The seconds of imports a trainer needs, to be done while the data is being prepared."""
    import deepspeed
    import ray.train.torch
    import trl.trainer.sft_trainer

    assert deepspeed and ray.train.torch and trl


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: build the trainer, train from the last checkpoint or the start, save the model."""
    import torch.distributed

    job: TrainJob = config["job"]
    quiet_ray()
    rank, workers = worker_rank()
    on_cpu = config["on_cpu"]
    if job.deepspeed is not None:
        if workers == 1 and not torch.distributed.is_initialized():
            join_single_process_group()
        init_deepspeed("gloo" if on_cpu else "nccl")
    trainer = _build(config["build"], job, on_cpu)
    args = trainer.args
    shares = Shares(workers, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    rows = sum(count for _, _, count in job.groups)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * shares.steps(rows))
    checkpoint, done = last_checkpoint(job.work / "checkpoints")
    order = job.seed if job.shuffle else None
    feed = Feed(
        job.groups,
        rank=rank,
        shares=shares,
        steps=total,
        seed=order,
        start_step=done,
        tokens_per_row=job.tokens_per_row,
    )
    trainer.loader = FeedLoader(feed, trainer.data_collator, job.placeholder)
    if rank == 0:
        Reporter(job.work).rewind(done)
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)  # of a finished checkpoint the feed gives nothing more to train
    seconds = time.time() - started
    held_out = evaluate_held_out(trainer, job, rank, workers) if job.held_out else {}
    if rank == 0:
        if held_out:
            Reporter(job.work).metrics(trainer.state.global_step, held_out)
        Reporter(job.work).phase("export")
    _save(trainer, job, rank)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": int(trainer.state.global_step),
        "epochs": feed.epochs,
        "seconds": round(seconds, 3),
        "resumed_at_step": done,
        "last": (history[-1] if history else {}) | held_out,
        "first": history[0] if history else {},
    }


def evaluate_held_out(trainer: Any, job: TrainJob, rank: int, workers: int) -> dict[str, float]:
    """The trained model on the rows that were held out: the mean over tokens (conversations) or over pairs, as `eval_*`."""
    import torch

    shares = Shares(workers, trainer.args.per_device_train_batch_size)
    rows = sum(count for _, _, count in job.held_out)
    feed = Feed(job.held_out, rank=rank, shares=shares, steps=shares.steps(rows), seed=None)
    model = trainer.model_wrapped
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in FeedLoader(feed, trainer.data_collator, PLACEHOLDERS[job.task]):
            examples = batch["rows"]
            inputs = trainer._prepare_inputs(batch)
            if trainer.token_normalised:
                inputs = {k: v for k, v in inputs.items() if k not in (*OF_THE_FEED, "loss_weights")}
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                total, count = total - float(outputs.log_probs.sum()), count + float(outputs.label_mask.sum())
            else:
                shared = {"row_weight": float(examples > 0), "ragged": workers > 1}
                total, count = total + float(trainer.compute_loss(model, inputs | shared)) * examples, count + examples
    model.train()
    sums = trainer.accelerator.reduce(torch.tensor([total, count], device=trainer.args.device), "sum")
    return {"eval_loss": float(sums[0] / sums[1].clamp(min=1)), "eval_rows": rows}


def last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """(path, optimiser steps done) of the newest complete checkpoint; (None, 0) where there is none."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if not found:
        return None, 0
    newest = max(found, key=lambda p: int(p.name.split("-")[1]))
    return str(newest), int(newest.name.split("-")[1])


def _build(build: Build, job: TrainJob, on_cpu: bool) -> Any:
    import datasets
    import transformers

    from stages.data.tokenizer import load_tokenizer

    transformers.logging.set_verbosity_error()
    peft_config = None
    if job.lora is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="SEQ_CLS" if job.reward else "CAUSAL_LM", **job.lora)
    placeholder = datasets.Dataset.from_list([{k: v for k, v in PLACEHOLDERS[job.task].items() if v is not None}])
    parts = TrainerParts(job, load_tokenizer(job.model, job.chat_template), placeholder, peft_config, on_cpu)
    trainer = build(parts)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_report_callback(job.work))
    return trainer


def _report_callback(work: Path) -> Any:
    """Progress and metrics to the stage's folder, checkpoints to Ray Train."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def __init__(self) -> None:
            self.reporter, self.told = Reporter(work), 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.reporter.phase("train", steps=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero and (time.time() - self.told > 0.5 or state.global_step == state.max_steps):
                self.told = time.time()
                last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), None)
                self.reporter.progress(state.global_step, state.max_steps, "step", loss=last)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                self.reporter.metrics(state.global_step, {k: v for k, v in logs.items() if k != "step"})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            ray.train.report(  # a barrier: every rank comes here
                {"step": state.global_step},
                checkpoint=Checkpoint.from_directory(folder),
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )

    return Report()


def _save(trainer: Any, job: TrainJob, rank: int) -> None:
    """The plain Hugging Face folder. With LoRA the adapter is kept beside it and merged into it."""
    target = job.work / "model"
    if job.lora is not None:
        trainer.save_model(str(job.work / "adapter"))
    else:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on every rank: ZeRO-3 gathers the weights
        if rank == 0:
            # DeepSpeed hands tied weights over as copies, which would be saved twice.
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            model.save_pretrained(str(target), state_dict={k: v for k, v in state.items() if k not in tied})
    if rank != 0:
        return
    if job.lora is not None:
        merge_adapter(job.model, job.work / "adapter", target, reward=job.reward)
    finish_export(target, job.model, trainer.processing_class, job.stop_ids)


def merge_adapter(base: str, adapter: Path, target: Path, *, reward: bool) -> None:
    """Fold a LoRA adapter into its base model, read afresh so that it works the same under every ZeRO stage."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would partition what is loaded here
    if reward:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target))


def finish_export(target: Path, model: str, tokenizer: Any, stop_ids: list[int]) -> None:
    """Tokenizer, chat template and stop tokens beside the weights, so that the folder generates as it was trained to."""
    from transformers import AutoConfig, GenerationConfig

    tokenizer.save_pretrained(str(target))
    config = AutoConfig.from_pretrained(str(target))
    if config.pad_token_id != tokenizer.pad_token_id:
        config.pad_token_id = tokenizer.pad_token_id
        config.save_pretrained(str(target))
    if "ForCausalLM" not in "".join(config.architectures or []):
        return
    try:
        generation = GenerationConfig.from_pretrained(model)  # the base's own stop tokens and sampling stay
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    generation.eos_token_id = list(dict.fromkeys([*ids, *stop_ids]))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(str(target))
