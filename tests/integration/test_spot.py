"""A notice of the cloud's reaches Ray: a metadata service on loopback, real raylets. What training makes of it is in
test_preemption.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from stages import spot
from stages.training.watchdog import draining_nodes

from ..metadata import metadata
from .clusters import several_nodes


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_notice_drains_the_node_and_the_watcher_ends_with_its_raylet() -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with several_nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1}) as address, metadata() as service:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        watchers: list[subprocess.Popen[str]] = []
        try:
            nodes = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
            by_node = {raylet.node: raylet for raylet in spot.raylets()}
            assert {by_node[node].gcs for node in nodes} == {address}

            @ray.remote(num_cpus=1)
            class Works:  # a node that is drained and idle goes at once
                def ready(self) -> None: ...

            there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
            works = [Works.options(scheduling_strategy=each).remote() for each in there]
            ray.get([each.ready.remote() for each in works])

            service.failing = 503
            watchers += [
                subprocess.Popen(
                    [sys.executable, "-m", "stages.spot", cloud, f"--node={node}"], text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {spot.METADATA: service.address},
                )
                for cloud, node in zip(("aws", "gcp", "aws"), nodes, strict=True)
            ]  # fmt: skip
            wait_until(lambda: len(service.asked) >= 3)  # of them all: each asks once, since it is refused
            service.failing = None
            wait_until(lambda: sum("instance-action" in asked for asked in service.asked) >= 2)
            assert not draining_nodes()

            os.kill(by_node[nodes[2]].pid, signal.SIGKILL)
            assert watchers[2].wait(60) == 0
            before = time.time()
            then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(before + 120))
            service.action, service.preempted = f'{{"action": "terminate", "time": "{then}"}}', "TRUE"
            assert [each.wait(60) for each in watchers[:2]] == [0, 0]
            deadlines = ray._private.state.state.get_draining_nodes()
            assert set(deadlines) == draining_nodes() == set(nodes[:2])
            for node, seconds in zip(nodes, (120, 30), strict=False):  # and those that Ray's command takes to start
                assert seconds - 6 < deadlines[node] / 1000 - before < seconds + 60
            told = [each.communicate()[0].splitlines() for each in watchers]
            assert told[2] == ["aws: /latest/api/token: 503 Service Unavailable"]
            assert told[0][0] == told[2][0] and told[1][0].startswith("gcp: /computeMetadata/")
            for node, lines in zip(nodes, told[:2], strict=False):
                assert len(lines) == 2 and lines[1].startswith(f"node {node} will be taken away in ")
        finally:
            for each in watchers:
                each.kill()
            ray.shutdown()


def wait_until(done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not done():
        assert time.time() < deadline
        time.sleep(0.05)
