"""Whole runs whose storage is an object store: an S3 server on loopback, and nodes that have no folder in common."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from ..conftest import LLAMA
from .clusters import STORE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

TRAIN = {
    "learning_rate": 1.0e-3,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "logging_steps": 5,
    "save_steps": 6,
}


def spec_of(folder: Path, data: Path, storage: str, **more: Any) -> str:
    init = {"config": LLAMA, "tokenizer": {"vocab_size": 320}, "data": [{"path": str(data / "chats.jsonl")}]}
    stages: dict[str, Any] = {
        "sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl"), "eval": "10%"}], "train": TRAIN},
        "dpo": {"kind": "dpo", "model": "stages.sft", "data": [{"path": str(data / "pairs.jsonl")}], "max_dropped": 1.0,
                "train": TRAIN | {"num_train_epochs": 1}},
        "eval": {"kind": "evaluate", "models": ["stages.sft", "stages.dpo"], "data": [{"path": str(data / "heldout.jsonl")}],
                 "max_new_tokens": 8},
    }  # fmt: skip
    spec = {"name": "run", "storage": storage, "model": {"init": init}, "stages": stages} | more
    YAML().dump(spec, folder / "spec.yaml")
    return "spec.yaml"


def command(*arguments: str, folder: Path, cache: Path, **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAYLIGN_STORAGE")}
    env |= {"RAYLIGN_CACHE": str(cache)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == code, out
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_models(one: Path, other: Path) -> None:
    for name in ("sft", "dpo"):
        wanted, got = weights(one / name), weights(other / name)
        assert set(wanted) == set(got) and all(torch.equal(wanted[key], got[key]) for key in wanted), name


def fetched(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run as it lies in the store, brought to a fresh folder."""
    from pipeline.artifacts import RunFolder
    from stages import storage

    monkeypatch.setenv(storage.CACHE, str(cache))
    monkeypatch.setenv(storage.STORAGE, "")
    run = RunFolder.open(address)
    storage.pull(run.path)
    return run.path


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers, in a folder of this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spec_of(folder, data, "runs", cluster={"workers": 2})
    finished(command("run", "spec.yaml", folder=folder, cache=folder / "none"))
    return folder / "runs" / "run"


def test_a_run_is_killed_and_goes_on_on_another_machine(
    undisturbed: Path, data: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver is killed while the first model is trained, and the machine's disk is gone: what the store has is enough."""
    storage = f"s3://bucket/{uuid4().hex}{s3}"
    spec_of(tmp_path, data, storage, cluster={"workers": 2})
    cache = tmp_path / "cache"
    process = command("run", "spec.yaml", folder=tmp_path, cache=cache)
    at, deadline = random.randint(8, 20), time.time() + 300
    while not any(len(p.read_text().splitlines()) >= at for p in cache.glob("*/run/.work/sft-*/consumed.jsonl")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family, timeout=30)
    shutil.rmtree(cache)
    told = finished(command("run", "spec.yaml", folder=tmp_path, cache=cache))
    assert "run folder: s3://bucket/" in told
    address = storage.replace("?", "/run?")
    got = fetched(address, tmp_path / "fresh", monkeypatch)
    assert_same_models(undisturbed, got)
    manifest = json.loads((got / "sft" / "manifest.json").read_text())
    assert manifest["details"]["consumption"] == {"steps": 24, "epochs": 2, "rows_after": 0, "problems": []}
    assert not list(got.rglob("*.tmp")) and not list(got.glob(".work/*/model"))
    for file in (
        "report.html",
        "spec.yaml",
        "logs/sft.log",
        "sft/metrics.jsonl",
        "dpo/ledger.json",
        "eval/samples.json",
    ):
        assert (got / file).is_file(), file

    shutil.rmtree(cache)
    told = finished(command("run", "spec.yaml", folder=tmp_path, cache=cache))
    assert told.count("cached") >= 4, "on a third machine nothing is made again"
    assert not list(cache.rglob("model.safetensors")), "nor is a model fetched that nobody reads"
    assert "done" in finished(command("status", address, folder=tmp_path, cache=tmp_path / "status"))


@contextmanager
def nodes_of_their_own(cache: Path, count: int) -> Iterator[str]:
    """The address of a cluster whose nodes each have their own disk at the same path."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
        shutdown_at_exit=False,
    )  # fmt: skip
    started = []
    try:
        import ray

        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        for number in range(count):  # one after another: Ray gives a node 30 s to start
            start = (
                f"mount -t tmpfs tmpfs {cache} && exec {sys.executable} -m ray.scripts.scripts start --block"
                f" --address={cluster.address} --num-cpus=1 --object-store-memory={STORE} --disable-usage-stats"
            )
            started.append(
                subprocess.Popen(
                    ["unshare", "--mount", "sh", "-c", start], stdout=subprocess.DEVNULL, start_new_session=True
                )
            )
            deadline = time.time() + 120
            while len([n for n in ray.nodes() if n["Alive"]]) < number + 2:
                assert time.time() < deadline and started[-1].poll() is None, ray.nodes()
                time.sleep(0.2)
        ray.shutdown()
        yield cluster.address
    finally:
        ray.shutdown()
        for process in started:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()
        cluster.shutdown()


def can_have_nodes_of_their_own() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_have_nodes_of_their_own(), reason="this machine allows no mount namespaces")
def test_nodes_that_have_no_folder_in_common(
    undisturbed: Path, data: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on two nodes, the driver on a third: data, checkpoints and models reach each other by the store alone."""
    storage, cache = f"s3://bucket/{uuid4().hex}{s3}", tmp_path / "cache"
    cache.mkdir()
    spec_of(tmp_path, data, storage, cluster={"workers": 2})
    with nodes_of_their_own(cache, 2) as address:
        finished(
            command(
                "run",
                "spec.yaml",
                folder=tmp_path,
                cache=cache,
                RAY_ADDRESS=address,
                RAY_API_SERVER_ADDRESS="http://127.0.0.1:9",
            )
        )
    assert not list(cache.glob("*/run/.work/*/checkpoints")), "the driver's node has trained nothing"
    got = fetched(storage.replace("?", "/run?"), tmp_path / "fresh", monkeypatch)
    assert_same_models(undisturbed, got)
    curves = [
        [
            (line["step"], line.get("loss"), line.get("eval_loss"))
            for line in map(json.loads, (run / "sft" / "metrics.jsonl").open())
        ]
        for run in (undisturbed, got)
    ]
    assert len(curves[0]) == 5 and curves[0] == curves[1]
