"""Direct preference optimisation: the policy is moved towards chosen and away from rejected answers, near its reference.

The reference is by definition the model the stage was given. TRL reads it again from that folder; with LoRA it is the
policy with the adapter switched off.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stages.base import StageContext, StageResult
from stages.data.encode import Task
from stages.training.arguments import TrainConfig, train_config
from stages.training.fed import Fed
from stages.training.job import TrainerParts
from stages.training.stage import TrainStage, run_training

DPOArguments: type[TrainConfig] = train_config("DPOConfig")


class DPO(TrainStage):
    """Trains a policy on preference pairs (Rafailov et al. 2023, eq. 7, and TRL's other losses by `loss_type`)."""

    kind: Literal["dpo"] = "dpo"
    train: DPOArguments = DPOArguments()  # type: ignore[valid-type]

    produces: ClassVar = "model"
    task: ClassVar[Task] = "preference"

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    class FedDPOTrainer(Fed, DPOTrainer):
        pass

    args = parts.arguments(DPOConfig, max_length=None)
    return FedDPOTrainer(
        model=parts.job.model,  # a path: from a model in memory TRL would take the old base as reference (trl#2015)
        args=args,
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
