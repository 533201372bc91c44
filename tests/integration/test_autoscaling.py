"""Ray's real autoscaler, its nodes raylets on this machine: they come for what runs and go after it; a stage that cannot have
what it needs is refused, or waits with a reason and ends."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ..conftest import LLAMA
from .clusters import Autoscaled, autoscaled, free_port, plain_environment

# Workers of two CPUs have no room on the nodes for data. Those of `broken` cannot start: Ray refuses so small a store.
TYPES: dict[str, tuple[dict[str, float], int]] = {
    "data": ({"CPU": 1, "data": 1}, 2),
    "train": ({"CPU": 2}, 2),
    "gpu": ({"CPU": 4, "GPU": 1}, 2),
    "broken": ({"CPU": 8, "object_store_memory": 1}, 2),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    with autoscaled(TYPES, idle_seconds=15) as started:
        yield started


def write_spec(folder: Path, data: Path, cluster: dict[str, Any]) -> Path:
    spec = {
        "name": "grown",
        "model": {"init": {"config": LLAMA, "tokenizer": {"vocab_size": 320}}},
        "storage": str(folder / "runs"),
        "cluster": cluster,
        "stages": {
            "sft": {
                "kind": "sft",
                "data": [{"path": str(data / "chats.jsonl")}],
                "train": {"max_steps": 4, "max_length": 128, "save_strategy": "no"},
            }
        },
    }
    file = folder / "spec.yaml"
    file.write_text(json.dumps(spec))  # YAML has JSON in it
    return file


def start(command: str, spec: Path, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", command, str(spec)], env=plain_environment() | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(command: str, spec: Path, address: str) -> tuple[int, str, str]:
    process = start(command, spec, address)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.cluster
def test_nodes_come_for_what_runs_and_go(cluster: Autoscaled, data: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, data, {"workers": 2, "cpus_per_worker": 2})
    process, state = start("run", spec, cluster.address), tmp_path / "runs" / "grown" / "run.json"
    waited = set()
    while process.poll() is None:
        if state.is_file():
            waited.add(json.loads(state.read_text())["stages"]["sft"].get("waiting"))
        time.sleep(0.2)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    cluster.wait({}, seconds=60)
    seen = cluster.seen
    print(seen)
    # One for data first. Nodes to train on are asked for when the data is there.
    prepared = next((tmp_path / "runs").glob(".prepared/*/manifest.json")).stat().st_mtime - seen.began
    assert seen.first("data") < prepared < seen.first("train") < seen.first("train", 2)
    assert seen.gone("data") < seen.gone("train")
    assert all(there["gpu"] == there["broken"] == 0 for _, there in seen.changes)
    assert "sft: waiting for 4 CPU: have " in out and "s of 1800" in out
    assert any(line and line.startswith("waiting for ") and "can grow to" in line for line in waited), waited
    record = json.loads(state.read_text())["stages"]["sft"]
    assert (record["state"], record["workers"], record.get("waiting")) == ("done", 2, None)


@pytest.mark.cluster
def test_what_can_never_be_is_refused_before_anything_starts(cluster: Autoscaled, data: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, data, {"workers": 4, "gpus_per_worker": 1})
    says = "needs 4 GPU; have 0, can grow to 2: will never start"
    began = time.monotonic()
    code, _, err = run("run", spec, cluster.address)
    assert (code, says in " ".join(err.split())) == (2, True), err
    assert time.monotonic() - began < 120 and not (tmp_path / "runs" / "grown" / "run.json").exists()
    code, out, err = run("plan", spec, cluster.address)
    assert code == 0 and "NO" in out and says in " ".join(out.split()), out + err


@pytest.mark.cluster
def test_waiting_for_what_never_comes_ends(cluster: Autoscaled, data: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, data, {"workers": 1, "cpus_per_worker": 8, "wait_minutes": 0.1})
    code, out, err = run("run", spec, cluster.address)
    assert code == 1, out + err
    told = " ".join((out + err).split())
    assert "waiting for 8 CPU: have " in told and "stage sft failed: waited " in told
    assert "give it longer (cluster.wait_minutes), ask for less, or let the cluster grow further" in told
    assert "Traceback" not in told


def test_an_address_where_no_ray_answers_is_told_in_seconds(data: Path, tmp_path: Path) -> None:
    spec, address = write_spec(tmp_path, data, {}), f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    code, _, err = run("run", spec, address)
    assert code == 1 and time.monotonic() - began < 120
    assert f"RAY_ADDRESS={address}: no Ray answers there: Connection refused" in " ".join(err.split())


GROUP = {
    "groupName": "gpu-train", "minReplicas": 0, "maxReplicas": 3, "rayStartParams": {},
    "template": {"spec": {"containers": [{"resources": {"limits": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"}}}]}},
}  # fmt: skip


class KubernetesApi(BaseHTTPRequestHandler):
    """What KubeRay's own API server would say of two clusters, to those that have a certificate."""

    def do_GET(self) -> None:
        *_, namespace, kind, name = self.path.split("/")
        if (namespace, kind) != ("team", "rayclusters") or name not in ("grows", "fixed"):
            self.send_error(403)
            return
        spec = {"headGroupSpec": GROUP | {"rayStartParams": {"num-cpus": "0"}}, "workerGroupSpecs": [GROUP]}
        cluster = {
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec | {"enableInTreeAutoscaling": name == "grows"},
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(cluster).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_what_kuberay_allows_is_read_from_its_cluster(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=test"
    subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    server = HTTPServer(("127.0.0.1", 0), KubernetesApi)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT_HTTPS": str(server.server_port),
        "RAY_CLUSTER_NAMESPACE": "team", "RAY_KUBERAY_CA_CERT_PATH": certificate,
        "RAY_KUBERAY_CLIENT_CERT_PATH": certificate, "RAY_KUBERAY_CLIENT_KEY_PATH": key,
    }  # fmt: skip
    code = "from stages.cluster import autoscaler_config as c, growth_of as g; f = c('x:1'); print(g(f) if isinstance(f, dict) else f)"
    said = {}
    for name in ("grows", "fixed", "hidden"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment | {"RAY_CLUSTER_NAME": name}, text=True,
            capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout.strip()
    server.shutdown()
    assert "NodeType(name='gpu-train', resources={'CPU': 8, 'GPU': 4, 'memory': 68719476736}, most=3)" in said["grows"]
    assert said["fixed"] == "None"
    assert said["hidden"].startswith("the RayCluster hidden could not be read: 403 Client Error")
