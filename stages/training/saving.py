"""What makes a trainer's checkpoints ours: exact, atomic, written in the background, good for another number of workers.

The methods with a leading underscore replace private ones of transformers 5.23's Trainer (whose minor version is pinned),
which saves the whole model with each checkpoint, writes in place while training waits, and knows positions in the data only
as steps of a constant size.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import uuid
from pathlib import Path
from typing import Any

from stages.base import Reporter
from stages.errors import StageError
from stages.storage import mirrored, pull
from stages.training.checkpoint import Saved, best_of, find_best, saved, sweep
from stages.training.consumption import FILE as CONSUMED
from stages.training.feed import Feed, FeedLoader
from stages.training.universal import finish_loading
from stages.training.unpickling import load, tensors_only
from stages.training.watchdog import Pulse
from stages.training.writer import Writer, sees, snapshot

# What the loop remembers from step to step: sums of what is not logged yet, what the guard has seen, and of training in
# iterations what one hands on to the next.
SUMS = ("_tr_loss", "_globalstep_last_logged", "_total_train_tokens", "_metrics", "_watched", "_told", "_rollouts")


class Checkpoints:
    """Mixin before a trainer: saves, restores, and runs the loop over what the feed has left.

    The `output_dir` of the arguments is the folder of the checkpoints, in the stage's own.
    """

    loader: FeedLoader
    writer: Writer
    args: Any
    state: Any
    control: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    callback_handler: Any
    is_deepspeed_enabled: bool
    pulse: Pulse | None = None  # through which all workers may be asked to stop at a checkpoint
    paused = False  # they have stopped there
    _stop_asked = False
    _saved_step = -1

    @property
    def feed(self) -> Feed:
        return self.loader.feed

    # -- the loop

    def train(self, resume_from_checkpoint: str | None = None, **more: Any) -> Any:
        """Train from a checkpoint's folder, or from the start.

        Raises:
            StageError: the checkpoint is of another model; a checkpoint could not be written; workers see different disks.
        """
        folder = Path(self.args.output_dir)
        self._check_shared(folder.parent)
        if resume_from_checkpoint is not None:
            self._resumed = self._check(Path(resume_from_checkpoint))
        self._reporter, self._noted = Reporter(folder.parent), self.feed.step
        kept = (folder.parent / CONSUMED, folder.parent / "metrics.jsonl")
        self.writer = Writer(folder, self.args.process_index, self.args.world_size, kept)
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **more)  # type: ignore[misc]
        except BaseException as error:
            try:
                self.writer.wait(30)  # what is being written is still good; not longer: other workers may be gone
            except StageError as second:
                raise second from error
            raise
        self.writer.wait()
        if self.args.process_index == 0:
            sweep(folder)
        return result

    def _check_shared(self, folder: Path) -> None:
        """Threads that write a checkpoint agree through the folder, so all workers have to see the same one."""
        if self.args.world_size == 1 or mirrored(folder):
            return
        import torch
        from accelerate.utils import broadcast_object_list

        first, name = self.args.process_index == 0, [f".shared-{uuid.uuid4().hex}"]
        if first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name[0]).touch()
            except OSError as error:
                raise StageError(f"cannot write to {folder}: {error}") from error
        broadcast_object_list(name)  # the file is there before the others know its name
        missing = torch.tensor(0.0 if sees(folder / name[0]) else 1.0, device=self.args.device)
        missing = self.accelerator.reduce(missing, "sum")
        if first:
            (folder / name[0]).unlink()
        if missing.item():
            raise StageError(f"workers do not share {folder}: set `storage` to a path that every node mounts")

    def _check(self, path: Path) -> Saved:
        checkpoint = saved(path)
        if checkpoint is None:
            raise StageError(f"{path} is not a complete checkpoint")
        if checkpoint.record.identity != identity(self.model):
            raise StageError(
                f"{path} is of another model than {self.model.config.name_or_path or type(self.model).__name__} (other "
                f"architecture, parameters or tuning); to train from the start, remove {path.parent}"
            )
        return checkpoint

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        values = list(super().set_initial_training_values(args, dataloader))  # type: ignore[misc]
        values[0], values[6] = self.feed.epochs, self.feed.steps  # epochs and steps in all
        return tuple(values)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)  # type: ignore[misc]
        # How often to log and save may have changed since the checkpoint.
        self.state.compute_steps(self.args, max_steps)
        finished = self.feed.step >= self.feed.steps
        if resume_from_checkpoint is not None:
            find_best(Path(self.args.output_dir), self.state, self.args.load_best_model_at_end)
            finished |= stopped_early(self.callback_handler.callbacks, self.state.stateful_callbacks)
        return self.feed.epochs if finished else self.feed.start.epoch, 0

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.writer.wait()  # it looks at the checkpoints
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, **values: Any) -> None:
        steps = self.feed.steps_in(values["epoch"])
        values |= {"num_update_steps_per_epoch": steps, "steps_in_epoch": steps * self.feed.shares.accumulation}
        super()._run_epoch(**values)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After each step, and again at the end of an epoch."""
        step, feed = self.state.global_step, self.feed
        if step != feed.step:
            raise StageError(f"the trainer has made {step} steps of {feed.step} it was fed")
        done = feed.position(step)
        self.state.epoch = done.epoch + done.row / feed.rows
        if step > self._noted:
            self._noted = step
            if self.args.process_index == 0 and feed.ends(step):
                self._reporter.consumed(step, *feed.span(step - 1), feed.shares.workers)
        self.writer.check()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        if self._stop_asked and self._saved_step == step < feed.steps:
            self.paused = self.control.should_training_stop = True

    def stop_at_checkpoint(self) -> None:
        """Make a checkpoint as soon as one can be made, and stop there. To be called on all workers in the same step."""
        self._stop_asked = self.control.should_save = True

    # -- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        self.store_flos()  # type: ignore[attr-defined]
        self.writer.wait()
        step, rank = self.state.global_step, self.args.process_index
        best = best_of(Path(self.args.output_dir), self.state, step)
        states: dict[str, Any] = {f"rank-{rank}.pt": snapshot({"random": random_state(), "sums": self._sums()})}
        if rank == 0:
            states["trainer_state.json"] = self._state_json()
            states["state.pt"] = snapshot(self._optimizer_state())
            if not self.is_deepspeed_enabled:
                states["weights.pt"] = snapshot(trained_weights(self.model))
        if self.is_deepspeed_enabled:
            self.writer.guarded(step, lambda: states.update(self._deepspeed_states(step)))
        done = self.feed.position(step)
        record = {
            "step": step,
            "epoch": done.epoch,
            "row": done.row,
            "workers": self.args.world_size,
            "zero": self.model_wrapped.zero_optimization_stage() if self.is_deepspeed_enabled else None,
            "identity": identity(self.model),
        }
        self.writer.begin(step, states, record, self.args.save_total_limit, best)
        self._saved_step = step
        self.writer.blocked += time.perf_counter() - began

    def _state_json(self) -> str:
        from transformers.trainer_callback import ExportableState

        states: dict[str, list[Any]] = {}
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                states.setdefault(type(each).__name__, []).append(each.state())
        self.state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in states.items()}
        return json.dumps(vars(self.state), indent=1, sort_keys=True)

    def _optimizer_state(self) -> dict[str, Any]:
        """What is the same on every worker. With DeepSpeed the optimizer, and a scheduler of its own, are its matter."""
        from accelerate.utils import DeepSpeedSchedulerWrapper

        out: dict[str, Any] = {}
        if not self.is_deepspeed_enabled:
            out["optimizer"] = self.optimizer.state_dict()
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            out["scheduler"] = self.lr_scheduler.state_dict()
        if getattr(self.accelerator, "scaler", None) is not None:
            out["scaler"] = self.accelerator.scaler.state_dict()
        return out

    def _deepspeed_states(self, step: int) -> dict[str, Any]:
        """What DeepSpeed would write now on this worker, as copies: path in the checkpoint's folder -> state."""
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        making, states = self.writer.making(step), {}

        class Collect(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                states[str(Path(path).relative_to(making))] = snapshot(state_dict)

        engine = self.model_wrapped
        original, engine.checkpoint_engine = engine.checkpoint_engine, Collect()
        try:
            engine.save_checkpoint(
                str(making), tag=f"global_step{step}", exclude_frozen_parameters=hasattr(self.model, "peft_config")
            )
        finally:
            engine.checkpoint_engine = original
        return states

    def _sums(self) -> dict[str, Any]:
        sums = {name: getattr(self, name) for name in SUMS if hasattr(self, name)}
        metrics = sums.get("_metrics", {})  # TRL's: mode -> name -> values
        return sums | {"_metrics": {mode: dict(values) for mode, values in metrics.items()}}

    # -- restoring

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        """The model, optimizer and schedule in their places, restored here rather than there: of what runs in between, only
        DeepSpeed's reading is held to tensors. A user's own optimizer, reward or callback may load what it likes."""
        made = super()._prepare_for_training(max_steps, loader, None)  # type: ignore[misc]
        if checkpoint is not None and self.is_deepspeed_enabled:
            self._load_deepspeed(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        return made

    def _load_deepspeed(self, checkpoint: str, **what: bool) -> None:
        with tensors_only(Path(checkpoint), deepspeed=True):
            loaded, _ = self.model_wrapped.load_checkpoint(
                checkpoint, load_module_strict=not hasattr(self.model, "peft_config"), **what
            )
        if loaded is None:
            raise StageError(f"DeepSpeed finds nothing of its own in {checkpoint}; remove it")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load(Path(resume_from_checkpoint) / "weights.pt")
        unknown = (model or self.model).load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise StageError(f"{resume_from_checkpoint} holds {unknown[0]!r}, which the model does not have")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled and self.model_wrapped.load_universal_checkpoint():
            finish_loading(self.model_wrapped, Path(checkpoint))
        state = load(Path(checkpoint) / "state.pt")
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if "scheduler" in state:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called when the loop is about to take its first batch; also where the loop's sums can be put back."""
        if checkpoint is None:
            return
        before, rank = self._resumed.record.workers, self.args.process_index
        ranks = [load(Path(checkpoint) / f"rank-{r}.pt") for r in range(before)]
        if rank < before:
            set_random_state(ranks[rank]["random"])
        else:
            import numpy as np
            from transformers import set_seed

            own = np.random.SeedSequence([self.args.seed, self.state.global_step, rank]).generate_state(1)
            set_seed(int(own[0]))
        self._set_sums(ranks[rank if before == self.args.world_size else 0]["sums"])
        if before != self.args.world_size:
            # Each held the loss of its own rows; the logged one is the mean over workers.
            self._tr_loss = sum(r["sums"]["_tr_loss"] for r in ranks).to(self.args.device) / before

    def _set_sums(self, sums: dict[str, Any]) -> None:
        for name, value in sums.items():
            if name == "_metrics":
                for mode, metrics in value.items():
                    self._metrics[mode].update(metrics)  # type: ignore[attr-defined]
            elif name == "_tr_loss":
                self._tr_loss = value.to(self.args.device)
            else:
                setattr(self, name, value)

    def _load_best_model(self) -> None:
        """Weights alone, once the checkpoint is there for every worker."""
        if self.paused:
            return
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        best = str(pull(Path(self.state.best_model_checkpoint)))
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(best)
            return
        self._load_deepspeed(best, load_optimizer_states=False, load_lr_scheduler_states=False, load_module_only=True)


def identity(model: Any) -> str:
    """A hash of a model's architecture, and of names, shapes and tuning of its parameters; not of their values."""
    shapes = [
        (name, list(getattr(p, "ds_shape", p.shape)), p.requires_grad) for name, p in sorted(model.named_parameters())
    ]
    return hashlib.sha256(json.dumps([type(model).__name__, shapes]).encode()).hexdigest()[:32]


def trained_weights(model: Any) -> dict[str, Any]:
    """The parameters that train, once each, and buffers that are part of the model.

    A model's state has more: how bitsandbytes has quantised a weight, which it does the same way when the base is loaded again.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: value for name, value in model.state_dict().items() if name in buffers}


def stopped_early(callbacks: list[Any], states: dict[str, Any]) -> bool:
    """Give EarlyStoppingCallback its counter back; whether training had been stopped by it.

    transformers does that with `restore_callback_states_from_checkpoint`, which also restores the flags of TrainerControl as
    they were while the checkpoint was made: it would be made again after the next step.
    """
    from transformers import EarlyStoppingCallback

    state = states.get(EarlyStoppingCallback.__name__)
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback) and isinstance(state, dict):
            callback.early_stopping_patience_counter = state["attributes"]["early_stopping_patience_counter"]
            if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
                return True
    return False


def random_state() -> dict[str, Any]:
    """Of every generator a model's forward pass may draw from."""
    import numpy as np
    import torch

    numpy = [v.tolist() if isinstance(v, np.ndarray) else v for v in np.random.get_state()]
    out = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_random_state(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
