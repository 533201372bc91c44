"""What SFT, reward and DPO share: their configs' common fields, and prepare -> train -> export."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from stages.base import ArtifactKind, Share, Stage, StageContext, StageResult
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe, Task
from stages.data.ledger import check_lost, read_entries, write_entries
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer
from stages.data.truncate import Truncation
from stages.training.arguments import TrainConfig
from stages.training.deepspeed import deepspeed_config
from stages.training.job import Build, TrainJob
from stages.training.launch import launch, quiet_ray
from stages.training.trainer import import_trainers, train_on_worker
from stages.training.tuning import Full, Lora


class TrainStage(Stage):
    """A stage that trains a model from data."""

    model: str | None = Field(
        default=None, description="stages.NAME, a folder or a hub id; the spec's model if absent."
    )
    data: list[DataSource] = Field(min_length=1)
    train: TrainConfig
    tuning: Annotated[Full | Lora, Field(discriminator="method")] = Full()  # type: ignore[valid-type]
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
    deepspeed: str | None = Field(default=None, description="zero0 .. zero3, or the path of a DeepSpeed JSON file.")
    workers: int | None = Field(default=None, ge=1, description="Workers of this stage, where not the cluster's.")

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"model": ("model",)}
    task: ClassVar[Task]
    default_max_length: ClassVar[int] = 1024

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: str | None) -> str | None:
        deepspeed_config(value)
        return value

    @property
    def max_length(self) -> int:
        return self.train.given().get("max_length") or self.default_max_length

    def recipe(self, tokenizer: Any, seed: int) -> Recipe:
        """How this stage's rows become tokens."""
        return Recipe(
            self.task,
            tokenizer_spec(tokenizer),
            max_length=self.max_length,
            truncation=self.truncation,
            deduplicate=self.deduplicate,
            shuffle=self.shuffle,
            seed=seed,
            **self.mask.options(),
        )

    def lora(self) -> dict[str, Any] | None:
        """PEFT's options, or None for full training."""
        return None if isinstance(self.tuning, Full) else self.tuning.given()


def run_training(stage: TrainStage, ctx: StageContext, build: Build) -> StageResult:
    """Prepare the data, train on the workers, and leave model, ledger and metrics in `ctx.work`."""
    quiet_ray()
    ctx.report.phase("prepare")
    model = ctx.input().model
    tokenizer = load_tokenizer(model, ctx.chat_template)
    imports = threading.Thread(target=import_trainers)
    imports.start()
    data = prepare(
        stage.data,
        stage.recipe(tokenizer, ctx.seed),
        ctx.prepared,
        lambda done, total: ctx.report.progress(done, total, "chunk"),
    )
    imports.join()
    write_ledger(data, ctx.work)
    check_lost(data.manifest["ledger"], stage.max_dropped, refuse_long=stage.truncation == "refuse")
    arguments = {k: v for k, v in stage.train.given().items() if k not in ("max_length", "packing")}
    job = TrainJob(
        task=stage.task,
        model=model,
        work=ctx.work,
        groups=data.row_groups(),
        arguments=arguments,
        reward=stage.produces == "reward model",
        lora=stage.lora(),
        deepspeed=deepspeed_config(stage.deepspeed),
        chat_template=ctx.chat_template,
        stop_ids=data.manifest["stop_ids"],
        seed=ctx.seed,
        shuffle=stage.shuffle,
        weighted=data.manifest["weighted"],
        packed=data.manifest["fill"] is not None,
        tokens_per_row=max(1.0, data.tokens / max(data.rows, 1)),
        held_out=data.row_groups("eval"),
    )
    ctx.report.phase("start", rows=data.rows, tokens=data.tokens)
    outcome = launch(
        train_on_worker,
        {"job": job, "build": build, "on_cpu": ctx.resources.gpus_per_worker == 0},
        resources=ctx.resources,
        local=ctx.local,
        folder=ctx.work,
    )
    last = {k: v for k, v in outcome["last"].items() if k not in ("step", "epoch")}
    trained = data.manifest["trained_tokens"]
    metrics = {**last, "first_loss": outcome["first"].get("loss"), "train_seconds": outcome["seconds"]}
    details = {
        "prepared": str(data.path),
        "trained_tokens": trained,
        "epochs": outcome["epochs"],
        "ledger": data.manifest["ledger"],
        "mixture": data.manifest["sources"],
        "warnings": data.manifest["warnings"],
        "fill": data.manifest["fill"],
    }
    return StageResult(metrics, rows=data.rows, tokens=data.tokens, steps=outcome["steps"], details=details)


def write_ledger(data: Prepared, work: Path) -> None:
    """The stage's own copy of the ledger: `ledger.json` counts, `ledger.jsonl` names every row."""
    (work / "ledger.json").write_text(json.dumps(data.manifest["ledger"], indent=1))
    write_entries(work / "ledger.jsonl", read_entries(data.path))
