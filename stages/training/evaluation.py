"""The rows that were held out, evaluated by the workers that train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stages.training.feed import Feed, FeedLoader, Shares


def evaluate_held_out(trainer: Any) -> dict[str, float]:
    """`eval_loss` (of conversations the mean of -log p over trained tokens, whatever their weights and normalisation),
    `eval_rows`, and the trainer's own metrics with `eval_` before their names. The same on any number of workers."""
    import torch

    from stages.training.fed import add_metrics

    job, args = trainer.job, trainer.args
    shares = Shares(args.world_size, job.arguments.get("per_device_eval_batch_size", args.per_device_train_batch_size))
    rows = sum(count for _, _, count in job.held_out)

    def batches() -> Iterator[dict[str, Any]]:
        feed = Feed(job.held_out, rank=args.process_index, shares=shares, steps=shares.steps(rows), seed=None)
        return iter(FeedLoader(feed, trainer.data_collator, job.single_placeholder))

    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    if averaged := getattr(trainer.optimizer, "eval", None):  # schedule-free optimizers evaluate an average of weights
        averaged()
    sums: dict[str, Any] = {}
    terms = counts = torch.zeros(1)
    with torch.no_grad():
        trainer.before_step(batches())
        for batch in batches():
            inputs = trainer._prepare_inputs(batch)
            scored = trainer.score(model, inputs)
            loss, share = trainer.held_out_loss(scored, inputs)
            assert len(loss) == torch.as_tensor(share).numel(), "each term of a loss has its share"
            terms, counts = terms + loss.cpu().double(), counts + torch.as_tensor(share).cpu().double().reshape(-1)
            add_metrics(sums, scored.metrics)
    model.train(was_training)
    size = len(counts)
    totals = torch.tensor(trainer._sum([*terms.tolist(), *counts.tolist()]))
    loss = float((totals[:size] / totals[size:].clamp(min=1e-6)).sum())
    return {"eval_loss": loss, "eval_rows": rows} | {f"eval_{k}": v for k, v in trainer.means(sums).items()}
