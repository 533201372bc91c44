"""The rows that were held out, evaluated by the workers that train."""

from __future__ import annotations

from typing import Any

from stages.training.feed import Feed, FeedLoader, Shares
from stages.training.job import PLACEHOLDERS


def evaluate_held_out(trainer: Any) -> dict[str, float]:
    """`eval_loss`: the mean of -log p over trained tokens of conversations, whatever their weights and normalisation, or the
    mean of the trainer's own loss over pairs; and `eval_rows`. The same on any number of workers."""
    import torch

    job, args = trainer.job, trainer.args
    shares = Shares(args.world_size, job.arguments.get("per_device_eval_batch_size", args.per_device_train_batch_size))
    rows = sum(count for _, _, count in job.held_out)
    feed = Feed(job.held_out, rank=args.process_index, shares=shares, steps=shares.steps(rows), seed=None)
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    if averaged := getattr(trainer.optimizer, "eval", None):  # schedule-free optimizers evaluate an average of weights
        averaged()
    total = count = 0.0
    with torch.no_grad():
        for batch in FeedLoader(feed, trainer.data_collator, PLACEHOLDERS[job.task]):
            examples = batch["rows"]
            inputs = trainer._prepare_inputs(batch)
            if trainer.token_normalised:
                nll, tokens = trainer.token_loss(model, inputs)
                total, count = total + nll, count + tokens
            else:
                shared = {"row_weight": float(examples > 0), "ragged": args.world_size > 1}
                total, count = total + float(trainer.compute_loss(model, inputs | shared)) * examples, count + examples
    model.train(was_training)
    total, count = trainer._sum([total, count])
    return {"eval_loss": total / max(count, 1.0), "eval_rows": rows}
