"""Supervised fine-tuning: cross-entropy on the trained tokens of conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from stages.base import StageContext, StageResult
from stages.data.chat import IGNORE
from stages.data.encode import Recipe, Task
from stages.data.mask import TrainMask
from stages.training.arguments import TrainConfig, train_config
from stages.training.collate import conversation_collator
from stages.training.fed import OF_THE_FEED, Fed
from stages.training.job import TrainerParts
from stages.training.stage import TrainStage, run_training

SFTArguments: type[TrainConfig] = train_config("SFTConfig")


class SFT(TrainStage):
    """Trains a model on conversations, prompts with completions, or plain text."""

    kind: Literal["sft"] = "sft"
    mask: TrainMask = TrainMask()
    train: SFTArguments = SFTArguments()  # type: ignore[valid-type]

    produces: ClassVar = "model"
    task: ClassVar[Task] = "conversation"

    def recipe(self, tokenizer: Any, seed: int) -> Recipe:
        packing = bool(self.train.given().get("packing"))  # type: ignore[attr-defined]
        return replace(super().recipe(tokenizer, seed), packing=packing)

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's SFTTrainer. Its loss is the sum over trained tokens divided by their count in the whole step."""
    import torch
    from trl import SFTConfig, SFTTrainer

    class FedSFTTrainer(Fed, SFTTrainer):
        token_normalised = True
        _total_train_tokens: float

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if "loss_weights" in inputs:
                return self.weighted_loss(model, inputs, num_items_in_batch)
            seen, real = self._total_train_tokens, inputs["input_ids"].numel()
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if "position_ids" in inputs and model.training:  # TRL takes a packed batch for a single row
                real = self.accelerator.gather(torch.tensor([real], device=self.args.device)).sum().item()
                self._total_train_tokens = seen + real
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return loss

        def weighted_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Any:
            """sum w_t * -log p_t / sum w_t, over the trained tokens t of the whole step."""
            inputs = {k: v for k, v in inputs.items() if k not in OF_THE_FEED}
            weights = inputs.pop("loss_weights")[:, 1:]
            log_probs = model(
                **inputs, use_cache=False, fused_lm_head=True
            ).log_probs  # (rows, tokens - 1), 0 if untrained
            return -(log_probs * weights).sum() / num_items.clamp(min=1e-6) * self.accelerator.num_processes

        def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
            if not batch_samples or "loss_weights" not in batch_samples[0]:
                return super()._get_num_items_in_batch(batch_samples, device)
            total = sum((b["loss_weights"] * b["labels"].ne(IGNORE))[:, 1:].sum() for b in batch_samples)
            return self.accelerator.gather(total.to(device)).sum()

    args = parts.arguments(SFTConfig, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = FedSFTTrainer(
        model=parts.job.model,
        args=args,
        train_dataset=parts.dataset,
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
    trainer.data_collator = conversation_collator(
        parts.tokenizer.pad_token_id, weighted=parts.job.weighted, pad_to_multiple_of=args.pad_to_multiple_of
    )
    return trainer
