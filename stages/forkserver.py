"""Python processes that begin with their imports done: forked from one that has imported torch, transformers and TRL.

    python -I -S stages/forkserver.py -m pipeline.stage_process

is `python -m pipeline.stage_process`, ten processor seconds earlier. Stages are started so, and Ray starts its worker processes
so (`py_executable` of its runtime environment). The process that is started, the stand-in, asks a server to fork; what is
forked has the stand-in's arguments, environment, folder and standard files. Signals are handed on to it; when one of the two
ends, so does the other, and with the same exit code.

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
import resource
import selectors
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

WANTED = "RAYLIGN_FORKSERVER"  # `0`: processes are started as ever; a process id: the owner, whatever OWNER says
OWNER = "RAYLIGN_FORKSERVER_OWNER"  # a process id; a worker of Ray's without one belongs to its node
IDLE_SECONDS = 120.0
LOOK_SECONDS = 1.0  # between two looks whether the owner is there
FAILED_SECONDS = 600.0  # after which imports that failed are tried again
# Without Ray, which reads RAY_JOB_ID when it is loaded: after these it takes a second. Ours stand on the others.
IMPORTS = (
    "pydantic", "ruamel.yaml", "jinja2.sandbox", "pyarrow.parquet", "pandas", "datasets", "transformers.trainer", "peft",
    "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "deepspeed", "stages.training.trainer", "stages.data.prepare",
)  # fmt: skip
# Of the environment, what those and Python read when they start: processes in which it differs have servers of their own.
READ_AT_START = (
    "ACCELERATE_", "ARROW_", "BNB_", "DO_NOT_TRACK", "DS_", "FSSPEC_", "GOMP_", "HF_", "HOME", "HUGGINGFACE_", "KMP_", "LANG",
    "LC_", "LD_", "MKL_", "OMP_WAIT_POLICY", "OPENBLAS_", "PATH", "PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONPATH",
    "PYTHONUNBUFFERED", "PYTHONUTF8", "PYTHONWARNINGS", "PYTORCH_", "TORCH", "TQDM_", "TRANSFORMERS_", "TRITON_", "TRL_",
    "USE_", "XDG_",
)  # fmt: skip
ACCELERATORS = ("nvidia", "kfd", "accel", "dxg", "davinci")  # in /dev
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # Linux: prctl(2)
NUMBER = struct.Struct(">I")  # a length, a process id, a wait status


def command(*arguments: str) -> list[str]:
    """What to start for `python ARGUMENTS`."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments]


def py_executable() -> str:
    """What Ray is to start worker processes with. On a node that does not have our code and this Python in the same places,
    that is the Python whose Ray it is. Ray gives it to a shell, with the path of its worker's script and the arguments."""
    script = (
        'if [ -x "$1" ] && [ -f "$2" ]; then exec "$1" -I -S "$2" "${@:3}"; fi; '
        'python="${3%/lib/python*}/bin/python3"; [ -x "$python" ] || python=python3; exec "$python" "${@:3}"'
    )
    return shlex.join(["bash", "-c", script, "python", sys.executable, os.path.abspath(__file__)])


# ------------------------------------------------------------------------------------------------ the stand-in


def stand_in(arguments: list[str]) -> NoReturn:
    """Have `python ARGUMENTS` forked, and end as it ends; become it, where it cannot be forked."""
    connection = None
    with suppress(OSError, ValueError):
        if _possible():
            connection = _forked(arguments)
    if connection is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # a pipe is to end when the forked process ends it
        os.dup2(null, fd)
    status = _number(connection)
    code = 1 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the forked process has left its own
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
    owner = next(filter(None, map(os.environ.get, (WANTED, OWNER, "RAY_RAYLET_PID"))), "")
    return int(owner) if owner.isdigit() else None


def _forked(arguments: list[str]) -> socket.socket | None:
    """A connection to the server that has forked a process for us; None where it could not.

    Raises:
        OSError: there can be no server, or it has gone.
    """
    request = json.dumps({
        "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "umask": _umask(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text(),
    }).encode()  # fmt: skip
    connection = _connected()
    if not connection.recv(1):  # it comes when all is imported: files that are sent before would stay open until then
        return None
    connection.sendmsg(
        [NUMBER.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    )
    connection.sendall(request)
    pid = _number(connection)
    if pid is None:
        return None
    for each in HANDED_ON:
        signal.signal(each, lambda number, _: _signal_group(pid, number))
    return connection


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _number(connection: socket.socket) -> int | None:
    """The next number that is told; None at the end."""
    told = connection.recv(NUMBER.size, socket.MSG_WAITALL)
    return NUMBER.unpack(told)[0] if len(told) == NUMBER.size else None


def _signal_group(pid: int, number: int) -> None:
    """To a forked process and what it has started."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # it has not come to make a group of its own, or is gone
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _connected() -> socket.socket:
    """Connected to the server, which is started where there is none.

    Raises:
        OSError: there can be none.
    """
    owner, folder = _owner(), _folder()
    began = _began(owner)
    if began is None:
        raise ProcessLookupError(owner)
    where = folder / f"{owner}-{began}-{_key()}.sock"
    with suppress(FileNotFoundError):
        if time.time() - where.with_suffix(".failed").stat().st_mtime < FAILED_SECONDS:
            raise ConnectionRefusedError(where)
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
    """Where servers listen. They run what they are asked to, so nobody else may ask; and processes have other numbers in a
    container that shares the folder above."""
    numbers = os.stat("/proc/self/ns/pid").st_ino
    folder = Path(tempfile.gettempdir()) / f"raylign-{os.getuid()}-{numbers}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(folder)
    return folder


def _began(pid: int | str | None) -> str | None:
    """When a process was started, which tells it from others of its number; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _key() -> str:
    """The same for processes that one server can serve: their interpreter, what it has installed, our code, the environment,
    and the namespaces (networks, mounts), of which a forked process has the server's."""
    installed = Path(sys.executable).parent.parent.glob("lib/python*/site-packages")
    code = Path(__file__).parent.rglob("*.py")
    newest = [max((file.stat().st_mtime_ns for file in files), default=0) for files in (installed, code)]
    read = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(READ_AT_START))
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))]
    decides = "\0".join([sys.executable, os.path.abspath(__file__), *map(str, newest), *read, *spaces])
    return hashlib.sha256(os.fsencode(decides)).hexdigest()[:16]


def _sweep(folder: Path) -> None:
    """Remove what servers of owners that are gone have left."""
    for file in folder.glob("*-*-*"):
        owner, began, _ = file.name.split("-")
        if _began(owner) != began:
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


@dataclass(frozen=True)
class Forked:
    """What a forked process is to be."""

    request: dict[str, Any]
    files: list[int]  # standard input, output and error
    added: dict[str, str]  # to the environment, by the imports
    server: int


def serve(where: Path) -> Forked:
    """Fork a process for whoever asks at the socket that is standard input, until the owner is gone. Returns in the forked
    processes only."""
    listening = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    before = dict(os.environ)
    try:
        _import()
    except BaseException:
        where.with_suffix(".failed").touch()
        raise
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    owner, began, _ = where.name.split("-")
    server, children = os.getpid(), dict[int, socket.socket]()  # process id -> its stand-in
    idle_since = time.monotonic()
    watched = selectors.DefaultSelector()
    for each in (woken, listening):
        watched.register(each, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in watched.select(LOOK_SECONDS)}
        if children or ready:
            idle_since = time.monotonic()
        if _began(owner) != began or time.monotonic() - idle_since > IDLE_SECONDS:
            for pid in children:
                _signal_group(pid, signal.SIGKILL)
            for kind in (".log", ".sock"):
                where.with_suffix(kind).unlink(missing_ok=True)
            os._exit(0)
        for pid, connection in children.items():
            if connection in ready:  # it says nothing, so it has gone
                watched.unregister(connection)
                _signal_group(pid, signal.SIGKILL)
        if woken in ready:
            woken.recv(4096)
            _reap(children, watched)
        if listening in ready and (asked := _accepted(listening)):
            connection, request, files = asked
            child = _fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                watched.close()
                for other in (listening, woken, wake, connection, *children.values()):
                    other.close()
                return Forked(request, files, added, server)
            for file in files:
                os.close(file)
            if child is None:
                connection.close()
                continue
            children[child] = connection
            watched.register(connection, selectors.EVENT_READ)
            with suppress(OSError):
                connection.send(NUMBER.pack(child))


def _import() -> None:
    import gc
    import importlib

    root = str(Path(__file__).parent.parent)
    sys.path[0] = root  # it was the folder of this file
    for name in IMPORTS:
        importlib.import_module(name)
    sys.path.remove(root)
    sys.stdout.flush()  # what is left in it would be written once more by each that is forked
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # the collector writes to what it looks at, and then the processes would not share it


def _accepted(listening: socket.socket) -> tuple[socket.socket, dict[str, Any], list[int]] | None:
    """A stand-in, what it asks for and its standard files; None where it has gone meanwhile."""
    files: list[int] = []
    connection = None
    try:
        connection, _ = listening.accept()
        connection.settimeout(5)
        connection.send(b"?")
        size, files, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
        left, parts = NUMBER.unpack(size)[0], []
        while left:
            parts.append(connection.recv(min(left, 1 << 20)))
            left -= len(parts[-1]) or left
        request = json.loads(b"".join(parts))
        connection.settimeout(None)
        return connection, request, files
    except (OSError, ValueError, struct.error):
        for file in files:
            os.close(file)
        if connection is not None:
            connection.close()
        return None


def _fork() -> int | None:
    """As os.fork; None where there is no room for one more process."""
    try:
        return os.fork()
    except OSError:
        return None


def _reap(children: dict[int, socket.socket], watched: selectors.BaseSelector) -> None:
    """Tell the stand-ins of processes that have ended how."""
    for pid, connection in list(children.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with suppress(KeyError):  # where the stand-in went first
                watched.unregister(connection)
            with suppress(OSError):
                connection.send(NUMBER.pack(status))
            connection.close()
            del children[pid]


# ------------------------------------------------------------------------------------------------ the forked process


def become(forked: Forked) -> NoReturn:
    """Be what was asked for."""
    import ctypes
    import runpy

    request = forked.request
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    module = request["arguments"][0] == "-m"
    program, *arguments = request["arguments"][module:]
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NAME, os.fsencode(program.rpartition("/")[2].rpartition("pipeline.")[2])[:15], 0, 0, 0)
    if os.getppid() != forked.server:  # it has gone before it could take us with it
        os._exit(1)
    for fd, file in enumerate(forked.files):
        os.dup2(file, fd)
        os.close(file)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(forked.added | request["environment"])
    with suppress(OSError):  # not everybody may be nicer than the server
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["open_files"]))
    _of_its_own()
    sys.argv = [program, *arguments]
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    sys.exit()


def _of_its_own() -> None:
    """What libraries decide when they are loaded: OpenMP its threads, numpy where its random numbers begin."""
    import numpy
    import torch

    numpy.random.seed()
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch.set_num_threads(max(1, int(threads)) if threads.isdigit() else len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        become(serve(Path(sys.argv[2])))
    stand_in(sys.argv[1:])
