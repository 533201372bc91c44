"""The rows that were held out, evaluated by the workers that train."""

from __future__ import annotations

from typing import Any

from stages.training.fed import OF_THE_FEED
from stages.training.feed import Feed, FeedLoader, Shares
from stages.training.job import PLACEHOLDERS, TrainJob


def evaluate_held_out(trainer: Any, job: TrainJob, rank: int, workers: int) -> dict[str, float]:
    """The trained model on the rows that were held out: the mean over tokens (conversations) or over pairs, as `eval_*`."""
    import torch

    shares = Shares(workers, trainer.args.per_device_train_batch_size)
    rows = sum(count for _, _, count in job.held_out)
    feed = Feed(job.held_out, rank=rank, shares=shares, steps=shares.steps(rows), seed=None)
    model = trainer.model_wrapped
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in FeedLoader(feed, trainer.data_collator, PLACEHOLDERS[job.task]):
            examples = batch["rows"]
            inputs = trainer._prepare_inputs(batch)
            if trainer.token_normalised:
                inputs = {k: v for k, v in inputs.items() if k not in (*OF_THE_FEED, "loss_weights")}
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                total, count = total - float(outputs.log_probs.sum()), count + float(outputs.label_mask.sum())
            else:
                shared = {"row_weight": float(examples > 0), "ragged": workers > 1}
                total, count = total + float(trainer.compute_loss(model, inputs | shared)) * examples, count + examples
    model.train()
    sums = trainer.accelerator.reduce(torch.tensor([total, count], device=trainer.args.device), "sum")
    return {"eval_loss": float(sums[0] / sums[1].clamp(min=1)), "eval_rows": rows}
