"""Reward modelling: a scalar head that scores the chosen answer above the rejected one (Bradley-Terry)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from stages.base import StageContext, StageResult
from stages.data.encode import Task
from stages.training.arguments import TrainConfig, train_config
from stages.training.fed import Fed
from stages.training.job import TrainerParts
from stages.training.stage import TrainStage, run_training

RewardArguments: type[TrainConfig] = train_config("RewardConfig")


class Reward(TrainStage):
    """Trains a reward model on preference pairs: -log sigmoid(r(chosen) - r(rejected)), as in Ouyang et al. 2022, eq. 1."""

    kind: Literal["reward"] = "reward"
    train: RewardArguments = RewardArguments()  # type: ignore[valid-type]

    produces: ClassVar = "reward model"
    task: ClassVar[Task] = "preference"

    def lora(self) -> dict[str, Any] | None:
        options = super().lora()
        if options is None:
            return None
        # The score head is new, so it is always trained and saved with the adapter.
        return options | {"modules_to_save": [*(options.get("modules_to_save") or []), "score"]}

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's RewardTrainer; it wants whole sequences, so the prompt is put before both answers."""
    from trl import RewardConfig, RewardTrainer

    class FedRewardTrainer(Fed, RewardTrainer):
        pass

    args = parts.arguments(RewardConfig, max_length=None)
    trainer = FedRewardTrainer(
        model=parts.job.model,
        args=args,
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate([whole_sequences(row) for row in rows])
    return trainer


def whole_sequences(row: dict[str, Any]) -> dict[str, Any]:
    return {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
