"""Direct preference optimisation: the policy is moved towards chosen and away from rejected answers, near its reference.

The reference is by definition the model the stage was given. Its log-probabilities are computed once, before training
(stages/training/reference.py), so no second model is held. The losses and their formulas: stages/training/preference.py.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import StageContext, StageResult
from stages.data.encode import Task
from stages.training.answers import PAIR, answer_collator, score_answers
from stages.training.arguments import TrainConfig, train_config
from stages.training.drift import Drift, Samples
from stages.training.fed import Fed, Scored
from stages.training.head import TrainedHead
from stages.training.job import TrainerParts
from stages.training.preference import PairLoss, pair_loss
from stages.training.reference import LABELLED, REFERENCE, References, references_elsewhere
from stages.training.stage import TrainStage, run_training

DPOArguments: type[TrainConfig] = train_config("DPOConfig", loss_type=str | list[str] | None)


class DPO(TrainStage):
    """Trains a policy on preference pairs (Rafailov et al. 2023, and the other losses of `loss_type`)."""

    kind: Literal["dpo"] = "dpo"
    train: DPOArguments = DPOArguments()  # type: ignore[valid-type]
    gamma: float = Field(default=0.5, ge=0, description="Of loss_type simpo: by how much chosen should be better.")
    watch: Samples = Samples()

    produces: ClassVar = "model"
    task: ClassVar[Task] = "preference"
    version: ClassVar[int] = 2

    @model_validator(mode="after")
    def _one_loss(self) -> DPO:
        self.loss()
        return self

    def loss(self) -> PairLoss:
        return PairLoss.of(self.train.given(), self.gamma)  # type: ignore[attr-defined]

    def arguments(self) -> dict[str, Any]:
        given = super().arguments()
        return {k: v for k, v in given.items() if k not in ("loss_type", "loss_weights")}  # those of `loss`

    def run(self, ctx: StageContext) -> StageResult:
        loss, ld_alpha = self.loss(), self.train.given().get("ld_alpha")  # type: ignore[attr-defined]
        references = References(PAIR, ld_alpha=ld_alpha) if loss.needs_reference else None
        options = {"loss": loss, "watch": self.watch}
        return run_training(self, ctx, build_trainer, options, references)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's DPOTrainer with losses of our own."""
    import torch
    import trl.trainer.dpo_trainer as trl

    class FedDPOTrainer(Drift, Fed, trl.DPOTrainer):
        head: TrainedHead
        pair_loss: PairLoss

        def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
            own = score_answers(
                self.head, model, inputs, sides=2, router_logits=self.aux_loss_enabled,
                agreement=self.pair_loss.use_weighting,
            )  # fmt: skip
            reference = None
            if self.pair_loss.needs_reference:
                reference = torch.stack([inputs["extra"][name] for name in REFERENCE[PAIR]])
            each, tokens = pair_loss(self.pair_loss, own.logps, reference, own.lengths, own.means, own.agreement)
            real = inputs["real"]
            terms = torch.stack([(each * real).sum(), (tokens * real).sum()])
            logps, means = own.logps.detach(), own.means.detach()
            average = "simpo" in self.pair_loss.loss_type
            rewards = self.pair_loss.beta * (means if average else logps if reference is None else logps - reference)
            margins = rewards[0] - rewards[1]
            metrics = {
                "rewards/chosen": rewards[0],
                "rewards/rejected": rewards[1],
                "rewards/accuracies": (margins > 0).float(),
                "rewards/margins": margins,
                "logps/chosen": logps[0],
                "logps/rejected": logps[1],
            }
            if reference is not None:
                metrics["chosen_ratio"] = (logps[0] - reference[0]) / own.lengths[0]
            count = real.sum()
            return Scored(terms, {k: torch.stack([(v * real).sum(), count]) for k, v in metrics.items()}, own.outputs)

    args = parts.arguments(trl.DPOConfig, max_length=None, precompute_ref_log_probs=True)
    with references_elsewhere(trl):
        trainer = FedDPOTrainer(
            model=parts.job.model,
            args=args,
            train_dataset=parts.dataset,
            eval_dataset=parts.eval_dataset(args),
            processing_class=parts.tokenizer,
            peft_config=parts.peft_config,
        )
    loss = trainer.pair_loss = parts.job.options["loss"]
    trainer.head = TrainedHead(trainer.model)
    layout = parts.layout(trainer.model)
    trainer.data_collator = answer_collator(
        parts.tokenizer.pad_token_id,
        PAIR,
        layout=layout,
        extra=REFERENCE[PAIR] if loss.needs_reference else (),
        ld_alpha=parts.job.arguments.get("ld_alpha"),
        token_share=True,
        pad_to_multiple_of=parts.multiple(),
    )
    trainer.samples_collator = answer_collator(parts.tokenizer.pad_token_id, LABELLED, layout=layout)
    return trainer
