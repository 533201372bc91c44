"""A model's work over many rows (reference log-probabilities, samples, rewards), by Ray Data actors: each loads the model once.

Where there is little to do, or one core, on this machine, the work is done in the present process: an actor's start and its
imports take seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stages.base import StageContext
from stages.capacity import Need
from stages.cluster import wait_for_room
from stages.errors import RaylignError, StageError


class Worker(Protocol):
    """Made once in each process, with the options it was sent. Of a task it gives something small that can be pickled."""

    def __call__(self, task: Any, /) -> Any: ...


Progress = Callable[[int, int], None]
RESTARTS = 2  # of a process that is lost


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
        StageError: what a worker said. In the present process other exceptions as they are, from actors in one line: the
            stage's log has the trace.
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
    """A worker in an actor of Ray Data. Errors come back as data: Ray would wrap them in traces of its own."""

    def __init__(self, job: Any) -> None:
        import ray

        from stages.training.launch import quiet_ray

        quiet_ray()
        make, options, self.tasks, threads = ray.get(job)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.worker: Worker | None = None
        self.failed = ""
        try:
            self.worker = make(**options)
        except Exception as error:
            self.failed = told_of(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = int(batch["index"][0])
        if self.worker is None:
            return _row(index, None, self.failed)
        try:
            return _row(index, self.worker(self.tasks[index]), "")
        except Exception as error:
            return _row(index, None, told_of(error))


def told_of(error: Exception) -> str:
    """What the user is told of an error in an actor; the trace of one that is not meant for the user goes to the log."""
    if isinstance(error, RaylignError):
        return str(error)
    import traceback

    traceback.print_exc()
    return f"{type(error).__name__}: {error}"


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

    gpus = ctx.resources.gpus_per_worker
    wait_for_room([Need(count, {"CPU": ctx.resources.cpus_per_worker, "GPU": gpus})], ctx.report)
    job = ray.put((make, options, list(tasks), None if gpus else ctx.resources.cpus_per_worker))
    rows = ray.data.from_items([{"index": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
    done = rows.map_batches(
        _Actor,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        # On this machine the runner shares out the cores; actors that held them would keep the tasks of others waiting.
        num_cpus=0 if ctx.local else ctx.resources.cpus_per_worker,
        num_gpus=gpus or None,
        max_restarts=RESTARTS,  # for ever by default: a model that does not fit would never be told of
        max_task_retries=RESTARTS,
    )
    results: dict[int, Any] = {}
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise StageError(row["error"])
            results[row["index"]] = pickle.loads(row["result"])
            progress(len(results), len(tasks))
    except ray.exceptions.RayError as error:
        raise StageError(
            f"a process that runs the model was lost {RESTARTS + 1} times: out of memory? Try fewer rows at a time "
            f"(per_device_train_batch_size, or batch_size), or more memory\n  Ray says: {str(error).splitlines()[0]}"
        ) from error
    return [results[i] for i in range(len(tasks))]
