"""Workers under watch: which of them stand still, and what the driver asks of all (to stop at a checkpoint).

Every worker sends a beat a second to an actor beside the driver: its step, where its training stands in the code, and how many
blocks of files it has copied. A worker whose beats stop, or never come, is stopped itself or cut off. Workers that all stand at
the same place for as long, and copy nothing, hang, in each other's collectives or in somebody's function; one that waits for
another which still moves does not. What hangs is named and ended: it is then a lost worker like any other (recovery.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.storage import blocks

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # of beats: they come from a thread that has nothing else to do


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself."""

    rank: int
    pid: int
    node: str  # Ray's id of its node
    host: str
    step: int
    place: tuple[str, ...] = ()  # the frames its training stands in, the innermost last
    blocks: int = 0  # of files, copied so far: a checkpoint on its way, for which its training may wait
    events: str = ""  # lines of what it tells the terminal, where the driver's node does not see its files

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host})"


@dataclass
class Standing:
    """Who stands still, from beats and the times they came at."""

    workers: int = 0  # that are to be heard of
    heard: dict[int, tuple[float, Beat]] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    first: float = math.inf  # when one of them was: Ray Train starts all before any of them runs

    def note(self, beat: Beat, now: float) -> None:
        last = self.heard.get(beat.rank)
        if last is None or replace(last[1], events="") != replace(beat, events=""):
            self.moved[beat.rank] = now
        self.heard[beat.rank] = (now, beat)
        self.first = min(self.first, now)

    def leave(self, rank: int) -> None:
        """A worker is done."""
        self.left.add(rank)
        self.heard.pop(rank, None)
        self.moved.pop(rank, None)

    def stalled(self, now: float, bound: float) -> tuple[str, list[Beat]] | None:
        """(what is wrong, whose processes to end), or None while somebody moves. `bound`: seconds."""
        patience = min(bound, SILENT_SECONDS)
        silent = [beat for at, beat in self.heard.values() if now - at > patience]
        if silent:
            told = " and ".join(f"{beat} has not been heard of for {patience:g} s" for beat in silent)
            return f"{told}, since step {silent[0].step}: it is stopped, or its machine is cut off", silent
        if not self.heard:
            return None
        beats = [beat for _, beat in self.heard.values()]
        still = min(now - at for at in self.moved.values()) > bound
        missing = sorted(set(range(self.workers)) - self.heard.keys() - self.left)
        if missing and (
            still or now - self.first > max(bound, SILENT_SECONDS)
        ):  # imports take as long from a slow disk
            told = " and ".join(f"worker {rank} has never been heard of" for rank in missing)
            # Where its process is, nobody has said: it goes with the others'.
            return f"{told}, {now - self.first:.0f} s after others: it hangs, or its machine is cut off", beats
        if not still:
            return None
        # Of workers that wait for each other, the one that does not wait in a collective is the one to name.
        waits = [beat for beat in beats if not in_collective(beat.place)] or beats
        told = " and ".join(f"{beat} stands in {at(beat.place)}" for beat in waits)
        return f"nothing has moved for {bound:g} s, since step {beats[0].step}: {told}", beats


def in_collective(place: tuple[str, ...]) -> bool:
    return any("distributed_c10d" in frame or "deepspeed/comm" in frame for frame in place)


def at(place: tuple[str, ...]) -> str:
    """The innermost frame."""
    return place[-1] if place else "a place unknown"


def frames_of(thread: int) -> tuple[str, ...]:
    """Where a thread of this process stands."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ()
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
    return tuple(f"{f.name} ({f.filename}:{f.lineno})" for f in reversed(stack))


class Monitor:
    """The actor. Beats come in, and go back with what the driver asks."""

    def __init__(self, workers: int) -> None:
        self.standing = Standing(workers)
        self.pause = ""  # why all are to stop at a checkpoint
        self.events = ""

    def beat(self, beat: Beat) -> str:
        self.standing.note(beat, time.monotonic())
        self.events += beat.events
        return self.pause

    def leave(self, rank: int) -> None:
        self.standing.leave(rank)

    def stop_at_checkpoint(self, why: str) -> None:
        self.pause = why

    def look(self, bound: float) -> tuple[tuple[str, list[Beat]] | None, set[str], str]:
        """(who stands still, the nodes of all, lines of events since the last look)."""
        nodes = {beat.node for _, beat in self.standing.heard.values()}
        events, self.events = self.events, ""
        return self.standing.stalled(time.monotonic(), bound), nodes, events


class Pulse:
    """A worker's beats, sent by a thread until `end`. `pause` is why it is to stop at a checkpoint, if it is."""

    def __init__(self, monitor: Any, rank: int, driver: str, events: Path | None) -> None:
        import ray

        context = ray.get_runtime_context()
        self.monitor, self.rank = monitor, rank
        self.step: Callable[[], int] = lambda: 0  # optimiser steps done
        self.node, self.host = context.get_node_id(), ray.util.get_node_ip_address()
        self.watched, self.pause = threading.get_ident(), ""
        self.events = events if self.node != driver else None
        self._told = events.stat().st_size if events is not None and events.is_file() else 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, name="pulse", daemon=True)
        self._thread.start()

    def _send(self) -> None:
        import ray

        while not self._over.wait(BEAT_SECONDS):
            place = frames_of(self.watched)
            told = self._new_events()
            beat = Beat(self.rank, os.getpid(), self.node, self.host, self.step(), place, blocks(), told)
            try:
                self.pause = ray.get(self.monitor.beat.remote(beat))
            except ray.exceptions.RayError as error:  # the driver's node is gone; Ray ends this worker
                print(f"worker {self.rank} is not watched any more: {error}", flush=True)
                return

    def _new_events(self) -> str:
        if self.events is None or not self.events.is_file():
            return ""
        with self.events.open() as lines:
            lines.seek(self._told)
            new = lines.read()
            new = new[: new.rfind("\n") + 1]
        self._told += len(new.encode())
        return new

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self.monitor.leave.remote(self.rank)


@contextmanager
def beating(watch: tuple[Any, str] | None, rank: int, events: Path | None) -> Iterator[Pulse | None]:
    """A worker's pulse, where there is somebody to feel it: the monitor on the driver's node. `events` is sent along."""
    if watch is None:
        yield None
        return
    monitor, driver = watch
    pulse = Pulse(monitor, rank, driver, events)
    try:
        yield pulse
    finally:
        pulse.end()


@contextmanager
def watching(
    workers: int, stall_seconds: float, wanted: Callable[[set[str]], str], events: Path
) -> Iterator[tuple[tuple[Any, str], list[str]]]:
    """(what workers are given to be watched by, what was found to hang so far), while workers train.

    Args:
        workers: how many there are.
        stall_seconds: after which workers that do not move are ended.
        wanted: asked each second, of the nodes that workers are on: why they are to stop at a checkpoint, or nothing.
        events: the file that events of workers elsewhere are added to.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(driver, soft=False)
    monitor = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=here).remote(workers)
    found: list[str] = []
    over = threading.Event()

    def look() -> None:
        asked = ""
        while not over.wait(BEAT_SECONDS):
            stalled, nodes, lines = ray.get(monitor.look.remote(stall_seconds))
            if lines:
                with events.open("a") as out:
                    out.write(lines)
            if stalled is not None:
                what, beats = stalled
                found.append(what)
                print(what, flush=True)
                for beat in beats:
                    end_process(beat)
                    ray.get(monitor.leave.remote(beat.rank))
            if not asked and (asked := wanted(nodes)):
                print(f"workers stop at a checkpoint: {asked}", flush=True)
                ray.get(monitor.stop_at_checkpoint.remote(asked))

    def looking() -> None:
        try:
            look()
        except ray.exceptions.RayError as error:
            if not over.is_set():
                print(f"workers are not watched any more: {error}", flush=True)

    thread = threading.Thread(target=looking, name="watchdog", daemon=True)
    thread.start()
    try:
        yield (monitor, driver), found
    finally:
        over.set()
        ray.kill(monitor)
        thread.join(10)


def end_process(beat: Beat) -> None:
    """End a worker's process on its node; one that is stopped (SIGSTOP) too. A node that is gone takes it with it."""
    import signal

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(beat.pid, signal.SIGKILL)

    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    done = ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
    ray.wait([done], timeout=20)


def draining_nodes() -> set[str]:
    """Nodes that will be taken away soon (spot): Ray's own watcher asks in the same way, `ray.train.get_preemption_info` gives
    it only at a barrier of all workers."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())
