"""What makes a TRL trainer ours: batches from the feed, and a step's loss that is the same however the step is shared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from stages.training import optimizers
from stages.training.evaluation import evaluate_held_out
from stages.training.feed import OF_THE_FEED, FeedLoader
from stages.training.guard import Guard
from stages.training.job import TrainJob
from stages.training.meter import Meter, Work, peak_flops
from stages.training.saving import Checkpoints


class Fed(Checkpoints):
    """Mixin before a TRL trainer.

    `token_normalised` says that the trainer's loss is divided by what the whole step holds. Otherwise it is a mean over the
    micro-batch, which is weighted here so that a step's loss is the mean over all its rows, whatever the micro-batches
    (transformers#34191).
    """

    token_normalised = False
    job: TrainJob
    loader: FeedLoader
    args: Any
    accelerator: Any
    state: Any

    def join(self, job: TrainJob, loader: FeedLoader) -> None:
        """Take up the job: to be called once, before training."""
        self.job, self.loader = job, loader
        model = self.accelerator.unwrap_model(self.model)
        self.meter = loader.meter = Meter(Work.of(model), peak_flops())
        vocabulary = model.config.get_text_config().vocab_size
        hopeless = math.log(vocabulary) if self.token_normalised else 5.0
        self.guard = Guard(job.work, hopeless, self.args.process_index, self.args.world_size)
        self._step_loss: Any = 0.0  # of this worker, in the step that is being made
        self._step_inputs: list[dict[str, Any]] = []

    def get_train_dataloader(self) -> FeedLoader:
        return self.loader

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    # -- the step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, uneven = inputs.get("row_weight", 1.0), inputs.get("ragged", False)
        inputs = {k: v for k, v in inputs.items() if k not in OF_THE_FEED}
        with ragged_gathers(self.accelerator, weight > 0) if uneven else nullcontext():
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.token_normalised or weight == 1.0:
            return loss
        return (loss[0] * weight, loss[1]) if return_outputs else loss * weight

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._step_loss = self._step_loss + loss
        self._step_inputs.append(inputs)
        if self.accelerator.sync_gradients:  # once a step, since a GPU has to be waited for
            own = float(self._step_loss)
            each = [own if rank == self.args.process_index else 0.0 for rank in range(self.args.world_size)]
            self.guard.step(self._sum(each), self.state.global_step + 1, self._step_inputs)
            self._step_loss = 0.0
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if norm is not None and not self.args.fp16:  # fp16 skips steps whose gradient is too large, and goes on
            self.guard.gradient(float(norm), self.state.global_step + 1, self._step_inputs)
        self._step_inputs = []
        return norm

    @property
    def _watched(self) -> dict[str, Any]:
        """What the guard remembers: a checkpoint keeps it."""
        return {"start": self.guard.start, "recent": list(self.guard.recent)}

    @_watched.setter
    def _watched(self, value: dict[str, Any]) -> None:
        self.guard.start = value["start"]
        self.guard.recent.extend(value["recent"])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counted by the meter; transformers walks through all parameters for it in every micro-batch

    # -- what is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self._sum, self.accelerator.num_processes)
        super().log(logs, start_time)  # type: ignore[misc]

    def _sum(self, numbers: list[float]) -> list[float]:
        """Over all workers."""
        import torch

        if self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out rows; called by the trainer as `eval_strategy` says."""
        with self.meter.paused():
            metrics = evaluate_held_out(self)
        self.model.eval()  # TRL logs what it has gathered for the mode the model is in
        self.log(metrics)
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))  # type: ignore[misc]
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True  # whatever `save_steps` says, the best is kept
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            super()._save_checkpoint(model, trial)

    # -- the user's own optimizer and schedule

    def create_optimizer(self, model: Any = None) -> Any:
        name = self.job.arguments.get("optim", "")
        if optimizers.is_own(name):
            given = {"lr": self.args.learning_rate} | optimizers.options(self.args.optim_args)
            self.optimizer_cls_and_kwargs = (optimizers.load(name), given)
        return super().create_optimizer(model)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        name = self.job.arguments.get("lr_scheduler_type", "")
        if not optimizers.is_own(name):
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = optimizers.load(name)(
                self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                **(self.args.lr_scheduler_kwargs or {}),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


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
