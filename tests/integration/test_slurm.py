"""cluster_configs/slurm.sh with a Slurm of shell scripts that starts every step on this machine: two real Ray nodes, one token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ..cluster_files import FILES

pytestmark = pytest.mark.cluster

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then tr , '\\n' <<<"$3"; else echo "$@" >>"$SLURM_TMPDIR/said"; fi
"""
LOOK = "import ray; ray.init(logging_level='ERROR'); print('CPUs', ray.cluster_resources()['CPU']); raise SystemExit(7)"


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a job of two nodes; after it, nothing of the job may be left."""
    folder = Path("/tmp") / f"slurm-{secrets.token_hex(4)}"
    folder.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    gone = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    env = {name: value for name, value in os.environ.items() if name not in gone}
    env |= {"PATH": f"{folder}:{Path(sys.executable).parent}:{env['PATH']}", "SLURM_TMPDIR": str(folder)}
    env |= {"SLURM_JOB_ID": str(secrets.randbelow(10000)), "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2"}
    yield env | {"SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0"}
    left = of(folder)
    for process in left:
        process.kill()
    shutil.rmtree(folder)
    assert not left


def of(folder: Path) -> list[psutil.Process]:
    """Ray's processes of a job, given ten seconds to go."""
    for _ in range(20):
        every = psutil.process_iter(["cmdline"])
        found = [p for p in every if any(str(folder) in word for word in p.info["cmdline"] or [])]
        if not found:
            break
        time.sleep(0.5)
    return found


def test_two_nodes_and_the_exit_code_of_the_command(slurm: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", FILES / "slurm.sh", "python", "-c", LOOK], env=slurm, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 7, done.stdout + done.stderr
    assert "CPUs 2.0" in done.stdout, done.stdout + done.stderr


def test_near_its_end_it_gets_in_line_again(slurm: dict[str, str]) -> None:
    ready = Path(slurm["SLURM_TMPDIR"]) / "ready"
    command = [
        "bash",
        FILES / "slurm.sh",
        "bash",
        "-c",
        f"trap 'echo ended; exit 1' TERM; touch {ready}; while sleep 0.2; do :; done",
    ]
    job = subprocess.Popen(
        command, env=slurm | {"SLURM_JOB_NUM_NODES": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not ready.exists():
            assert job.poll() is None, job.stdout.read() if job.stdout else ""
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 0 and "ended" in said, said
    assert (ready.parent / "said").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
