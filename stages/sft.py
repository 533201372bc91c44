"""Supervised fine-tuning: cross-entropy on the trained tokens of conversations."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.base import Config, StageContext, StageResult
from stages.data.chat import TrainOn
from stages.data.encode import Task
from stages.training.arguments import TrainConfig, train_config
from stages.training.stage import TrainStage, run_training
from stages.training.trainer import Fed, TrainerParts

SFTArguments: type[TrainConfig] = train_config("SFTConfig")


class Mask(Config):
    train_on: TrainOn = Field(
        default="assistant", description="assistant (every turn and its stop token), last_assistant, completion or all."
    )


class SFT(TrainStage):
    """Trains a model on conversations, prompts with completions, or plain text."""

    kind: Literal["sft"] = "sft"
    mask: Mask = Mask()
    train: SFTArguments = SFTArguments()  # type: ignore[valid-type]

    produces: ClassVar = "model"
    task: ClassVar[Task] = "conversation"

    def train_on(self) -> TrainOn:
        return self.mask.train_on

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's SFTTrainer. Its loss is the sum over trained tokens divided by their count in the whole step."""
    from trl import SFTConfig, SFTTrainer

    class FedSFTTrainer(Fed, SFTTrainer):
        token_normalised = True

    args = parts.arguments(SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return FedSFTTrainer(
        model=parts.job.model,
        args=args,
        train_dataset=parts.dataset,
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
