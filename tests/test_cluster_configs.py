"""The cluster files say the versions of the lock, and run the command that exists."""

from __future__ import annotations

import re
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def test_the_rayjob_is_that_of_the_locked_ray() -> None:
    job = YAML(typ="safe").load((ROOT / "cluster_configs" / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("python -m pipeline run ")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == locked("ray")
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert container["image"].endswith(f":ray-{locked('ray')}")
        assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/storage", "/dev/shm"}
    assert [g["minReplicas"] for g in cluster["workerGroupSpecs"]] == [0, 0]


def test_the_lock_pins_the_stack() -> None:
    stack = {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}
    stack |= {"deepspeed": "0.19.8", "datasets": "5.2.0", "accelerate": "1.15.0"}
    assert {name: locked(name) for name in stack} == stack
