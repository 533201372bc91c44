"""What a cluster has and can grow to, against what processes need: pure."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.capacity import Capacity, Growth, Need, Node, NodeType
from stages.cluster import growth_of, growth_reported

HEAD = Node({"CPU": 2.0}, {"CPU": 2.0}, "head")


def gpu_node(gpus: float, free: float | None = None, type: str = "gpu") -> Node:
    return Node({"CPU": 8.0, "GPU": gpus}, {"CPU": 8.0, "GPU": gpus if free is None else free}, type)


def growing(*nodes: Node, gpus: float = 1, most: float = 4, most_nodes: float = math.inf) -> Capacity:
    """A head, nodes of it, and a type of nodes with `gpus` of which there may be `most`."""
    kinds = (
        NodeType("gpu", {"CPU": 8, "GPU": gpus}, most),
        NodeType("cpu", {"CPU": 16}, 10),
    )
    return Capacity((HEAD, *nodes), Growth(kinds, most_nodes))


def workers(count: int, gpus: float = 1) -> list[Need]:
    return [Need(count, {"CPU": 1, "GPU": gpus})]


def test_what_can_never_be_is_told() -> None:
    assert growing(*[gpu_node(1)] * 4).lacks(workers(8)) == ["needs 8 GPU; have 4, can grow to 4: will never start"]
    assert growing().lacks(workers(4)) == []
    assert growing(most_nodes=3).lacks(workers(4)) == ["needs 4 GPU; have 0, can grow to 3: will never start"]
    assert growing(most=math.inf).lacks(workers(1000)) == []


def test_what_does_not_grow_is_told_so() -> None:
    fixed = Capacity((HEAD, gpu_node(4)))
    assert fixed.lacks(workers(8)) == ["needs 8 GPU; have 4, cannot grow: will never start"]
    assert fixed.lacks(workers(4)) == []
    machine = Capacity.of({"CPU": 2.0, "GPU": 0.0})
    assert machine.lacks([Need(3, {"CPU": 1})]) == ["needs 3 CPU; have 2, cannot grow: will never start"]
    assert machine.lacks([Need(2, {"CPU": 1}), Need(1, {})]) == []


def test_a_worker_needs_its_gpus_on_one_node() -> None:
    four = growing(*[gpu_node(1)] * 2)  # four GPUs, on four nodes
    assert four.lacks(workers(1, gpus=2)) == [
        "needs 1 x 1 CPU and 2 GPU; the nodes have room for 0 of these, can grow to 0: will never start"
    ]
    assert growing(gpus=3, most=2).lacks(workers(2, gpus=2)) == []
    assert growing(gpus=3, most=2).lacks(workers(3, gpus=2)) == [
        "needs 3 x 1 CPU and 2 GPU; the nodes have room for 0 of these, can grow to 2: will never start"
    ]
    assert (
        growing(gpu_node(4, type="own"), gpus=1).lacks(workers(2, gpus=2)) == []
    )  # a node that is not the autoscaler's


def test_processes_beside_the_workers_count() -> None:
    needs = [*workers(3), Need(2, {"GPU": 1})]
    assert growing().lacks(needs) == ["needs 5 GPU; have 0, can grow to 4: will never start"]
    assert growing(most=5).lacks(needs) == []


def test_a_limit_of_nodes_is_spent_on_the_best() -> None:
    kinds = (NodeType("small", {"GPU": 1}, 10), NodeType("large", {"GPU": 8}, 2))
    assert Capacity((HEAD,), Growth(kinds, 3)).most("GPU") == 17
    assert Capacity((HEAD,), Growth(kinds, 3)).most_room({"GPU": 2}) == 8


def test_what_is_not_known_is_not_refused() -> None:
    cluster = Capacity((HEAD,), Growth(unknown="its RayCluster may not be read"))
    assert cluster.lacks(workers(8)) == []
    assert cluster.waits_for(workers(8)) == (
        "8 GPU: have 0 free of 0, may grow (how far is not known: its RayCluster may not be read)"
    )


def test_what_is_waited_for() -> None:
    busy = growing(gpu_node(1, free=0), gpu_node(1, free=0))
    assert busy.waits_for(workers(4)) == "4 GPU: have 0 free of 2, can grow to 4"
    spread = growing(gpu_node(3, free=1), gpu_node(3, free=1), gpus=3)
    assert spread.waits_for(workers(1, gpus=2)) == (
        "1 x 1 CPU and 2 GPU: the nodes have room for 0 of these, can grow to 4"
    )
    assert growing(gpu_node(4)).waits_for(workers(1)) == "room: 1 x 1 CPU and 1 GPU"
    assert growing().grows_for(workers(4)) == "needs 4 GPU; have 0, can grow to 4"
    assert growing(gpu_node(4)).grows_for(workers(4)) == ""


def test_growth_goes_through_the_environment_as_it_is() -> None:
    growth = Growth((NodeType("gpu", {"CPU": 8, "GPU": 0.5}, math.inf),), 7)
    assert Growth.from_json(growth.as_json()) == growth
    assert Growth.from_json(Growth(unknown="why").as_json()) == Growth(unknown="why")


def test_a_resource_that_some_node_has_or_will_have() -> None:
    kinds = (NodeType("data", {"CPU": 4, "data": 4}, 2),)
    assert Capacity((HEAD,), Growth(kinds)).has("data")
    assert Capacity((Node({"data": 1}, {}),)).has("data")
    assert not growing(gpu_node(1)).has("data")


@given(
    nodes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=4),
    kinds=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=3),
    most_nodes=st.integers(0, 5),
    cpus=st.integers(1, 3),
    gpus=st.integers(0, 2),
    count=st.integers(1, 12),
)
def test_refused_is_what_fits_on_no_cluster_that_may_come(
    nodes: list[tuple[int, int]],
    kinds: list[tuple[int, int, int]],
    most_nodes: int,
    cpus: int,
    gpus: int,
    count: int,
) -> None:
    """Against a search over all clusters: every choice of as many nodes of each type as there may be."""
    need = Need(count, {"CPU": cpus, "GPU": gpus})
    types = tuple(NodeType(str(i), {"CPU": c, "GPU": g}, most) for i, (c, g, most) in enumerate(kinds))
    fixed = tuple(Node({"CPU": c, "GPU": g}, {}) for c, g in nodes)

    def room(c: int, g: int) -> int:
        return min(c // cpus, g // gpus if gpus else count)

    def best(i: int, left: int) -> int:
        if i == len(kinds):
            return 0
        c, g, most = kinds[i]
        return max(n * room(c, g) + best(i + 1, left - n) for n in range(min(most, left) + 1))

    fits = sum(room(c, g) for c, g in nodes) + best(0, most_nodes) >= count
    assert (Capacity(fixed, Growth(types, most_nodes)).lacks([need]) == []) == fits


@pytest.mark.parametrize("gpus", [0.5, 1 / 3, 0.1])
def test_shares_of_a_gpu_add_up(gpus: float) -> None:
    assert Capacity.of({"CPU": 100.0, "GPU": 1.0}).room({"GPU": gpus}) == round(1 / gpus)


def test_what_a_cluster_file_allows() -> None:
    file = {
        "head_node_type": "head",
        "max_workers": 5,
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "cpu": {"resources": {"CPU": 16}, "max_workers": 3},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}},  # as many as there may be nodes
        },
    }
    types = (NodeType("cpu", {"CPU": 16}, 3), NodeType("gpu", {"CPU": 8, "GPU": 1}, 5))
    assert growth_of(file) == Growth(types, 5)
    file["available_node_types"]["gpu"] = {}  # type: ignore[index]
    assert growth_of(file) == Growth(unknown="the node type gpu does not say what it has")


def test_what_an_autoscaler_reports() -> None:
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    report = ClusterConfig()
    for name, gpus, most in (("a", 1, 3), ("b", 8, -1)):
        group = report.node_group_configs.add(name=name, max_count=most)
        group.resources["GPU"] = gpus
    assert growth_reported(report) == Growth((NodeType("a", {"GPU": 1}, 3), NodeType("b", {"GPU": 8}, math.inf)))
