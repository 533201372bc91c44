"""Python processes that begin with their imports done: forked from one that has imported torch, transformers and TRL.

    python -I -S stages/forkserver.py -m pipeline.stage_process

is `python -m pipeline.stage_process`, ten processor seconds earlier. Stages are started so, and Ray starts its worker processes
so (`py_executable` of its runtime environment). This process, the stand-in, asks a server to fork; what is forked has its
arguments, environment, folder and standard files, and ends when it does, as it ends when the other does.

A server serves one owner (a run, a node of Ray) and one set of imports. The first stand-in that finds none starts it; it goes
with its owner, or when nobody has needed it for a while. Where there can be none, a process is started as ever: elsewhere
than on Linux, beside a GPU (its driver does not survive a fork), and where the imports fail.

This file runs by itself, without site-packages: only the standard library is imported before a server is asked.
"""

from __future__ import annotations

import array
import fcntl
import hashlib
import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

OWNER = "RAYLIGN_FORKSERVER_OWNER"  # a process id; a worker of Ray's without one belongs to its node
WANTED = "RAYLIGN_FORKSERVER"  # `0`: processes are started as ever
IDLE_SECONDS = 120.0
# Without Ray, which reads RAY_JOB_ID when it is loaded: after these it takes a second. Ours stand on the others.
IMPORTS = (
    "pydantic", "ruamel.yaml", "jinja2.sandbox", "pyarrow.parquet", "pandas", "datasets", "transformers.trainer", "peft",
    "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "deepspeed", "stages.training.trainer", "stages.data.prepare",
)  # fmt: skip
# Of the environment, what those read when they are imported: processes in which it differs have servers of their own.
READ_BY_IMPORTS = (
    "ACCELERATE_", "BNB_", "DS_", "HF_", "HOME", "HUGGINGFACE_", "KMP_", "LD_", "MKL_", "OMP_WAIT_POLICY", "OPENBLAS_", "PATH",
    "PYTHONPATH", "PYTORCH_", "TORCH", "TRANSFORMERS_", "TRITON_", "TRL_", "USE_", "XDG_",
)  # fmt: skip
ACCELERATORS = ("nvidia", "kfd", "accel", "dxg", "davinci")  # in /dev
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # Linux: prctl(2)
SIZE = struct.Struct(">I")


def command(*arguments: str) -> list[str]:
    """What to start for `python ARGUMENTS`."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments]


def py_executable() -> str:
    """What Ray is to start worker processes with, on nodes that have our code and this Python in the same place; elsewhere they
    are started as ever. Ray hands it to a shell."""
    ours = [sys.executable, os.path.abspath(__file__)]
    script = 'if [ -x "$1" ] && [ -f "$2" ]; then exec "$1" -I -S "$2" "${@:3}"; else exec python3 "${@:3}"; fi'
    return shlex.join(["bash", "-c", script, "python", *ours])


# ------------------------------------------------------------------------------------------------ the stand-in


def stand_in(arguments: list[str]) -> NoReturn:
    """Have `python ARGUMENTS` forked, and end as it ends; become it, where it cannot be forked."""
    connection = _forked(arguments) if _possible() else None
    if connection is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # a pipe is to end when the forked process ends it
        os.dup2(null, fd)
    told = connection.recv(SIZE.size)
    code = os.waitstatus_to_exitcode(SIZE.unpack(told)[0]) if told else 1
    if code < 0:
        with suppress(OSError):  # SIGKILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _possible() -> bool:
    return (
        sys.platform == "linux"
        and os.environ.get(WANTED) != "0"
        and _owner() is not None
        and not any(name.startswith(ACCELERATORS) for name in os.listdir("/dev"))
    )


def _owner() -> int | None:
    owner = os.environ.get(OWNER) or os.environ.get("RAY_RAYLET_PID", "")
    return int(owner) if owner.isdigit() else None


def _forked(arguments: list[str]) -> socket.socket | None:
    """A connection to the server that has forked a process for us; None where none can."""
    request = json.dumps({
        "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "umask": _umask(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "oom_score_adj": Path("/proc/self/oom_score_adj").read_text(),
    }).encode()  # fmt: skip
    try:
        connection = _connected()
        files = array.array("i", [0, 1, 2])
        connection.sendmsg([SIZE.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        connection.sendall(request)
        return connection if connection.recv(1) else None  # when all is imported and the process is there
    except OSError:
        return None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _connected() -> socket.socket:
    """Connected to the server, which is started where there is none.

    Raises:
        OSError: there can be none.
    """
    folder, name = _folder(), f"{_owner()}-{_key()}"
    where = folder / f"{name}.sock"
    if (folder / f"{name}.failed").exists():
        raise ConnectionRefusedError(name)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(where))
        except (FileNotFoundError, ConnectionRefusedError):
            _sweep(folder)
            _start(where)
            connection.connect(str(where))
    return connection


def _folder() -> Path:
    """Where servers listen: they run what they are asked to, so nobody else may ask."""
    folder = Path(tempfile.gettempdir()) / f"raylign-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(folder)
    return folder


def _key() -> str:
    read = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(READ_BY_IMPORTS))
    told = "\0".join([sys.executable, os.path.abspath(__file__), *read])
    return hashlib.sha256(os.fsencode(told)).hexdigest()[:16]


def _sweep(folder: Path) -> None:
    """Remove what servers of owners that are gone have left."""
    for file in folder.glob("*-*"):
        if not os.path.exists(f"/proc/{file.name.partition('-')[0]}"):
            file.unlink(missing_ok=True)


def _start(where: Path) -> None:
    where.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, where.with_suffix(".log").open("wb") as log:
        listening.bind(str(where))
        listening.listen(128)
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--serve", str(where)],
            stdin=listening.fileno(), stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the server


def serve(where: Path) -> NoReturn:
    """Fork a process for whoever asks at the socket that is standard input, until the owner is gone."""
    import gc

    owner = os.pidfd_open(int(where.name.partition("-")[0]))
    listening = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    before = dict(os.environ)
    try:
        _import()
    except BaseException:
        where.with_suffix(".failed").touch()
        raise
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()  # the collector writes to what it looks at, and then the processes would not share it
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}  # process id -> its stand-in
    while True:
        stand_ins = {connection: pid for pid, connection in children.items() if connection.fileno() >= 0}
        watched: list[Any] = [owner, woken, listening, *stand_ins]
        ready, _, _ = select.select(watched, [], [], None if children else IDLE_SECONDS)
        if not ready or owner in ready:
            for kind in (".sock", ".log"):
                where.with_suffix(kind).unlink(missing_ok=True)
            os._exit(0)  # and the children with it (PR_SET_PDEATHSIG)
        for connection in stand_ins.keys() & set(ready):  # they never say anything: it is gone
            connection.close()
            _kill(stand_ins[connection])
        if woken in ready:
            woken.recv(4096)
            _reap(children)
        if listening in ready:
            connection, _ = listening.accept()
            try:
                request, files = _received(connection)
            except (OSError, ValueError):  # it went away meanwhile
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                for other in [listening, woken, wake, connection, *children.values()]:
                    other.close()
                os.close(owner)
                _become(request, files, added)
            for file in files:
                os.close(file)
            children[pid] = connection
            with suppress(OSError):
                connection.send(b"+")


def _import() -> None:
    import importlib

    sys.path[0] = str(Path(__file__).parent.parent)  # it was the folder of this file
    for name in IMPORTS:
        importlib.import_module(name)
    del sys.path[0]


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    connection.settimeout(5)
    size, files, _, _ = socket.recv_fds(connection, SIZE.size, 3)
    left, parts = SIZE.unpack(size)[0] if len(size) == SIZE.size else 0, []
    while left:
        parts.append(connection.recv(min(left, 1 << 20)))
        if not parts[-1]:
            break
        left -= len(parts[-1])
    connection.settimeout(None)
    return json.loads(b"".join(parts)), files


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to make a group of its own
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, socket.socket]) -> None:
    """Tell the stand-ins of processes that have ended how."""
    for pid, connection in list(children.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del children[pid]
            with suppress(OSError):
                connection.send(SIZE.pack(status))
            connection.close()


def _become(request: dict[str, Any], files: list[int], added: dict[str, str]) -> NoReturn:
    """In the forked process: be what was asked for."""
    import atexit
    import ctypes
    import threading
    import traceback

    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = request["arguments"][1 if request["arguments"][0] == "-m" else 0]
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, os.fsencode(program.rpartition("/")[2].rpartition("pipeline.")[2])[:15], 0, 0, 0)
    for fd, file in enumerate(files):
        os.dup2(file, fd)
        os.close(file)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(added | request["environment"])
    with suppress(OSError):  # to less niceness than the server's, which not everybody may
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    _threads()
    code: Any = 0
    try:
        _run(request["arguments"])
    except SystemExit as error:
        code = error.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end: the server's is not reached
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _threads() -> None:
    """OpenMP read its number of threads when it was loaded."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def _run(arguments: list[str]) -> None:
    import runpy

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]))
    stand_in(sys.argv[1:])
