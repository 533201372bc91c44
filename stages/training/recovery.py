"""A training carried to its end, whatever becomes of its workers.

Where workers are lost (killed, out of memory, their machine gone or taken away, found to hang), others are started from the
newest sound checkpoint; a number of times without progress, and the stage fails. `workers: 2..8` trains with as many as there
is room for: fewer after a loss, more at a checkpoint when machines come. A step holds the same rows whatever the workers, so
the model is the same to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from stages.base import Resources, StageContext
from stages.errors import StageError
from stages.storage import pull, push
from stages.training.feed import Shares
from stages.training.job import Build, TrainJob
from stages.training.launch import WorkersLost, launch, per_worker, runs_in_process
from stages.training.trainer import OF_THE_DRIVER, train_on_worker
from stages.training.universal import for_universal, go_on_from
from stages.training.watchdog import draining_nodes, watching

RESTARTS = 3  # in a row, without a new checkpoint between them
SETTLE_SECONDS = 15.0  # for which there must be room for more workers before they are taken


def train_to_the_end(job: TrainJob, build: Build, ctx: StageContext, shares: Shares) -> dict[str, Any]:
    """What `train_on_worker` gave when all steps were done.

    Args:
        shares: how a step is cut for all workers the stage asks for.

    Raises:
        StageError: what a worker raised; workers were lost again and again.
    """
    with asking_for_more(ctx.resources, ctx.local):
        return _train_to_the_end(job, build, ctx, shares)


def _train_to_the_end(job: TrainJob, build: Build, ctx: StageContext, shares: Shares) -> dict[str, Any]:
    say = lambda line: print(line, flush=True)  # noqa: E731
    resources, folder = ctx.resources, ctx.work / "checkpoints"
    push(ctx.work / "base")  # the given model with rows for added tokens, where there is one
    lost: list[str] = []  # what became of workers since the checkpoint that was last gone on from
    reached, losses, resizes = -1, 0, 0
    while True:
        workers = workers_now(resources, ctx.local)
        resume = go_on_from(folder, workers, say)
        if resume is not None and resume.record.step > reached:
            lost, reached = [], resume.record.step
        config = {
            "job": for_workers(replace(job, resume=resume, deepspeed=for_universal(job.deepspeed, resume)), workers, shares),
            "build": build,
            "on_cpu": resources.gpus_per_worker == 0,
        }  # fmt: skip
        if runs_in_process(resources, ctx.local):
            return launch(train_on_worker, config, resources=resources, local=True, folder=ctx.work)
        try:
            outcome = _watched(config, ctx, workers)
        except WorkersLost as error:
            lost.append(str(error))
            losses += 1
            if len(lost) > RESTARTS:
                again = "" if len(set(lost)) == 1 else f"; before that: {lost[0].splitlines()[0]}"
                since = f"step {reached}" if reached > 0 else "the start"
                raise StageError(
                    f"{error}{again}\n  it was so {len(lost)} times without a checkpoint since {since}"
                ) from error
            say(f"workers lost ({len(lost)} of at most {RESTARTS} times without progress): {error}")
            ctx.report.phase("recover", lost=str(error).splitlines()[0])
            continue
        if "paused" not in outcome:
            pull(ctx.work, without=OF_THE_DRIVER)
            return outcome | {"lost": losses, "resizes": resizes, "workers": workers}
        resizes += 1


@contextmanager
def asking_for_more(resources: Resources, local: bool) -> Iterator[None]:
    """Have a cluster grow to the most workers of a range, as long as it lasts."""
    if local or resources.at_least is None:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[per_worker(resources)] * resources.workers)
    try:
        yield
    finally:
        request_resources(bundles=[])


def for_workers(job: TrainJob, workers: int, shares: Shares) -> TrainJob:
    """The job for a number of workers: a step has the rows it has with all."""
    if workers == shares.workers or shares.workers == 1:  # (an iteration's prompts are read by every worker)
        return job
    cut = shares.over(workers)
    arguments = job.arguments | {"gradient_accumulation_steps": cut.accumulation}
    return replace(job, arguments=arguments, rows_per_step=cut.rows)


def _watched(config: dict[str, Any], ctx: StageContext, workers: int) -> dict[str, Any]:
    """Launch the workers under watch."""
    resources = ctx.resources
    wanted, events = _asker(resources, ctx.local, workers), ctx.work / "events.jsonl"
    with watching(workers, 60 * resources.stall_minutes, wanted, events) as (watch, hung):
        try:
            return launch(
                train_on_worker, config | {"monitor": watch}, resources=resources, local=ctx.local, folder=ctx.work,
                workers=workers,
            )  # fmt: skip
        except WorkersLost as error:
            if hung:
                raise WorkersLost(hung[-1]) from error
            raise


def _asker(resources: Resources, local: bool, workers: int) -> Callable[[set[str]], str]:
    """What to ask of workers: to stop at a checkpoint where a node goes, or where more of them could train."""
    room_since: float | None = None

    def wanted(nodes: set[str]) -> str:
        nonlocal room_since
        if local:
            return ""
        if going := draining_nodes() & nodes:
            return f"node {', '.join(sorted(going))} will be taken away"
        if workers == resources.workers:
            return ""
        more = min(resources.workers, workers + room_for(resources)) - workers
        if more <= 0:
            room_since = None
            return ""
        room_since = room_since or time.monotonic()
        settled = time.monotonic() - room_since >= SETTLE_SECONDS
        return f"there is room for {more} more workers than {workers}" if settled else ""

    return wanted


def workers_now(resources: Resources, local: bool) -> int:
    """As many workers as there is room for, between the fewest and the most."""
    if resources.fewest == resources.workers:
        return resources.workers
    if local:
        import os

        return max(resources.fewest, min(resources.workers, (os.cpu_count() or 1) // resources.cpus_per_worker))
    before = -1
    while (room := room_for(resources)) != before:  # what a lost group held is given back one after the other
        before = room
        time.sleep(2)
    return max(resources.fewest, min(resources.workers, room))


def room_for(resources: Resources) -> int:
    """Workers that the nodes have free resources for. (The public `ray.available_resources` sums over nodes.)"""
    import ray

    need, gone = per_worker(resources), draining_nodes()
    free = ray._private.state.available_resources_per_node()
    return sum(
        int(min(has.get(kind, 0) // amount for kind, amount in need.items()))
        for node, has in free.items()
        if node not in gone
    )
