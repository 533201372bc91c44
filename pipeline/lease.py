"""Who carries out a run that lies in an object store, which has no locks: a file in the run's folder that is renewed meanwhile.

Whether a lease that is found is still renewed is seen by looking at it twice, so clocks need not agree. Two that begin in the
same moment both write, and the one whose file is still there a little later has it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from stages.errors import RaylignError, StageError
from stages.storage import address, look, put, remove

FILE = "lease.json"
RENEW_SECONDS = 10.0
PATIENCE_SECONDS = 45.0  # without a new one, after which its holder is taken for gone
SETTLE_SECONDS = 1.0  # in which another that began at the same time has written too


class Lease:
    """A lease that is held; `check` says whether it still is."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self.file, self.say, self.own = file, say, uuid.uuid4().hex
        self._beats, self._lost = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def _write(self) -> None:
        self._beats += 1
        here = {"host": socket.gethostname(), "process": os.getpid()}
        put(self.file, json.dumps({"id": self.own, "beat": self._beats, **here}))

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                found = look(self.file)
                if found is not None and (other := _read(found[0])).get("id") != self.own:
                    self._lost = _by(other)
                    return
                self._write()
            except StageError as error:  # the store may answer again; what the run itself wants of it fails by itself
                self.say(f"the lease was not renewed: {error}")

    def take(self) -> None:
        """
        Raises:
            RaylignError: another process began at the same time, and has it.
        """
        self._write()
        time.sleep(SETTLE_SECONDS)
        found = look(self.file)
        if found is None or _read(found[0]).get("id") != self.own:
            raise _taken(self.file, _read(found[0]) if found is not None else {})
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            StageError: another process has taken it, having heard nothing of this one for PATIENCE_SECONDS.
        """
        if self._lost:
            raise StageError(
                f"{address(self.file.parent)}: {self._lost} has taken over this run, since the store had not heard of this "
                f"process for {PATIENCE_SECONDS:.0f} s"
            )

    def give_back(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._lost:
            remove(self.file)


@contextmanager
def leased(folder: Path, say: Callable[[str], None]) -> Iterator[Lease]:
    """The lease of a run's folder in an object store.

    Raises:
        RaylignError: another process renews it.
    """
    file = folder / FILE
    began, first = time.monotonic(), look(file)
    if first is not None and not _is_gone(other := _read(first[0])):
        say(f"{_by(other)} may be carrying out this run: that is seen within {PATIENCE_SECONDS:.0f} s")
        while time.monotonic() - began < PATIENCE_SECONDS:
            time.sleep(1)
            now = look(file)
            if now is None:
                break
            if now[0] != first[0]:
                raise _taken(file, _read(now[0]))
    lease = Lease(file, say)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()


def is_leased(folder: Path) -> bool:
    """Whether the lease was renewed lately, by the clocks of this machine and of the store."""
    found = look(folder / FILE)
    return found is not None and time.time() - found[1] < PATIENCE_SECONDS + RENEW_SECONDS


def _read(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether its process was one of this machine, and is no more."""
    pid = lease.get("process")
    if lease.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    return pid == os.getpid() or not psutil.pid_exists(pid)


def _by(lease: dict[str, Any]) -> str:
    return (
        f"process {lease['process']} on {lease['host']}" if {"process", "host"} <= lease.keys() else "another process"
    )


def _taken(file: Path, other: dict[str, Any]) -> RaylignError:
    return RaylignError(
        f"{address(file.parent)}: {_by(other)} is carrying out this run; wait for it, or give this one another `name`"
    )
