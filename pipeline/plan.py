"""The plan: order, fingerprints, what is there already, rows, steps and resources. Pure: neither Ray nor a GPU is needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import RunFolder, read_json
from pipeline.spec import Cluster, Spec
from stages import Stage
from stages.base import Resources
from stages.data.encode import DATA_VERSION
from stages.data.prepare import sources_key
from stages.data.source import DataSource, count_rows
from stages.training.deepspeed import deepspeed_config
from stages.training.feed import Shares
from stages.training.stage import TrainStage

State = Literal["cached", "resume", "run"]
# Config that cannot change what a stage makes.
NOT_IN_FINGERPRINT = {
    "data", "model", "models", "deepspeed", "gates", "logging_steps", "save_steps", "save_total_limit", "report_to",
    "max_dropped",
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
    folder = RunFolder(Path(spec.storage) / spec.name)
    stages: list[PlannedStage] = []
    for name in order(spec):
        stage: Stage = spec.stages[name]
        inputs, needs = spec.references(name), spec.upstream(name)
        before = {p.name: p for p in stages}
        resources = resources_for(stage, spec.cluster)
        fingerprint = fingerprint_of(spec, stage, inputs, {n: before[n].fingerprint for n in needs}, resources)
        changed = [n for n in needs if before[n].state != "cached"]
        state: State
        if folder.find(name, fingerprint):
            state, why = "cached", "unchanged"
        elif folder.was_started(name, fingerprint):
            state, why = "resume", "interrupted; goes on from its last checkpoint"
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


def fingerprint_of(
    spec: Spec, stage: Stage, inputs: dict[str, list[str]], upstream: dict[str, str], resources: Resources
) -> str:
    """Hash of all that decides the artifact: config, data, inputs, seed, template, workers, and the stage's version."""
    config = _strip(stage.model_dump(mode="json", exclude_unset=True))
    key = {
        "kind": stage.kind,
        "version": [stage.version, DATA_VERSION],
        "config": config,
        "deepspeed": deepspeed_config(getattr(stage, "deepspeed", None)),  # what the file says, not where it lies
        "data": sources_key(stage.sources()),
        "inputs": {
            name: [upstream[r.removeprefix("stages.")] if r.startswith("stages.") else model_key(r) for r in refs]
            for name, refs in inputs.items()
        },
        "seed": spec.seed,
        "chat_template": spec.template,
        "workers": resources.workers,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


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
    workers = getattr(stage, "workers", None)
    if workers is None:
        trains = isinstance(stage, TrainStage)
        workers = (cluster.workers or max(here, 1)) if trains else 1
    return Resources(
        workers=workers, gpus_per_worker=each if stage.uses_ray else 0, cpus_per_worker=cluster.cpus_per_worker or 1
    )


# ------------------------------------------------------------------------------------------------ `raylign plan`


def describe(plan: Plan, available: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """`plan --json`: what is known of each stage; numbers that cannot be known before its inputs are made are null."""
    return [_describe(plan, planned, available or machine_resources()) for planned in plan.stages]


def machine_resources() -> dict[str, float]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(machine_gpus()), "memory": float(memory)}


def lacking(resources: Resources, available: dict[str, float]) -> list[str]:
    """What there is too little of for a stage's workers, in words."""
    need = {"CPU": resources.cpus_per_worker * resources.workers, "GPU": resources.gpus_per_worker * resources.workers}
    return [f"needs {n} {k}, there are {available.get(k, 0):g}" for k, n in need.items() if n > available.get(k, 0)]


def _describe(plan: Plan, planned: PlannedStage, available: dict[str, float]) -> dict[str, Any]:
    stage, resources = planned.stage, planned.resources
    published = plan.folder.find(planned.name, planned.fingerprint)
    manifest = read_json(published / "manifest.json") if published else None
    rows = manifest["rows"] if manifest else None
    tokens, steps = (manifest["tokens"], manifest["steps"]) if manifest else (None, None)
    why = planned.why
    if manifest is None and stage.sources() and stage.kind != "init":
        rows = expected_rows(stage.sources())
        if isinstance(stage, TrainStage) and rows is not None:
            steps = planned_steps(stage, rows, resources.workers)
    memory = training_memory(plan, planned) if isinstance(stage, TrainStage) else None
    lacks = lacking(resources, available)
    total = (memory or 0) * resources.workers
    if not resources.gpus_per_worker and total > available.get("memory", total):
        lacks.append(f"needs {total / 2**30:.1f} GiB of memory, there are {available['memory'] / 2**30:.1f}")
    return {
        "name": planned.name,
        "kind": stage.kind,
        "inputs": [ref for refs in planned.inputs.values() for ref in refs],
        "fingerprint": planned.fingerprint,
        "state": planned.state,
        "rows": rows,
        "tokens": tokens,
        "steps": steps,
        "workers": resources.workers,
        "memory_per_worker_bytes": memory,
        "fits": not lacks,
        "why": "; ".join([*lacks, why]),
    }


def expected_rows(sources: list[DataSource]) -> int | None:
    """Rows to train on, by what the files have, weights and splits; None where that takes a download.

    What filters, duplicates and the ledger take away is known only once the data is prepared.
    """
    counts = [(count_rows(source), source) for source in sources]
    known = [count * (1 - (source.eval or 0)) * source.weight for count, source in counts if count is not None]
    return round(sum(known)) if len(known) == len(counts) else None


def planned_steps(stage: TrainStage, rows: int, workers: int) -> int | None:
    """Optimiser steps over `rows` rows, with the trainer's defaults where nothing is said; None before they are packed."""
    given = stage.train.given()
    shares = Shares(workers, given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1))
    if given.get("max_steps", -1) > 0:
        return int(given["max_steps"])
    if given.get("packing"):
        return None
    default_epochs = 1.0 if stage.kind in ("reward", "dpo") else 3.0
    return -int(-given.get("num_train_epochs", default_epochs) * shares.steps(rows) // 1)


def training_memory(plan: Plan, planned: PlannedStage) -> int | None:
    """Bytes of weights, gradients and AdamW's two moments in float32 on one worker; activations are not counted.

    ZeRO (Rajbhandari et al. 2020, section 5) divides by the workers: stage 1 the moments, 2 the gradients too, 3 the
    weights too. None where the model is not there yet.
    """
    weights = parameters(plan, planned.inputs["model"][0])
    if weights is None:
        return None
    stage, workers = planned.stage, planned.resources.workers
    assert isinstance(stage, TrainStage)
    lora = stage.lora()
    trained = weights if lora is None else 0  # an adapter is small beside its model
    zero = int(stage.deepspeed[-1]) if stage.deepspeed and stage.deepspeed.startswith("zero") else 0
    reference = weights if stage.kind == "dpo" and lora is None else 0
    return (
        4 * (weights + reference) // (workers if zero == 3 else 1)
        + 4 * trained // (workers if zero >= 2 else 1)
        + 8 * trained // (workers if zero >= 1 else 1)
    )


def parameters(plan: Plan, model: str) -> int | None:
    """Parameters of a model, from the headers of its safetensors, or from its config where it is made by the run."""
    if model.startswith("stages."):
        made = plan[model.removeprefix("stages.")]
        if published := plan.folder.find(made.name, made.fingerprint):
            return _count_safetensors(published / "model")
        if made.stage.kind == "init":
            return _count_from_config(made.stage)
        return parameters(plan, made.inputs["model"][0])
    return _count_safetensors(Path(model)) if Path(model).is_dir() else None


def _count_safetensors(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for n in tensor["shape"]:
                    size *= n
                total += size
    return total


def _count_from_config(stage: Any) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**({"model_type": "llama", "vocab_size": stage.tokenizer.vocab_size} | stage.config))
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def lineage(plan: Plan, planned: PlannedStage) -> dict[str, list[dict[str, Any]]]:
    """The manifest's `inputs`: what each field referred to, down to the fingerprint."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, refs in planned.inputs.items():
        out[name] = []
        for ref in refs:
            if ref.startswith("stages."):
                stage = ref.removeprefix("stages.")
                model = str(plan.folder.stage(stage) / "model")
                out[name].append({"stage": stage, "fingerprint": plan[stage].fingerprint, "model": model})
            else:
                out[name].append({"model": ref})
    return out


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
