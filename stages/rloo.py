"""REINFORCE leave-one-out: an answer is as good as its reward is above the mean of the other answers to its prompt, with the KL
to the reference as a part of the reward (Ahmadian et al. 2024, arXiv:2402.14740).

The loss and the sampling are TRL's; what is ours is in stages/rl/groups.py.
"""

from __future__ import annotations

from typing import Any, Literal

from stages.base import StageContext, StageResult
from stages.rl.groups import Grouped, GroupStage, group_trainer
from stages.training.arguments import TrainConfig, train_config
from stages.training.fed import Fed
from stages.training.job import TrainerParts

RLOOArguments: type[TrainConfig] = train_config("RLOOConfig")


class RLOO(GroupStage):
    """Trains a policy against rewards of its own answers, each compared with the others to its prompt."""

    kind: Literal["rloo"] = "rloo"
    train: RLOOArguments = RLOOArguments()  # type: ignore[valid-type]

    def run(self, ctx: StageContext) -> StageResult:
        return self.train_in_groups(ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's RLOOTrainer on our feed."""
    import trl.trainer.rloo_trainer as trl

    class FedRLOOTrainer(Grouped, Fed, trl.RLOOTrainer):
        loss_is_scaled_for_ga = trl.RLOOTrainer.loss_is_scaled_for_ga

    return group_trainer(parts, FedRLOOTrainer, trl.RLOOConfig)
