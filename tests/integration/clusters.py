"""Clusters for tests, on one machine: several real raylets, and a head whose real autoscaler starts and ends raylets.

Ray counts the CPUs that a node is said to have, not those of the machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from stages import forkserver
from stages.cluster import HEAD

STORE = 80 << 20  # bytes of each node's object store
# A token that lies in the home folder would switch authentication on for whatever calls ray.init, and off for what does not.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def plain_environment() -> dict[str, str]:
    """This process's, without what a Ray of one machine may have set in it, and what its own runs are forked from."""
    gone = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", forkserver.WANTED)
    return {k: v for k, v in os.environ.items() if k not in gone}


@contextmanager
def several_nodes(*nodes: dict[str, Any], head: dict[str, Any] | None = None) -> Iterator[str]:
    """The address of a cluster with a head and these nodes (`num_cpus`, `num_gpus`, `resources`)."""
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": STORE}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **common, **(head or {})},
        shutdown_at_exit=False,
    )
    try:
        for node in nodes:
            cluster.add_node(**common | node)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@dataclass
class Seen:
    """How many nodes of each type there were, and when: a line for each change."""

    began: float = field(default_factory=time.time)
    changes: list[tuple[float, Counter[str]]] = field(default_factory=list)

    def first(self, kind: str, count: int = 1, after: float = 0.0) -> float:
        """When there were so many for the first time, in seconds since the start."""
        return next(when for when, there in self.changes if when >= after and there[kind] >= count)

    def gone(self, kind: str) -> float:
        """When the last one of a type was gone for good."""
        last = max(i for i, (_, there) in enumerate(self.changes) if there[kind])
        return self.changes[last + 1][0]

    def __str__(self) -> str:
        return "\n".join(f"{when:6.1f} s  {dict(there)}" for when, there in self.changes)


@dataclass
class Autoscaled:
    address: str
    seen: Seen

    def nodes(self) -> Counter[str]:
        """How many nodes there are of each type, the head left out."""
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(self.address)
        alive = [*status.active_nodes, *status.idle_nodes]
        return Counter(n.ray_node_type_name for n in alive if HEAD not in n.total_resources())

    def wait(self, wanted: Counter[str] | dict[str, int], seconds: float) -> None:
        """Until there are just these nodes."""
        end = time.time() + seconds
        while (there := self.seen.changes[-1][1] if self.seen.changes else None) != Counter(wanted):
            assert time.time() < end, f"wanted {dict(wanted)}, there are {there}\n{self.seen}"
            time.sleep(0.2)


@contextmanager
def autoscaled(
    types: dict[str, tuple[dict[str, float], int]], *, most: int = 8, idle_seconds: float = 6, head_cpus: int = 0
) -> Iterator[Autoscaled]:
    """A head with Ray's own autoscaler, which starts raylets on this machine.

    Args:
        types: of nodes: name -> (resources, how many there may be). There are none at the start.
        most: nodes of all types together.
        idle_seconds: after which a node goes.
    """
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))  # short: sockets are made in it
    address = f"127.0.0.1:{port}"
    file = folder / "autoscaler.yaml"
    kinds = {name: {"resources": has, "node_config": {}, "max_workers": count} for name, (has, count) in types.items()}
    kinds["ray.head.default"] = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    nothing: dict[str, Any] = {key: {} for key in ("docker", "auth", "file_mounts")}
    nothing |= {
        key: []
        for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
                    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    }  # fmt: skip
    provider = {
        "type": "fake_multinode", "gcs_address": address, "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True, "launch_multiple": True,
    }  # fmt: skip
    config = {
        "cluster_name": "test", "max_workers": most, "provider": provider, "available_node_types": kinds,
        "head_node_type": "ray.head.default", "idle_timeout_minutes": idle_seconds / 60, "upscaling_speed": 100,
        "file_mounts_sync_continuously": False, **nothing,
    }  # fmt: skip
    YAML().dump(config, file)
    environment = plain_environment() | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    options = [
        f"--port={port}", f"--autoscaling-config={file}", f"--num-cpus={head_cpus}", f"--temp-dir={folder}",
        "--include-dashboard=false", f"--object-store-memory={STORE}", "--disable-usage-stats",
    ]  # fmt: skip
    over = threading.Event()
    watcher: threading.Thread | None = None
    try:
        subprocess.run([*ray, *options], env=environment, check=True, capture_output=True, text=True, timeout=240)
        cluster = Autoscaled(address, Seen())
        watcher = threading.Thread(target=_watch, args=(cluster, over), daemon=True)
        watcher.start()
        yield cluster
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"ray start: {error.stdout}{error.stderr}") from error
    finally:
        over.set()
        if watcher is not None:
            watcher.join()
        end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _watch(cluster: Autoscaled, over: threading.Event) -> None:
    seen = cluster.seen
    while not over.wait(0.25):
        there = cluster.nodes()
        if not seen.changes or seen.changes[-1][1] != there:
            seen.changes.append((time.time() - seen.began, there))


def end_processes_of(folder: Path) -> None:
    """End what a head in this folder has started: raylets of the fake provider outlive the head, and ignore SIGTERM for a
    while. The monitor first, which would start others."""
    for wanted in ("monitor.py", ""):
        for process in psutil.process_iter(["cmdline"]):
            arguments = " ".join(process.info["cmdline"] or [])
            if str(folder) in arguments and wanted in arguments and process.pid != os.getpid():
                process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Hosts:
    """Two hosts: network namespaces with an address each, joined by a cable. The second has a folder of its own where the first
    has `private`."""

    address: str
    interfaces: tuple[str, str]
    inside: list[str]  # what goes before a command to run it on the first host


@contextmanager
def two_hosts(private: Path, cpus: tuple[int, int] = (1, 1)) -> Iterator[Hosts]:
    """A cluster of two hosts. Skips the test where this machine allows no namespaces."""
    tag = f"{os.getpid() % 10_000}"
    names, ends, ips = (f"ra{tag}", f"rb{tag}"), (f"va{tag}", f"vb{tag}"), ("10.77.0.1", "10.77.0.2")
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    address, environment = f"{ips[0]}:6379", plain_environment()
    options = [f"--object-store-memory={STORE}", "--disable-usage-stats"]
    head = ["--head", "--port=6379", f"--temp-dir={folder}", "--include-dashboard=false", *options]
    # Ray's own folder too: in a shared one it would take the address of the node that came last for its own.
    mounts = " && ".join(f"mount -t tmpfs none {path}" for path in (private, folder))
    own = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    try:
        allowed = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0 for name in names]
        if not all(allowed) or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("hosts need network and mount namespaces, which this machine does not allow")
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, ip in zip(names, ends, ips, strict=True):
            _ip("-n", name, "addr", "add", f"{ip}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        on = [["ip", "netns", "exec", name] for name in names]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        for before, ip, count, more in zip(
            (on[0], on[1] + own), ips, cpus, (head, [f"--address={address}", *options]), strict=True
        ):
            command = [*before, *ray, f"--node-ip-address={ip}", f"--num-cpus={count}", *more]
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=240)
        yield Hosts(address, ends, on[0])
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{error.cmd}: {error.stdout}{error.stderr}") from error
    finally:
        end_processes_of(folder)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
