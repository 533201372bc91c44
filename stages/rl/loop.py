"""Training in iterations: the policy answers prompts, is trained on its answers for some optimiser steps, and answers again."""

from __future__ import annotations

from typing import Any

from stages.errors import StageError
from stages.training.feed import Shares

FLAGS = ("should_log", "should_save", "should_evaluate")


class Iterating:
    """Mixin before `Fed`. Logs, checkpoints and evaluations that fall into an iteration wait for its end: `save_steps: 100`
    saves at the end of the iteration that the 100th optimiser step belongs to."""

    args: Any
    control: Any
    feed: Any

    _waiting: dict[str, bool]

    @property
    def prompts_per_iteration(self) -> int:
        """Over all workers."""
        raise NotImplementedError

    def shares(self) -> Shares:
        workers = self.args.world_size
        if self.prompts_per_iteration % workers:
            raise StageError(f"{self.prompts_per_iteration} prompts of an iteration do not divide by {workers} workers")
        return Shares(workers, self.prompts_per_iteration // workers)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        waiting = getattr(self, "_waiting", dict.fromkeys(FLAGS, False))
        now = {name: waiting[name] or getattr(self.control, name) for name in FLAGS}
        done = self.feed.ends(self.state.global_step)  # type: ignore[attr-defined]
        for name in FLAGS:
            setattr(self.control, name, done and now[name])
        self._waiting = dict.fromkeys(FLAGS, False) if done else now
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
