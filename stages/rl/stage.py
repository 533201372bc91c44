"""What PPO, GRPO and RLOO share: prompts to answer, what an answer is worth, and how answers are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import ArtifactKind, Config, StageContext
from stages.data.encode import Recipe, Task
from stages.data.source import DataSource
from stages.errors import DataError
from stages.rewards import Reward, Scorer, check, is_function, scorers
from stages.rl import words
from stages.rl.watching import Limits
from stages.training.architecture import positions
from stages.training.stage import TrainStage

Engine = Literal["auto", "transformers", "vllm"]
TOGETHER = 64  # answers that are sampled together, at least


class Kept(Config):
    """Samples that are kept for the report, `samples.jsonl`."""

    every: int = Field(
        default=10, ge=1, description="Iterations from one time to the next; the last one is always kept."
    )
    prompts: int = Field(default=8, ge=0, description="Of the iteration's prompts, the first so many; 0: none.")


@dataclass(frozen=True)
class Beside:
    """What a worker has in memory besides the policy that it trains, for the plan."""

    value: str | None = None  # the model, as it is written, that a value model of the same size as it begins as
    rewards: tuple[str, ...] = ()  # reward models, as they are written
    reference: Literal["", "whole", "shared"] = ""  # frozen, where the policy has no adapter; shared out under ZeRO-3
    sampled: int = 1  # answers that are sampled together
    whole_logits: bool = True  # those of all tokens of the answers are held at once
    processes: int = 0  # that judge, each with the resources of a worker


class RLStage(TrainStage):
    """A stage whose policy answers prompts, and is trained on what its answers are worth."""

    data: list[DataSource] = Field(min_length=1, description="Rows of any format: their prompts are used.")
    rewards: list[Reward] = Field(
        min_length=1,
        description="Reward stages, reward models or functions `module:name`; with weights, their sum is the reward.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Bound of an answer.")
    temperature: float = Field(
        default=1.0, gt=0, description="Answers are drawn with; the policy's probabilities have it too."
    )
    engine: Engine = Field(
        default="auto",
        description="Who samples. auto: vllm where it is installed and there are GPUs, else transformers.",
    )
    samples: Kept = Kept()
    limits: Limits = Limits()

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"model": ("model",), "rewards": ("reward model",)}
    produces: ClassVar = "model"
    task: ClassVar[Task] = "prompt"
    instead: ClassVar[Mapping[str, str]] = words.COMMON

    @model_validator(mode="after")
    def _prompts_are_not_cut(self) -> RLStage:
        if self.truncation in ("left", "right"):
            raise ValueError(
                "truncation: a prompt that is too long is dropped (or refused): an answer to a part of it means nothing"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        given = super().arguments()
        if given.get("load_best_model_at_end") and "metric_for_best_model" not in given:
            given |= {"metric_for_best_model": "reward", "greater_is_better": True}
        return given

    def references(self) -> dict[str, list[str]]:
        models = [term.reward for term in self.rewards if not is_function(term.reward)]
        return {"model": [] if self.model is None else [self.model], "rewards": models}

    @property
    def answers_to_each(self) -> int:
        """Answers to a prompt in an iteration."""
        return 1

    def beside(self, workers: int, inputs: Mapping[str, Sequence[str]]) -> Beside:
        """`inputs`: field -> models, as `references` has them, with the spec's own where the stage names none."""
        return Beside(rewards=tuple(inputs.get("rewards", ())))

    def functions(self) -> list[str]:
        return [term.reward for term in self.rewards if is_function(term.reward)]

    def recipe(self, tokenizer: Any, seed: int) -> Recipe:
        """Prompts that leave room for an answer.

        Raises:
            DataError: there is room for none.
        """
        limit = positions(tokenizer.name_or_path)
        if limit is not None and limit <= self.max_new_tokens:
            raise DataError(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the model's {limit} positions"
            )
        return replace(super().recipe(tokenizer, seed), max_length=limit and limit - self.max_new_tokens)

    def judges(self, ctx: StageContext) -> list[Scorer]:
        """The terms of the reward, checked against the policy.

        Raises:
            StageError: a function cannot be imported, or a reward model reads text in another way than the policy.
        """
        terms = scorers(self.rewards, ctx.inputs.get("rewards", []))
        check(terms, ctx.input(), ctx.chat_template)
        return terms
