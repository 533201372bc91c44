"""Carry a plan out: each stage in its own process, independent ones side by side, finished ones published."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import attempts
from pipeline.artifacts import read_json
from pipeline.capacity import fit_together, lacking
from pipeline.cluster import RayCluster
from pipeline.handoff import PROBES, Checker
from pipeline.hub import push_problems, push_stages
from pipeline.plan import (
    Plan,
    PlannedStage,
    lineage,
    with_made_data,
)
from pipeline.progress import Terminal
from pipeline.report import LiveReport
from pipeline.stage_log import telling_lines
from pipeline.stage_process import StageJob, send
from pipeline.tracking import PATIENCE_S, Tracking, tracking_problems
from pipeline.training_checks import run_problems
from stages import forkserver, own
from stages.base import Artifact, StageContext
from stages.errors import Problem, SpecError, StageError
from stages.evaluate import check_gate
from stages.storage import mirrored, push, use
from stages.training.launch import ENVIRONMENT
from stages.training.stage import TrainStage

LIBRARIES = ("raylign", "torch", "transformers", "trl", "peft", "deepspeed", "ray", "accelerate")
TRAINING = ("start", "start judges", "train", "recover")  # phases of a stage whose workers are wanted
SIDE_BY_SIDE = max(4, os.cpu_count() or 1)  # stages: each has a process here, wherever its workers are


def run_plan(plan: Plan, quiet: bool = False) -> None:
    """Carry a plan out.

    Raises:
        StageError: a stage failed. The others that could still run have run, and what they made is published.
    """
    use(plan.spec.storage)
    own.use(plan.spec.folder)
    with Terminal(quiet) as terminal, plan.folder.lock(terminal.note) as check_lock:
        run = _Run(plan, terminal, check_lock)
        try:
            run.carry_out()
        except OSError as error:  # a full disk, say
            if not run.state:
                raise  # nothing was started
            raise StageError(f"{error}; what was done stays, run the same command again to go on") from error


@dataclass
class Running:
    planned: PlannedStage
    process: subprocess.Popen[bytes]
    started: float
    work: Path
    environment: dict[str, str]
    log_from: int  # where in the log this attempt begins
    earlier: float  # seconds of the attempts before
    checker: Checker | None = None

    @property
    def seconds(self) -> float:
        """Of all attempts."""
        return round(self.earlier + time.time() - self.started, 2)


class _Run:
    def __init__(self, plan: Plan, terminal: Terminal, check_lock: Callable[[], None]) -> None:
        self.plan, self.terminal, self.folder, self.check_lock = plan, terminal, plan.folder, check_lock
        self.cluster = RayCluster()
        self.tracking = Tracking(plan, terminal.note)
        self.running: dict[str, Running] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.state: dict[str, Any] = {}
        self.report = LiveReport(self.folder, terminal.note)

    def carry_out(self) -> None:
        try:
            self._check()
        except BaseException:
            self.cluster.stop()
            raise
        self._begin()
        try:
            self.tracking.begin()
            os.environ[forkserver.OWNER] = str(os.getpid())
            if any(s.state != "cached" and s.stage.uses_ray for s in self.plan.stages):
                self.cluster.start()
            while self._start_ready() or self.running:
                self._watch()
                self.check_lock()
                self.cluster.check()
                self.cluster.grow_for([r.planned.resources for n, r in self.running.items() if self._trains(n)])
                self.report.follow()
                time.sleep(0.05)
            self.failed |= push_stages(self.plan, self.state["stages"], self.terminal.note)
            self._end("failed" if self.failed else "done")
        except BaseException as error:
            self._stop_all()
            self._end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            self.cluster.stop()
        if self.failed:
            raise StageError("\n".join(self.failed.values()))

    def _check(self) -> None:
        """What can never work is told before anything is started.

        Raises:
            SpecError: a stage needs more than there will ever be, or contradicts itself.
            StageError: no Ray answers; the run folder is not the same one on all nodes.
        """
        todo = [s for s in self.plan.stages if s.state != "cached" and s.stage.uses_ray]
        hint = "lower `workers`, or " + (
            "run it on a cluster (RAY_ADDRESS, or `raylign submit`)"
            if self.cluster.local
            else "let the cluster grow further"
        )
        problems = [
            Problem(f"stages.{s.name}", f"{what}; {hint}") for s in todo for what in lacking(s, self.cluster.capacity())
        ]
        problems += run_problems(self.plan, local=self.cluster.local) + tracking_problems(self.plan)
        problems += [] if problems else push_problems(self.plan)
        if problems:
            raise SpecError(problems, self.plan.spec.file)
        if todo and not mirrored(self.folder.path):
            self.cluster.check_shared(self.folder.path)

    # -- the record

    def _begin(self) -> None:
        self.terminal.plan((s.name, s.stage.kind, s.needs) for s in self.plan.stages)
        self.folder.save_spec(self.plan.spec.as_yaml())
        (self.folder.path / "logs").mkdir(exist_ok=True)
        stages = {}
        for planned in self.plan.stages:
            record: dict[str, Any] = {
                "kind": planned.stage.kind,
                "fingerprint": planned.fingerprint,
                "state": "waiting",
                "inputs": [ref for refs in planned.inputs.values() for ref in refs],
            }
            if planned.state == "cached":
                self.folder.recall(planned.name, planned.fingerprint)
                self.folder.fetch(planned.name)
                self.done.add(planned.name)
                record["state"] = "cached"
                self.terminal.stage(planned.name, "cached")
            stages[planned.name] = record
        self.state = {
            "name": self.plan.spec.name,
            "state": "running",
            "started": time.time(),
            "pid": os.getpid(),
            "stages": stages,
            "sweeps": self.plan.spec.sweeps,
        }
        self.folder.save_state(self.state)
        for planned in self.plan.stages:
            if planned.state == "cached":
                self._judge(planned)

    def _judge(self, planned: PlannedStage) -> bool:
        """Check a published evaluation's gates; one that does not hold fails the run, the artifact stays."""
        gates = getattr(planned.stage, "gates", [])
        if not gates:
            return True
        manifest = self.folder.manifest(planned.name) or {}
        try:
            verdicts = [check_gate(gate, manifest["metrics"], manifest["details"]["samples"]) for gate in gates]
        except StageError as error:  # a check of the user's
            verdicts = [{"metric": "check", "holds": False, "value": None, "says": str(error)}]
        broken = [verdict["says"] for verdict in verdicts if not verdict["holds"]]
        self._set(planned.name, gates=verdicts)
        if broken:
            cause = "gate not met: " + "; ".join(broken)
            self.failed[planned.name] = f"stage {planned.name}: {cause}"
            self._set(planned.name, state="failed", error=cause)
            self.terminal.stage(planned.name, "failed", why=cause)
        return not broken

    def _set(self, name: str, **values: Any) -> None:
        self.state["stages"][name].update(values)
        self.folder.save_state(self.state)
        if "state" in values:
            self.report.change()

    def _end(self, state: str) -> None:
        for record in self.state["stages"].values():
            if record["state"] == "waiting":
                record["state"] = "not run"
        self.state |= {"state": state, "finished": time.time()}
        self.folder.save_state(self.state)
        self.report.write(final=True)
        self.tracking.end(5.0 if state == "interrupted" else PATIENCE_S)

    # -- starting

    def _start_ready(self) -> bool:
        """Start every stage whose inputs are there and for which there is room. True if anything is left to wait for."""
        waiting = [s for s in self.plan.stages if self.state["stages"][s.name]["state"] == "waiting"]
        ready = [s for s in waiting if all(n in self.done for n in s.needs)]
        started: list[PlannedStage] = []
        for planned in ready:
            if self._fits(planned, [r.planned for r in self.running.values()] + started):
                started.append(planned)
        side_by_side = len(self.running) + len(started)
        for planned in started:
            self._start(planned, threads=max(1, (os.cpu_count() or 1) // side_by_side))
        return bool(started)

    def _fits(self, planned: PlannedStage, others: list[PlannedStage]) -> bool:
        if not others:
            return True  # alone: if it does not fit even so, it says what it lacks
        return len(others) < SIDE_BY_SIDE and fit_together([planned, *others], self.cluster.capacity())

    def _start(self, planned: PlannedStage, threads: int) -> None:
        name, work = planned.name, self.folder.work(planned.name, planned.fingerprint)
        work.mkdir(parents=True, exist_ok=True)
        earlier = attempts.begin(work)
        for file in ("result.json", "error.json", "events.jsonl"):
            (work / file).unlink(missing_ok=True)
        context = StageContext(
            name=name,
            work=work,
            prepared=self.folder.prepared,
            inputs={field: [self._artifact(ref) for ref in refs] for field, refs in planned.inputs.items()},
            seed=self.plan.spec.seed,
            resources=planned.resources,
            chat_template=self.plan.spec.template,
            local=self.cluster.local,
        )
        address = self.cluster.address() if planned.stage.uses_ray else None
        stage = with_made_data(self.plan, planned.stage)
        assert stage is not None, f"{name} was started before its data was made"
        config = stage.model_dump(exclude_unset=True) | {"kind": stage.kind}
        environment = self._environment(planned, threads)
        with self.folder.log(name).open("ab") as log:
            log_from = log.tell()
            process = subprocess.Popen(
                forkserver.command("-m", "pipeline.stage_process"),
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends its stages
            )  # fmt: skip
        assert process.stdin is not None
        send(StageJob(planned.stage.kind, config, context, address), process.stdin)
        self.running[name] = Running(planned, process, time.time(), work, environment, log_from, earlier)
        self._set(name, state="running", started=time.time(), workers=planned.resources.workers, earlier=earlier)
        self.terminal.stage(name, "running", resumed=planned.state == "resume")

    def _environment(self, planned: PlannedStage, threads: int) -> dict[str, str]:
        environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": str(threads)}
        environment |= self.cluster.environment(self.plan.spec.cluster.wait_minutes) | own.environment()
        if self.cluster.local:
            environment.pop("RAY_ADDRESS", None)
        elif "UV_RUN_RECURSION_DEPTH" in environment:  # Ray looks for `uv run` among a driver's ancestors
            environment[forkserver.WANTED] = "0"
        train = getattr(planned.stage, "train", None)
        if planned.resources.gpus_per_worker == 0 and self.cluster.local:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if planned.resources.gpus_per_worker == 0 and not (train and train.given().get("torch_compile")):
            # DeepSpeed's Muon optimizer is compiled when it is imported, used or not: a second and a half.
            environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        return environment

    def _artifact(self, ref: str) -> Artifact:
        if ref.startswith("stages."):
            return self.folder.artifact(ref.removeprefix("stages."))
        return Artifact(ref, "model", ref)

    # -- watching

    def _watch(self) -> None:
        for name, running in list(self.running.items()):
            self.terminal.follow(name, running.work / "events.jsonl")
            self.tracking.follow(name, running.work)
            if (waiting := self.terminal.waiting(name)) != self.state["stages"][name].get("waiting"):
                self._set(name, waiting=waiting)
            if running.checker is None and self.terminal.phase(name) in ("train", "model"):
                running.checker = Checker(self.folder.log(name), running.environment)
            code = running.process.poll()
            if code is None:
                continue
            del self.running[name]
            if running.process.stdin:
                running.process.stdin.close()
            self._finish(running, code)

    def _trains(self, name: str) -> bool:
        """Whether a stage is past its data: nodes for its workers are of use from then on."""
        return self.terminal.phase(name) in TRAINING

    def _finish(self, running: Running, code: int) -> None:
        name, planned, work = running.planned.name, running.planned, running.work
        self.tracking.follow(name, work)
        result = read_json(work / "result.json")
        if code != 0 or result is None:
            if running.checker is not None:
                running.checker.drop()
            self._fail(running, _cause(work, code, telling_lines(self.folder.log(name), running.log_from)))
            return
        checked: dict[str, Any] = {"problems": [], "warnings": [], "facts": {}}
        if planned.stage.produces in ("model", "reward model"):
            checker = running.checker or Checker(self.folder.log(name), running.environment)
            checked = checker.check(work / "model", planned.stage.produces, isinstance(planned.stage, TrainStage))
        if checked["problems"]:
            self._fail(running, "handoff refused: " + "; ".join(checked["problems"]))
            return
        seconds = running.seconds
        manifest = {
            "name": name,
            "kind": planned.stage.kind,
            "produces": planned.stage.produces,
            "fingerprint": planned.fingerprint,
            "config": planned.stage.model_dump(mode="json", exclude_unset=True),
            "seed": self.plan.spec.seed,
            "inputs": lineage(self.plan, planned),
            "handoff": {**checked["facts"], "warnings": checked["warnings"]},
            "workers": planned.resources.workers,
            "seconds": seconds,
            "versions": versions(),
            **result,
        }
        push(self.folder.log(name))
        self.folder.publish(name, manifest)
        self.tracking.follow(name, self.folder.stage(name))  # what another node wrote into a bucket has come with it
        self.tracking.finish(name)
        for file in ("result.json", "events.jsonl", attempts.FILE, PROBES):
            (self.folder.stage(name) / file).unlink(missing_ok=True)
        self.done.add(name)
        self._set(name, state="done", seconds=seconds)
        if self._judge(planned):
            self.terminal.stage(name, "done", seconds=seconds, metrics=manifest["metrics"])

    def _fail(self, running: Running, cause: str) -> None:
        name, log = running.planned.name, self.folder.log(running.planned.name)
        message = (
            f"stage {name} failed: {cause}\n  log: {log}\n  what was done stays; run the same command again to go on"
        )
        self.failed[name] = message
        push(log)
        seconds = running.seconds
        attempts.end(running.work, seconds)
        self._set(name, state="failed", error=cause, seconds=seconds)
        self.terminal.stage(name, "failed", seconds=seconds, why=cause)

    def _stop_all(self) -> None:
        for name, running in self.running.items():
            os.killpg(running.process.pid, signal.SIGTERM)
            if running.checker is not None:
                running.checker.drop()
            try:
                running.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
            self.state["stages"][name] |= {"state": "interrupted", "seconds": running.seconds}
        for running in self.running.values():  # when all are stopped: on a full disk nothing can be written
            attempts.end(running.work, running.seconds)


def _cause(work: Path, code: int, told: list[str]) -> str:
    """Why a stage failed; where it is not an error of ours, with the lines that its log has of it."""
    error = read_json(work / "error.json")
    lines = error["message"].strip().splitlines() if error is not None else []
    if error is not None and error["ours"]:
        return "\n".join(lines[:6])
    if lines:
        said = lines[0]
    elif code < 0:
        said = f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
    else:
        said = f"its process ended with exit code {code}"
    return "\n".join([said, *(f"  log: {line}" for line in told if said not in line)])


def versions() -> dict[str, str]:
    """Versions of what made an artifact."""
    out = {}
    for library in LIBRARIES:
        try:
            out[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            out[library] = "from source"
    return out
