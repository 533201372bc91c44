"""A node that will be taken away (spot): its notice makes a checkpoint, and training goes on elsewhere without losing a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .clusters import several_nodes
from .test_object_store import finished, spec_of, weights


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_a_notice_makes_a_checkpoint_and_training_goes_on_elsewhere(data: Path, tmp_path: Path) -> None:
    import ray
    import torch

    train = {"train": {"learning_rate": 1.0e-3, "per_device_train_batch_size": 4, "num_train_epochs": 12, "logging_steps": 1,
                       "save_strategy": "no"}}  # fmt: skip
    sft = {"sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}], **train}}
    spec_of(tmp_path, data, "whole", cluster={"workers": 2}, stages=sft)
    whole = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "spec.yaml"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )  # fmt: skip
    finished(whole)
    spec_of(tmp_path, data, "runs", cluster={"workers": 2}, stages=sft)
    # Three nodes of one CPU: the workers are on two of them.
    with several_nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1}) as address:
        run = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "spec.yaml"], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"RAY_ADDRESS": address},
        )  # fmt: skip
        deadline = time.time() + 300
        while not any(
            len(p.read_text().splitlines()) >= 5 for p in tmp_path.glob("runs/run/.work/sft-*/consumed.jsonl")
        ):
            assert run.poll() is None and time.time() < deadline, run.communicate()
            time.sleep(0.05)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        free = ray._private.state.available_resources_per_node()
        busy = next(
            node["NodeID"]
            for node in ray.nodes()
            if node["Resources"].get("CPU") and not free[node["NodeID"]].get("CPU")
        )
        ray.shutdown()
        notice = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}", f"--node-id={busy}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120",
        ]  # fmt: skip
        subprocess.run(notice, check=True, capture_output=True, timeout=60)
        finished(run)
    log = (tmp_path / "runs" / "run" / "logs" / "sft.log").read_text()
    assert f"workers stop at a checkpoint: node {busy} will be taken away" in log
    made = json.loads((tmp_path / "runs" / "run" / "sft" / "manifest.json").read_text())["details"]
    assert made["workers"] == {"workers": 2, "lost": 0, "resizes": 1}
    assert made["consumption"]["problems"] == [] and made["consumption"]["epochs"] == 12
    wanted, got = (weights(tmp_path / name / "run" / "sft") for name in ("whole", "runs"))
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
