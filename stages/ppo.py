"""Proximal policy optimisation: the policy answers prompts, rewards judge the answers, and it is moved towards what was better
than expected, near the model it was given (Ouyang et al. 2022, arXiv:2203.02155; Ziegler et al. 2019, arXiv:1909.08593).

What is computed: stages/rl/advantages.py and losses.py, each formula with its source. How an iteration goes: stages/rl/ppo.py.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import Artifact, ArtifactKind, StageContext, StageResult
from stages.generate import choose_engine
from stages.rl import settings
from stages.rl.ppo import PPOOptions, build_trainer, judged_elsewhere, value_scale
from stages.rl.settings import PPOSettings
from stages.rl.stage import RLStage
from stages.rl.watching import Limits
from stages.training.arguments import TrainConfig, train_config
from stages.training.stage import run_training

PPOArguments: type[TrainConfig] = train_config("TrainingArguments", **settings.types())


class PPO(RLStage):
    """Trains a policy against rewards of its own answers (Schulman et al. 2017, arXiv:1707.06347)."""

    kind: Literal["ppo"] = "ppo"
    train: PPOArguments = PPOArguments()  # type: ignore[valid-type]
    value_model: str | None = Field(
        default=None,
        description="What the value model begins as: stages.NAME, a folder or a hub id; by default the first reward model of "
        "`rewards`, or where all are functions the policy's own model with a new head.",
    )
    placement: Literal["colocated", "separate"] = Field(
        default="colocated",
        description="Where reward models and the reference are: in the workers that train, or in processes of their own.",
    )
    judge_processes: int = Field(
        default=1, ge=1, description="Of placement separate: how many, each with the resources of a worker."
    )
    limits: Limits = Limits()

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {
        "model": ("model",),
        "rewards": ("reward model",),
        "value_model": ("reward model", "model"),
    }

    @model_validator(mode="after")
    def _settings_are_right(self) -> PPO:
        self.settings()
        if "judge_processes" in self.model_fields_set and self.placement != "separate":
            raise ValueError("judge_processes: there are some with `placement: separate` alone")
        return self

    def settings(self) -> PPOSettings:
        given = self.train.given()  # type: ignore[attr-defined]
        return PPOSettings(**{name: given[name] for name in settings.NAMES if name in given})

    def arguments(self) -> dict[str, Any]:
        """transformers' own; the others are in `settings`."""
        given = {k: v for k, v in super().arguments().items() if k not in settings.NAMES}
        if given.get("load_best_model_at_end") and "metric_for_best_model" not in given:
            given |= {"metric_for_best_model": "reward", "greater_is_better": True}
        return given

    def references(self) -> dict[str, list[str]]:
        value = [] if self.value_model is None else [self.value_model]
        return super().references() | {"value_model": value}

    def begins_as(self, ctx: StageContext) -> Artifact:
        """What the value model begins as."""
        given = [*ctx.inputs.get("value_model", []), *ctx.inputs.get("rewards", [])]
        return given[0] if given else ctx.input()

    def run(self, ctx: StageContext) -> StageResult:
        scorers, begins_as = self.judges(ctx), self.begins_as(ctx)
        options = PPOOptions(
            settings=self.settings(),
            scorers=scorers,
            value=begins_as.model,
            value_scale=value_scale(begins_as, scorers),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            engine=choose_engine(self.engine, gpu=ctx.resources.gpus_per_worker > 0),
            samples=self.samples,
            limits=self.limits,
        )
        judges = self.judge_processes if self.placement == "separate" else 0
        return run_training(
            self, ctx, build_trainer, {"ppo": options}, around=lambda job: judged_elsewhere(job, judges, ctx)
        )
