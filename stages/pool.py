"""A model's work over many rows (reference log-probabilities, samples, rewards), by Ray Data actors: each loads the model once.

Where there is little to do, or one core, on this machine, the work is done in the present process: an actor's start and its
imports take seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stages.base import StageContext
from stages.errors import RaylignError, StageError


class Worker(Protocol):
    """Made once in each process, with the options it was sent. Of a task it gives something small that can be pickled."""

    def __call__(self, task: Any) -> Any: ...


Progress = Callable[[int, int], None]


def run_pool(
    make: Callable[..., Worker],
    options: dict[str, Any],
    tasks: Sequence[Any],
    *,
    ctx: StageContext,
    little: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Any]:
    """`make(**options)(task)` of every task, in order.

    A task that is done twice (Ray retries those of lost actors) must do no harm.

    Args:
        make: a class, or a function, at the top level of a module.
        little: so little that it is not worth starting processes for.
        progress: called with (tasks done, tasks in all).

    Raises:
        StageError: what a worker said; other exceptions as Ray wraps them.
    """
    count = min(len(tasks), processes(ctx))
    if count == 0:
        return []
    if ctx.local and not ctx.resources.gpus_per_worker and (little or count == 1):
        worker = make(**options)
        results = []
        for done, task in enumerate(tasks, 1):
            results.append(worker(task))
            progress(done, len(tasks))
        return results
    return _by_actors(make, options, tasks, count, ctx, progress)


def processes(ctx: StageContext) -> int:
    """As many as the stage will have workers; on this machine's CPU, one for each core the stage was given."""
    if ctx.local and not ctx.resources.gpus_per_worker:
        return max(ctx.resources.workers, int(os.environ.get("OMP_NUM_THREADS") or 1))
    return ctx.resources.workers


class _Actor:
    """A worker in an actor of Ray Data. Errors for the user come back as data: Ray would wrap them in a trace."""

    def __init__(self, job: Any) -> None:
        import ray

        from stages.training.launch import quiet_ray

        quiet_ray()
        make, options, self.tasks = ray.get(job)
        if not options.get("gpu"):
            import torch

            torch.set_num_threads(1)
        self.worker, self.failed = None, ""
        try:
            self.worker = make(**options)
        except RaylignError as error:
            self.failed = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = int(batch["index"][0])
        if self.worker is None:
            return _row(index, None, self.failed)
        try:
            return _row(index, self.worker(self.tasks[index]), "")
        except RaylignError as error:
            return _row(index, None, str(error))


def _row(index: int, result: Any, error: str) -> dict[str, Any]:
    import pickle

    return {"index": [index], "result": [pickle.dumps(result)], "error": [error]}


def _by_actors(
    make: Callable[..., Worker],
    options: dict[str, Any],
    tasks: Sequence[Any],
    count: int,
    ctx: StageContext,
    progress: Progress,
) -> list[Any]:
    import pickle

    import ray
    import ray.data

    job = ray.put((make, options, list(tasks)))
    rows = ray.data.from_items([{"index": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
    done = rows.map_batches(
        _Actor,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=1 if ctx.local else ctx.resources.cpus_per_worker,
        num_gpus=ctx.resources.gpus_per_worker or None,
    )
    results: dict[int, Any] = {}
    for row in done.iter_rows():
        if row["error"]:
            raise StageError(row["error"])
        results[row["index"]] = pickle.loads(row["result"])
        progress(len(results), len(tasks))
    return [results[i] for i in range(len(tasks))]
