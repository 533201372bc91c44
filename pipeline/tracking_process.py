"""Tells trackers on other machines of a run: reads the run folder every few seconds and sends what they have not got.

The runner starts `python -m pipeline.tracking_process`, sends the job as a line of JSON on standard input and keeps that pipe
open; when it closes, the run is over. A line on standard output is for the user; what the libraries say goes to
logs/tracking.log. What was sent is kept in tracking.json, so all of this can be ended at any moment, and begun again.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.artifacts import RunFolder, read_json, write_json
from pipeline.trackers import Point, State, Told, Tracker, redacted, trackers_of
from pipeline.tracking import HAS_IT_ALL, RECORD, Job, Lines, Tracked, key_of, numbers, read_record, remote

EVERY_S = 5.0
AFTER_A_FAILURE_S = 30.0
STATES: dict[str, State] = {
    "running": "running", "done": "done", "cached": "done", "failed": "failed", "interrupted": "interrupted",
}  # fmt: skip


class Sync:
    """One tracker and a run. `round` sends what it lacks; after an error the next one begins where this one got to."""

    def __init__(self, job: Job, name: str, tracker: Tracker, record: dict[str, Any], keep: Callable[[], None]) -> None:
        self.job, self.name, self.tracker, self.keep = job, name, tracker, keep
        self.folder = RunFolder(Path(job.folder))
        self.record = record
        if record.get("place") != tracker.place():  # ids of another server
            record.clear()
            record |= {"place": tracker.place(), "run": None, "state": None, "stages": {}}
        self.lines: dict[str, Lines] = {}
        self.opened: set[str] = set()
        self.where: str | None = None  # for the user to look at

    def round(self, state: dict[str, Any]) -> None:
        """Send what the tracker lacks of a run in this `state` (run.json)."""
        parent = self._open(self.record, Told(self.job.name, "pipeline", started=state.get("started")), None)
        self.where = self.tracker.url(parent)
        for name, stage in self.job.stages.items():
            now = STATES.get(state["stages"].get(name, {}).get("state", ""))
            if now is not None and self.name in stage.trackers:
                self._stage(name, stage, state["stages"][name], now, parent)
        ended = STATES.get(state["state"], "running")
        if ended != "running":
            gates = [verdict for record in state["stages"].values() for verdict in record.get("gates") or []]
            files = [self.folder.path / name for name in ("spec.yaml", "report.html")]
            self.tracker.end(
                parent,
                ended,
                state.get("finished") or time.time(),
                said_of_gates(gates),
                [f for f in files if f.is_file()],
            )
            self._now(self.record, ended)

    def _stage(self, name: str, stage: Tracked, facts: dict[str, Any], now: State, parent: str) -> None:
        key = key_of(name, stage)
        entry = self.record["stages"].setdefault(key, {"run": None, "at": [-1, 0], "state": None})
        if entry["state"] == now and now != "running":
            return
        run = self._open(
            entry,
            Told(name, stage.kind, stage.config, {"fingerprint": stage.fingerprint}, facts.get("started")),
            parent,
        )
        folder = self.folder.find(name, stage.fingerprint) or self.folder.work(name, stage.fingerprint)
        self._points(key, entry, run, folder)
        if now == "running":
            return
        manifest = read_json(folder / "manifest.json") or {}
        if point := summary(manifest, folder):
            self.tracker.points(run, [point])
        versions = {f"version.{library}": version for library, version in manifest.get("versions", {}).items()}
        told = {"error": redacted(facts["error"])} if facts.get("error") else {}
        ended = facts.get("started", 0) + facts.get("seconds", 0) - facts.get("earlier", 0) or time.time()
        self.tracker.end(run, now, ended, versions | said_of_gates(facts.get("gates") or []) | told, [])
        self._now(entry, now)

    def _open(self, entry: dict[str, Any], told: Told, parent: str | None) -> str:
        """The tracker's run, begun or gone on with once by this process."""
        if entry["run"] in self.opened:
            return str(entry["run"])
        if entry["run"] is None or not self.tracker.resume(entry["run"], told, parent):
            if parent is None:
                entry["stages"] = {}  # runs under one that is gone
            entry["run"] = self.tracker.begin(told, parent)
            if parent is not None:
                entry["at"] = [-1, 0]
        self.opened.add(entry["run"])
        self._now(entry, "running")
        return str(entry["run"])

    def _points(self, key: str, entry: dict[str, Any], run: str, folder: Path) -> None:
        lines = self.lines.pop(key, None) or Lines((entry["at"][0], entry["at"][1]))
        found = [Point(line["step"], line["time"], numbers(line)) for line in lines.read(folder)]
        if found:
            self.tracker.points(run, found)
            entry["at"] = list(lines.sent)
            self.keep()
        self.lines[key] = lines  # not where it failed: these lines are read again

    def _now(self, entry: dict[str, Any], state: State) -> None:
        if state != "running":
            self.opened.discard(entry["run"])
        entry["state"] = state
        self.keep()


def summary(manifest: dict[str, Any], folder: Path) -> Point | None:
    """What the manifest has besides the curves: seconds, rows, tokens, metrics of the whole stage."""
    if not manifest:
        return None
    drawn: set[str] = set()
    step, when = 0, time.time()
    for line in Lines().read(folder):
        drawn |= numbers(line).keys()
        step, when = line["step"], line["time"]
    metrics = {
        name: value
        for model, values in manifest.get("metrics", {}).items()
        for name, value in (
            numbers({**values, "model": model}) if isinstance(values, dict) else numbers({model: values})
        ).items()
    }
    whole = numbers({name: manifest.get(name) for name in ("rows", "tokens", "seconds", "workers")})
    return Point(step, when, {name: value for name, value in (metrics | whole).items() if name not in drawn})


def said_of_gates(verdicts: list[dict[str, Any]]) -> dict[str, str]:
    if not verdicts:
        return {}
    held = sum(bool(verdict["holds"]) for verdict in verdicts)
    said = "; ".join(f"{verdict['says']}: {'held' if verdict['holds'] else 'NOT MET'}" for verdict in verdicts)
    return {"gates": f"{held} of {len(verdicts)} held: {said}"}


class Follower:
    """A tracker that may be down, or let nobody in: the user is told once, and it is tried again."""

    def __init__(
        self, job: Job, name: str, record: dict[str, Any], keep: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.job, self.name, self.record, self.keep, self.say = job, name, record, keep, say
        self.sync: Sync | None = None
        self.told_where = self.told_down = False
        self.again = 0.0

    def round(self, state: dict[str, Any], last: bool) -> None:
        if not last and time.monotonic() < self.again:
            return
        try:
            if self.sync is None:
                tracker = trackers_of(self.name, self.job.project, Path(self.job.folder), self.job.name)
                self.sync = Sync(self.job, self.name, tracker, self.record, self.keep)
            self.sync.round(state)
        except Exception as error:  # of clients, networks and servers, of dozens of classes
            print(redacted(traceback.format_exc()), file=sys.stderr)
            self.again = time.monotonic() + AFTER_A_FAILURE_S
            if not self.told_down:
                self.told_down = True
                self.say(f"{self.name}: {short(error)}; the run goes on without it, it is tried again; {HAS_IT_ALL}")
        else:
            self.again = 0.0
            if not self.told_where and self.sync.where:
                self.told_where = True
                self.say(f"{self.name}: {self.sync.where}")


def short(error: Exception) -> str:
    said = redacted(str(error)).strip().splitlines() or [type(error).__name__]
    return said[0] if len(said[0]) <= 200 else f"{said[0][:200]} ..."


def main() -> int:
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # libraries print
        sent = json.loads(sys.stdin.readline())
        job = Job(**sent | {"stages": {name: Tracked(**stage) for name, stage in sent["stages"].items()}})
        return follow(job, lambda text: print(text, file=out))


def follow(job: Job, say: Callable[[str], None]) -> int:
    """Until the run is over. 0: every tracker has everything."""
    folder = Path(job.folder)
    record = read_record(folder / RECORD)
    keep = lambda: write_json(folder / RECORD, record)  # noqa: E731
    followers = [Follower(job, name, record.setdefault(name, {"stages": {}}), keep, say) for name in remote(job.stages)]
    over = False
    while not over:
        over = bool(select.select([sys.stdin], [], [], EVERY_S)[0])  # its end, that is
        state = read_json(folder / "run.json")
        if over and state["state"] == "running":
            return 0  # the runner was killed: the next one goes on
        for follower in followers:
            follower.round(state, last=over)
    return 0


if __name__ == "__main__":
    sys.exit(main())
