"""The feed of prompts as transformers' trainer and our checkpoints count it: in optimiser steps.

An iteration takes the prompts of one step of the feed (stages/training/feed.py), has them answered, and trains on the answers
for `updates` optimiser steps. Between iterations nothing but the weights, the optimizer and a position in the prompts has to be
kept, so checkpoints are made there.
"""

from __future__ import annotations

from dataclasses import replace

from stages.training.feed import Feed, Position, Shares


class Iterations:
    """What `Feed` is to other stages.

    Args:
        feed: of prompts; its steps are iterations, its start that of an iteration.
        updates: optimiser steps of an iteration.
        accumulation: micro-batches of an optimiser step, on each worker.
        workers: that share an optimiser step; those of the feed, unless that gives every one of them all prompts.
    """

    def __init__(self, feed: Feed, updates: int, accumulation: int, workers: int | None = None) -> None:
        self.feed, self.updates = feed, updates
        self.workers = workers or feed.shares.workers
        self.shares = Shares(self.workers, 1, accumulation)
        self.rows, self.seed = feed.rows, feed.seed
        self.start = replace(feed.start, step=feed.start.step * updates)
        self.steps, self.epochs = feed.steps * updates, feed.epochs
        self.step = self.start.step

    @property
    def micro_batches(self) -> int:
        """Of a whole epoch of prompts, the same on every worker."""
        return self.feed.steps_per_epoch * self.updates * self.shares.accumulation

    def iteration(self, step: int) -> int:
        """The iteration, counted from 0, that optimiser step `step` (counted from 0) belongs to."""
        return step // self.updates

    def ends(self, step: int) -> bool:
        """Whether an iteration is over when `step` optimiser steps are done."""
        return step % self.updates == 0

    def steps_in(self, epoch: int) -> int:
        return self.feed.steps_in(epoch) * self.updates

    def span(self, step: int) -> tuple[int, int, int]:
        """(epoch, from, to): the prompts that optimiser step `step` is made of, over all workers."""
        return self.feed.span(self.iteration(step))

    def position(self, step: int) -> Position:
        """Where training stands when `step` optimiser steps are done; within an iteration as at its end."""
        done = self.feed.position(-(-step // self.updates))
        return replace(done, step=step)
