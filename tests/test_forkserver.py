"""Processes that are forked from one with the imports done: as if they had been started, only sooner."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages import forkserver
from stages.training.launch import runtime_environment

TELL = """
    import json, os, sys
    json.dump({
        "module": __name__, "argv": sys.argv, "folder": os.getcwd(), "path": sys.path[0], "input": sys.stdin.read(),
        "mask": oct(os.umask(0)), "nice": os.getpriority(os.PRIO_PROCESS, 0), "environment": dict(os.environ), "pid": os.getpid(),
        "torch": "torch" in sys.modules, "ray": "ray" in sys.modules, "ours": "stages.training.trainer" in sys.modules,
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    }, sys.stdout)
"""


@pytest.fixture(scope="module")
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """One that servers belong to."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def environment(owner: subprocess.Popen[bytes]) -> dict[str, str]:
    return os.environ | {forkserver.WANTED: str(owner.pid)}


def script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(text))
    return str(folder / "script.py")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(forkserver.command(*arguments), text=True, capture_output=True, timeout=120, **options)


def servers(owner: int) -> list[psutil.Process]:
    every = psutil.process_iter(["cmdline"])
    return [p for p in every if "--serve" in (p.info["cmdline"] or []) and f"/{owner}-" in p.info["cmdline"][-1]]


def started(path: str, environment: dict[str, str]) -> tuple[subprocess.Popen[str], list[int]]:
    """A stand-in, and the numbers that the forked process tells first."""
    process = subprocess.Popen(forkserver.command(path), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(number) for number in process.stdout.readline().split()]


def wait_for(what: Any) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_forked_has_all_that_a_process_is_given(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(tmp_path, TELL)
    assert run(path, input="", env=environment).returncode == 0  # the server is there, and knows of none of these
    given = environment | {"OMP_NUM_THREADS": "3", "MINE": "caf\udce9"}
    del given["COLUMNS"]
    (tmp_path / "elsewhere").mkdir()

    def told(*arguments: str, **options: Any) -> dict[str, Any]:
        done = run(*arguments, input="a line\n", env=given, umask=0o027, preexec_fn=lambda: os.nice(3), **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    forked = told(path, "--an=argument", "two words", cwd=tmp_path / "elsewhere")
    assert forked["torch"] and forked["ours"] and not forked["ray"]  # Ray reads its job's number when it is loaded
    assert forked["argv"] == [path, "--an=argument", "two words"] and forked["module"] == "__main__"
    assert forked["folder"] == str(tmp_path / "elsewhere") and forked["path"] == str(tmp_path)
    assert (forked["input"], forked["mask"], forked["nice"], forked["threads"]) == (
        "a line\n",
        "0o27",
        os.nice(0) + 3,
        3,
    )
    assert forked["environment"]["MINE"] == given["MINE"] and "COLUMNS" not in forked["environment"]

    given[forkserver.WANTED] = "0"
    started = told(path, "--an=argument", "two words", cwd=tmp_path / "elsewhere")
    assert not started["torch"]
    same = ("argv", "module", "folder", "path", "input", "mask", "nice")
    assert {k: started[k] for k in same} == {k: forked[k] for k in same}
    lacking = started["environment"].items() - forked["environment"].items()
    assert not {k for k, _ in lacking} - {forkserver.WANTED, "LC_CTYPE"}

    given[forkserver.WANTED] = environment[forkserver.WANTED]
    module = told("-m", "script", "x", cwd=tmp_path)
    assert module["torch"] and module["argv"] == [path, "x"] and module["path"] == str(tmp_path)


def test_it_ends_as_it_would(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(
        tmp_path,
        """
        import atexit, os, signal, sys, threading, time
        what = sys.argv[1]
        if what != "interrupted":
            atexit.register(lambda: print("at exit"))
            threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
        if what == "raise":
            raise KeyError("here")
        if what == "hook":
            sys.excepthook = lambda *error: print(error[1], file=sys.stderr)
            raise KeyError("hooked")
        if what == "closed":
            sys.stdout.close()
            os._exit(5)
        if what in ("KILL", "TERM", "INT"):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), getattr(signal, "SIG" + what))
        if what == "interrupted":
            raise KeyboardInterrupt
        sys.exit({"none": None, "seven": 7, "text": "said so", "large": 2**40}[what])
        """,
    )
    ways = ("none", "seven", "text", "large", "raise", "hook", "closed", "KILL", "TERM", "INT", "interrupted")
    for what in ways:
        forked, started = (
            run(path, what, env=environment | {forkserver.WANTED: x}) for x in (environment[forkserver.WANTED], "0")
        )
        assert (what, forked.returncode, forked.stdout) == (what, started.returncode, started.stdout)
        assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_both_end_together(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(
        tmp_path,
        """
        import subprocess, sys, time
        print(__import__("os").getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
        """,
    )
    for end in (signal.SIGTERM, signal.SIGKILL):
        stand_in, (forked, its_own) = started(path, environment)
        assert forked != stand_in.pid and psutil.Process(forked).name() == "script.py"
        stand_in.send_signal(end)
        wait_for(lambda: not psutil.pid_exists(forked) and not psutil.pid_exists(its_own))  # noqa: B023
        assert stand_in.wait() == -end and stand_in.stdout.read() == ""  # type: ignore[union-attr]
    stand_in, (forked, _) = started(path, environment)
    os.kill(forked, signal.SIGKILL)
    assert stand_in.wait(20) == -signal.SIGKILL


def test_signals_are_handed_on(tmp_path: Path, environment: dict[str, str]) -> None:
    """So that what a process does when it is asked to go is done."""
    path = script(
        tmp_path,
        """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        try:
            print(os.getpid(), flush=True)
            time.sleep(600)
        finally:
            print("left in order", flush=True)
        """,
    )
    stand_in, _ = started(path, environment)
    stand_in.terminate()
    assert stand_in.wait(20) == 3 and stand_in.stdout.read() == "left in order\n"  # type: ignore[union-attr]


@pytest.mark.slow
def test_many_at_once_have_one_server_and_end_each_by_itself(tmp_path: Path, environment: dict[str, str]) -> None:
    """Also of an owner that has none yet; no process holds what is another's."""
    mine = subprocess.Popen(["sleep", "600"])
    path = script(tmp_path, "import os, sys; print(os.getppid(), len(os.listdir('/proc/self/fd')), sys.stdin.read())")
    env = environment | {forkserver.WANTED: str(mine.pid)}
    many = [
        subprocess.Popen(forkserver.command(path), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    told = []
    for process in reversed(many):  # each sees the end of its input though those before it still run
        told.append(process.communicate("mine", timeout=120)[0].split())
        assert process.returncode == 0
    (server,) = servers(mine.pid)
    assert {parent for parent, _, _ in told} == {str(server.pid)} and {text for _, _, text in told} == {"mine"}
    assert len({files for _, files, _ in told}) == 1
    wait_for(lambda: not server.children())
    mine.kill()
    mine.wait()
    wait_for(lambda: not server.is_running())


def test_one_server_for_an_owner_and_what_is_read_at_the_start(
    tmp_path: Path, owner: subprocess.Popen[bytes], environment: dict[str, str]
) -> None:
    path = script(tmp_path, "print(__import__('os').getppid())")
    of_a_node = {k: v for k, v in environment.items() if k != forkserver.WANTED} | {"RAY_RAYLET_PID": str(owner.pid)}
    others = [environment | {"OMP_NUM_THREADS": n, "RAY_JOB_ID": n} for n in ("1", "2", "4,2", "x")]
    parents = {run(path, env=env).stdout for env in (of_a_node, *others)}
    assert parents == {f"{process.pid}\n" for process in servers(owner.pid)} and len(parents) == 1
    other = run(path, env=environment | {"HF_HOME": str(tmp_path)}).stdout
    assert other not in parents and len(servers(owner.pid)) == 2


@pytest.mark.skipif(
    subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0,
    reason="this machine allows no network namespaces",
)
@pytest.mark.slow
def test_what_is_forked_is_on_the_same_network(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(tmp_path, "import os, sys; print(os.readlink('/proc/self/ns/net'), 'torch' in sys.modules)")
    here = os.readlink("/proc/self/ns/net")
    assert run(path, env=environment).stdout == f"{here} True\n"
    command = ["unshare", "--net", *forkserver.command(path)]
    other, forked = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120).stdout.split()
    assert other != here and forked == "True"


def test_code_that_has_changed_has_a_server_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forkserver.py", "data/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(forkserver, "__file__", str(tmp_path / "forkserver.py"))
    before = forkserver._key()
    assert forkserver._key() == before
    os.utime(tmp_path / "data" / "other.py", (2**31, 2**31))
    assert forkserver._key() != before


@pytest.mark.slow
def test_all_goes_with_the_owner(tmp_path: Path, environment: dict[str, str]) -> None:
    mine = subprocess.Popen(["sleep", "600"])
    path = script(
        tmp_path,
        """
        import os, subprocess, time
        print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
        """,
    )
    stand_in, forked = started(path, environment | {forkserver.WANTED: str(mine.pid)})
    left = list(forkserver._folder().glob(f"{mine.pid}-*"))
    assert left
    mine.kill()
    mine.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, forked)) and not servers(mine.pid))
    assert stand_in.wait(20) != 0 and not any(file.exists() for file in left)


def test_where_there_can_be_none_processes_are_started_as_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(tmp_path, "import sys; print('torch' in sys.modules)")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pydantic.py").write_text("raise RuntimeError('broken')")
    folder = forkserver._folder().name
    for name in ("open", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / folder).mkdir()
    (tmp_path / "open" / folder).chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "linked" / folder).symlink_to(tmp_path / "mine")
    without = {k: v for k, v in environment.items() if k != forkserver.WANTED}
    found = []
    for env in (
        without,
        environment | {forkserver.WANTED: "0"},
        environment | {forkserver.WANTED: "4194305"},  # no process has it
        environment | {"PYTHONPATH": str(broken)},
        environment | {"PYTHONPATH": str(broken)},  # a second time it is not tried
        environment | {"TMPDIR": str(tmp_path / "open")},  # another user may have made them
        environment | {"TMPDIR": str(tmp_path / "linked")},
    ):
        done = run(path, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
        logs = list(forkserver._folder().glob(f"{environment[forkserver.WANTED]}-*.failed"))
        found.append([(log, log.with_suffix(".log").stat().st_mtime_ns) for log in logs])
    assert not any(found[:3]) and len(found[3]) == 1 and found[3] == found[4]
    assert "RuntimeError: broken" in found[3][0][0].with_suffix(".log").read_text()


def test_beside_a_gpu_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["null", "zero", "shm"]
    monkeypatch.setattr(os, "listdir", lambda folder: devices if folder == "/dev" else [])
    assert forkserver._possible()
    devices.append("nvidia0")
    assert not forkserver._possible()


def test_ray_starts_workers_as_ever_on_nodes_without_our_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is a shell's, and Ray appends the path of its worker's script and the arguments."""
    for python in (tmp_path / "python3", tmp_path / "an env" / "bin" / "python3"):
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\necho {python.parent.name} "$@"\n')
        python.chmod(0o755)
    (tmp_path / "a worker.py").write_text("import sys; print('ours', sys.argv[1:])")
    env = os.environ | {forkserver.WANTED: "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said(script: str) -> str:
        command = ["bash", "-c", f"exec {forkserver.py_executable()} {shlex.quote(script)} --two=3"]
        return subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, check=True).stdout.strip()

    assert said("a worker.py") == "ours ['--two=3']"
    monkeypatch.setattr(forkserver, "__file__", "/not/here/forkserver.py")
    worker = f"{tmp_path}/an env/lib/python3.11/site-packages/ray/default_worker.py"
    assert said(worker) == f"bin {worker} --two=3"  # the Python whose Ray it is
    assert said("a worker.py") == f"{tmp_path.name} a worker.py --two=3"  # the one in PATH


def test_a_submitted_jobs_own_runtime_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "MINE": "1"}
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert runtime_environment(told) == {"env_vars": told, "py_executable": forkserver.py_executable()}
    job: dict[str, Any] = {"working_dir": "gcs://a.zip", "env_vars": {"MINE": "2"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job, "metadata": {}}))
    assert runtime_environment(told)["env_vars"] == {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job | {"pip": ["x"]}}))
    assert "py_executable" not in runtime_environment(told)
