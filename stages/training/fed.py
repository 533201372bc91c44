"""What makes a TRL trainer ours: batches from the feed, and a step's loss that is the same however the step is shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from stages.training.feed import FeedLoader

OF_THE_FEED = ("rows", "row_weight", "ragged")  # what a batch carries besides the model's inputs


class Fed:
    """Mixin before a TRL trainer: batches come from the feed, already tokenised.

    `token_normalised` says that the trainer's loss is divided by the trained tokens of the whole step. Otherwise it is a
    mean over the micro-batch, which is weighted here so that a step's loss is the mean over all its rows, whatever the
    micro-batches (transformers#34191).
    """

    token_normalised = False
    loader: FeedLoader

    def get_train_dataloader(self) -> FeedLoader:
        return self.loader

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, uneven = inputs.get("row_weight", 1.0), inputs.get("ragged", False)
        inputs = {k: v for k, v in inputs.items() if k not in OF_THE_FEED}
        with ragged_gathers(self.accelerator, weight > 0) if uneven else nullcontext():  # type: ignore[attr-defined]
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.token_normalised or weight == 1.0:
            return loss
        return (loss[0] * weight, loss[1]) if return_outputs else loss * weight


@contextmanager
def ragged_gathers(accelerator: Any, real: bool) -> Iterator[None]:
    """Let TRL gather its metrics from workers that hold different numbers of rows.

    Its compute_loss gathers (rows, ...) tensors, which crashes gloo where the rows differ between workers. Here each is
    padded for the way and cut again; a worker without `real` rows adds none.
    """
    import torch

    gather = accelerator.gather

    def ragged(tensor: Any) -> Any:
        if tensor.ndim == 0 or accelerator.num_processes == 1:
            return gather(tensor)
        rows = tensor.shape[0] if real else 0
        sizes = gather(torch.tensor([rows], device=tensor.device)).tolist()
        if not max(sizes):
            return tensor
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[:rows] = tensor[:rows]
        parts = gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    accelerator.gather = accelerator.gather_for_metrics = ragged
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
