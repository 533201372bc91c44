"""What SFT, reward and DPO share: their configs' common fields, and prepare -> train -> export."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from stages.base import ArtifactKind, Config, Share, Stage, StageContext, StageResult, Workers
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe, Task
from stages.data.hub import repository_problem
from stages.data.ledger import check_lost, read_entries, write_entries
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer
from stages.data.truncate import Truncation
from stages.errors import DataError, StageError
from stages.training.architecture import positions
from stages.training.arguments import TrainConfig, library_defaults
from stages.training.consumption import FILE as CONSUMED
from stages.training.consumption import check_consumption
from stages.training.deepspeed import deepspeed_config, zero_stage
from stages.training.export import template_hash
from stages.training.feed import Position, Shares, total_steps
from stages.training.job import Build, TrainJob
from stages.training.kernels import Attention
from stages.training.launch import quiet_ray
from stages.training.recovery import train_to_the_end
from stages.training.reference import References, with_reference
from stages.training.trainer import import_trainers
from stages.training.tuning import Full, Lora, QLora, adapter_options, checked_architecture, rows_problem
from stages.training.vocabulary import grow_vocabulary


class EarlyStopping(Config):
    """As transformers' EarlyStoppingCallback."""

    patience: int = Field(ge=1, description="Evaluations without improvement after which training stops.")
    threshold: float = Field(default=0.0, ge=0, description="How much better is better.")


class TrainStage(Stage):
    """A stage that trains a model from data."""

    model: str | None = Field(
        default=None, description="stages.NAME, a folder or a hub id; the spec's model if absent."
    )
    data: list[DataSource] = Field(min_length=1, description="What it is trained on.")
    train: TrainConfig
    tuning: Annotated[Full | Lora | QLora, Field(discriminator="method", description="What is trained.")] = Full()  # type: ignore[valid-type]
    mask: Mask = Mask()
    truncation: Truncation = Field(
        default="drop",
        description="Rows longer than max_length: refuse (stop the run), drop (to the ledger), or cut left or right.",
    )
    max_dropped: Share = Field(
        default=0.01, description="Rows that may be lost before the run is stopped: 1%, or a share of 1."
    )
    deduplicate: bool = Field(default=False, description="Leave out rows that are exactly the same as an earlier one.")
    shuffle: bool = Field(default=True, description="Shuffle the rows of each epoch, drawn from the spec's seed.")
    deepspeed: str | None = Field(
        default=None, description="zero0 .. zero3, zero3+offload, zero3+offload_params, or a DeepSpeed JSON file."
    )
    attention: Attention = Field(
        default="auto", description="auto (flash_attention_2 where it can be had, else sdpa), or one of them by name."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop when the evaluation has not become better for a while; the best model is kept."
    )
    workers: Workers | None = Field(default=None, description="Workers of this stage, where not the cluster's.")
    push_to_hub: str | None = Field(
        default=None, description="org/name of the hub: the model is published there when the run's gates of it hold."
    )
    hub_private_repo: bool | None = Field(
        default=None, description="Whether it is made private; where absent, as the account has it."
    )

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"model": ("model",)}
    task: ClassVar[Task]
    default_max_length: ClassVar[int] = 1024

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: str | None) -> str | None:
        deepspeed_config(value)
        return value

    @model_validator(mode="after")
    def _hub(self) -> TrainStage:
        if self.push_to_hub is not None and (problem := repository_problem(self.push_to_hub)):
            raise ValueError(f"push_to_hub: {problem}")
        if self.hub_private_repo is not None and self.push_to_hub is None:
            raise ValueError("hub_private_repo wants a name: `push_to_hub: org/name`")
        return self

    @model_validator(mode="after")
    def _evaluation(self) -> TrainStage:
        given = self.train.given()
        evaluates = given.get("eval_strategy", "no") != "no"
        if evaluates and not any(source.eval for source in self.data):
            raise ValueError("eval_strategy wants rows to evaluate on: give a source `eval: 2%`")
        if not evaluates and (self.early_stopping or given.get("load_best_model_at_end")):
            raise ValueError(
                "early_stopping and load_best_model_at_end want `train: {eval_strategy: steps, eval_steps: N}`"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """The trainer's, as given; where the best model is to be kept, checkpoints are made when it is evaluated."""
        given = {k: v for k, v in self.train.given().items() if k not in ("max_length", "packing")}
        if self.early_stopping is not None:
            given.setdefault("load_best_model_at_end", True)
        if given.get("load_best_model_at_end"):
            given.setdefault(
                "eval_steps", given.get("logging_steps", library_defaults(self.train.library)["logging_steps"])
            )
            given.setdefault("save_strategy", given["eval_strategy"])
            given.setdefault("save_steps", given["eval_steps"])
        return given

    @property
    def max_length(self) -> int:
        """What was asked for, or the default: the model may have fewer positions."""
        return self.train.given().get("max_length") or self.default_max_length

    def recipe(self, tokenizer: Any, seed: int) -> Recipe:
        """How this stage's rows become tokens."""
        return Recipe(
            self.task,
            tokenizer_spec(tokenizer),
            max_length=self.train.given().get("max_length")
            or min(self.default_max_length, positions(tokenizer.name_or_path) or self.default_max_length),
            truncation=self.truncation,
            deduplicate=self.deduplicate,
            shuffle=self.shuffle,
            seed=seed,
            **self.mask.options(),
        )

    def check_data(self, data: Prepared) -> list[str]:
        """Warnings. Raises DataError for data that the stage cannot be trained on."""
        return []

    def cut(self, workers: int) -> tuple[Shares, int]:
        """How rows are cut into steps of the feed, and how many optimiser steps are made of each."""
        given = self.train.given()
        batch, accumulation = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
        return Shares(workers, batch, accumulation), 1

    def most_steps(self, workers: int) -> int:
        """Optimiser steps that are asked for whatever rows there are; 0 where it is epochs that are asked for."""
        return max(int(self.train.given().get("max_steps", 0)), 0)

    def planned_steps(self, rows: int, workers: int) -> int:
        """Optimiser steps over `rows` rows, as a worker (trainer.py) counts them."""
        shares, updates = self.cut(workers)
        if most := self.most_steps(workers):
            return -(-most // updates) * updates
        defaults = library_defaults(self.train.library)
        epochs = self.train.given().get("num_train_epochs", defaults.get("num_train_epochs", 3.0))
        return total_steps(shares, rows, epochs, Position()) * updates

    def lora(self) -> dict[str, Any] | None:
        """PEFT's options, or None for full training."""
        return None if isinstance(self.tuning, Full) else self.tuning.given()


def run_training(
    stage: TrainStage,
    ctx: StageContext,
    build: Build,
    options: dict[str, Any] | None = None,
    references: References | None = None,
    around: Callable[[TrainJob], AbstractContextManager[TrainJob]] = nullcontext,
) -> StageResult:
    """Prepare the data, train on the workers, and leave model, ledger and metrics in `ctx.work`.

    Args:
        build: makes the stage's trainer on each worker.
        options: what that needs besides the job.
        references: what it needs of the model the stage was given, run over the data before.
        around: what is there while the workers train; it gives the job they are sent.
    """
    quiet_ray()
    ctx.report.phase("prepare")
    model = ctx.input().model
    tokenizer = load_tokenizer(model, ctx.chat_template)
    deepspeed = deepspeed_config(stage.deepspeed, gpu=ctx.resources.gpus_per_worker > 0)
    reward = stage.produces == "reward model"
    architecture = checked_architecture(stage.tuning, model, reward=reward, zero_stage=zero_stage(deepspeed))
    data = prepared(stage, ctx, tokenizer)
    base, new_tokens = grow_vocabulary(model, tokenizer, ctx.work / "base")
    lora = stage.lora()
    if lora is not None and architecture is not None:
        lora = adapter_options(stage.tuning, lora, architecture, new_tokens)
        if problem := rows_problem(lora, zero_stage(deepspeed), gpu=ctx.resources.gpus_per_worker > 0):
            raise StageError(problem)
    job = TrainJob(
        task=stage.task,
        model=base,
        given_model=model,
        work=ctx.work,
        groups=data.row_groups(),
        held_out=data.row_groups("eval"),
        tokens_per_row=max(1.0, data.tokens / max(data.rows, 1)),
        weighted=data.manifest["weighted"],
        packed=data.manifest["fill"] is not None,
        stop_ids=data.manifest["stop_ids"],
        chat_template=ctx.chat_template,
        template_hash=template_hash(tokenizer),
        arguments=stage.arguments(),
        reward=reward,
        lora=lora,
        quantization=stage.tuning.quantization(),
        deepspeed=deepspeed,
        attention=stage.attention,
        seed=ctx.seed,
        shuffle=stage.shuffle,
        early_stopping=stage.early_stopping.model_dump() if stage.early_stopping else None,
        options=options or {},
    )
    facts: dict[str, Any] = {}
    if references is not None:
        ctx.report.phase("reference")
        count = lambda done, total: ctx.report.progress(done, total, "row group")  # noqa: E731
        seen, facts["reference"] = with_reference(data, references, job, ctx, count)
        job = replace(job, groups=seen.row_groups(), held_out=seen.row_groups("eval"))
    ctx.report.phase("start", rows=data.rows, tokens=data.tokens)
    with around(job) as job:
        outcome = train_to_the_end(job, build, ctx, stage.cut(ctx.resources.workers)[0])
    shutil.rmtree(ctx.work / "base", ignore_errors=True)  # its rows are in the export
    tuned = {"new_tokens": len(new_tokens), "adapter": lora, **outcome["export"]}
    facts |= {"consumption": consumed(ctx.work, data.rows, outcome["updates"]), "tuning": tuned}
    facts["training_warnings"] = [*stage.check_data(data), *outcome["warnings"]]
    return result_of(data, outcome, facts)


def prepared(stage: TrainStage, ctx: StageContext, tokenizer: Any) -> Prepared:
    """The stage's data, its ledger written and judged; the trainers are imported meanwhile."""
    imports = threading.Thread(target=import_trainers)
    imports.start()
    data = prepare(
        stage.data,
        stage.recipe(tokenizer, ctx.seed),
        ctx.prepared,
        lambda done, total: ctx.report.progress(done, total, "chunk"),
        ctx.report,
    )
    imports.join()
    write_ledger(data, ctx.work)
    check_lost(data.manifest["ledger"], stage.max_dropped, refuse_long=stage.truncation == "refuse")
    stage.check_data(data)
    if stage.train.given().get("eval_strategy", "no") != "no" and not data.row_groups("eval"):
        raise DataError(
            f"eval_strategy: no row of {data.rows} was held out by `eval`, so there is nothing to evaluate on; hold out more"
        )
    return data


def consumed(work: Path, rows: int, updates: int) -> dict[str, Any]:
    """What the consumption ledger proves.

    Raises:
        StageError: rows were lost or repeated.
    """
    with (work / CONSUMED).open() as lines:
        proof = check_consumption(map(json.loads, lines), rows, updates)
    if proof.problems:
        raise StageError(
            f"rows were lost or repeated: {'; '.join(proof.problems[:3])} ({work / CONSUMED})\n"
            f"  to train from the start, remove {work}"
        )
    return proof.as_dict()


def result_of(data: Prepared, outcome: dict[str, Any], more: dict[str, Any]) -> StageResult:
    """What goes into the manifest."""
    last = {k: v for k, v in outcome["last"].items() if k not in ("step", "epoch")}
    metrics = {**last, "first_loss": outcome["first"].get("loss"), "train_seconds": outcome["seconds"]}
    details = {
        "prepared": str(data.path),
        "trained_tokens": data.manifest["trained_tokens"],
        "epochs": outcome["epochs"],
        "checkpoints": outcome["checkpoints"],
        "workers": {name: outcome[name] for name in ("workers", "lost", "resizes") if name in outcome},
        "ledger": data.manifest["ledger"],
        "mixture": data.manifest["sources"],
        "warnings": data.manifest["warnings"],
        "fill": data.manifest["fill"],
        "lengths": data.manifest.get("lengths", {}),  # of data that an older version prepared: not known
        "kernels": outcome["kernels"],
        **more,
    }
    return StageResult(metrics, rows=data.rows, tokens=data.tokens, steps=outcome["steps"], details=details)


def write_ledger(data: Prepared, work: Path) -> None:
    """The stage's own copy of the ledger: `ledger.json` counts, `ledger.jsonl` names every row."""
    (work / "ledger.json").write_text(json.dumps(data.manifest["ledger"], indent=1))
    write_entries(work / "ledger.jsonl", read_entries(data.path))
