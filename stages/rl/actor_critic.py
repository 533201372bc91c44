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

    Neither model drops anything out: the policy that is trained would not be the one that answered, and the ratio of the two
    not 1 before the first step (Huang et al. 2024, "The N+ implementation details of RLHF with PPO").

    Args:
        policy: a causal language model, with its adapter if it has one.
        value: a model with a score head for one label.
        temperature: the policy's probabilities are of logits / temperature, as its answers are drawn.
        value_shift: what is taken off every score to make it a value.
    """

    def __init__(self, policy: Any, value: Any, temperature: float, value_shift: float = 0.0) -> None:
        super().__init__()
        self.policy, self.value, self.temperature, self.value_shift = policy, value, temperature, value_shift
        without_dropout(self)
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
        return logps, entropies, scores[at] - self.value_shift

    # -- what trainers ask of a model

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.value):
            model.gradient_checkpointing_enable(**options)

    def get_input_embeddings(self) -> Any:
        return self.policy.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.policy.get_output_embeddings()


def without_dropout(module: torch.nn.Module) -> None:
    """Dropout of any kind is off: torch's layers, those of adapters, and the rates that attention is called with."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name, value in list(vars(part).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)
