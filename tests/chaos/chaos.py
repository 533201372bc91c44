"""Faults at random while a chain runs: what is published in the end is what an undisturbed run publishes.

    python -m tests.chaos.chaos --runs 20 --seed 1 [--faults node,disk] [--keep FOLDER]

Each run is the whole command on a chain of a fresh model, SFT and DPO on two workers, and an evaluation; a fault strikes at a
random moment. It has to end by itself with exit code 0, or fail with a clear error and be completed by the same command. All
that is published is looked at after each attempt: never half of a stage, never one gone, and at last the same weights, bit by
bit, as of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.processes import family

ATTEMPTS = 3
SECONDS = 600  # of one attempt
STALL_MINUTES = 0.15
STEPS = {"sft": 26, "dpo": 10}


@dataclass
class Scene:
    """What a fault finds: the folder of the runs, the command that runs, and its cluster if it has one of its own."""

    folder: Path
    rng: random.Random
    command: subprocess.Popen[str] | None = None
    cluster: Any = None
    store: subprocess.Popen[bytes] | None = None  # an object store's server
    endpoint: str = ""
    undo: list[Callable[[], None]] = field(default_factory=list)

    def processes(self, *signs: str) -> list[psutil.Process]:
        """Processes that were started from here whose command line has one of the signs."""
        found = []
        for process in family(psutil.Process()):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if any(sign in line for sign in signs):
                found.append(process)
        return found

    def one(self, *signs: str) -> psutil.Process | None:
        found = self.processes(*signs)
        return self.rng.choice(found) if found else None

    def steps(self, stage: str) -> int:
        """Steps that a stage has made."""
        runs = next(self.folder.rglob("chaos/run.json"), self.folder).parent  # of a mirror where there is a store
        for path in runs.glob(f".work/{stage}-*/consumed.jsonl"):
            return len(path.read_text().splitlines())
        return STEPS[stage] if (runs / stage / "manifest.json").is_file() else 0

    def runs(self) -> Path:
        """The folder of all that is published; of a store a copy."""
        if not self.endpoint:
            return self.folder / "runs"
        copy = self.folder / "bucket"
        shutil.rmtree(copy, ignore_errors=True)
        client = s3_client(self.endpoint)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
            for found in page.get("Contents", []):
                if not found["Key"].endswith("/"):
                    target = copy / found["Key"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    client.download_file("bucket", found["Key"], str(target))
        return copy / "runs"


def send(scene: Scene, what: signal.Signals, *signs: str) -> bool:
    process = scene.one(*signs)
    if process is not None:
        process.send_signal(what)
    return process is not None


def worker(scene: Scene) -> bool:
    return send(scene, signal.SIGKILL, "ray::RayTrainWorker")


def hang(scene: Scene) -> bool:
    """A worker stands still."""
    return send(scene, signal.SIGSTOP, "ray::RayTrainWorker")


def stage(scene: Scene) -> bool:
    return send(scene, signal.SIGKILL, "pipeline.stage_process")


def driver(scene: Scene) -> bool:
    assert scene.command is not None
    scene.command.send_signal(signal.SIGKILL)
    return True


def any_process(scene: Scene) -> bool:
    """Some process of Ray: a task's, an actor's, a controller's."""
    return send(scene, signal.SIGKILL, "ray::")


def node(scene: Scene) -> bool:
    """A machine is gone, and after a while there is another."""
    victim = scene.rng.choice(scene.cluster.worker_nodes and list(scene.cluster.worker_nodes))
    scene.cluster.remove_node(victim, allow_graceful=False)
    time.sleep(scene.rng.uniform(0, 4))
    scene.cluster.add_node(**NODE)
    return True


def gcs(scene: Scene) -> bool:
    """The cluster's head forgets everything: there has to be another cluster."""
    found = send(scene, signal.SIGKILL, "gcs_server")
    scene.undo.append(lambda: renew(scene))
    return found


def disk(scene: Scene) -> bool:
    """Not one more byte for a while."""
    filler = scene.folder / "runs" / "filler"
    with filler.open("wb") as out:
        try:
            while True:
                out.write(bytes(1 << 16))
                out.flush()
        except OSError:
            pass  # it is full: that is what was wanted
    scene.undo.append(lambda: filler.unlink(missing_ok=True))
    return True


def store(scene: Scene) -> bool:
    """The object store does not answer for a while."""
    assert scene.store is not None
    scene.store.send_signal(signal.SIGSTOP)
    time.sleep(scene.rng.uniform(2, 20))
    scene.store.send_signal(signal.SIGCONT)
    return True


FAULTS: dict[str, Callable[[Scene], bool]] = {
    f.__name__: f for f in (worker, hang, stage, driver, any_process, node, gcs, disk, store)
}
OWN_CLUSTER, OWN_DISK, OWN_STORE = ("node", "gcs"), ("disk",), ("store",)
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def renew(scene: Scene) -> None:
    """Another cluster of three nodes, for what had one."""
    from ray.cluster_utils import Cluster

    if scene.cluster is not None:
        scene.cluster.shutdown()
    scene.cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20, "_system_config": HEALTH},
        shutdown_at_exit=False,
    )  # fmt: skip
    for _ in range(2):
        scene.cluster.add_node(**NODE)


def s3_client(endpoint: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=f"http://{endpoint}", **S3)


@contextmanager
def s3_server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """(process, host:port) of an S3 server on loopback with a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        endpoint, end = f"127.0.0.1:{port}", time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < end and process.poll() is None, "the S3 server does not start"
            time.sleep(0.1)
        s3_client(endpoint).create_bucket(Bucket="bucket")
        yield process, endpoint
    finally:
        process.kill()
        process.wait()


S3 = {"aws_access_key_id": "chaos", "aws_secret_access_key": "chaos", "region_name": "us-east-1"}
S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_DEFAULT_REGION": "us-east-1"}

# As in cluster_configs/README.md: a node that is gone is noticed in seconds.
HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the chain


def write_chain(folder: Path, storage: str = "runs") -> None:
    """The data and the spec: an SFT of 26 steps, a DPO of 10, checkpoints every three."""
    from ruamel.yaml import YAML

    rng = random.Random(0)

    def row() -> dict[str, Any]:
        letters = rng.sample("abcdefgh", 3)
        return {"prompt": "Reverse: " + " ".join(letters), "completion": " ".join(reversed(letters))}

    rows = [row() for _ in range(104)]
    pairs = [r | {"chosen": r["completion"], "rejected": r["completion"][::-1] + " h"} for r in rows[:80]]
    for name, values in (("rows", rows), ("pairs", [{k: v for k, v in p.items() if k != "completion"} for p in pairs])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    llama = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    train = {"learning_rate": 1.0e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3}
    stages = {
        "sft": {"kind": "sft", "data": [{"path": "rows.jsonl"}], "train": train | {"num_train_epochs": 2}, "deepspeed": "zero2"},
        "dpo": {"kind": "dpo", "model": "stages.sft", "data": [{"path": "pairs.jsonl"}], "train": train | {"num_train_epochs": 1}},
        "eval": {"kind": "evaluate", "models": ["stages.sft", "stages.dpo"], "data": [{"path": "rows.jsonl"}],
                 "max_new_tokens": 8, "workers": 1},
    }  # fmt: skip
    spec = {
        "name": "chaos", "storage": storage, "cluster": {"workers": 2, "stall_minutes": STALL_MINUTES, "wait_minutes": 2},
        "model": {"init": {"config": llama, "tokenizer": {"vocab_size": 320}}}, "stages": stages,
    }  # fmt: skip
    YAML().dump(spec, folder / "spec.yaml")


def start(scene: Scene) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    if scene.endpoint:
        env |= S3_ENVIRONMENT | {"RAYLIGN_CACHE": str(scene.folder / "mirror")}
    if scene.cluster is not None:
        env["RAY_ADDRESS"] = scene.cluster.address
        env["RAY_API_SERVER_ADDRESS"] = (
            "http://127.0.0.1:9"  # it has no dashboard (stages/training/launch.py, ENVIRONMENT)
        )
    scene.command = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "spec.yaml"], cwd=scene.folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def published(runs: Path) -> dict[str, str]:
    """Stage -> fingerprint of all that is published.

    Raises:
        AssertionError: something of it is half-written.
    """
    found = {}
    for manifest in runs.glob("chaos/*/manifest.json"):
        value = json.loads(manifest.read_text())
        if value["produces"] == "model":
            from safetensors import safe_open

            with safe_open(str(manifest.parent / "model" / "model.safetensors"), "pt") as tensors:
                assert [tensors.get_tensor(name).isfinite().all() for name in tensors.keys()]  # noqa: SIM118
            assert (manifest.parent / "model" / "tokenizer.json").is_file()
        found[value["name"]] = value["fingerprint"]
    return found


def assert_same(runs: Path, undisturbed: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for name in ("sft", "dpo"):
        wanted, got = (load_file(f / "chaos" / name / "model" / "model.safetensors") for f in (undisturbed, runs))
        assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in wanted), f"{name} differs"
    ledgers = [(f / "chaos" / "sft" / "consumed.jsonl").read_text() for f in (undisturbed, runs)]
    assert ledgers[0] == ledgers[1], "other rows were trained, or in another order"


# ------------------------------------------------------------------------------------------------ a run


@dataclass
class Outcome:
    fault: str
    moment: str
    attempts: list[tuple[int, float, str]]  # exit code, seconds, the error

    def __str__(self) -> str:
        ends = "; ".join(
            f"exit {code} after {seconds:.0f} s{f' ({error})' if error else ''}"
            for code, seconds, error in self.attempts
        )
        return f"{self.fault:12} {self.moment:18} {ends}"


@contextmanager
def scene_of(fault: str, rng: random.Random) -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    scene = Scene(folder, rng)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if fault in OWN_DISK:
            (folder / "runs").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder / "runs")], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(folder / "runs")], check=True)
        if fault in OWN_CLUSTER:
            renew(scene)
            stack.callback(lambda: scene.cluster.shutdown())
        if fault in OWN_STORE:
            scene.store, scene.endpoint = stack.enter_context(s3_server())
        write_chain(
            folder, f"s3://bucket/runs?endpoint_override={scene.endpoint}&scheme=http" if scene.endpoint else "runs"
        )
        yield scene


def disturbed(fault: str, seed: int, undisturbed: Path) -> Outcome:
    """One run, with a fault at a random moment of its first attempt.

    Raises:
        AssertionError: something published was lost or is half-written, the models are not the same, an error is not clear.
    """
    rng = random.Random(f"{fault} {seed}")
    if fault in ("worker", "hang") or rng.random() < 0.7:
        which = rng.choice(["sft", "dpo"])
        step = rng.randint(1, STEPS[which] - 2)
        moment, due = f"{which}, step {step}", lambda scene, began: scene.steps(which) >= step
    else:
        seconds = rng.uniform(2, 40)
        moment, due = f"after {seconds:.0f} s", lambda scene, began: time.monotonic() - began >= seconds
    outcome = Outcome(fault, moment, [])
    with scene_of(fault, rng) as scene:
        before: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            began, struck = time.monotonic(), attempt > 0
            start(scene)
            assert scene.command is not None
            while scene.command.poll() is None:
                if not struck and due(scene, began):
                    struck = FAULTS[fault](scene)
                assert time.monotonic() - began < SECONDS, f"{outcome}: still runs"
                time.sleep(0.05)
            out = scene.command.communicate()[0]
            code = scene.command.returncode
            error = next((line for line in out.splitlines() if line.startswith("error:")), "")[:90]
            outcome.attempts.append((code, time.monotonic() - began, error))
            after = published(scene.runs())
            assert before.items() <= after.items(), f"{outcome}: published stages were lost: {before} -> {after}"
            assert "Traceback" not in out, f"{outcome}\n{out}"
            if code == 0:
                break
            assert code == -signal.SIGKILL or (code == 1 and error), f"{outcome}: no clear error\n{out}"
            before = after
            for undo in scene.undo:
                undo()
            scene.undo.clear()
            psutil.wait_procs(scene.processes("pipeline.stage_process"), timeout=30)
        assert outcome.attempts[-1][0] == 0, f"{outcome}\n{out}"
        assert struck, f"{outcome}: the fault never struck"
        assert_same(scene.runs(), undisturbed / "runs")
    return outcome


def run_undisturbed(folder: Path) -> float:
    """The chain without a fault, in the folder; seconds it took."""
    write_chain(folder)
    scene, began = Scene(folder, random.Random(0)), time.monotonic()
    start(scene)
    assert scene.command is not None
    out, _ = scene.command.communicate(timeout=SECONDS)
    assert scene.command.returncode == 0, out
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS))
    options = parser.parse_args()
    undisturbed = Path(tempfile.mkdtemp(prefix="undisturbed-"))
    failed = 0
    try:
        print(f"undisturbed: {run_undisturbed(undisturbed):.0f} s", flush=True)
        faults = options.faults.split(",")
        for number in range(options.runs):
            fault = faults[number % len(faults)]
            try:
                print(f"{number + 1:3} {disturbed(fault, options.seed + number, undisturbed)}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{number + 1:3} FAILED {error}", flush=True)
    finally:
        shutil.rmtree(undisturbed)
    print(f"{options.runs - failed} of {options.runs} ended with the models of the undisturbed run")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
