"""Processes that are forked from one with the imports done: as if they had been started, only sooner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
    return os.environ | {forkserver.OWNER: str(owner.pid)}


def script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(text))
    return str(folder / "script.py")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(forkserver.command(*arguments), text=True, capture_output=True, timeout=120, **options)


def servers(owner: int) -> list[psutil.Process]:
    every = psutil.process_iter(["cmdline"])
    return [p for p in every if "--serve" in (p.info["cmdline"] or []) and f"/{owner}-" in p.info["cmdline"][-1]]


def wait_for(what: Any) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_forked_has_all_that_a_process_is_given(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(tmp_path, TELL)
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

    del given[forkserver.WANTED]
    module = told("-m", "script", "x", cwd=tmp_path)
    assert module["torch"] and module["argv"] == [path, "x"] and module["path"] == str(tmp_path)


def test_it_ends_as_it_would(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(
        tmp_path,
        """
        import atexit, os, sys, threading, time
        atexit.register(lambda: print("at exit"))
        threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
        what = sys.argv[1]
        if what == "raise":
            raise KeyError("here")
        if what == "kill":
            os.kill(os.getpid(), 9)
        sys.exit({"none": None, "seven": 7, "text": "said so"}[what])
        """,
    )
    ends = {what: run(path, what, env=environment) for what in ("none", "seven", "text", "raise", "kill")}
    assert {what: end.returncode for what, end in ends.items()} == {
        "none": 0,
        "seven": 7,
        "text": 1,
        "raise": 1,
        "kill": -9,
    }
    assert all(end.stdout == "a thread\nat exit\n" for what, end in ends.items() if what != "kill")
    assert ends["text"].stderr == "said so\n" and ends["raise"].stderr.endswith("KeyError: 'here'\n")


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
        stand_in = subprocess.Popen(forkserver.command(path), env=environment, stdout=subprocess.PIPE, text=True)
        assert stand_in.stdout is not None
        forked, its_own = map(int, stand_in.stdout.readline().split())
        assert forked != stand_in.pid and psutil.Process(forked).name() == "script.py"
        stand_in.send_signal(end)
        wait_for(lambda: not psutil.pid_exists(forked) and not psutil.pid_exists(its_own))  # noqa: B023
        assert stand_in.wait() == -end and stand_in.stdout.read() == ""

    stand_in = subprocess.Popen(forkserver.command(path), env=environment, stdout=subprocess.PIPE, text=True)
    assert stand_in.stdout is not None
    os.kill(int(stand_in.stdout.readline().split()[0]), signal.SIGKILL)
    assert stand_in.wait(20) == -signal.SIGKILL


def test_one_server_for_an_owner_and_what_imports_read(
    tmp_path: Path, owner: subprocess.Popen[bytes], environment: dict[str, str]
) -> None:
    path = script(tmp_path, "print(__import__('os').getppid())")
    parents = {run(path, env=environment | {"OMP_NUM_THREADS": n, "RAY_JOB_ID": n}).stdout for n in "123"}
    assert parents == {f"{process.pid}\n" for process in servers(owner.pid)} and len(parents) == 1
    other = run(path, env=environment | {"HF_HOME": str(tmp_path)}).stdout
    assert other not in parents and len(servers(owner.pid)) == 2


def test_a_server_goes_with_its_owner(tmp_path: Path, environment: dict[str, str]) -> None:
    mine = subprocess.Popen(["sleep", "600"])
    path = script(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    stand_in = subprocess.Popen(
        forkserver.command(path), env=environment | {forkserver.OWNER: str(mine.pid)}, stdout=subprocess.PIPE, text=True
    )
    assert stand_in.stdout is not None
    forked = int(stand_in.stdout.readline())
    left = list(forkserver._folder().glob(f"{mine.pid}-*"))
    assert left
    mine.kill()
    mine.wait()
    wait_for(lambda: not psutil.pid_exists(forked) and not servers(mine.pid))
    assert stand_in.wait(20) != 0
    wait_for(lambda: not any(file.exists() for file in left))


def test_where_there_can_be_none_processes_are_started_as_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    path = script(tmp_path, "import sys; print('torch' in sys.modules)")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pydantic.py").write_text("raise RuntimeError('broken')")
    unwritable = tmp_path / "unwritable"
    unwritable.mkdir()
    (unwritable / f"raylign-{os.getuid()}").mkdir(mode=0o777)
    (unwritable / f"raylign-{os.getuid()}").chmod(0o777)  # another user may have made it
    without = {k: v for k, v in environment.items() if k != forkserver.OWNER}
    for env in (
        without,
        environment | {forkserver.WANTED: "0"},
        environment | {forkserver.OWNER: "4194304"},  # no process has it
        environment | {"PYTHONPATH": str(broken)},
        environment | {"PYTHONPATH": str(broken)},  # a second time it is not tried
        environment | {"TMPDIR": str(unwritable)},
    ):
        done = run(path, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    failed = [
        file for file in forkserver._folder().glob("*.failed") if file.name.startswith(environment[forkserver.OWNER])
    ]
    assert len(failed) == 1 and "RuntimeError: broken" in failed[0].with_suffix(".log").read_text()


def test_beside_a_gpu_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forkserver.OWNER, str(os.getpid()))
    devices = ["null", "zero", "shm"]
    monkeypatch.setattr(os, "listdir", lambda folder: devices if folder == "/dev" else [])
    assert forkserver._possible()
    devices.append("nvidia0")
    assert not forkserver._possible()


def test_ray_starts_workers_as_ever_on_nodes_without_our_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is a shell's, and Ray appends the worker's arguments."""
    (tmp_path / "python3").write_text(f'#!/bin/sh\necho as ever "$@"; exec {sys.executable} -c pass\n')
    (tmp_path / "python3").chmod(0o755)
    ask = "exec {} 'a worker.py' --two=3"
    env = {k: v for k, v in os.environ.items() if k != forkserver.OWNER} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "a worker.py").write_text("import sys; print('ours', sys.argv)")

    def said() -> str:
        command = ["bash", "-c", ask.format(forkserver.py_executable())]
        return subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, check=True).stdout.strip()

    assert said() == "ours ['a worker.py', '--two=3']"
    monkeypatch.setattr(forkserver, "__file__", "/not/here/forkserver.py")
    assert said() == "as ever a worker.py --two=3"


def test_a_submitted_jobs_own_runtime_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "MINE": "1"}
    assert runtime_environment(told) == {"env_vars": told, "py_executable": forkserver.py_executable()}
    job: dict[str, Any] = {"working_dir": "gcs://a.zip", "env_vars": {"MINE": "2"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job, "metadata": {}}))
    assert runtime_environment(told)["env_vars"] == {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job | {"pip": ["x"]}}))
    assert "py_executable" not in runtime_environment(told)
