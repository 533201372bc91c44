"""What a run folder holds, read so that a damaged one still gives what is left of it.

A folder may be half written, of another version, or somebody else's. What cannot be read is named in `Run.problems` and left
out; everything that is handed on has the type it is said to have, and no number in it is infinite or not a number.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import NAME, RunFolder, use_run
from stages.errors import DataError
from stages.storage import mirrored, pull

SAMPLES_AT_MOST = 4000  # lines that are used of a file of samples, half of them the last
TAIL = 4096  # bytes of events.jsonl that are looked at for how far a stage is


@dataclass
class StageRead:
    """A stage: its record in run.json, its manifest where it is published, and what lies in its folder.

    Numbers that are not finite stand in `manifest` and `metrics` as the texts `NaN`, `Infinity` and `-Infinity`.
    """

    name: str
    kind: str
    state: str
    record: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # the published one, or the one in which it is being made
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)  # of one that is not published; else it is in the manifest
    done: float | None = None  # share of what it is at, 0 to 1
    doing: str = ""

    @property
    def details(self) -> dict[str, Any]:
        return mapping(self.manifest.get("details"))

    @property
    def seconds(self) -> float | None:
        return finite(self.record.get("seconds")) or finite(self.manifest.get("seconds"))

    @property
    def inputs(self) -> list[str]:
        """What it is made from: names of stages, and models from elsewhere as they were given."""
        given = self.record.get("inputs")
        if isinstance(given, list):
            return list(dict.fromkeys(str(ref).removeprefix("stages.") for ref in given))
        refs = [ref for refs in mapping(self.manifest.get("inputs")).values() for ref in mappings(refs)]
        return list(dict.fromkeys(str(ref.get("stage") or ref.get("model")) for ref in refs))


@dataclass
class Run:
    name: str
    state: str
    path: Path
    address: str  # as a command of ours wants it
    started: float | None = None
    finished: float | None = None
    stages: dict[str, StageRead] = field(default_factory=dict)
    sweeps: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    spec: str = ""
    problems: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ values of any type


def finite(value: Any) -> float | None:
    """A number, None for everything else, integers that no float can hold among it."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return value if known else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else []


def readable(value: Any) -> Any:
    """JSON data without numbers that JSON has not: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: readable(each) for key, each in value.items()}
    return [readable(each) for each in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------ files


def text_of(path: Path, problems: list[str], where: str) -> str | None:
    """A file's text, None where there is none; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_text(errors="replace") if path.is_file() else None
    except OSError as error:
        problems.append(f"{where} cannot be read: {error.strerror or error}")
        return None


def json_of(path: Path, problems: list[str], where: str) -> dict[str, Any]:
    """A file's JSON object; empty where there is none, which is told unless the file is not there."""
    text = text_of(path, problems, where)
    if text is None:
        return {}
    try:
        value = readable(json.loads(text))
    except (ValueError, RecursionError) as error:
        problems.append(f"{where} is not whole: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{where} is not what is written there: a mapping is wanted, it is {type(value).__name__}")
        return {}
    return value


def lines_of(path: Path, problems: list[str], where: str, at_most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl; lines that are none are counted. The last one may be torn: it is being written."""
    text = text_of(path, problems, where)
    lines = [(i, line) for i, line in enumerate((text or "").split("\n"), 1) if line.strip()]
    if at_most is not None and len(lines) > at_most:
        lines = lines[: at_most // 2] + lines[-at_most // 2 :]
    out, broken = [], []
    for i, line in lines:
        try:
            value = readable(json.loads(line))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            out.append(value)
        else:
            broken.append(i)
    if lines and broken == [lines[-1][0]] and not (text or "").endswith("\n"):
        broken = []
    if broken:
        problems.append(f"{where}: {len(broken)} of {len(lines)} lines cannot be read, the first is line {broken[0]}")
    return out


# ------------------------------------------------------------------------------------------------ the run


def open_run(path: str | Path) -> RunFolder:
    """The run of a folder or address, also where its record is damaged or missing.

    Raises:
        DataError: there is nothing of a run in it.
    """
    try:
        return RunFolder.open(path)
    except DataError:
        folder = use_run(str(path))
        seen = [(folder / "run.json").is_file(), (folder / "spec.yaml").is_file(), bool(_published(folder))]
        if sum(seen) < 2:
            raise
        return RunFolder(folder)


def _published(folder: Path) -> list[str]:
    """Stages that have a manifest, oldest first."""
    found = [m for m in folder.glob("*/manifest.json") if NAME.fullmatch(m.parent.name)]
    return [m.parent.name for m in sorted(found, key=lambda m: (m.stat().st_mtime, m.parent.name))]


def read_run(folder: RunFolder, whole: bool = True) -> Run:
    """All that is shown of a run; its metrics and samples only where it is to be the `whole`."""
    problems: list[str] = []
    path = folder.path
    record = path / "run.json"
    state = json_of(record, problems, "run.json")
    if not record.is_file():
        problems.append("run.json is missing: states and times are those of the stages' manifests")
    run = Run(
        str(state.get("name") or path.resolve().name), str(state.get("state") or "unknown"), path,
        folder.address if mirrored(path) else str(path.absolute()),
        finite(state.get("started")), finite(state.get("finished")), problems=problems,
    )  # fmt: skip
    stages = state.get("stages")
    if stages is not None and not isinstance(stages, dict):
        problems.append("run.json: `stages` is not a mapping")
    if not isinstance(stages, dict):
        stages = {name: {} for name in _published(path)}
        if stages:
            problems.append(f"its stages are those that have a manifest: {', '.join(stages)}")
    for name, given in stages.items():
        if NAME.fullmatch(name) is None:
            problems.append(f"run.json: {name!r} is no name of a stage; it is left out")
        else:
            run.stages[name] = _read_stage(folder, name, mapping(given), problems, whole)
    run.sweeps = _sweeps(state.get("sweeps"), problems)
    spec = text_of(path / "spec.yaml", problems, "spec.yaml")
    if spec is None:
        problems.append("spec.yaml is missing")
    run.spec = spec or ""
    return run


def _read_stage(folder: RunFolder, name: str, record: dict[str, Any], problems: list[str], whole: bool) -> StageRead:
    fingerprint = str(record.get("fingerprint") or "")
    manifest = json_of(pull(folder.stage(name) / "manifest.json"), problems, f"{name}/manifest.json")
    if record and manifest and manifest.get("fingerprint") != record.get("fingerprint"):
        manifest = {}  # an older artifact stands there
    kind = record.get("kind") or manifest.get("kind") or "unknown"
    state = record.get("state") or ("done" if manifest else "unknown")
    stage = StageRead(name, str(kind), str(state), record, manifest)
    if state in ("done", "cached") and not manifest:
        problems.append(f"{name}: {state}, but its manifest is missing")
    work = folder.work(name, fingerprint) if NAME.fullmatch(fingerprint or "-") else None
    stage.folder = folder.stage(name) if manifest else work if work is not None and work.is_dir() else None
    if stage.folder is not None and whole:
        stage.metrics = lines_of(stage.folder / "metrics.jsonl", problems, f"{name}/metrics.jsonl")
        stage.samples = lines_of(stage.folder / "samples.jsonl", problems, f"{name}/samples.jsonl", SAMPLES_AT_MOST)
        if not manifest:
            stage.ledger = json_of(stage.folder / "ledger.json", problems, f"{name}/ledger.json")
        if state in ("running", "interrupted", "failed"):
            stage.done, stage.doing = progress(stage.folder / "events.jsonl")
    return stage


def progress(events: Path) -> tuple[float | None, str]:
    """How far a stage is, from the end of its events: (share, `train 400 of 1,500 steps`)."""
    if not events.is_file():
        return None, ""
    with events.open("rb") as file:
        file.seek(max(0, events.stat().st_size - TAIL))
        tail = file.read().decode(errors="replace").splitlines()
    phase, count = "", ""
    share: float | None = None
    for event in _objects(tail):
        if "phase" in event:
            phase, count, share = str(event["phase"]), "", None
        done, total = finite(event.get("done")), finite(event.get("total"))
        if done is not None and total:
            share, count = min(1.0, max(0.0, done / total)), f"{done:,} of {total:,} {event.get('unit', '')}s"
    return share, f"{phase} {count}".strip()


def _objects(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the first is cut, the last may be torn
        if isinstance(value, dict):
            yield value


def _sweeps(given: Any, problems: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    out = {}
    for name, variants in mapping(given).items():
        settings = list(variants.values()) if isinstance(variants, dict) else []
        if settings and all(isinstance(s, dict) and s.keys() == settings[0].keys() for s in settings):
            out[name] = variants
        else:
            problems.append(f"run.json: the sweep {name} cannot be read; it is left out")
    return out
