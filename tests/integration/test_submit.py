"""A run as a Ray job, on a real Ray head that wants a token: submitted, followed over a bad line, resubmitted, left, stopped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages import forkserver

pytestmark = pytest.mark.cluster

BIN = str(Path(sys.executable).parent)
SECRET = "hf_" + secrets.token_hex(16)
SPEC = """\
name: ${RUN_NAME}
model: base
storage: STORAGE
stages:
  sft:
    kind: sft
    data: [{path: made/chats.jsonl}]
    train: {learning_rate: 3e-3, max_steps: 4, save_steps: 2, logging_steps: 1, max_length: 128}
"""


@dataclass(frozen=True)
class Head:
    port: int  # of the dashboard
    gcs: str  # what RAY_ADDRESS wants
    token: dict[str, str]  # the environment variables that let one in

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def clean(**more: str) -> dict[str, str]:
    """This environment without what would lead Ray elsewhere."""
    gone = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "HF_TOKEN", forkserver.WANTED)
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160"} | more


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head") / "head.log") as started:
        yield started


@contextmanager
def ray_head(log: Path) -> Iterator[Head]:
    """A Ray head with its dashboard and job server, all of whose processes are ended by their ids."""
    port, dashboard, agent, client = free_ports(4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = Path("/tmp") / f"raylign-{secrets.token_hex(4)}"  # short: the paths of Ray's sockets have 107 characters
    command = [
        f"{BIN}/ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=3", "--object-store-memory=200000000",
        "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    env = clean(**token, RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}")
    try:
        with log.open("wb") as out:
            subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, check=True, timeout=300)
        found = Head(dashboard, f"127.0.0.1:{port}", token)
        wait_for_jobs(found)
        yield found
    finally:
        for process in processes_of(folder):
            with suppress(psutil.NoSuchProcess):  # some go with others
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Ray's processes with this folder, and what they started."""
    every = psutil.process_iter(["cmdline"])
    found = [process for process in every if any(str(folder) in word for word in process.info["cmdline"] or [])]
    return [*found, *(child for process in found for child in process.children(recursive=True))]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def ask(head: Head, path: str) -> Any:
    """What the job server answers."""
    token = {"Authorization": f"Bearer {head.token['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.address}/api/jobs/{path}", headers=token)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for_jobs(head: Head) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            ask(head, "")
            return
        except OSError:  # not up yet
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: Path, model: str) -> Path:
    """A repository with a spec, a model, and data that git ignores."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(model, folder / "base")
    (folder / "made").mkdir()
    shutil.copy(data / "chats.jsonl", folder / "made")
    (folder / ".gitignore").write_text("/made/\n")
    (folder / "spec.yaml").write_text(SPEC.replace("STORAGE", str(tmp_path_factory.mktemp("shared"))))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def storage(folder: Path) -> Path:
    return Path((folder / "spec.yaml").read_text().partition("storage: ")[2].splitlines()[0])


def submit(folder: Path, head: Head, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A dead address in the environment: the one that is given wins.
    env = clean(**head.token, RAY_API_SERVER_ADDRESS="http://127.0.0.1:9", RUN_NAME="first", HF_TOKEN=SECRET)
    command = [sys.executable, "-m", "pipeline", "submit", *arguments]
    return subprocess.run(command, cwd=folder, env=env | environment, capture_output=True, text=True, timeout=300)


class BadLine:
    """A way to the head that cuts each connection that follows a log two seconds after it was made."""

    def __init__(self, port: int) -> None:
        self.target, self.cuts = port, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed at the end
            while True:
                here, _ = self.server.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
                first = here.recv(65536)
                there.sendall(first)
                if b"/logs/tail" in first:
                    threading.Timer(2, self._cut, (here, there)).start()
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _cut(self, *ends: socket.socket) -> None:
        self.cuts += 1
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while part := one.recv(65536):
                other.sendall(part)
            other.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def first(folder: Path, head: Head) -> tuple[subprocess.CompletedProcess[str], int]:
    """The first submission, over a bad line, and how often that was cut."""
    line = BadLine(head.port)
    done = submit(
        folder, head, "spec.yaml", "--address", f"http://127.0.0.1:{line.port}", "--env", "RUN_NAME", "--env", "HF_TOKEN"
    )  # fmt: skip
    line.server.close()
    return done, line.cuts


def test_a_job_is_carried_out_and_its_log_is_told_once_over_a_bad_line(
    first: tuple[subprocess.CompletedProcess[str], int], head: Head, folder: Path
) -> None:
    done, cuts = first
    assert done.returncode == 0, done.stdout + done.stderr
    assert (storage(folder) / "first" / "sft" / "manifest.json").is_file()
    assert cuts > 1 and done.stderr == ""
    job = done.stdout.split()[1]
    assert job.startswith("raylign-first-") and job.endswith("-1")
    log = ask(head, f"{job}/logs")["logs"]
    assert done.stdout == f"job {job} submitted: {done.args[6]}\n{log}job {job}: succeeded\n"
    assert f"run folder: {storage(folder) / 'first'}" in log


def test_secrets_are_in_no_file_and_on_no_screen(
    first: tuple[subprocess.CompletedProcess[str], int], folder: Path
) -> None:
    done, _ = first
    assert SECRET not in done.stdout + done.stderr
    files = [file for place in (folder, storage(folder)) for file in place.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_the_same_command_again_finds_everything_made(
    first: tuple[subprocess.CompletedProcess[str], int], folder: Path, head: Head
) -> None:
    again = submit(folder, head, "spec.yaml", "--address", head.address, "--env", "RUN_NAME")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.split()[1].endswith("-2") and "unchanged" in again.stdout


def test_rays_own_command_from_a_clone(
    first: tuple[subprocess.CompletedProcess[str], int], folder: Path, head: Head, tmp_path: Path
) -> None:
    clone, root = tmp_path / "clone", Path(__file__).parents[2]
    for package in ("pipeline", "stages"):
        shutil.copytree(root / package, clone / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(folder / "base", clone / "base")
    shutil.copytree(folder / "made", clone / "made")
    (clone / "spec.yaml").write_text((folder / "spec.yaml").read_text().replace("${RUN_NAME}", "first"))
    done = subprocess.run(
        [f"{BIN}/ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "pipeline", "run", "spec.yaml"],
        cwd=clone, env=clean(**head.token, RAY_API_SERVER_ADDRESS=head.address), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unchanged" in done.stdout and "run folder: " in done.stdout


def test_a_run_that_fails_is_told_by_its_own_exit_code(folder: Path, head: Head) -> None:
    done = submit(folder, head, "spec.yaml", "--address", head.address)  # RUN_NAME is set here, but is not sent
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the environment variable RUN_NAME is not set" in done.stdout


def test_a_token_that_is_missing_or_wrong_is_explained(folder: Path, head: Head) -> None:
    for token, said in (
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, "wants a token, and none was sent: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token that was sent"),
    ):  # fmt: skip
        done = submit(folder, head, "spec.yaml", "--address", head.address, **token)
        assert done.returncode == 1 and done.stdout == ""
        assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_job_goes_on_without_who_follows_it_and_is_found_again(folder: Path, head: Head) -> None:
    long = ("spec.yaml", "--address", head.address, "--env", "RUN_NAME", "--set", "stages.sft.train.max_steps=100000")
    left = submit(folder, head, *long, "--no-wait", RUN_NAME="long")
    assert left.returncode == 0, left.stdout + left.stderr
    job = left.stdout.split()[1]
    assert f"`ray job stop {job} --address {head.address}` ends it" in left.stdout

    other = submit(folder, head, *long[:-2], RUN_NAME="long")
    assert other.returncode == 1 and f"{job} runs now with another spec" in other.stderr

    with following(folder, head, *long, RUN_NAME="long") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"job {job} runs already")
        while "sft" not in (line := process.stdout.readline()):
            assert line, "the log ended"
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and "the job goes on" in told, told

    with following(folder, head, *long, RUN_NAME="long") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"job {job} runs already"), ask(head, f"{job}/logs")["logs"]
        stopped = subprocess.run(
            [f"{BIN}/ray", "job", "stop", job, "--address", head.address],
            env=clean(**head.token), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and f"job {job}: stopped\n" in told, told


@contextmanager
def following(folder: Path, head: Head, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "submit", *arguments], cwd=folder, env=clean(**head.token, **environment),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
