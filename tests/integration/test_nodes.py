"""Several nodes: real raylets on this machine, and hosts in network namespaces. Workers are spread, talk over their nodes'
network and train the same model; data is prepared where it is meant to be; a folder that only one node sees is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.training.network import interface_of

from .clusters import plain_environment, several_nodes, two_hosts
from .test_training import LOSS_TOLERANCE

pytestmark = pytest.mark.cluster


def python(*arguments: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    env = plain_environment() | environment
    command = [*before, sys.executable, "-m", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


def probe(
    address: str, folder: Path, before: tuple[str, ...] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the ranks have seen, and where data was prepared."""
    (folder / "stage").mkdir(parents=True)
    done = python("tests.integration.probe_nodes", address, str(folder), before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    return tuple(
        [json.loads(f.read_text()) for f in sorted(folder.glob(f"{name}-*.json"))] for name in ("rank", "data")
    )  # type: ignore[return-value]


def write_spec(folder: Path, data: Path, model: str, storage: Path, zero: str) -> Path:
    train = {"max_steps": 4, "max_length": 128, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    spec = {
        "name": "spread",
        "model": model,
        "storage": str(storage),
        "cluster": {"workers": 2},
        "stages": {
            "sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}], "deepspeed": zero, "train": train}
        },
    }
    file = folder / "spec.yaml"
    file.write_text(json.dumps(spec))  # YAML has JSON in it
    return file


def losses(storage: Path) -> list[float]:
    lines = [json.loads(line) for line in (storage / "spread" / "sft" / "metrics.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line]


def test_workers_are_spread_and_data_is_prepared_beside_them(tmp_path: Path) -> None:
    with several_nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1, "resources": {"data": 1}}) as address:
        ranks, data = probe(address, tmp_path)
    assert [rank["sum"] for rank in ranks] == [3.0, 3.0]
    assert len({rank["node"] for rank in ranks}) == 2
    for rank in ranks:
        assert rank["gloo"] == interface_of(rank["address"]) is not None
        assert rank["nccl"] == f"={rank['gloo']}"
    assert len(data) == 6 and all("data" in task["resources"] for task in data)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_zero_across_nodes_is_zero_on_one(tmp_path: Path, data: Path, model: str, zero: str) -> None:
    found = []
    for name, nodes in (("one", [{"num_cpus": 2}]), ("two", [{"num_cpus": 1}, {"num_cpus": 1}])):
        spec = write_spec(tmp_path, data, model, tmp_path / name, zero)
        with several_nodes(*nodes) as address:
            done = python("pipeline", "run", str(spec), RAY_ADDRESS=address)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 4 and found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], rel=LOSS_TOLERANCE)


def test_hosts_with_networks_of_their_own(tmp_path: Path, data: Path, model: str) -> None:
    """The host's name means an address that neither of them has, so that without the interface gloo would find no way."""
    private = tmp_path / "private"
    private.mkdir()
    with two_hosts(private) as hosts:
        ranks, _ = probe(hosts.address, tmp_path / "probe", before=tuple(hosts.inside))
        assert [(rank["address"], rank["gloo"]) for rank in sorted(ranks, key=lambda r: r["address"])] == [
            ("10.77.0.1", hosts.interfaces[0]), ("10.77.0.2", hosts.interfaces[1]),
        ]  # fmt: skip
        assert [(rank["sum"], rank["local_rank"]) for rank in ranks] == [(3.0, 0), (3.0, 0)]

        spec = write_spec(tmp_path, data, model, private / "runs", "zero2")
        done = python("pipeline", "run", str(spec), before=tuple(hosts.inside), RAY_ADDRESS=hosts.address)
        assert done.returncode == 1
        told = " ".join(done.stderr.split())
        assert f"error: {private}/runs/spread is not the same folder on " in told and "(10.77.0.2) as on " in told
        assert "set `storage` to a path that every node mounts" in told
        assert not (private / "runs" / "spread" / "run.json").exists()

        spec = write_spec(tmp_path, data, model, tmp_path / "shared", "zero2")
        done = python("pipeline", "run", str(spec), before=tuple(hosts.inside), RAY_ADDRESS=hosts.address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(losses(tmp_path / "shared")) == 4
