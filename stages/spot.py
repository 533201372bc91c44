"""The notice that a spot node will be taken away, told to Ray: `python -m stages.spot aws` (or `gcp`) beside a worker's raylet.

Training makes a checkpoint where Ray says that a node is draining, and goes on elsewhere (training/watchdog.py). On Kubernetes
a pod is told by SIGTERM, at which Ray drains its node; on a virtual machine nobody tells Ray. The cloud tells the machine, at
an address of its own:

- AWS two minutes ahead: `spot/instance-action` is not there (404) until then. (`events/recommendations/rebalance` is no notice:
  the node may stay for hours.)
- Google Cloud 30 seconds ahead: `preempted` is FALSE until then.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

METADATA = "RAYLIGN_METADATA"  # another host:port than the clouds', for tests
ADDRESS = "169.254.169.254"  # of both clouds; seen from a container on the machine's own network
EVERY = 5.0  # seconds, as AWS recommends
GCP_SECONDS = 30


def ask(path: str, method: str = "GET", **headers: str) -> str | None:
    """What the metadata service says; None where it has no such thing.

    Raises:
        OSError, HTTPException: it does not answer, or refuses.
    """
    server = http.client.HTTPConnection(os.environ.get(METADATA, ADDRESS), timeout=2)
    try:
        server.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = server.getresponse()
        text = answer.read().decode()
    finally:
        server.close()
    if answer.status not in (200, 404):
        raise OSError(f"{path}: {answer.status} {answer.reason}")
    return text if answer.status == 200 else None


def aws() -> int | None:
    """Seconds that are left to this node; None where it stays."""
    token = ask("/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    if token is None:
        raise OSError("/latest/api/token: there is none")
    notice = ask("/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token)
    return None if notice is None else seconds_until(json.loads(notice)["time"], time.time())


def seconds_until(then: str, now: float) -> int:
    """From now (Unix time) to a time as AWS writes it, in UTC."""
    return max(0, int(datetime.fromisoformat(then).timestamp() - now))


def gcp() -> int | None:
    preempted = ask("/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google")
    return GCP_SECONDS if preempted is not None and preempted.strip() == "TRUE" else None


CLOUDS: dict[str, Callable[[], int | None]] = {"aws": aws, "gcp": gcp}


@dataclass(frozen=True)
class Raylet:
    """A node's process of Ray."""

    pid: int
    node: str
    gcs: str  # host:port


def raylets() -> set[Raylet]:
    """Those of this machine."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program, *words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        given = dict(word.partition("=")[::2] for word in words)
        if Path(program).name == "raylet" and "--node_id" in given:
            found.add(Raylet(int(process.name), given["--node_id"], given["--gcs-address"]))
    return found


def drain(raylet: Raylet, seconds: int) -> None:
    """Tell Ray that the node will go.

    Raises:
        OSError: Ray does not take it.
    """
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={raylet.gcs}", f"--node-id={raylet.node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the cloud takes this spot node away",
        f"--deadline-remaining-seconds={seconds}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"Ray does not drain the node: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def watch(cloud: str, raylet: Raylet) -> None:
    """Until the node is to go, or its raylet has ended. What fails is told once, and tried again."""
    told = ""
    while raylet in raylets():
        try:
            seconds = CLOUDS[cloud]()
            if seconds is not None:
                drain(raylet, seconds)
                print(f"node {raylet.node} will be taken away in {seconds} s; Ray has been told", flush=True)
                return
            problem = ""
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            problem = f"{cloud}: {error or type(error).__name__}"
        if problem not in ("", told):
            print(problem, flush=True)
        told = problem
        time.sleep(EVERY)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.spot", description="Tell Ray when this spot node will go.")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("--node", help="Ray's id of the node, where a machine has several")
    given = parser.parse_args()
    here = [raylet for raylet in raylets() if given.node in (None, raylet.node)]
    if len(here) != 1:
        sys.exit(f"{len(here)} nodes of Ray are on this machine{'' if given.node is None else ' by that id'}, not one")
    watch(given.cloud, here[0])


if __name__ == "__main__":
    main()
