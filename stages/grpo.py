"""Group relative policy optimisation: an answer is as good as its reward is above that of the other answers to its prompt
(Shao et al. 2024, arXiv:2402.03300; and the losses that came after it, `loss_type`).

The losses and the sampling are TRL's; what is ours is in stages/rl/groups.py. Prompts, `rewards:` and what is told are as with
PPO, which has a value model besides.
"""

from __future__ import annotations

from typing import Any, Literal

from stages.base import StageContext, StageResult
from stages.rl.groups import Grouped, GroupStage, group_trainer
from stages.training.arguments import TrainConfig, train_config
from stages.training.fed import Fed
from stages.training.job import TrainerParts

GRPOArguments: type[TrainConfig] = train_config(
    "GRPOConfig",
    loss_type=Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    scale_rewards=Literal["group", "batch", "none"] | bool,
    importance_sampling_level=Literal["token", "sequence"],
    multi_objective_aggregation=Literal["sum_then_normalize", "normalize_then_sum"],
)


class GRPO(GroupStage):
    """Trains a policy against rewards of its own answers, compared within their group."""

    kind: Literal["grpo"] = "grpo"
    train: GRPOArguments = GRPOArguments()  # type: ignore[valid-type]

    def run(self, ctx: StageContext) -> StageResult:
        return self.train_in_groups(ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's GRPOTrainer on our feed."""
    import trl.trainer.grpo_trainer as trl

    class FedGRPOTrainer(Grouped, Fed, trl.GRPOTrainer):
        loss_is_scaled_for_ga = trl.GRPOTrainer.loss_is_scaled_for_ga

        @property
        def _watched(self) -> dict[str, Any]:
            """With what TRL's adaptive entropy bonus remembers."""
            return super()._watched | {"entropy": [self.entropy_coef, self._last_world_entropy]}

        @_watched.setter
        def _watched(self, value: dict[str, Any]) -> None:
            Fed._watched.fset(self, value)  # type: ignore[attr-defined]
            self.entropy_coef, self._last_world_entropy = value["entropy"]

    return group_trainer(parts, FedGRPOTrainer, trl.GRPOConfig)
