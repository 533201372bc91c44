"""The plan: order, fingerprints, what is there already and resources. Pure: neither Ray nor a GPU is needed.

Its numbers (rows, steps, memory, disk) are in estimate.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import RunFolder, product, read_manifest
from pipeline.spec import Cluster, Spec
from stages import Generate, Stage, own
from stages.base import Resources, workers_range
from stages.data.encode import DATA_VERSION
from stages.data.prepare import options_key, sources_key
from stages.rl.stage import RLStage
from stages.storage import address, use
from stages.training.deepspeed import deepspeed_config
from stages.training.stage import TrainStage

State = Literal["cached", "resume", "run"]
# Config that cannot change what a stage makes.
NOT_IN_FINGERPRINT = {
    "data", "model", "models", "deepspeed", "gates", "logging_steps", "save_steps", "save_total_limit", "report_to",
    "max_dropped", "workers", "push_to_hub", "hub_private_repo",
}  # fmt: skip


@dataclass(frozen=True)
class PlannedStage:
    name: str
    stage: Stage
    inputs: dict[str, list[str]]  # field -> stages.NAME, folder or hub id
    needs: list[str]  # names of the stages that must be done before
    fingerprint: str
    state: State
    resources: Resources
    why: str


@dataclass(frozen=True)
class Plan:
    spec: Spec
    folder: RunFolder
    stages: list[PlannedStage] = field(default_factory=list)  # in an order that can be carried out

    def __getitem__(self, name: str) -> PlannedStage:
        return next(s for s in self.stages if s.name == name)


def make_plan(spec: Spec) -> Plan:
    """What would be done, in order. Reads the data files (for their hashes) and the run folder, changes nothing."""
    own.use(spec.folder)
    folder = RunFolder(use(spec.storage) / spec.name)
    stages: list[PlannedStage] = []
    for name in order(spec):
        stage: Stage = spec.stages[name]
        inputs, needs = spec.references(name), spec.upstream(name)
        before = {p.name: p for p in stages}
        resources = resources_for(stage, spec.cluster)
        fingerprint = fingerprint_of(spec, stage, inputs, {n: before[n].fingerprint for n in needs})
        changed = [n for n in needs if before[n].state != "cached"]
        state: State
        if folder.find(name, fingerprint):
            state, why = "cached", "unchanged" + made_with_others(folder, name, fingerprint, resources)
        elif folder.was_started(name, fingerprint):
            state, why = "resume", "interrupted; goes on where it was"
        else:
            state = "run"
            why = (
                "not made yet"
                if folder.manifest(name) is None
                else "its inputs change"
                if changed
                else "it or its data changed"
            )
        stages.append(PlannedStage(name, stage, inputs, needs, fingerprint, state, resources, why))
    return Plan(spec, folder, stages)


def order(spec: Spec) -> list[str]:
    """Names so that each comes after what it needs, otherwise in the order of the spec."""
    done: list[str] = []

    def add(name: str) -> None:
        if name not in done:
            for needed in spec.upstream(name):
                add(needed)
            done.append(name)

    for name in spec.stages:
        add(name)
    return done


def made_with_others(folder: RunFolder, name: str, fingerprint: str, resources: Resources) -> str:
    """A note where an artifact was made with another number of workers: with other steps, that is, of the same data."""
    published = folder.find(name, fingerprint)
    manifest = read_manifest(published) if published else None
    workers = (manifest or {}).get("workers", resources.workers)
    if workers == resources.workers:
        return ""
    return f"; made with {workers} workers" if workers > 1 else "; made with 1 worker"


def fingerprint_of(spec: Spec, stage: Stage, inputs: dict[str, list[str]], upstream: dict[str, str]) -> str:
    """Hash of all that decides the artifact: config, data, inputs, seed, template, and the stage's version.

    Workers say how it is made, not what: an interrupted training is found again, and goes on, with another number of them.
    """
    config = _strip(stage.model_dump(mode="json", exclude_unset=True))
    key = {
        "kind": stage.kind,
        "version": [stage.version, DATA_VERSION],
        "config": config,
        "deepspeed": deepspeed_config(getattr(stage, "deepspeed", None)),  # what the file says, not where it lies
        "data": data_key(stage, upstream),
        "inputs": {
            name: [upstream[r.removeprefix("stages.")] if r.startswith("stages.") else model_key(r) for r in refs]
            for name, refs in inputs.items()
        },
        "seed": spec.seed,
        "chat_template": spec.template,
    }
    if functions := [*stage.functions(), *([stage.kind] if own.is_named(stage.kind) else [])]:
        key["functions"] = [own.key(name) for name in functions]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def data_key(stage: Stage, upstream: dict[str, str]) -> list[dict[str, Any]]:
    """What identifies the stage's data: files by their contents, a dataset that is made by its stage's fingerprint."""
    return [
        {"made": upstream[source.made_by], **options_key(source)} if source.made_by else sources_key([source])[0]
        for source in stage.sources()
    ]


def with_made_data(plan: Plan, stage: Stage) -> Stage | None:
    """The stage with folders in the place of the stages that make its data; None where one of them is not made yet."""
    sources = []
    for source in stage.sources():
        if source.made_by is not None:
            made = plan[source.made_by]
            published = plan.folder.find(made.name, made.fingerprint)
            if published is None:
                return None
            source = source.model_copy(update={"path": address(product(published, made.stage.produces))})
        sources.append(source)
    return stage.model_copy(update={"data": sources}) if sources else stage


def _strip(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _strip(v) for k, v in config.items() if k not in NOT_IN_FINGERPRINT}
    return [_strip(v) for v in config] if isinstance(config, list) else config


def model_key(model: str) -> Any:
    """What identifies a model that is not made by the run: small files by content, weights by size and date."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    key = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        stat = file.stat()
        small = stat.st_size < 32 << 20
        key[file.name] = hashlib.sha256(file.read_bytes()).hexdigest() if small else [stat.st_size, stat.st_mtime_ns]
    return key


# ------------------------------------------------------------------------------------------------ resources


def machine_gpus() -> int:
    """GPUs of this machine that may be used, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    return len([p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()])


def resources_for(stage: Stage, cluster: Cluster, gpus: Callable[[], int] = machine_gpus) -> Resources:
    """A stage's workers: what it says, else what the cluster section says, else what this machine has."""
    here = gpus()
    each = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else min(here, 1)
    many = isinstance(stage, TrainStage | Generate)
    given = getattr(stage, "workers", None) or (cluster.workers if many else 1) or max(here, 1)
    fewest, most = workers_range(given) or (1, 1)
    if not isinstance(stage, TrainStage) or isinstance(stage, RLStage):
        most = fewest  # the prompts of an iteration are cut for all workers
    return Resources(
        workers=most,
        at_least=fewest if fewest < most else None,
        stall_minutes=cluster.stall_minutes,
        gpus_per_worker=each if stage.uses_ray else 0,
        cpus_per_worker=cluster.cpus_per_worker or 1,
    )


def machine_resources() -> dict[str, float]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(machine_gpus()), "memory": float(memory)}


# ------------------------------------------------------------------------------------------------ the record


def lineage(plan: Plan, planned: PlannedStage) -> dict[str, list[dict[str, Any]]]:
    """The manifest's `inputs`: what each field referred to, down to the fingerprint."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, refs in planned.inputs.items():
        out[name] = []
        for ref in refs:
            if ref.startswith("stages."):
                made = plan[ref.removeprefix("stages.")]
                path = product(plan.folder.stage(made.name), made.stage.produces)
                out[name].append({"stage": made.name, "fingerprint": made.fingerprint, path.name: str(path)})
            else:
                out[name].append({"model": ref})
    return out


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
