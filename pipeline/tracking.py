"""What trackers are told of a run, by the process that carries it out, from what the stages write into metrics.jsonl.

TensorBoard's files are written here, into runs/NAME/tensorboard/STAGE. MLflow and Weights & Biases are told by a process of
their own (tracking_process.py): they are heavy, they talk over networks, and one that hangs can be ended. What they have been
told is kept in tracking.json, so an interrupted run goes on in the same runs of theirs, and what they missed comes later.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import SHORT, RunFolder, read_json
from pipeline.event_file import EventFile
from pipeline.plan import Plan, PlannedStage
from stages.errors import DataError, Problem
from stages.storage import names, pull, push, remove
from stages.tracking import missing_tracker, trackers

RECORD = "tracking.json"
BOARDS = "tensorboard"
EVENTS = "events.out.tfevents"  # what TensorBoard takes for its own
# That the end of a run waits for its trackers; one that is down says so sooner.
PATIENCE_S = float(os.environ.get("RAYLIGN_TRACKER_SECONDS") or 60)
NOT_VALUES = ("step", "time")
HAS_IT_ALL = "metrics.jsonl of each stage has everything"


@dataclass(frozen=True)
class Tracked:
    """What is told of a stage besides its metrics."""

    kind: str
    fingerprint: str
    config: dict[str, Any]
    trackers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What tracking_process.py is sent, as JSON."""

    folder: str
    name: str
    project: str | None
    stages: dict[str, Tracked]


def tracked(plan: Plan, planned: PlannedStage) -> Tracked:
    train = getattr(planned.stage, "train", None)
    own = train.given().get("report_to") if train is not None else None
    config = planned.stage.model_dump(mode="json", exclude_unset=True) | {"seed": plan.spec.seed}
    named = trackers(plan.spec.report_to if own is None else own)
    return Tracked(planned.stage.kind, planned.fingerprint, flat(config), named)


def tracking_problems(plan: Plan) -> list[Problem]:
    """Trackers that cannot work, whoever is there to listen."""
    wanted = sorted({name for planned in plan.stages for name in tracked(plan, planned).trackers})
    found = [Problem("report_to", problem) for name in wanted if (problem := missing_tracker(name))]
    if not found and "mlflow" in wanted and not os.environ.get("MLFLOW_TRACKING_URI"):
        found = [Problem("report_to", "mlflow: set MLFLOW_TRACKING_URI to the address of its server")]
    return found


# ------------------------------------------------------------------------------------------------ numbers


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{train: {beta: 0.1}}` as `{"train.beta": 0.1}`; lists of mappings by their numbers, other lists as they are."""
    if isinstance(config, dict):
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(each, dict) for each in config):
        items = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {prefix: config}
    return {
        key: value for name, part in items for key, value in flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """What can be drawn of a line of metrics.jsonl; of an evaluation by model."""
    prefix = f"{values['model']}/" if isinstance(values.get("model"), str) else ""
    return {
        f"{prefix}{name}": float(value)
        for name, value in values.items()
        if name not in NOT_VALUES and isinstance(value, int | float) and not isinstance(value, bool)
    }


class Lines:
    """New lines of a stage's metrics.jsonl, each once, though a stage that goes on from a checkpoint writes some again.

    `sent` is (step, how many lines of that step) of what has been given out. Steps never go down within a file; when training
    goes back, a shorter file takes its place.
    """

    def __init__(self, sent: tuple[int, int] = (-1, 0)) -> None:
        self.sent = sent
        self._file = (0, 0)  # inode, bytes read
        self._at = (-1, 0)  # as `sent`, of the last line read

    def read(self, folder: Path) -> Iterator[dict[str, Any]]:
        try:
            file = (folder / "metrics.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._file[0] or stat.st_size < self._file[1]:
                self._file, self._at = (stat.st_ino, 0), (-1, 0)
            if stat.st_size == self._file[1]:
                return
            file.seek(self._file[1])
            whole, _, _ = file.read().rpartition(b"\n")  # the last line may be half written
            if not whole:
                return
            self._file = (stat.st_ino, self._file[1] + len(whole) + 1)
        for line in whole.split(b"\n"):
            entry = _entry(line)
            if entry is None:
                continue
            self._at = (entry["step"], self._at[1] + 1 if entry["step"] == self._at[0] else 1)
            if self._at > self.sent:
                self.sent = self._at
                yield entry


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line; None of one that was torn when the power went: its step is written again."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    told = isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("time"), int | float)
    return entry if told else None


# ------------------------------------------------------------------------------------------------ TensorBoard


class Board:
    """TensorBoard's file of a stage, written anew by each process that carries the run out: so no point is there twice."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.suffix = folder, f".{fingerprint[:SHORT]}"
        self.lines, self.file = Lines(), None  # type: tuple[Lines, EventFile | None]

    def is_written(self) -> bool:
        """Whether a file of this very stage is there, of an earlier process."""
        return any(name.startswith(EVENTS) and name.endswith(self.suffix) for name in names(self.folder))

    def follow(self, stage: Path) -> None:
        """Add what has come to the stage's metrics.jsonl."""
        for line in self.lines.read(stage):
            if self.file is None:
                self.file = self._begin(line["time"])
            self.file.add(line["time"], line["step"], numbers(line))

    def _begin(self, time: float) -> EventFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{EVENTS}.*"):
            old.unlink()
        remove(self.folder)
        own = f"{EVENTS}.{int(time)}.{os.getpid()}"  # a TensorBoard that is looking on sees a new file
        return EventFile(self.folder / f"{own}{self.suffix}", time)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
            push(self.folder)


# ------------------------------------------------------------------------------------------------ the run


class Tracking:
    """What the runner tells: a run begins, a stage is followed, a run ends. Nothing here fails or stalls a run.

    Args:
        say: tells the user a line, from any thread.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.say = plan, plan.folder, say
        self.stages = {planned.name: tracked(plan, planned) for planned in plan.stages}
        self.boards: dict[str, Board] = {}
        self.off = False
        self.process: subprocess.Popen[str] | None = None
        self.listener: threading.Thread | None = None

    def begin(self) -> None:
        """The run's record is written; what is cached and not told yet is told now."""
        for planned in self.plan.stages:
            if planned.state == "cached" and not self._board(planned.name).is_written():
                self.follow(planned.name, self.folder.stage(planned.name))
                self.finish(planned.name)
        pull(self.folder.path / RECORD)
        if any(lacks(self.folder, self.plan, name, self.stages) for name in remote(self.stages)):
            self._start()

    def follow(self, name: str, stage: Path) -> None:
        """Tell what has come of a stage; `stage`: its folder."""
        if self.off or "tensorboard" not in self.stages[name].trackers:
            return
        try:
            self._board(name).follow(stage)
        except OSError as error:
            self.off = True
            self.say(f"tensorboard: {error}; {HAS_IT_ALL}")

    def finish(self, name: str) -> None:
        """The stage's process has ended."""
        if board := self.boards.pop(name, None):
            board.close()

    def end(self, patience: float = PATIENCE_S) -> None:
        """The run has ended and its record says how; waits for trackers, but no longer than `patience` seconds."""
        for name in list(self.boards):
            self.finish(name)
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None and self.listener is not None
        process.stdin.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.say(
                f"trackers: not all had come there in {patience:.0f} s; {HAS_IT_ALL}, the same command sends the rest"
            )
        self.listener.join(1.0)
        push(self.folder.path / RECORD)

    def _board(self, name: str) -> Board:
        if name not in self.boards:
            self.boards[name] = Board(self.folder.path / BOARDS / name, self.stages[name].fingerprint)
        return self.boards[name]

    def _start(self) -> None:
        job = Job(str(self.folder.path), self.plan.spec.name, self.plan.spec.project, self.stages)
        with self.folder.log("tracking").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tracking_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, start_new_session=True,  # as the stages: Ctrl-C reaches the runner alone
            )  # fmt: skip
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asdict(job)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and its log says why
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(line.rstrip("\n"))
        if process.wait() not in (0, -signal.SIGKILL):
            self.say(f"trackers: their process has ended, see {self.folder.log('tracking')}; {HAS_IT_ALL}")


def remote(stages: dict[str, Tracked]) -> list[str]:
    """The trackers that a process of its own tells."""
    return sorted({name for stage in stages.values() for name in stage.trackers} - {"tensorboard"})


def key_of(name: str, stage: Tracked) -> str:
    return f"{name}-{stage.fingerprint[:SHORT]}"


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """What the trackers were told: by tracker `{"run", "place", "state", "stages": {key: {"run", "at", "state"}}}`.

    Nothing where it cannot be read: they are then told anew.
    """
    try:
        record = read_json(path)
    except DataError:
        return {}
    whole = isinstance(record, dict) and all(
        isinstance(r, dict) and isinstance(r.get("stages"), dict) for r in record.values()
    )
    return record if whole else {}


def lacks(folder: RunFolder, plan: Plan, tracker: str, stages: dict[str, Tracked]) -> bool:
    """Whether there is anything that a tracker has not been told."""
    told = read_record(folder.path / RECORD).get(tracker, {})
    return told.get("state") != "done" or any(
        planned.state != "cached" or told["stages"].get(key_of(planned.name, stage), {}).get("state") != "done"
        for planned in plan.stages
        if tracker in (stage := stages[planned.name]).trackers
    )
