"""What PPO can be told, by the names of TRL's last PPOConfig (1.12) where it had them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stages.base import Config


class PPOSettings(Config):
    """Part of `train:`, beside transformers' own arguments. A step is an optimiser step, of a mini-batch of
    per_device_train_batch_size x gradient_accumulation_steps x workers answers;
    an iteration has `num_mini_batches` times as many."""

    num_ppo_epochs: int = Field(default=4, ge=1, description="How often an iteration's answers are trained on.")
    num_mini_batches: int = Field(default=1, ge=1, description="Steps that an epoch over them is cut into.")
    total_episodes: int | None = Field(
        default=None, ge=1, description="Answers in all, rounded up to whole iterations; instead of num_train_epochs."
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="Discount of what comes a token later.")
    lam: float = Field(default=0.95, ge=0, le=1, description="Lambda of generalized advantage estimation.")
    cliprange: float = Field(default=0.2, gt=0, description="How far the ratio of policies may go from 1.")
    cliprange_value: float = Field(default=0.2, gt=0, description="How far a value may go from what it was.")
    vf_coef: float = Field(default=0.1, ge=0, description="Weight of the value loss beside the policy's.")
    entropy_coef: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
    kl_coef: float = Field(default=0.05, ge=0, description="beta: what a nat of KL to the reference costs.")
    kl_estimator: Literal["k1", "k3"] = Field(default="k1", description="Of the KL of a token.")
    kl_target: float | None = Field(
        default=None, gt=0, description="Nats an answer that kl_coef is adapted to; constant if absent."
    )
    kl_horizon: int = Field(default=10_000, ge=1, description="Answers over which kl_coef is adapted.")
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="Leave the rest of an iteration out once the policy is so many nats a token from the "
        "one that answered.",
    )
    whiten_rewards: bool = Field(default=False, description="Scale the rewards of tokens to variance 1.")
    whiten_advantages: bool = Field(default=True, description="Shift and scale advantages to mean 0 and variance 1.")
    missing_eos_penalty: float | None = Field(
        default=None, ge=0, description="What an answer loses that does not end by itself."
    )
    value_learning_rate: float | None = Field(
        default=None, gt=0, description="Of the value model; learning_rate if absent."
    )

    @model_validator(mode="after")
    def _something_is_adapted(self) -> PPOSettings:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target: kl_coef is what is adapted to it, and from 0 it never moves; give it a value")
        return self


NAMES = tuple(PPOSettings.model_fields)


def types() -> dict[str, Any]:
    """Field -> type, for the pydantic model of `train:`."""
    return {name: field.annotation for name, field in PPOSettings.model_fields.items()}
