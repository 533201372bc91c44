"""Run a function on the workers of a stage: Ray Train's TorchTrainer, kept small where one worker is enough."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import forkserver, own, telemetry
from stages.base import Reporter, Resources
from stages.capacity import Need
from stages.cluster import wait_for_room
from stages.errors import RaylignError, StageError
from stages.storage import environment, mirrored, ray_storage

# The environment of stages and workers, set before Ray starts.
# - Ray's PlacementGroupCleaner asks a State API that a local cluster does not run, and waits 15 s for the answer; a dead
#   address (pipeline/runner.py) and a short health check leave 0.3 s. Seen with Ray 2.60; both settings are public.
# - Waiting OpenMP threads sleep rather than spin: where another process wants the same core, spinning made a small
#   model's forward pass 17 times slower (LOG.md, 2026-11-21).
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a cluster may have to grow first
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's own choice for its controller (see `connect`)
    **telemetry.OFF,
    "TOKENIZERS_PARALLELISM": "true",
}

# Of a job's runtime environment, what decides with which Python its processes are started.
OWN_PYTHON = {
    "_nsight",
    "_rocprof_sys",
    "conda",
    "container",
    "image_uri",
    "nsight",
    "pip",
    "py_executable",
    "rocprof_sys",
    "uv",
}

# What Ray says of a worker whose process is gone, and a worker's process group where another one is.
ECHOES = (
    "worker process has died",
    "node has died",
    "health check",  # Ray Train's: a worker that is gone does not answer
    "Connection reset by peer",
    "Connection closed by peer",
    "NCCL communicator was aborted",
    "Broken pipe",
)


class WorkersLost(StageError):
    """Processes or machines went away under a training: from its last checkpoint it can go on (recovery.py)."""


def quiet_ray() -> None:
    """Ray's own progress bars and execution logs off: the pipeline shows progress itself."""
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    for name in ("enable_progress_bars", "enable_operator_progress_bars", "print_on_execution_start"):
        setattr(context, name, False)
    context.enable_auto_log_stats = False
    for logger in ("ray", "ray.data", "ray.train"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def connect(address: str, local: bool) -> None:
    """Join the cluster, and have a worker process started while the stage does its own imports.

    All processes of the stage get what Ray Train would tell those it starts, so they have one runtime environment: one that is
    idle may become the next of any kind.
    """
    import ray

    env = environment() | ({} if local else own.environment())  # a Ray of this machine was started from our environment
    env |= {name: os.environ[name] for name in (*ENVIRONMENT, "TORCHDYNAMO_DISABLE") if name in os.environ}
    ray.init(address=address, log_to_driver=True, logging_level="ERROR", runtime_env=runtime_environment(env))

    @ray.remote(num_cpus=0)
    def warm_up() -> None:
        import stages.data.prepare
        from stages.data.chat import CHATML
        from stages.data.template import ChatTemplate

        assert stages.data.prepare and ChatTemplate(CHATML, {})

    warm_up.remote()


def runtime_environment(env: dict[str, str]) -> dict[str, Any]:
    """Of a stage's processes, for Ray. That of a submitted job is theirs too, and Ray refuses what says the same again."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    told: dict[str, Any] = {"env_vars": {k: v for k, v in env.items() if k not in job.get("env_vars", {})}}
    if job.keys() & OWN_PYTHON or os.environ.get(forkserver.WANTED) == "0":
        return told
    return told | {"py_executable": forkserver.py_executable()}


def use_given_threads() -> None:
    """As many as the process was given CPUs, which Ray says in OMP_NUM_THREADS after torch may have been loaded
    (stages/forkserver.py)."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit():
        torch.set_num_threads(max(1, int(threads)))


def worker_rank() -> tuple[int, int]:
    """(rank, workers) inside a function that `launch` runs."""
    import ray.train

    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def launch(
    function: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    resources: Resources,
    local: bool,
    folder: Path,
    workers: int | None = None,
) -> Any:
    """Run `function(config)` on every worker and return what rank 0 returned.

    One CPU worker on this machine runs in the present process (Ray Train's local mode): no actors to start, no placement
    group, seconds less. Anything else is a Ray Train worker group, whose run folder is `folder`. Ray is told of no checkpoints:
    what a stage goes on from is its own matter (stages/training/saving.py, recovery.py).

    Args:
        workers: how many, where not all that `resources` names.

    Raises:
        WorkersLost: some are gone.
        Exception: what a worker raised, or Ray Train's own where the workers could not be started in the time allowed.
    """
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    workers = workers or resources.workers
    torch_config = None
    if not local:
        from stages.training.network import OnNodeInterface

        torch_config = OnNodeInterface()
        wait_for_room(
            [Need(workers, per_worker(resources))], Reporter(folder), shared=None if mirrored(folder) else folder
        )
    in_process = runs_in_process(resources, local)
    trainer = TorchTrainer(
        function,
        train_loop_config=config,
        torch_config=torch_config,
        scaling_config=ScalingConfig(
            num_workers=0 if in_process else workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=None if in_process else per_worker(resources),
        ),
        # A worker group that cannot start is retried for ever by default; one that is lost, or on a node that goes, is our
        # matter.
        run_config=RunConfig(
            name=folder.name,
            **ray_storage(folder.parent),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3, max_preemption_failures=0),
        ),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        raise first_cause(list(error.worker_failures.values())) from error
    except PreemptionError as error:
        raise WorkersLost(f"a machine was taken away: {first_line(error)}") from error
    except ControllerError as error:
        raise WorkersLost(f"the workers could not be started: {first_line(error.controller_failure)}") from error
    except RayActorError as error:
        raise WorkersLost(f"the process that controls the workers was lost: {first_line(error)}") from error


def runs_in_process(resources: Resources, local: bool) -> bool:
    return local and resources.workers == 1 and resources.gpus_per_worker == 0


def per_worker(resources: Resources) -> dict[str, float]:
    """What Ray is asked for each worker."""
    gpus = {"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    return {"CPU": float(resources.cpus_per_worker)} | gpus


def first_cause(failures: list[Exception]) -> Exception:
    """Of what the workers of a group failed with: what one of ours says, else what is not the echo of another's end, or the end
    itself as Ray tells it."""
    from ray.exceptions import RayActorError

    ours = [f for f in failures if isinstance(f, RaylignError)]
    echoes = [f for f in failures if isinstance(f, RayActorError) or any(sign in str(f) for sign in ECHOES)]
    others = [f for f in failures if f not in echoes]
    if ours or others:
        return (ours or others)[0]
    lost = "a worker was lost: its process was ended, or its machine is gone (out of memory?)"
    lines = str(echoes[0]).splitlines()
    return WorkersLost(f"{lost}\n  seen: {next((n for n in lines if any(e in n for e in ECHOES)), lines[0])}")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def join_single_process_group() -> None:
    """A process group of one, for DeepSpeed in local mode: no port is opened, nothing is read from the environment."""
    import torch.distributed as dist

    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
