"""The Ray that a run's stages use: the cluster that `RAY_ADDRESS` names, else a small one of this machine."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.capacity import machine
from stages.base import Resources
from stages.capacity import Capacity, Growth
from stages.cluster import GROWTH, WAIT, answers, check_shared, nodes, read_growth, why_not
from stages.errors import StageError
from stages.training.launch import ENVIRONMENT, per_worker

LOOK_AGAIN_SECONDS = 1.0
# Ray ends every process that has not heard from the head (its GCS) for so long, without a word: we say it before.
LOST_SECONDS = 0.75 * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))  # noqa: SIM112 - Ray's name

# Servers of a Ray of this machine listen on loopback only, as they do on a Mac. By default they are on every network of the
# machine, and let whoever reaches them run code. All processes that join inherit this; Ray reads it when it is imported.
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM looks for Ray's node by its own idea of the address
}
# A stage's processes are forked (stages/forkserver.py), so those that Ray would start beforehand are of no use, and a few idle
# ones cost little; the next actor is then there at once, as after the death of a worker.
WORKER_PROCESSES = {"RAY_prestart_worker_first_driver": "0", "RAY_num_workers_soft_limit": "8"}


class RayCluster:
    """The cluster the stages use; one of this machine is started when it is needed."""

    def __init__(self) -> None:
        self.given = os.environ.get("RAY_ADDRESS") or None
        self._address: str | None = self.given
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.ours = True
        self._ready, self._over = threading.Event(), threading.Event()
        self._connected = False
        self._growth: Growth | None = None
        self._seen: tuple[float, Capacity] | None = None
        self._head: str | None = None  # host:port of its GCS
        self._looked = self._heard = 0.0
        self._lost = False
        self._asked: list[dict[str, float]] = []  # of the autoscaler

    @property
    def local(self) -> bool:
        return self.given is None

    def start(self) -> None:
        """Begin to start it; takes seconds, in which other things can be done."""
        if self.local and self._thread is None:
            os.environ.update({k: os.environ.get(k, v) for k, v in (ENVIRONMENT | LOOPBACK | WORKER_PROCESSES).items()})
            # Nobody listens there: what asks the dashboard for its State API is told so at once (see ENVIRONMENT).
            os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
            self._thread = threading.Thread(target=self._start, daemon=True)
            self._thread.start()

    def _start(self) -> None:
        """Runs until the end: Ray's processes die with the thread that started them (they ask for PR_SET_PDEATHSIG)."""
        import ray

        try:
            if ray.is_initialized():  # the caller's own: used, and left running
                self._address = self._head = ray.get_runtime_context().gcs_address
                self.ours = False
                self._ready.set()
                return
            _quiet()
            context = ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=int(os.environ.get("RAYLIGN_OBJECT_STORE_BYTES", 512 << 20)),
            )  # fmt: skip
            self._address = self._head = context.address_info["gcs_address"]
        except Exception as error:
            self._error = error
        self._ready.set()
        self._over.wait()

    def address(self) -> str:
        if self.local:
            self.start()
            self._ready.wait()
        if self._error is not None:
            raise StageError(f"Ray could not be started on this machine: {self._error}") from self._error
        assert self._address is not None
        return self._address

    def connect(self) -> None:
        """Join a cluster that is given, and learn how far it can grow.

        Raises:
            StageError: no Ray answers there.
        """
        if self._connected or self.local:
            return
        assert self.given is not None
        import ray

        where = f"RAY_ADDRESS={self.given}"
        if why := answers(self.given):
            raise StageError(f"{where}: {why}\n  or unset it, to run on this machine alone")
        if ray.is_initialized():
            self.ours = False
        else:
            _quiet()
            try:
                ray.init(address=self.given, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError) as error:
                raise StageError(f"{where}: {why_not(self.given, str(error))}") from error
        self._growth, self._connected = read_growth(), True
        self._head = ray.get_runtime_context().gcs_address

    def check(self) -> None:
        """Whether the head is there.

        Raises:
            StageError: it has not answered for LOST_SECONDS.
        """
        now = time.monotonic()
        if self._head is None or now - self._looked < LOOK_AGAIN_SECONDS:
            return
        self._looked = now
        if _listens(self._head):
            self._heard = now
        elif now - (self._heard or now) > LOST_SECONDS:
            self._lost = True
            raise StageError(
                f"the head of the Ray cluster at {self._head} has not answered for {LOST_SECONDS:.0f} s; what was done stays, "
                "run the same command again to go on"
            )

    def capacity(self) -> Capacity:
        """What there is, free and not, and what it can grow to; of a cluster not older than a second."""
        if self.local:
            return machine()
        self.connect()
        if self._seen is None or (time.monotonic() - self._seen[0] > LOOK_AGAIN_SECONDS and _listens(str(self._head))):
            self._seen = (time.monotonic(), Capacity(nodes(), self._growth))
        return self._seen[1]

    def environment(self, wait_minutes: float) -> dict[str, str]:
        """What tells the processes of a stage that they are on a cluster, how far it can grow and how long to wait for it."""
        if self.local:
            return {}
        self.connect()
        seconds = 60 * wait_minutes
        return {
            GROWTH: "null" if self._growth is None else self._growth.as_json(),
            WAIT: str(seconds),
            # Ray Train's own waiting, where what was free is taken between ours and its.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(seconds),
        }

    def check_shared(self, folder: Path) -> None:
        """Whether the nodes there are now see the folder as this machine does.

        Raises:
            StageError: one does not.
        """
        if not self.local:
            self.connect()
            import ray

            check_shared(folder, [node["NodeID"] for node in ray.nodes() if node["Alive"]])

    def grow_for(self, stages: Sequence[Resources]) -> None:
        """Have a cluster grow to the most workers of stages that train with a range of them (`workers: 2..8`). Ray keeps one
        such request for all of a cluster, until the next one; nobody takes back that of a run that was killed."""
        if self.local or not self._connected:
            return
        bundles = [per_worker(each) for each in stages if each.at_least is not None for _ in range(each.workers)]
        if bundles != self._asked:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=bundles)
            self._asked = bundles

    def stop(self) -> None:
        if self._thread is not None:
            self._ready.wait()
        if self._asked and not self._lost:
            self.grow_for([])
        if self.ours and "ray" in sys.modules and not self._lost:  # it would wait for the head's answer
            sys.modules["ray"].shutdown()
        self._over.set()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False


def _quiet() -> None:
    """What raylets say of themselves goes to the stages' logs (stages/training/launch.py, `connect`), and not among the
    progress as well. Ray 2.60 prints it to every driver, whatever `log_to_driver` is (worker.py, `listen_error_messages`)."""
    from ray._private import worker

    printed = worker.print_to_stdstream
    if printed.__module__ != __name__:  # once in a process

        def without_raylets(data: dict[str, Any], ignore_prefix: bool) -> None:
            if data.get("pid") != "raylet":
                printed(data, ignore_prefix)

        worker.print_to_stdstream = without_raylets
