"""Run against a cluster by test_nodes.py, in a process of its own: `python -m tests.integration.probe_nodes ADDRESS FOLDER`.

Writes to the folder where each rank of a training is and what it sees, and where tasks that prepare data have run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stages.base import Resources
from stages.cluster import GROWTH
from stages.data.prepare import _Making
from stages.training.launch import connect, launch, worker_rank


def here() -> dict[str, Any]:
    import ray

    context = ray.get_runtime_context()
    (node,) = (n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
    return {"address": node["NodeManagerAddress"], "resources": sorted(node["Resources"]), "node": node["NodeID"]}


def rank(config: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    number, workers = worker_rank()
    total = torch.tensor(float(number + 1))
    dist.all_reduce(total)
    seen = {
        "workers": workers,
        "sum": total.item(),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "gloo": os.environ.get("GLOO_SOCKET_IFNAME"),
        "nccl": os.environ.get("NCCL_SOCKET_IFNAME"),
    }
    (Path(config["folder"]) / f"rank-{number}.json").write_text(json.dumps(here() | seen))


def prepare_task(index: int, folder: str) -> None:
    (Path(folder) / f"data-{index}.json").write_text(json.dumps(here()))


def main() -> None:
    address, folder = sys.argv[1:]
    os.environ.setdefault(GROWTH, "null")
    connect(address, local=False)
    tasks = list(range(6))
    making = _Making([], [], None, Path(folder) / "made", {}, lambda done, total: None)  # type: ignore[arg-type]
    making._map(tasks, prepare_task, folder)
    launch(rank, {"folder": folder}, resources=Resources(workers=2), local=False, folder=Path(folder) / "stage")


if __name__ == "__main__":
    main()
