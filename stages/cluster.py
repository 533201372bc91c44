"""A cluster seen through Ray: its nodes, how far its autoscaler can make it grow, waiting for room, what its nodes share.

Ray's autoscalers (`ray up`, KubeRay) do not tell the cluster how many nodes they may start; their configuration does, and the
head node has it. The runner reads it once (`read_growth`) and hands it to the stages' processes in the environment. On a single
machine nothing of this is used.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stages.base import Reporter
from stages.capacity import Capacity, Growth, Need, Node, NodeType
from stages.errors import StageError

GROWTH = "RAYLIGN_GROWTH"  # a Growth as JSON, or `null`: set in the stages' environment where there is a cluster
WAIT = "RAYLIGN_WAIT_SECONDS"
WAIT_SECONDS = 1800.0
POLL_SECONDS, SAY_SECONDS = 1.0, 10.0
DATA = "data"  # a node's own resource: where any node has it, only those prepare data
SHARED_SECONDS = 5.0  # a network's delay until a file is seen
HEAD = "node:__internal_head__"


def on_cluster() -> bool:
    return GROWTH in os.environ


def capacity() -> Capacity:
    """What the cluster this process is connected to has now, and what it can grow to, as far as the environment says."""
    given = os.environ.get(GROWTH, "null")
    return Capacity(nodes(), None if given == "null" else Growth.from_json(given))


def nodes() -> tuple[Node, ...]:
    """The live nodes. The head is no node of the autoscaler's, whatever type it has."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    alive = [(n.total_resources(), n.available_resources(), n) for n in [*status.active_nodes, *status.idle_nodes]]
    return tuple(Node(total, free, "" if HEAD in total else n.ray_node_type_name) for total, free, n in alive)


def answers(address: str, seconds: float = 5.0) -> str:
    """Why nothing answers at `host:port`, or nothing. Towards an address where no Ray runs ray.init would hang for minutes.

    Other forms (`auto`, `local`, `ray://`) are Ray's own matter.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "//" in host:
        return ""
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError as error:
        return f"no Ray answers there: {error.strerror or error}"
    return ""


def why_not(address: str, said: str) -> str:
    """Why ray.init failed towards an address, where it said something; of a token that the cluster wants it says nothing."""
    import ray
    from ray.exceptions import AuthenticationError, RpcError

    try:
        ray._raylet.GcsClient(address=address)
    except AuthenticationError:
        return (
            "the cluster wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (on its head, `ray get-auth-token`)"
        )
    except RpcError as error:
        return str(error).strip().splitlines()[0]
    return said.strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------ how far it can grow


def read_growth() -> Growth | None:
    """What the cluster's autoscaler may start; None where it has none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if (reported := ray._private.state.state.get_cluster_config()) is not None and reported.node_group_configs:
        return growth_reported(reported)
    context = ray.get_runtime_context()
    (head,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])
    if head == context.get_node_id():
        config = autoscaler_config(context.gcs_address)
    else:
        there = ray.remote(num_cpus=0)(autoscaler_config).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)
        )
        config = ray.get(there.remote(context.gcs_address))
    return Growth(unknown=config) if isinstance(config, str) else None if config is None else growth_of(config)


def growth_reported(config: Any) -> Growth:
    """Of the message an autoscaler may leave with the GCS (Ray's own ones leave none)."""
    unlimited = lambda count: float("inf") if count < 0 else count  # noqa: E731
    return Growth(tuple(NodeType(g.name, dict(g.resources), unlimited(g.max_count)) for g in config.node_group_configs))


def autoscaler_config(gcs_address: str) -> dict[str, Any] | str | None:
    """The configuration of the autoscaler of this head node, in the form of a `ray up` file; why it cannot be read; None where
    there is no autoscaler.
    """
    import psutil  # type: ignore[import-untyped]
    from ruamel.yaml import YAML

    if "KUBERNETES_SERVICE_HOST" in os.environ and (name := os.environ.get("RAY_CLUSTER_NAME")):
        return _of_kuberay(name)
    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if not any(a.endswith("monitor.py") and f"{os.sep}autoscaler{os.sep}" in a for a in arguments):
            continue
        options = dict(a.removeprefix("--").split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
        if options.get("gcs-address", "").rpartition(":")[2] == port and (file := options.get("autoscaling-config")):
            try:
                return YAML(typ="safe").load(Path(file).expanduser())
            except OSError as error:
                return f"{file}: {error.strerror}"
    return None


def _of_kuberay(name: str) -> dict[str, Any] | str | None:
    """From the RayCluster, which the head's service account may read where KubeRay's autoscaler runs beside it."""
    import requests
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    try:
        namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or (account / "namespace").read_text()
        cluster = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
        if not cluster["spec"].get("enableInTreeAutoscaling"):
            return None
        return _derive_autoscaling_config_from_ray_cr(cluster)
    except (
        requests.RequestException,
        OSError,
        ValueError,
    ) as error:  # of other values Ray's autoscaler makes nothing either
        return f"the RayCluster {name} could not be read: {error}"


def growth_of(config: Mapping[str, Any]) -> Growth:
    """What a `ray up` file allows."""
    head, limit = config.get("head_node_type"), config.get("max_workers", 2)  # Ray's default
    types = []
    for name, kind in config["available_node_types"].items():
        most = kind.get("max_workers", 0 if name == head else limit)
        if most and not kind.get("resources"):
            return Growth(unknown=f"the node type {name} does not say what it has")
        if most:
            types.append(NodeType(name, kind["resources"], most))
    return Growth(tuple(types), limit)


# ------------------------------------------------------------------------------------------------ waiting for room


def wait_for_room(needs: Sequence[Need], report: Reporter | None, shared: Path | None = None) -> None:
    """Wait until the cluster has room for all processes at once, saying for what and how long.

    The waiting is a placement group of theirs, which makes an autoscaler start nodes; it is given back when it is there, for
    the processes themselves to be asked for. On a single machine nothing is waited for.

    Args:
        shared: a folder that all of them will write to; found to be the same one on their nodes.

    Raises:
        StageError: there was no room in the time that `cluster.wait_minutes` allows; a node does not see the folder.
    """
    asked = [({name: amount for name, amount in need.each.items() if amount}, need.processes) for need in needs]
    bundles = [each for each, count in asked for _ in range(count) if each]
    if not on_cluster() or not bundles:
        return
    from ray.util import placement_group, placement_group_table, remove_placement_group

    limit, began = wait_seconds(), time.monotonic()
    group = placement_group(bundles, strategy="PACK")
    try:
        said, last = "", 0.0
        while not group.wait(POLL_SECONDS):
            waited, what = time.monotonic() - began, capacity().waits_for(needs)
            if waited > limit:
                raise _waited(waited, what)
            if report is not None and (what != said or waited - last > SAY_SECONDS):
                said, last = what, waited
                report.waiting(what, waited, limit)
        if report is not None and said:
            report.waiting(None)
        if shared is not None:
            check_shared(shared, placement_group_table(group)["bundles_to_node_id"].values())
    finally:
        remove_placement_group(group)


def wait_seconds() -> float:
    return float(os.environ.get(WAIT, WAIT_SECONDS))


def _waited(seconds: float, what: str) -> StageError:
    return StageError(
        f"waited {seconds:.0f} s for {what}\n  give it longer (cluster.wait_minutes), ask for less, or let the cluster "
        "grow further"
    )


Result = TypeVar("Result")


def while_there_are_nodes(results: Iterable[Result], need: Need, report: Reporter | None) -> Iterator[Result]:
    """What Ray Data's tasks give, as it comes. Ray Data waits for ever where no node is left that could hold one: that is told,
    and bounded.

    Args:
        need: one task.

    Raises:
        StageError: there was no node for as long as `cluster.wait_minutes` allows.
    """
    if not on_cluster():
        yield from results
        return
    got: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)

    def take() -> None:
        try:
            for result in results:
                got.put(("result", result))
            got.put(("end", None))
        except BaseException as error:  # handed on below
            got.put(("error", error))

    threading.Thread(target=take, name="results", daemon=True).start()
    none_since, said = None, False
    while True:
        try:
            kind, value = got.get(timeout=SAY_SECONDS)
        except queue.Empty:
            has = capacity()
            if any(Capacity.of(node.total).room(need.each) >= 1 for node in has.nodes):
                none_since = None
                continue
            none_since = none_since or time.monotonic()
            waited, what = time.monotonic() - none_since, has.waits_for([need])
            if waited > wait_seconds():
                raise _waited(waited, what) from None
            if report is not None:
                report.waiting(what, waited, wait_seconds())
                said = True
            continue
        if report is not None and said:
            report.waiting(None)
            said = False
        if kind == "end":
            return
        if kind == "error":
            raise value
        yield value


# ------------------------------------------------------------------------------------------------ where data is prepared


def data_cpus() -> int:
    """CPUs that prepare data, when the cluster has grown as far as it can; of those that have them, where nodes say so."""
    has = capacity()
    most = has.most_room({"CPU": 1} | data_resources(has))
    return max(1, int(min(most, MOST_DATA_CPUS)))


MOST_DATA_CPUS = 4096  # where it is not known how far a cluster can grow


def data_resources(has: Capacity | None = None) -> dict[str, float]:
    """What a task that prepares data asks for besides a CPU: nodes that have GPUs are kept free where others say they are for
    data. Ray itself prefers nodes without GPUs for such tasks, but takes any that are free."""
    return {DATA: 0.001} if (has or capacity()).has(DATA) else {}


# ------------------------------------------------------------------------------------------------ what nodes share


def check_shared(folder: Path, node_ids: Iterable[str]) -> None:
    """Whether these nodes see what this process writes to a folder.

    Raises:
        StageError: one does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = sorted(set(node_ids) - {here})
    if not others:
        return
    marker = folder / f".shared-{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()

    def sees(marker: str) -> bool:  # goes to the workers by value: importing ours takes seconds
        deadline = time.monotonic() + SHARED_SECONDS
        while not os.path.isfile(marker):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    try:
        look = ray.remote(num_cpus=0)(sees)
        on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in others]
        asked = [look.options(scheduling_strategy=each).remote(str(marker)) for each in on]
        seen = [_answer(node, reply) for node, reply in zip(others, asked, strict=True)]
    finally:
        marker.unlink()
    if not all(seen):
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        blind = [f"{names[node]} ({addresses[node]})" for node, sees in zip(others, seen, strict=True) if not sees]
        raise StageError(
            f"{folder} is not the same folder on {', '.join(blind)} as on {socket.gethostname()}: set `storage` to a path that "
            "every node mounts, or to a bucket (s3://, gs://)"
        )


def _answer(node: str, reply: Any) -> bool:
    """What a node answers; of one that was lost meanwhile it does not matter what it would have seen."""
    import ray
    from ray.exceptions import RayError

    try:
        seen: bool = ray.get(reply)
    except RayError:
        if any(each["Alive"] for each in ray.nodes() if each["NodeID"] == node):
            raise
        return True
    return seen
