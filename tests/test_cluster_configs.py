"""The cluster files: KubeRay's against the fields of its API, those of `ray up` against Ray's own schema, versions against the
lock, and the examples' specs against what the clusters can grow to. Each check is shown a broken file too."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.capacity import lacking
from pipeline.plan import make_plan
from pipeline.spec_reader import load_spec
from stages.capacity import Capacity, Node
from stages.cluster import growth_of
from stages.training.launch import ENVIRONMENT

from .cluster_files import (
    DRAIN,
    DRAIN_DEFAULT,
    FILES,
    ROOT,
    SHAPES,
    cluster_spec,
    crd_schema,
    drains,
    kuberay_mistakes,
    pods,
    read,
    unknown,
)

KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml")
RAY_UP = ("ray-up-aws.yaml", "ray-up-gcp.yaml")
HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 4}


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def test_the_lock_pins_the_stack() -> None:
    stack = {"torch": "2.13.0", "ray": "2.60.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}
    stack |= {"deepspeed": "0.19.8", "datasets": "5.2.0", "accelerate": "1.15.0"}
    assert {name: locked(name) for name in stack} == stack


# ------------------------------------------------------------------------------------------------ KubeRay


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberays_files_have_the_fields_of_its_api(name: str) -> None:
    assert kuberay_mistakes(read(name)) == []


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what a dotted path leads to; numbers are places in lists."""

    def change(manifest: dict[str, Any]) -> None:
        *way, last = path.split(".")
        node: Any = manifest
        for part in way:
            node = node[int(part) if part.isdigit() else part]
        node[last] = value

    return change


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *way, last = path.split(".")
        node: Any = manifest
        for part in way:
            node = node[int(part) if part.isdigit() else part]
        del node[last]

    return change


POD = "spec.workerGroupSpecs.1.template.spec"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("spec.enableInTreeAutoScaling", True), ".spec.enableInTreeAutoScaling: there is no such field"),
        (put("spec.workerGroupSpecs.0.maxReplicas", "8"), "maxReplicas: '8' is no int"),
        (put("spec.workerGroupSpecs.0.minReplicas", 9), "cpu-data: minReplicas <= replicas <= maxReplicas"),
        (put("spec.headGroupSpec.rayStartParams.num-cpus", 0), "rayStartParams.num-cpus: 0 is no str"),
        (put("spec.authOptions.mode", "Token"), "authOptions.mode: 'Token' is none of disabled, token"),
        (put(f"{POD}.toleration", []), "toleration: there is no such field"),
        (put(f"{POD}.tolerations.0.effect", "NoRun"), "effect: 'NoRun' is none of"),
        (put(f"{POD}.containers.0.env.0.value", 1), "value: 1 is no str"),
        (without(f"{POD}.containers.0.env.0.value"), "gpu-train: RAYLIGN_CACHE has no value, or two"),
        (put(f"{POD}.containers.0.volumeMounts.0.name", "smh"), "gpu-train: the volume smh is mounted, but not there"),
        (without(f"{POD}.containers.0.resources.requests"), "GPUs that are asked for are those of the limits"),
        (without(f"{POD}.containers.0.image"), "containers[0].image: is missing"),
        (
            put(f"{POD}.terminationGracePeriodSeconds", 60),
            "gpu-train: Ray drains the node for 110 s of the 60 that the",
        ),
        (put(f"{POD}.containers.0.env", []), "gpu-train: Ray drains the node for 30 s of the 120 that the pod has"),
        (put("kind", "RayClusters"), "kind: 'RayClusters'"),
    ],
)
def test_broken_manifests_are_seen(change: Callable[[dict[str, Any]], None], said: str) -> None:
    manifest = copy.deepcopy(read("kuberay-raycluster.yaml"))
    change(manifest)
    assert said in "\n".join(kuberay_mistakes(manifest))


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of KubeRay's CRDs")
@pytest.mark.parametrize("name", KUBERAY)
def test_against_the_crds_themselves(name: str) -> None:
    import jsonschema

    manifest = read(name)
    schema = crd_schema(Path(os.environ["KUBERAY_CRDS"]), manifest["kind"])
    assert unknown(SHAPES[manifest["kind"]], schema) == []
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)
    manifest["spec"]["entrypont"] = ""
    with pytest.raises(jsonschema.ValidationError, match="entrypont"):
        jsonschema.validate(manifest, schema)


def test_the_two_kuberay_files_are_one_cluster() -> None:
    job, cluster = (copy.deepcopy(cluster_spec(read(name))) for name in KUBERAY)
    for _, pod in pods(job):  # a job brings its spec along
        for container in pod["containers"]:
            container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] != "spec"]
        pod["volumes"] = [v for v in pod["volumes"] if v["name"] != "spec"]
    assert job == cluster
    entrypoint = read(KUBERAY[0])["spec"]["entrypoint"]
    assert entrypoint.startswith("python -m pipeline run ") and "storage=s3://" in entrypoint


def test_head_data_and_gpu_nodes_are_what_they_are_for() -> None:
    cluster = cluster_spec(read(KUBERAY[1]))
    head, data, gpu = (pod for _, pod in pods(cluster))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert [(g["minReplicas"], g["replicas"]) for g in cluster["workerGroupSpecs"]] == [(0, 0), (0, 0)]
    assert [g.get("resources", {}).get("data") for g in cluster["workerGroupSpecs"]] == ["1", None]

    def spot(pod: dict[str, Any]) -> set[str]:
        """What the pod says of the nodes it may be on, of those that the clouds call spot."""
        affinity = (
            pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
        )
        return {e["operator"] for term in affinity.get("nodeSelectorTerms", []) for e in term["matchExpressions"]}

    assert (spot(head), spot(data), spot(gpu)) == ({"DoesNotExist", "NotIn"}, set(), {"In"})
    assert {t["key"] for t in gpu["tolerations"]} >= {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert gpu["terminationGracePeriodSeconds"] == 120 and drains(gpu["containers"][0]) == 110
    for pod in (head, data, gpu):
        (container,) = pod["containers"]
        mounted = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert {"name": mounted["/dev/shm"], "emptyDir": {"medium": "Memory"}} in pod["volumes"]
        env = {e["name"]: e for e in container["env"]}
        assert env["RAYLIGN_CACHE"]["value"] in mounted
        secret = [name for name in env if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
        assert len(secret) >= 3 and all("valueFrom" in env[name] for name in secret)
        assert {name: env[f"RAY_health_check_{name}"]["value"] for name in HEALTH} == {
            k: str(v) for k, v in HEALTH.items()
        }


# ------------------------------------------------------------------------------------------------ ray up, Slurm, Docker


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_the_files_of_ray_up(name: str) -> None:
    config = read(name)
    validate_config(prepare_config(config))
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0} and kinds["cpu-data"]["resources"]["data"] == 1
    assert all(kinds[name]["min_workers"] == 0 for name in ("cpu-data", "gpu-train"))
    spot = {name: bool(re.search("spot|preemptible", str(kind["node_config"]))) for name, kind in kinds.items()}
    assert spot == {"head": False, "cpu-data": False, "gpu-train": True}
    start = "\n".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and all(
        f"RAY_health_check_{k}={v}" in start for k, v in HEALTH.items()
    )
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", RAY_UP)
def test_workers_ask_their_cloud_whether_they_stay(name: str, tmp_path: Path) -> None:
    """The command as Ray gives it to a terminal that is then gone. (There is no raylet here, and the watcher says so.)"""
    *_, start, spot = read(name)["worker_start_ray_commands"]
    assert start.rpartition("; ")[2].startswith("ray start ")
    assert f"python -m stages.spot {name.removesuffix('.yaml').rpartition('-')[2]} " in spot
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nsleep 1\nexec {sys.executable} "$@" --node none\n')
    python.chmod(0o755)
    command = f"export PYTHONWARNINGS=ignore && ({spot.replace('/tmp/raylign-spot.log', str(log))})"
    subprocess.run(
        ["script", "-qec", f"bash -c {shlex.quote(command)}", "/dev/null"], check=True, cwd=ROOT, timeout=60,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while "nodes of Ray" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    "change",
    [
        put("available_node_types.cpu-data.resources.CPU", "16"),
        put("available_node_types.cpu-data.max_worker", 3),
        put("available_nodes", {}),
        without("available_node_types.gpu-train.node_config"),
        without("provider.type"),
        put("head_node_type", "heat"),
    ],
)
def test_broken_files_of_ray_up_are_seen(change: Callable[[dict[str, Any]], None]) -> None:
    config = read("ray-up-aws.yaml")
    change(config)
    with pytest.raises(Exception, match=r"CPU|16|max_worker|available_nodes|node_config|type|heat"):
        validate_config(prepare_config(config))


def test_the_time_to_drain_is_rays() -> None:
    from ray._private import ray_constants

    assert getattr(ray_constants, DRAIN) == DRAIN_DEFAULT


def test_the_health_checks_are_rays() -> None:
    import ray

    server = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    assert all(f"health_check_{name}".encode() in server for name in HEALTH)
    assert b"health_check_periods_ms" not in server


def test_slurms_script_is_bash_and_has_the_same_settings() -> None:
    script = FILES / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    assert all(f"RAY_health_check_{name}={value}" in script.read_text() for name, value in HEALTH.items())


def test_all_files_are_of_the_locked_ray() -> None:
    ray = locked("ray")
    for name in KUBERAY:
        cluster = cluster_spec(read(name))
        assert cluster["rayVersion"] == ray
        images = {container["image"] for _, pod in pods(cluster) for container in pod["containers"]}
        assert images == {f"REGISTRY/raylign:ray-{ray}"}
    for name in RAY_UP:
        assert read(name)["docker"]["image"] == f"REGISTRY/raylign:ray-{ray}"
    docker = (FILES / "Dockerfile").read_text()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(rf"^ARG BASE=rayproject/ray:{re.escape(ray)}-py311-", docker, re.MULTILINE) and python == "py311"
    versions = re.findall(r"\b2\.\d+\.\d+\b", "".join(f.read_text() for f in FILES.iterdir() if f.is_file()))
    assert set(versions) == {ray}


def test_the_image_is_made_of_the_lock_and_has_the_stages_environment() -> None:
    docker = (FILES / "Dockerfile").read_text()
    assert "--requirement requirements.lock" in docker
    assert dict(re.findall(r"^    (\w+)=(\S+)", docker, re.MULTILINE)) == ENVIRONMENT
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for word in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    sent = {line[1:] for line in (FILES / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == copied


def test_the_readme_tells_of_each_file() -> None:
    text = (FILES / "README.md").read_text()
    assert [f.name for f in FILES.iterdir() if f.is_file() and f.name not in text and f.suffix != ".dockerignore"] == [
        "README.md"
    ]


# ------------------------------------------------------------------------------------------------ do the examples fit


def grown(name: str) -> Capacity:
    """A cluster of a file: its head, and what its autoscaler can add."""
    config = read(name)
    if name in KUBERAY:
        config = {"metadata": {"name": "raylign", "namespace": "default"}, "spec": cluster_spec(config)}
        config = _derive_autoscaling_config_from_ray_cr(config)
    return Capacity((Node({"CPU": 0}, {"CPU": 0}),), growth_of(config))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples with their data, made by their own generators."""
    folder = tmp_path_factory.mktemp("clone") / "examples"
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    for generator in (["quickstart_data.py", "data/quickstart"], ["example_data.py", "data/examples"]):
        subprocess.run([sys.executable, *generator], cwd=folder, check=True, capture_output=True)
    return folder


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("cluster", [*KUBERAY, *RAY_UP])
@pytest.mark.parametrize("spec", EXAMPLES)
def test_the_examples_fit(spec: str, cluster: str, examples: Path) -> None:
    has = grown(cluster)
    for cpus, gpus, workers in ((1, 0, 1), (8, 1, 8), (10, 1, 64)):
        asked = {"workers": workers, "gpus_per_worker": gpus, "cpus_per_worker": cpus}
        read = load_spec(examples / spec, [f"cluster.{name}={value}" for name, value in asked.items()])
        assert {p.name: said for p in make_plan(read).stages if (said := lacking(p, has))} == {}


def test_what_does_not_fit_is_told(examples: Path) -> None:
    asked = ["cluster.workers=65", "cluster.gpus_per_worker=1"]
    plan = make_plan(load_spec(examples / "quickstart.yaml", asked))
    for cluster in (*KUBERAY, *RAY_UP):
        assert lacking(plan["sft"], grown(cluster)) == ["needs 65 GPU; have 0, can grow to 64: will never start"]
