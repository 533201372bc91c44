"""Checkpoints written while training goes on: a copy in host memory, then files from a thread of each worker.

Training is held up for the copy alone. Threads of different workers agree through the folder, never through the process
group, which belongs to the training loop: each worker leaves a list of its files, and the first worker's thread publishes
the checkpoint when all lists are there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

from stages.errors import StageError
from stages.storage import count_block, mirrored, names, pull, push, put, remove
from stages.training.checkpoint import SAVING, Record, hash_file, prune, publish, sync

Files = dict[str, tuple[int, str]]
PATIENCE = 1800.0  # seconds without a new file, after which another worker is given up


def snapshot(value: Any, seen: dict[Any, Any] | None = None) -> Any:
    """A copy in host memory of a state: training may go on changing the original. Tensors that are shared stay so."""
    import torch

    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        if not value.numel():
            return value.detach().to("cpu", copy=True)
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        made = {k: snapshot(v, seen) for k, v in value.items()}
        return made if type(value) is dict else _like(value, made)
    if isinstance(value, (list, tuple)):
        items = [snapshot(v, seen) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


def _like(original: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
    """An OrderedDict or defaultdict with other values."""
    out = copy.copy(original)
    out.update(made)  # type: ignore[attr-defined]
    return out


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:  # torch tells of a failed write, not of what failed
            self.error = error
            raise
        self.hash.update(data)
        self.size += written
        count_block()
        return written

    def flush(self) -> None:
        self.file.flush()


def write_state(path: Path, state: Any) -> tuple[int, str]:
    """`torch.save` to the disk; the file's bytes and SHA-256. A string is written as it is.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        out = _Hashed(file)
        try:
            if isinstance(state, str):
                out.write(state.encode())
            else:
                torch.save(state, out)  # type: ignore[arg-type]
        except RuntimeError:
            if out.error is not None:
                raise out.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return out.size, out.hash.hexdigest()


class Writer:
    """Writes one checkpoint at a time. `blocked` sums the seconds the training loop spent on checkpoints.

    Args:
        folder: where checkpoints lie.
        workers: how many write each of them; the one of `rank` 0 publishes.
        kept: files beside the checkpoints that must not be behind them (metrics, the consumption ledger).
    """

    def __init__(self, folder: Path, rank: int, workers: int, kept: tuple[Path, ...] = ()) -> None:
        self.folder, self.rank, self.workers, self.kept = folder, rank, workers, kept
        self.saved, self.blocked = 0, 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def making(self, step: int) -> Path:
        name = "checkpoint-" if mirrored(self.folder) else SAVING
        return self.folder / f"{name}{step}"

    def begin(
        self, step: int, states: dict[str, Any], record: dict[str, Any], keep: int | None, best: Collection[str]
    ) -> None:
        """Start to write this worker's `states` (path in the folder -> what to save), which nobody else may change.

        Args:
            record: of the checkpoint, without its files.
            keep: how many checkpoints stay, besides those of `best`.
        """

        def write() -> None:
            self.guarded(step, lambda: self._write(step, states, record, keep, best))

        self._thread = threading.Thread(target=self._remember, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def _remember(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def guarded(self, step: int, write: Callable[[], Any]) -> None:
        """Carry out a part of the writing; if it fails, the half-made checkpoint is removed.

        Raises:
            StageError: it could not be written.
        """
        try:
            write()
        except OSError as error:
            making = self.making(step)
            note = given_up(making)
            shutil.rmtree(making, ignore_errors=True)  # another may be at it; what is left is swept at the next start
            if isinstance(error, FileNotFoundError) and note.is_file():
                raise StageError(note.read_text()) from error
            message = told(error, step, self.folder)
            try:
                note.write_text(message)
                push(note)
            except OSError as second:
                message += f" ({second})"
            raise StageError(message) from error

    def check(self) -> None:
        """Raise in the training loop what went wrong in the thread."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being written (or so long)."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None
        self.check()

    # -- in the thread

    def _write(
        self, step: int, states: dict[str, Any], record: dict[str, Any], keep: int | None, best: Collection[str]
    ) -> None:
        making = self.making(step)
        making.mkdir(parents=True, exist_ok=True)
        files = {name: write_state(making / name, state) for name, state in states.items()}
        if self.rank:
            if mirrored(making):  # of which the first worker may be on another node, or have the same mirror
                push(making, only=files)
                put(making / own_list(self.rank), json.dumps(files))
            else:
                list_files(making, self.rank, files)
            return
        own = dict(files)
        for rank in range(1, self.workers):
            files |= listed_files(making, rank)
        for path in making.rglob("*"):  # what DeepSpeed wrote by itself: the name of the newest tag, scripts
            name = str(path.relative_to(making))
            if path.is_file() and name not in files:
                files[name] = own[name] = (path.stat().st_size, hash_file(path))
        push(making, only=own)
        for path in self.kept:
            if path.is_file():
                sync(path)
                push(path)
        publish(making, Record(**record, files=files))
        self.saved += 1
        prune(self.folder, keep, best)


def list_files(making: Path, rank: int, files: Files) -> None:
    """Tell the first worker that this one's files are on the disk."""
    sync(making)
    temporary = making / f".rank-{rank}.tmp"
    temporary.write_text(json.dumps(files))
    os.replace(temporary, making / own_list(rank))


def own_list(rank: int) -> str:
    return f".rank-{rank}.json"


def listed_files(making: Path, rank: int, patience: float = PATIENCE) -> Files:
    """Wait for another worker's files. (If that worker is gone, Ray Train ends this one.)

    Raises:
        FileNotFoundError: another worker has given up.
        TimeoutError: for `patience` seconds no worker has begun a file.
    """
    path = making / own_list(rank)
    there, since = names(making), time.monotonic()
    while not pull(path).is_file():
        if pull(given_up(making)).is_file():
            raise FileNotFoundError(f"another worker could not write to {making}")
        if time.monotonic() - since > patience:
            before, there, since = there, names(making), time.monotonic()
            if there == before:
                raise TimeoutError(f"worker {rank} has written nothing for {patience / 60:.0f} minutes")
        time.sleep(0.5 if mirrored(path) else 0.02)
    files = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_text()).items()}
    path.unlink()
    remove(path)
    return files


def sees(marker: Path, seconds: float = 5.0) -> bool:
    """Whether a file that another worker has just made is here, allowing for a network's delay."""
    deadline = time.monotonic() + seconds
    while not marker.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def given_up(making: Path) -> Path:
    """Where a worker that could not write its part says why."""
    return making.with_name(f"{making.name}.error")


def told(error: OSError, step: int, folder: Path) -> str:
    """Why a checkpoint could not be written, and what to do."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            left = f" ({shutil.disk_usage(folder).free / 2**30:.1f} GiB are free)"
        except OSError:
            left = ""
        return (
            f"the disk is full{left}: the checkpoint of step {step} could not be written to {folder}. Earlier checkpoints "
            "stay; make room, or set `storage` to another disk, and run the same command again"
        )
    return f"the checkpoint of step {step} could not be written to {folder}: {error}. Earlier checkpoints stay"
