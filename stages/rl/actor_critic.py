"""The policy and the value model as one module: one engine trains both, so every ZeRO stage and every checkpoint has both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.training.head import ScoreHead, TrainedHead
from stages.training.losses import token_logps


class Acted(NamedTuple):
    """What the two models say of the tokens of answers, (tokens,) each."""

    logps: Tensor  # log pi(a_t|s_t)
    entropy: Tensor  # of pi(.|s_t); nothing, (0,), where it is not wanted
    values: Tensor  # V(s_t): of the state before the token


class ActorCritic(torch.nn.Module):
    """Called with a batch of `answer_collator` (stages/training/answers.py): `inputs` of the models, `at` (answer_at) and
    `targets` (answer_ids).

    Args:
        policy: a causal language model, with its adapter if it has one.
        value: a model with a score head for one label.
        temperature: the policy's probabilities are of logits / temperature, as its answers are drawn.
    """

    def __init__(self, policy: Any, value: Any, temperature: float) -> None:
        super().__init__()
        self.policy, self.value, self.temperature = policy, value, temperature
        self.config = policy.config  # what trainers and DeepSpeed ask a model for
        if hasattr(policy, "peft_config"):
            self.peft_config = policy.peft_config
        self._head, self._scores = TrainedHead(policy), ScoreHead(value)

    def forward(
        self, inputs: dict[str, Tensor], at: Tensor, targets: Tensor, *, entropy: bool = False, value: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `Acted`; a plain tuple, since DeepSpeed makes any tuple anew."""
        logits, _ = self._head.logits(self.policy, inputs, at)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logps, entropies = token_logps(logits, targets, entropy=entropy)
        if not value:
            return logps, entropies, logps.new_empty(0)
        scores, _ = self._scores.scores(self.value, inputs)
        return logps, entropies, scores[at]

    # -- what trainers ask of a model

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.value):
            model.gradient_checkpointing_enable(**options)

    def get_input_embeddings(self) -> Any:
        return self.policy.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.policy.get_output_embeddings()
