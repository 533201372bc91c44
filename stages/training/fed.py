"""What makes a TRL trainer ours: batches from the feed, and a step's loss that is the same however the step is shared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages import own
from stages.training.evaluation import evaluate_held_out
from stages.training.feed import Feed, FeedLoader, Shares
from stages.training.guard import Guard
from stages.training.job import TrainJob
from stages.training.meter import Meter, Work, peak_flops
from stages.training.saving import Checkpoints


@dataclass
class Scored:
    """What a micro-batch came to, as sums, so that it does not matter how a step is cut into micro-batches and workers.

    `terms` (k,) are the parts of its loss; each is divided by what the whole step holds of the number in the same place of
    the batch's `loss_share` (trained tokens, pairs). `metrics`: name -> (2,), a sum and what it is divided by.
    """

    terms: Any
    metrics: dict[str, Any]
    outputs: Any


class Fed(Checkpoints):
    """Mixin before a TRL trainer, which says what a micro-batch's loss is (`score`).

    A step's loss is then the same whatever the micro-batches (transformers#34191), and so is every metric.
    """

    loss_is_scaled_for_ga = True  # it is divided by what all micro-batches of a step hold
    job: TrainJob
    loader: FeedLoader
    args: Any
    accelerator: Any
    state: Any
    data_collator: Any
    router_aux_loss_coef: float
    current_gradient_accumulation_steps: int

    def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
        raise NotImplementedError

    def held_out_loss(self, scored: Scored, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """(terms, shares) of the loss that is told of held-out rows."""
        return scored.terms, inputs["loss_share"]

    def before_step(self, batches: Iterable[dict[str, Any]]) -> None:
        """Called with this worker's micro-batches of a step before the first is scored, and with those of an evaluation."""

    def begin(self) -> None:
        """Called on every worker when the model is in its place, before the first step."""

    def watch(self) -> dict[str, float]:
        """Metrics of the model as it is, besides those of held-out rows; taken with them."""
        return {}

    def finish(self) -> tuple[dict[str, float], list[str]]:
        """Metrics of the trained model, and warnings. Called on every worker, before the export."""
        held_out = self.held_out_metrics() if self.job.held_out else {}
        return held_out | self.watch(), []

    def held_out_metrics(self) -> dict[str, float]:
        """Of the rows that were held out, `eval_` before their names."""
        return evaluate_held_out(self)

    @property
    def hopeless(self) -> float:
        """A loss that no data explains (guard.py)."""
        return 5.0

    def join(self, job: TrainJob, loader: FeedLoader) -> None:
        """Take up the job: to be called once, before training."""
        self.job, self.loader = job, loader
        model = self.accelerator.unwrap_model(self.model)
        self.meter = loader.meter = Meter(Work.of(model), peak_flops())
        self.guard = Guard(job.work, self.hopeless, self.args.process_index, self.args.world_size)
        self._metric_sums: dict[str, Any] = {}  # of metrics, since the last log
        self._step_loss: Any = 0.0  # of this worker, in the step that is being made
        self._step_inputs: list[dict[str, Any]] = []

    # -- what a stage's steps are made of

    @property
    def updates(self) -> int:
        """Optimiser steps that are made of the rows of one step of the feed."""
        return 1

    def shares(self) -> Shares:
        """How the feed cuts its steps."""
        args = self.args
        return Shares(args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)

    def loader_of(self, feed: Feed, job: TrainJob) -> FeedLoader:
        """Micro-batches of the feed's rows."""
        return FeedLoader(feed, self.data_collator, job.placeholder)

    def get_train_dataloader(self) -> FeedLoader:
        return self.loader

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _prepare_input(self, data: Any) -> Any:
        """Numbers stay as exact as they are: transformers rounds them to the precision DeepSpeed computes in, so a reference's
        log-probability of -500 in bfloat16 would be wrong by up to 1."""
        import torch

        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)  # type: ignore[misc]

    # -- the step

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """(k,): what the step holds over all workers."""
        import torch

        self.before_step(batch_samples)
        shares = torch.tensor([batch["loss_share"] for batch in batch_samples], device=device)
        return self.accelerator.reduce(shares.view(len(batch_samples), -1).sum(0), "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        scored = self.score(model, inputs)
        assert scored.terms.shape == num_items_in_batch.shape, "each term of a loss has its share"
        # The mean that DDP and DeepSpeed take over workers is undone.
        loss = (scored.terms / num_items_in_batch.clamp(min=1e-6)).sum() * self.accelerator.num_processes
        if getattr(
            self, "aux_loss_enabled", False
        ):  # load balance of a mixture of experts: a mean over each micro-batch
            loss = loss + self.router_aux_loss_coef * scored.outputs.aux_loss / self.current_gradient_accumulation_steps
        add_metrics(self._metric_sums, scored.metrics)
        return (loss, scored.outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._step_loss = self._step_loss + loss
        self._step_inputs.append(inputs)
        if self.accelerator.sync_gradients:  # once a step, since a GPU has to be waited for
            own = float(self._step_loss)
            each = [own if rank == self.args.process_index else 0.0 for rank in range(self.args.world_size)]
            asked = float(self.pulse is not None and bool(self.pulse.pause))
            *losses, asked = self._sum([*each, asked])
            self.guard.step(losses, self.state.global_step + 1, self._step_inputs)
            if asked:
                self.stop_at_checkpoint()
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

    @property
    def _told(self) -> dict[str, list[float]]:
        """Metrics that are not logged yet."""
        return {name: value.tolist() for name, value in self._metric_sums.items()}

    @_told.setter
    def _told(self, values: dict[str, list[float]]) -> None:
        import torch

        self._metric_sums = {name: torch.tensor(value, device=self.args.device) for name, value in values.items()}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counted by the meter; transformers walks through all parameters for it in every micro-batch

    # -- what is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self._sum, self.accelerator.num_processes)
            logs |= self.means(self._metric_sums)
            self._metric_sums = {}
        super().log(logs, start_time)  # type: ignore[misc]

    def _sum(self, numbers: list[float]) -> list[float]:
        """Over all workers."""
        import torch

        if self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()

    def means(self, sums: dict[str, Any]) -> dict[str, float]:
        """Of metrics, over all workers; those that nothing was counted for are left out."""
        import torch

        if not sums:
            return {}
        flat = self._sum(torch.stack(list(sums.values())).double().flatten().tolist())
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return {name: round(total / count, 6) for name, (total, count) in zip(sums, pairs, strict=True) if count}

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out rows; called by the trainer as `eval_strategy` says."""
        with self.meter.paused():
            metrics = self.held_out_metrics() | self.watch()
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

    # -- what is exported

    def trained_model(self, **options: Any) -> Any:
        """The model that the stage makes, with its adapter if it has one."""
        return self.accelerator.unwrap_model(self.model_wrapped, **options)

    def trained_state(self) -> dict[str, Any]:
        """Its weights. Every worker has to ask: ZeRO-3 gathers them."""
        return self.accelerator.get_state_dict(self.model_wrapped)

    def save_adapter(self, folder: str) -> None:
        """As peft does. Every worker has to come here."""
        self.save_model(folder)  # type: ignore[attr-defined]

    # -- the user's own optimizer and schedule

    def create_optimizer(self, model: Any = None) -> Any:
        name = self.job.arguments.get("optim", "")
        if own.is_own(name):
            given = {"lr": self.args.learning_rate} | own.options(self.args.optim_args)
            self.optimizer_cls_and_kwargs = (own.load(name), given)
        return super().create_optimizer(model)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        name = self.job.arguments.get("lr_scheduler_type", "")
        if not own.is_own(name):
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = own.load(name)(
                self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                **(self.args.lr_scheduler_kwargs or {}),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


def add_metrics(sums: dict[str, Any], metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value
