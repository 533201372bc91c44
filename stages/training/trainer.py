"""One worker of a training, whatever the stage: it builds the stage's trainer, trains, evaluates and saves."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from stages.base import Reporter
from stages.storage import mirrored, pull, push
from stages.training import documents
from stages.training.checkpoint import forget
from stages.training.deepspeed import init_deepspeed
from stages.training.export import save_model
from stages.training.feed import Feed, Position, total_steps
from stages.training.job import PLACEHOLDERS, Build, TrainerParts, TrainJob
from stages.training.launch import join_single_process_group, quiet_ray, use_given_threads, worker_rank
from stages.training.tuning import settle_quantized, train_in_float32
from stages.training.watch import begin_callback, report_callback
from stages.training.watchdog import Pulse, beating

# In a stage's folder: what has its own way to the driver, or is of no use to it.
OF_THE_DRIVER = ("checkpoints", "base", "events.jsonl", "ray")


def import_trainers() -> None:
    """The seconds of imports a trainer needs, to be done while the data is being prepared."""
    import deepspeed
    import ray.train.torch
    import trl.trainer.sft_trainer

    assert deepspeed and ray.train.torch and trl


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does: build the trainer, train from the last checkpoint or the start, save the model. Where it was asked
    to stop at a checkpoint, it gives `paused`."""
    job: TrainJob = config["job"]
    quiet_ray()
    use_given_threads()
    rank, workers = worker_rank()
    events = job.work / "events.jsonl" if rank == 0 and mirrored(job.work) else None
    with beating(config.get("monitor"), rank, events) as pulse, brought_here(job, rank):
        outcome = _train(job, config["build"], config["on_cpu"], rank, workers, pulse)
    if config.get("monitor") is not None and "paused" not in outcome:
        leave_no_checkpoints(job, driver=config["monitor"][1])
    return outcome


@contextmanager
def brought_here(job: TrainJob, rank: int) -> Iterator[None]:
    """What a worker reads, and what it has written taken back, where nodes have no folder in common."""
    job.work.mkdir(parents=True, exist_ok=True)
    forget(job.work / "checkpoints", unfinished=True)
    if job.resume is not None:
        pull(job.resume.path)
    if rank == 0:
        pull(job.work, only="*.jsonl", without=OF_THE_DRIVER)
    try:
        yield
    finally:
        # Others may have the same mirror as the first: each takes what it has written itself.
        push(
            job.work,
            without=OF_THE_DRIVER,
            only=None if rank == 0 else [p.name for p in job.work.glob(f"*-{rank}.jsonl")],
        )


def leave_no_checkpoints(job: TrainJob, driver: str) -> None:
    """Of a training that is done, none in the mirror of a node that is not the driver's: nobody would remove them there."""
    import ray

    if mirrored(job.work) and ray.get_runtime_context().get_node_id() != driver:
        shutil.rmtree(job.work / "checkpoints", ignore_errors=True)  # other workers of this node do the same


def _train(job: TrainJob, build: Build, on_cpu: bool, rank: int, workers: int, pulse: Pulse | None) -> dict[str, Any]:
    import torch.distributed

    if job.deepspeed is not None:
        if workers == 1 and not torch.distributed.is_initialized():
            join_single_process_group()
        init_deepspeed("gloo" if on_cpu else "nccl")
    trainer = _build(build, job, on_cpu)
    args = trainer.args
    shares, updates = replace(trainer.shares(), rows=job.rows_per_step), trainer.updates
    start = job.resume.record.position if job.resume else Position()
    before = replace(start, step=start.step // updates)  # in steps of the feed
    rows = sum(count for _, _, count in job.groups)
    epochs = args.num_train_epochs
    total = -(-args.max_steps // updates) if args.max_steps > 0 else total_steps(shares, rows, epochs, before)
    feed = Feed(
        job.groups,
        rank=rank % shares.workers,  # a stage may want all rows on every worker
        shares=shares,
        steps=total,
        seed=job.seed if job.shuffle else None,
        start=before,
        tokens_per_row=job.tokens_per_row,
    )
    trainer.join(job, trainer.loader_of(feed, job))
    if pulse is not None:
        pulse.step = lambda: int(trainer.state.global_step)
        trainer.pulse = pulse
    if rank == 0:
        Reporter(job.work).rewind(start.step)
    started = time.time()
    # Of a finished checkpoint the feed gives nothing more to train.
    trainer.train(resume_from_checkpoint=str(job.resume.path) if job.resume else None)
    seconds = time.time() - started
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every worker's checkpoints are written, and may go (leave_no_checkpoints)
    if trainer.paused:
        return {"paused": int(trainer.state.global_step)}
    # Schedule-free optimizers are done with an average of weights.
    if averaged := getattr(trainer.optimizer, "eval", None):
        averaged()
    finished, warnings = trainer.finish()
    if rank == 0:
        if finished:
            Reporter(job.work).final(trainer.state.global_step, finished)
        Reporter(job.work).phase("export")
    exported = save_model(trainer, job, rank)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": int(trainer.state.global_step),
        "updates": updates,
        "epochs": feed.epochs,
        "seconds": round(seconds, 3),
        "resumed_at_step": start.step,
        "kernels": trainer.kernels,
        "export": exported,
        "checkpoints": {"saved": trainer.writer.saved, "blocked_seconds": round(trainer.writer.blocked, 3)},
        "last": (history[-1] if history else {}) | finished,
        "warnings": warnings,
        "first": history[0] if history else {},
    }


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
    if job.quantization is not None:
        settle_quantized(trainer.model)
    if job.lora is not None:
        train_in_float32(trainer.model)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(report_callback(job.work))
    trainer.add_callback(begin_callback(trainer))
    trainer.kernels = parts.kernels.facts()
    if trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation == documents.NAME:
        trainer.kernels["attention"] += ", each document alone"
    if trainer.is_world_process_zero():
        print("; ".join(f"{k}: {v}" for k, v in trainer.kernels.items()), flush=True)
    if job.early_stopping is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(*job.early_stopping.values()))
    return trainer
