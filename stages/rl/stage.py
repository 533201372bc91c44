"""What PPO, GRPO and RLOO share: prompts to answer, what an answer is worth, and how answers are sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from stages.base import ArtifactKind, Config, StageContext
from stages.data.encode import Recipe, Task
from stages.data.source import DataSource
from stages.errors import DataError
from stages.generate import engine_problem
from stages.rewards import Reward, Scorer, check, is_function, scorers
from stages.training.architecture import positions
from stages.training.stage import TrainStage

Engine = Literal["auto", "transformers", "vllm"]


class Kept(Config):
    """Samples that are kept for the report, `samples.jsonl`."""

    every: int = Field(
        default=10, ge=1, description="Iterations from one time to the next; the last one is always kept."
    )
    prompts: int = Field(default=8, ge=0, description="Of the iteration's prompts, the first so many; 0: none.")


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

    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"model": ("model",), "rewards": ("reward model",)}
    produces: ClassVar = "model"
    task: ClassVar[Task] = "prompt"

    @field_validator("engine")
    @classmethod
    def _engine(cls, value: Engine) -> Engine:
        if problem := engine_problem(value):
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _prompts_are_not_cut(self) -> RLStage:
        if self.truncation in ("left", "right"):
            raise ValueError(
                "truncation: a prompt that is too long is dropped (or refused): an answer to a part of it means nothing"
            )
        return self

    def references(self) -> dict[str, list[str]]:
        models = [term.reward for term in self.rewards if not is_function(term.reward)]
        return {"model": [] if self.model is None else [self.model], "rewards": models}

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
        check(terms, ctx.input(), ctx.chat_template, ctx.code)
        return terms
