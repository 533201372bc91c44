"""Proximal policy optimisation: the policy answers prompts, rewards judge the answers, and it is moved towards what was better
than expected, near the model it was given (Ouyang et al. 2022, arXiv:2203.02155; Ziegler et al. 2019, arXiv:1909.08593).

What is computed: stages/rl/advantages.py and losses.py, each formula with its source. How an iteration goes: stages/rl/ppo.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from stages.base import ArtifactKind, StageContext, StageResult
from stages.data.tokenizer import load_tokenizer
from stages.errors import StageError
from stages.generate import choose_engine
from stages.rewards import difference
from stages.rl import settings, words
from stages.rl.ppo import PPOOptions, build_trainer, judged_elsewhere, value_scale
from stages.rl.settings import PPOSettings
from stages.rl.stage import TOGETHER, Beside, RLStage
from stages.training.arguments import TrainConfig, train_config
from stages.training.feed import Shares
from stages.training.stage import run_training

T = TypeVar("T")
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

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {
        "model": ("model",),
        "rewards": ("reward model",),
        "value_model": ("reward model", "model"),
    }
    instead: ClassVar[Mapping[str, str]] = words.COMMON | words.PPO

    @model_validator(mode="after")
    def _settings_are_right(self) -> PPO:
        settings, given = self.settings(), self.train.given()  # type: ignore[attr-defined]
        if settings.total_episodes is not None and (both := {"max_steps", "num_train_epochs"} & given.keys()):
            raise ValueError(f"train: total_episodes and {both.pop()} both say how long it is trained; leave one out")
        if "judge_processes" in self.model_fields_set and self.placement != "separate":
            raise ValueError("judge_processes: there are some with `placement: separate` alone")
        return self

    def settings(self) -> PPOSettings:
        given = self.train.given()  # type: ignore[attr-defined]
        return PPOSettings(**{name: given[name] for name in settings.NAMES if name in given})

    def arguments(self) -> dict[str, Any]:
        """transformers' own; the others are in `settings`."""
        return {k: v for k, v in super().arguments().items() if k not in settings.NAMES}

    def references(self) -> dict[str, list[str]]:
        value = [] if self.value_model is None else [self.value_model]
        return super().references() | {"value_model": value}

    def cut(self, workers: int) -> tuple[Shares, int]:
        shares, _ = super().cut(workers)
        settings = self.settings()
        prompts = shares.rows_per_step * settings.num_mini_batches
        return Shares(1, prompts), settings.num_ppo_epochs * settings.num_mini_batches

    def most_steps(self, workers: int) -> int:
        asked = self.settings().total_episodes
        if asked is None:
            return super().most_steps(workers)
        shares, updates = self.cut(workers)
        return shares.steps(asked) * updates

    def beside(self, workers: int, inputs: Mapping[str, Sequence[str]]) -> Beside:
        colocated, batch = self.placement == "colocated", self.train.given().get("per_device_train_batch_size", 8)  # type: ignore[attr-defined]
        return Beside(
            value=begins_as(inputs),
            rewards=tuple(inputs.get("rewards", ())) if colocated else (),
            reference="whole" if self.settings().kl_coef > 0 and colocated else "",
            sampled=min(max(TOGETHER, batch), -(-self.cut(workers)[0].rows_per_step // workers)),
            processes=0 if colocated else self.judge_processes,
        )

    def run(self, ctx: StageContext) -> StageResult:
        scorers, value = self.judges(ctx), begins_as(ctx.inputs)
        policy = ctx.input()
        if value.model != policy.model and (
            what := difference(load_tokenizer(policy.model, ctx.chat_template), load_tokenizer(value.model))
        ):
            raise StageError(
                f"value_model: {value.name} has another {what} than {ctx.input().name}, whose answers it values"
            )
        options = PPOOptions(
            settings=self.settings(),
            scorers=scorers,
            value=value.model,
            value_scale=value_scale(value, scorers),
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


def begins_as(inputs: Mapping[str, Sequence[T]]) -> T:
    """What the value model begins as."""
    return [*inputs.get("value_model", ()), *inputs.get("rewards", ()), *inputs["model"]][0]
