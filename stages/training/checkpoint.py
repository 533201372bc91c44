"""A checkpoint's folder: how it becomes visible, how it is known to be whole, which one training goes on from.

checkpoints/.saving-12/       half-made; nobody takes it for a checkpoint
checkpoints/checkpoint-12/    complete: it got its name by one rename, when everything in it was on the disk
    complete.json             step, position in the data, workers, ZeRO stage, identity of the model; size and hash of each file
    trainer_state.json        transformers' TrainerState
    weights.pt, state.pt      without DeepSpeed: the weights that train; optimizer, scheduler
    global_step12/, latest    with DeepSpeed: its own format, a shard for each worker
    rank-0.pt, rank-1.pt ...  each worker's random numbers, and the sums of metrics that are not logged yet
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.storage import mirrored, names, pull, push, remove, stored
from stages.training.feed import Position

COMPLETE = "complete.json"
SAVING = ".saving-"


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself (`complete.json`)."""

    step: int  # optimiser steps done
    epoch: int  # in which training stands, counted from 0
    row: int  # rows of that epoch already trained
    workers: int
    zero: int | None  # ZeRO stage; None without DeepSpeed
    identity: str  # of the model: architecture, names and shapes of its parameters
    files: dict[str, tuple[int, str]]  # path in the folder -> bytes, SHA-256

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.row, self.step)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint and where it lies."""

    path: Path
    record: Record
    universal: bool = False  # its ZeRO shards are rewritten for another number of workers


def saved(path: Path) -> Saved | None:
    """The checkpoint in a folder; None where it is not complete."""
    try:
        value = json.loads((path / COMPLETE).read_text())
        files = {name: (int(size), str(digest)) for name, (size, digest) in value.pop("files").items()}
        return Saved(path, Record(**value, files=files))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or not what is written below
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The folders named as checkpoints, oldest first."""
    found = [
        p
        for p in pull(folder, only=f"*/{COMPLETE}").glob("checkpoint-*")
        if p.name.removeprefix("checkpoint-").isdigit() and p.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def damage(checkpoint: Saved) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes and hashes; None if nothing is. In an object store, which takes a
    file whole or not at all, by their sizes: who reads it may be on another node."""
    if mirrored(checkpoint.path):
        there = stored(checkpoint.path)
        sizes = ((name, size, there.get(name)) for name, (size, _) in checkpoint.record.files.items())
        return next((_size_is(name, has, size) for name, size, has in sizes if has != size), None)

    def wrong(item: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, digest) = item
        path = checkpoint.path / name
        has = path.stat().st_size if path.is_file() else None
        if has != size:
            return _size_is(name, has, size)
        return None if hash_file(path) == digest else f"{name} has changed since it was written"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        return next((found for found in pool.map(wrong, checkpoint.record.files.items()) if found), None)


def _size_is(name: str, has: int | None, size: int) -> str:
    return f"{name} is missing" if has is None else f"{name} has {has} bytes of {size}"


def best_of(folder: Path, state: Any, step: int) -> tuple[str, ...]:
    """The checkpoints that pruning has to spare when that of `step` is made; `state` is transformers' TrainerState, which takes
    it for the best if it is. While the best is also the newest, the one that was the best before stays: without the newest,
    should it be damaged, training goes on from an older one, to which that was the best.
    """
    before = state.best_model_checkpoint
    if state.best_global_step == step:
        state.best_model_checkpoint = str(folder / f"checkpoint-{step}")
    return tuple(sorted({path for path in (before, state.best_model_checkpoint) if path is not None}))


def find_best(folder: Path, state: Any, wanted: bool) -> None:
    """Have a TrainerState that was read from a checkpoint name the best checkpoint only if that is there.

    Args:
        wanted: the best model is what will be exported, so a best without its checkpoint is none: another has to be found.
    """
    best = folder / f"checkpoint-{state.best_global_step}"
    state.best_model_checkpoint = str(best) if saved(best) is not None else None
    if wanted and state.best_model_checkpoint is None:
        state.best_metric = state.best_global_step = None


def newest_sound(folder: Path, say: Callable[[str], None]) -> Saved | None:
    """The checkpoint to go on from; what cannot be used is told to `say`. None: from the start."""
    found = checkpoints(folder)
    for path in reversed(found):
        checkpoint = saved(path)
        why = f"no readable {COMPLETE}" if checkpoint is None else damage(checkpoint)
        if checkpoint is not None and why is None:
            say(f"training goes on from {path.name}")
            return checkpoint
        say(f"{path.name} is damaged ({why}) and is not used")
    if found:
        say("no checkpoint is sound: training starts from the beginning")
    return None


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(making: Path, record: Record) -> Path:
    """Give a whole checkpoint its name, once everything in it is on the disk. One of the same step is replaced."""
    sync(*(path for name in record.files if (path := making / name).is_file()))  # others are on other nodes
    (making / COMPLETE).write_text(json.dumps(asdict(record), indent=1))
    sync(making / COMPLETE, *(p for p in making.rglob("*") if p.is_dir()), making)
    target = making.with_name(f"checkpoint-{record.step}")
    if target == making:  # of an object store, where nothing can be renamed: it is whole when COMPLETE is there
        push(making, only=[COMPLETE])
        return target
    if target.exists():  # a damaged one, or training would not have come here again
        aside = making.with_name(f"{making.name}-replaced")
        os.replace(target, aside)
        os.replace(making, target)
        shutil.rmtree(aside)
    else:
        os.replace(making, target)
    sync(target.parent)
    return target


def sync(*paths: Path) -> None:
    """Wait until files, and names in folders, are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prune(folder: Path, keep: int | None, best: Collection[str] = ()) -> None:
    """Remove all complete checkpoints but the newest `keep` and those whose paths are in `best`."""
    if keep is None:
        return
    spared = {Path(path).name for path in best}
    complete = [p for p in checkpoints(folder) if (p / COMPLETE).is_file()]
    for path in complete[: max(0, len(complete) - max(keep, 1))]:
        if path.name not in spared:
            aside = path.with_name(f".removed-{step_of(path)}")  # so that one removed half-way is not taken for damaged
            remove(path, first=COMPLETE)
            os.replace(path, aside)
            shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Remove what an interrupted run left half-made or half-removed. Only while nothing writes there."""
    halves = set(folder.glob(".*-*"))
    if mirrored(folder):  # where nothing has another name while it is made
        halves |= {folder / name for name in names(folder) if COMPLETE not in names(folder / name)}
    for path in halves:
        remove(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def forget(folder: Path, *, unfinished: bool = False) -> None:
    """Remove from this node's mirror the checkpoints that the object store does not have, or no longer.

    Args:
        unfinished: also those after the newest whole one, which workers may be writing. Only while nothing writes there.
    """
    if not mirrored(folder):
        return
    whole = {int(name.split("/")[0].removeprefix("checkpoint-")) for name in stored(folder) if _is_whole(name)}
    newest = max(whole, default=-1)
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and step_of(path) not in whole and (unfinished or step_of(path) < newest):
            shutil.rmtree(path, ignore_errors=True)  # another worker of this node may be at it


def _is_whole(name: str) -> bool:
    """Whether a path in the folder of checkpoints is that of a record of one."""
    return re.fullmatch(rf"checkpoint-\d+/{re.escape(COMPLETE)}", name) is not None
