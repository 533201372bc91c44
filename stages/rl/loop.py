"""Training in iterations: the policy answers prompts, is trained on its answers for some optimiser steps, and answers again."""

from __future__ import annotations

from typing import Any

from stages.errors import StageError
from stages.rl.watching import LimitGuard
from stages.training.feed import Shares

FLAGS = ("should_log", "should_save", "should_evaluate")


class Iterating:
    """Mixin before `Fed`. Logs, checkpoints and evaluations that fall into an iteration wait for its end: `save_steps: 100`
    saves at the end of the iteration that the 100th optimiser step belongs to."""

    args: Any
    control: Any
    feed: Any
    state: Any
    limit_guard: LimitGuard
    _enough: str  # why training ends early

    _waiting: dict[str, bool]

    @property
    def prompts_per_iteration(self) -> int:
        """Over all workers."""
        raise NotImplementedError

    def shares(self) -> Shares:
        """Every worker reads all prompts of an iteration, and takes its own of them."""
        return Shares(1, self.prompts_per_iteration)

    def hold_to_limits(self, told: dict[str, float]) -> None:
        """Compare an iteration's metrics with the limits: training ends with it where it has nothing more to learn.

        Raises:
            StageError: what it has made is of no use.
        """
        if (wrong := self.limit_guard.stop(told)) is not None:
            why, useful = wrong
            if not useful:
                raise StageError(f"stopped after {self.state.global_step} steps: {why}")
            self._enough = why

    def finish(self) -> tuple[dict[str, float], list[str]]:
        metrics, warnings = super().finish()  # type: ignore[misc]
        if self._enough:
            warnings = [*warnings, f"training ended after {self.state.global_step} steps: {self._enough}"]
        return metrics, warnings

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        waiting = getattr(self, "_waiting", dict.fromkeys(FLAGS, False))
        now = {name: waiting[name] or getattr(self.control, name) for name in FLAGS}
        done = self.feed.ends(self.state.global_step)
        for name in FLAGS:
            setattr(self.control, name, done and now[name])
        self._waiting = dict.fromkeys(FLAGS, False) if done else now
        if self._enough and done:
            self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
