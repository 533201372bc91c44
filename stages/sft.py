"""Supervised fine-tuning: cross-entropy on the trained tokens of conversations (its formulas: stages/training/losses.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.base import StageContext, StageResult
from stages.data.encode import Recipe, Task
from stages.data.mask import TrainMask
from stages.training import documents
from stages.training.arguments import TrainConfig, train_config
from stages.training.collate import conversation_collator
from stages.training.fed import Fed
from stages.training.feed import OF_THE_FEED
from stages.training.head import TrainedHead
from stages.training.job import TrainerParts
from stages.training.kernels import FLASH
from stages.training.losses import Normalization, cross_entropy
from stages.training.stage import TrainStage, run_training

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
        token_normalised = True
        loss_is_scaled_for_ga = True  # it is divided by what all micro-batches of a step hold
        head: TrainedHead
        right: Any = 0.0  # tokens that were the most likely one, since the last log

        def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
            share = torch.tensor(sum(batch["loss_share"] for batch in batch_samples), device=device)
            return self.accelerator.reduce(share, "sum")

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, _, correct, outputs = self.score(model, inputs)
            # The step's sum is cut over micro-batches and workers; the mean that DDP and DeepSpeed take is undone.
            loss = loss / num_items_in_batch.clamp(min=1e-6) * self.accelerator.num_processes
            if self.aux_loss_enabled:  # load balance of a mixture of experts: a mean over each micro-batch
                loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
            self.right = self.right + correct
            return (loss, outputs) if return_outputs else loss

        def score(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
            """(weighted loss, sum of -log p, correct tokens, the model's outputs) of a micro-batch, summed over its tokens."""
            weights = inputs["loss_weights"][:, 1:]
            trained = weights > 0
            given = {k: v for k, v in inputs.items() if k not in (*OF_THE_FEED, "labels", "loss_weights")}
            if self.aux_loss_enabled:
                given["output_router_logits"] = True
            else:  # rows are padded on the right, which causal attention does not see: without a mask it is faster
                given.pop("attention_mask", None)
            logits, outputs = self.head.logits(model, given, torch.nn.functional.pad(trained, (0, 1)))
            loss, nll, correct = cross_entropy(
                logits, inputs["labels"][:, 1:][trained], weights[trained],
                label_smoothing=self.args.label_smoothing_factor, dft=self.args.loss_type == "dft",
            )  # fmt: skip
            return loss, nll, correct, outputs

        def token_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
            """(sum of -log p, trained tokens) of a batch that is evaluated."""
            _, nll, _, _ = self.score(model, inputs)
            return float(nll), float((inputs["loss_weights"][:, 1:] > 0).sum())

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                right, trained = self._sum([float(self.right), self.meter.counts["trained"]])
                logs["mean_token_accuracy"] = round(right / max(trained, 1.0), 5)
                self.right = 0.0
            super().log(logs, start_time)

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
