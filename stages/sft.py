"""Supervised fine-tuning: cross-entropy on the trained tokens of conversations (its formulas: stages/training/losses.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.base import StageContext, StageResult
from stages.data.encode import Recipe, Task
from stages.data.mask import TrainMask
from stages.training import documents
from stages.training.arguments import TrainConfig, train_config
from stages.training.collate import conversation_collator
from stages.training.fed import Fed, Scored
from stages.training.feed import OF_THE_FEED
from stages.training.head import TrainedHead
from stages.training.job import TrainerParts
from stages.training.kernels import FLASH
from stages.training.losses import Normalization, cross_entropy
from stages.training.stage import TrainStage, run_training

NLL = "nll"  # the mean of -log p over trained tokens, which the loss is not where it has weights or is smoothed

SFTArguments: type[TrainConfig] = train_config("SFTConfig")


class SFT(TrainStage):
    """Trains a model on conversations, prompts with completions, or plain text."""

    kind: Literal["sft"] = "sft"
    mask: TrainMask = TrainMask()
    train: SFTArguments = SFTArguments()  # type: ignore[valid-type]
    loss_normalization: Normalization = Field(
        default="token",
        description="token: the mean over all trained tokens of a step; sequence: the mean over examples of each one's mean.",
    )

    produces: ClassVar = "model"
    task: ClassVar[Task] = "conversation"

    def recipe(self, tokenizer: Any, seed: int) -> Recipe:
        packing = bool(self.train.given().get("packing"))  # type: ignore[attr-defined]
        return replace(super().recipe(tokenizer, seed), packing=packing)

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer, options={"loss_normalization": self.loss_normalization})


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's SFTTrainer with a loss of our own, which needs logits of trained tokens only."""
    import torch
    from trl import SFTConfig, SFTTrainer

    class FedSFTTrainer(Fed, SFTTrainer):
        head: TrainedHead

        @property
        def hopeless(self) -> float:  # what guessing gives
            return math.log(self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size)

        def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
            weights = inputs["loss_weights"][:, 1:]
            trained = weights > 0
            given = {k: v for k, v in inputs.items() if k not in (*OF_THE_FEED, "labels", "loss_weights")}
            if self.aux_loss_enabled:
                given["output_router_logits"] = True
            else:  # rows are padded on the right, which causal attention does not see: without a mask it is faster
                given.pop("attention_mask", None)
            index = torch.nn.functional.pad(trained, (0, 1)).flatten().nonzero().squeeze(1)
            logits, outputs = self.head.logits(model, given, index)
            loss, nll, correct = cross_entropy(
                logits, inputs["labels"][:, 1:][trained], weights[trained],
                label_smoothing=self.args.label_smoothing_factor, dft=self.args.loss_type == "dft",
            )  # fmt: skip
            count = torch.full_like(nll, len(index))
            metrics = {"mean_token_accuracy": torch.stack([correct, count]), NLL: torch.stack([nll, count])}
            return Scored(loss[None], metrics, outputs)

        def held_out_loss(self, scored: Scored, inputs: dict[str, Any]) -> tuple[Any, Any]:
            """The mean of -log p, whatever the weights."""
            nll, count = scored.metrics[NLL]
            return nll[None], count[None]

    job = parts.job
    args = parts.arguments(SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0  # else TRL warns of its own way to do it
    trainer = FedSFTTrainer(
        model=job.model,
        args=args,
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
    trainer.args.label_smoothing_factor = smoothing
    trainer.head = TrainedHead(trainer.model)
    trainer.data_collator = conversation_collator(
        parts.tokenizer.pad_token_id,
        weighted=job.weighted,
        normalization=job.options["loss_normalization"],
        pad_to_multiple_of=args.pad_to_multiple_of,
        flat=parts.kernels.attention.name == FLASH
        or (parts.on_cpu and job.attention == "auto" and documents.use(trainer.model)),
    )
    return trainer
