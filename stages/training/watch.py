"""What a training says of itself while it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stages.base import Reporter


def report_callback(work: Path) -> Any:
    """Progress and metrics to the stage's folder. (Ray Train is told of no checkpoints: `report` is a barrier of 0.1 s.)"""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def __init__(self) -> None:
            self.reporter, self.told = Reporter(work), 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.reporter.phase("train", steps=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero and (time.time() - self.told > 0.5 or state.global_step == state.max_steps):
                self.told = time.time()
                last: dict[str, Any] = next((e for e in reversed(state.log_history) if "loss" in e), {})
                told = ("reward", "kl") if "reward" in last else ("loss",)
                values = {name: last[name] for name in told if name in last}
                self.reporter.progress(state.global_step, state.max_steps, "step", **values)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if state.is_world_process_zero and ("loss" in logs or "eval_rows" in logs):
                self.reporter.metrics(state.global_step, {k: v for k, v in logs.items() if k != "step"})

    return Report()


def begin_callback(trainer: Any) -> Any:
    """`trainer.begin()` once the model is where it will be trained."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trainer.begin()

    return Begin()
