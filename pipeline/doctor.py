"""`raylign doctor`: what this machine and its cluster have for training, what is missing, and the command that mends it.

Every check is a function that returns lines; one that fails says so and stops nothing. Nothing is changed and nothing is
downloaded; of secrets only the names of their variables are told.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Group
from rich.text import Text

from pipeline.reach import hub_silence
from stages.training.kernels import FLASH_PIP, flash_missing, installed

State = Literal["ok", "note", "problem"]
GIB = 1 << 30
DISK_LEAST, DISK_LITTLE = 1 * GIB, 20 * GIB
SHM_LITTLE = 2 * GIB
MEMORY_LITTLE = 4 * GIB
FILES_LITTLE = 4096  # Ray opens some hundred for each process
CLUSTER_SECONDS = 3.0
# What stores and services read their credentials from: variables, and files in the home folder.
CREDENTIALS = {
    "s3://": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "~/.aws/credentials", "~/.aws/config"),
    "gs://": ("GOOGLE_APPLICATION_CREDENTIALS", "~/.config/gcloud/application_default_credentials.json"),
    "hub": ("HF_TOKEN", "HF_TOKEN_PATH", "~/.cache/huggingface/token"),
    "trackers": ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"),
}
# Libraries that are used where they are there -> what for, the command, and whether only GPUs have a use for them.
KERNELS = {
    "bitsandbytes": ("qlora and 8-bit optimizers", "pip install 'raylign[qlora]'", False),
    "vllm": ("faster sampling in generate, ppo, grpo and rloo", "pip install vllm", True),
    "liger_kernel": ("`use_liger_kernel`: less memory for logits", "pip install liger-kernel", True),
}


@dataclass(frozen=True)
class Check:
    """A line: what was looked at, what was seen and means, and the command that mends it."""

    name: str
    state: State
    says: str
    command: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


Found = Iterator[Check]


def examine() -> list[Check]:
    """All checks, in order; those that wait for a network run beside the others."""
    with_network = (_hub, _cluster)
    pool = ThreadPoolExecutor(len(with_network))
    begun = {check: pool.submit(safely, check) for check in with_network}
    found = []
    for check in (_python, _stack, _torch, _kernels, _compiler, _machine, _disk, _shared_memory, _open_files):
        found += safely(check)
    for check, future in begun.items():
        try:
            found += future.result(CLUSTER_SECONDS)
        except TooLate:
            found.append(_late(check))
    pool.shutdown(wait=False, cancel_futures=True)
    return [*found, *safely(_credentials)]


def safely(check: Callable[[], Found]) -> list[Check]:
    """A check's lines; where it fails, a note of that."""
    try:
        return list(check())
    except Exception as error:  # whatever a broken installation raises: it is what is to be found out
        what = (str(error).strip().splitlines() or [""])[0]
        return [Check(_name(check), "note", f"could not be looked at: {type(error).__name__}: {what}"[:200])]


def _name(check: Callable[[], Found]) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _late(check: Callable[[], Found]) -> Check:
    state: State = "problem" if check is _cluster else "note"
    return Check(_name(check), state, f"no answer in {CLUSTER_SECONDS:.0f} s")


# ------------------------------------------------------------------------------------------------ the stack


def _python() -> Found:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.prefix})")


def _stack() -> Found:
    """What raylign's own metadata asks for, against what is installed."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("raylign") or []]
    wrong, seen = [], []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((requirement, "is not installed"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, f"is {version}"))
        elif requirement.name in ("torch", "ray", "transformers", "trl", "deepspeed", "peft"):
            seen.append(f"{requirement.name} {version}")
    for requirement, what in wrong:
        yield Check(
            requirement.name, "problem", f"{what}, wanted {requirement.specifier}", f"pip install '{requirement}'"
        )
    if not wrong:
        yield Check("versions", "ok", f"as wanted: {', '.join(seen)}")


def _torch() -> Found:
    from pipeline.plan import machine_gpus
    from pipeline.training_checks import gpus as told

    there = machine_gpus()
    try:
        import torch
    except Exception as error:  # a broken build raises what it likes
        yield Check("torch", "problem", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if there and not torch.version.cuda:
        yield Check(
            "torch",
            "problem",
            f"{torch.__version__}, a build for {build}, and there are {there} GPUs",
            "pip install torch",
        )
        return
    yield Check("torch", "ok", f"{torch.__version__}, built for {build}")
    if not there:
        yield Check(
            "GPUs", "note", "none: training is on the CPU, for models of some million parameters or with patience"
        )
        return
    if not torch.cuda.is_available():
        yield Check("GPUs", "problem", f"{there}, and torch cannot use them: is the driver new enough?", "nvidia-smi")
        return
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        half = card.major >= 8
        free = told("memory.free")
        left = f", {free[i] / 1024:.0f} GiB free" if i < len(free) else ""
        says = f"{card.name}, {card.total_memory / GIB:.0f} GiB{left}, {'bf16' if half else 'no bf16: fp16 or float32'}"
        yield Check(f"GPU {i}", "ok" if half else "note", says)


def _kernels() -> Found:
    from pipeline.plan import machine_gpus

    gpu = machine_gpus() > 0
    if missing := flash_missing():
        says = "not installed: attention is torch's own" + ("" if gpu else "; it would want a GPU")
        yield Check("flash-attn", "note" if gpu else "ok", says, FLASH_PIP if gpu and missing else "")
    else:
        yield Check("flash-attn", "ok", "installed")
    for module, (what, command, only_gpu) in KERNELS.items():
        if installed(module):
            yield Check(module, "ok", f"installed: {what}")
        else:
            of_use = gpu or not only_gpu
            says = f"not installed: {what}" + ("" if of_use else "; it would want a GPU")
            yield Check(module, "note" if of_use else "ok", says, command if of_use else "")


def _compiler() -> Found:
    """What DeepSpeed, torch.compile and triton build their operations with, while they run."""
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found is None:
        says = "none: offloaded optimizers, triton kernels and torch.compile cannot build their operations"
        yield Check("compiler", "note", says, "apt-get install g++")
    elif not header.is_file():
        says = f"{found}, without Python's headers ({header}): operations that are built while running will fail"
        yield Check(
            "compiler", "note", says, f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        )
    else:
        yield Check("compiler", "ok", f"{found}, with Python's headers")


# ------------------------------------------------------------------------------------------------ the machine


def _machine() -> Found:
    import psutil  # type: ignore[import-untyped]

    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    says = (
        f"{cores or os.cpu_count()} cores, {memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB of memory free"
    )
    if memory.available < MEMORY_LITTLE:
        yield Check("machine", "note", f"{says}: little for a stage and Ray; `raylign plan` says what one needs")
    else:
        yield Check("machine", "ok", says)


def _disk() -> Found:
    """Where `storage: runs` lies by default, and where models of the hub are kept."""
    from huggingface_hub import constants

    for name, path in (("disk", Path.cwd()), ("hub's cache", Path(constants.HF_HUB_CACHE))):
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        says = f"{free / GIB:.0f} GiB free in {there}"
        if name == "disk" and not os.access(there, os.W_OK):
            yield Check(
                name, "problem", f"{there} cannot be written to", "set `storage` in the spec to a folder of yours"
            )
        elif name == "disk" and free < DISK_LEAST:
            yield Check(name, "problem", f"{says}: no room for a run", "set `storage` in the spec to a larger disk")
        elif free < DISK_LITTLE:
            command = "set `storage` in the spec" if name == "disk" else "export HF_HOME=FOLDER"
            yield Check(
                name, "note", f"{says}: a model of a billion parameters needs some 40 with its checkpoints", command
            )
        else:
            yield Check(name, "ok", says)


def _shared_memory() -> Found:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check("/dev/shm", "note", "not there: Ray keeps its objects in /tmp, which is slower")
        return
    free = shutil.disk_usage(path).free
    if free < SHM_LITTLE:
        says = f"{free / GIB:.1f} GiB free: Ray keeps its objects in /tmp, which is slower"
        yield Check("/dev/shm", "note", says, "docker run --shm-size=8g ...")
    else:
        yield Check("/dev/shm", "ok", f"{free / GIB:.1f} GiB free")


def _open_files() -> Found:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if 0 <= soft < FILES_LITTLE:
        most = 65536 if hard in (-1, resource.RLIM_INFINITY) else min(65536, hard)
        yield Check("open files", "note", f"{limit}: Ray may run out of them with many workers", f"ulimit -n {most}")
    else:
        yield Check("open files", "ok", limit)


# ------------------------------------------------------------------------------------------------ the network


def _hub() -> Found:
    silence = hub_silence(2.0)
    if silence is None:
        yield Check("hub", "ok", "answers")
    else:
        yield Check(
            "hub", "note", f"does not answer ({silence}): models and datasets have to be folders, or in its cache"
        )


def _cluster() -> Found:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Check("cluster", "ok", "RAY_ADDRESS is not set: runs are on this machine")
        return
    from stages.cluster import answers

    if why := answers(address, CLUSTER_SECONDS / 2):
        yield Check("cluster", "problem", f"RAY_ADDRESS={address}: {why}", "unset RAY_ADDRESS")
        return
    if "//" in address or ":" not in address:
        yield Check("cluster", "note", f"RAY_ADDRESS={address}: looked up when a run starts")
        return
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    total: dict[str, float] = {}
    nodes = [*status.active_nodes, *status.idle_nodes]
    for node in nodes:
        for name, amount in node.total_resources().items():
            total[name] = total.get(name, 0) + amount
    has = (
        f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, {total.get('memory', 0) / GIB:.0f} GiB of memory"
    )
    yield Check("cluster", "ok", f"RAY_ADDRESS={address}: {len(nodes)} nodes with {has}")


def _credentials() -> Found:
    for name, places in CREDENTIALS.items():
        there = [
            place for place in places if (Path(place).expanduser().exists() if "/" in place else os.environ.get(place))
        ]
        says = f"found in {', '.join(there)}" if there else "none found here (of a machine's own role nothing is seen)"
        yield Check(f"credentials of {name}" if name != "trackers" else "trackers", "ok", says)


# ------------------------------------------------------------------------------------------------ words

STYLE = {"ok": "green", "note": "yellow", "problem": "bold red"}


def render(checks: list[Check]) -> Group:
    """A line for each, and its command below it; then what it comes to."""
    width = max(len(check.name) for check in checks)
    parts: list[Any] = []
    for check in checks:
        parts.append(Text.assemble((f"{check.state:<8}", STYLE[check.state]), f"{check.name:<{width}}  {check.says}"))
        if check.command:
            parts.append(Text(f"{'':<{8 + width}}  {check.command}", style="cyan"))
    problems = sum(check.state == "problem" for check in checks)
    end = (
        f"\n{problems} {'problem keeps' if problems == 1 else 'problems keep'} runs from working"
        if problems
        else "\nready"
    )
    return Group(*parts, Text(end, style="bold red" if problems else "bold green"))
