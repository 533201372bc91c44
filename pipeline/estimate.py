"""`raylign plan` in numbers: rows, tokens, steps, epochs, memory and disk of each stage, and the advice that makes it fit.

From files and configs alone: nothing is started, no weights are read, no GPU is asked to do anything.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.advice import GIB, Training, advise, precision
from pipeline.artifacts import read_json, read_manifest
from pipeline.capacity import lacking, machine, needs_of
from pipeline.plan import Plan, PlannedStage, with_made_data
from pipeline.training_checks import gpus, with_defaults
from stages import Generate, Init
from stages.capacity import Capacity
from stages.data.prepare import Prepared, find_prepared
from stages.data.source import DataSource, count_rows, resolve_formats
from stages.data.tokenizer import load_tokenizer
from stages.errors import DataError
from stages.rl.stage import RLStage
from stages.storage import pull
from stages.training.architecture import fetch_config, read_config
from stages.training.deepspeed import deepspeed_config
from stages.training.dry_run import Unpredictable, dry_run
from stages.training.memory import Memory, both, optimizer_bytes
from stages.training.stage import TrainStage
from stages.training.tuning import adapter_options


@dataclass(frozen=True)
class Amount:
    """How much a stage trains on; None where it is not known before its inputs are made."""

    rows: int | None = None
    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    longest: int | None = None  # tokens of the longest row
    bytes: int | None = None  # of the prepared data


def describe(plan: Plan, available: Capacity | None = None) -> list[dict[str, Any]]:
    """`plan --json`: what is known of each stage; numbers that cannot be known before its inputs are made are null.

    Args:
        available: what the cluster has and can grow to; what this machine has if absent.
    """
    return [_describe(plan, planned, available or machine()) for planned in plan.stages]


def _describe(plan: Plan, planned: PlannedStage, available: Capacity) -> dict[str, Any]:
    stage, resources = planned.stage, planned.resources
    amount = amount_of(plan, planned)
    memory: Memory | None = None
    disk: int | None = None
    why, advice = [planned.why], []
    lacks = lacking(planned, available)
    if not lacks and planned.state != "cached" and (waits := available.grows_for(needs_of(planned))):
        why.append(waits)
    if isinstance(stage, TrainStage):
        try:
            training = training_of(plan, planned, amount)
            memory, disk = training.memory(), disk_bytes(stage, training, amount)
        except (Unpredictable, DataError) as error:
            why.append(f"memory is not known: {error}")
        else:
            if memory.estimated:
                why.append(f"activations are estimated ({memory.estimated})")
            if (room := room_of(plan, planned, available)) is not None and memory.total > room:
                lacks.append(_too_much(memory, room, resources.gpus_per_worker > 0, resources.workers))
                if planned.state != "cached":
                    advice = [
                        {"change": a.change, "memory_per_worker_bytes": a.memory, "text": a.text}
                        for a in advise(training, room)
                    ]
    if planned.state != "cached" and (ranged := of_range(plan, planned)):
        why.append(ranged)
    if isinstance(stage, RLStage) and planned.state != "cached":
        why.append(iterations(stage, amount, resources.workers))
        if judges := stage.beside(resources.workers, planned.inputs).processes:
            why.append(f"answers are judged by {judges} more {'process' if judges == 1 else 'processes'}")
    if isinstance(stage, Generate) and planned.state != "cached":
        prompts = prompts_of(plan, stage)
        why.append(f"{'' if prompts is None else f'{prompts:,} '}prompts, {stage.samples} answers to each")
    return {
        "name": planned.name,
        "kind": stage.kind,
        "inputs": [ref for refs in planned.inputs.values() for ref in refs],
        "fingerprint": planned.fingerprint,
        "state": planned.state,
        "rows": amount.rows,
        "tokens": amount.tokens,
        "steps": amount.steps,
        "epochs": amount.epochs,
        "workers": resources.workers,
        "memory_per_worker_bytes": memory.total if memory else None,
        "memory": memory.parts() | {"moment": memory.moment, "host": memory.host} if memory else None,
        "disk_bytes": disk,
        "fits": not lacks,
        "why": "; ".join([*lacks, *why]),
        "advice": advice,
    }  # fmt: skip


def iterations(stage: RLStage, amount: Amount, workers: int) -> str:
    """`4,000 prompts, 36 iterations of 128 answers`."""
    shares, updates = stage.cut(workers)
    answers = f"of {shares.rows_per_step * stage.answers_to_each:,} answers"
    if stage.answers_to_each > 1:
        answers += f", {stage.answers_to_each} to a prompt"
    said = "iterations" if amount.steps is None else f"{amount.steps // updates:,} iterations"
    return f"{'' if amount.rows is None else f'{amount.rows:,} '}prompts, {said} {answers}"


def of_range(plan: Plan, planned: PlannedStage) -> str | None:
    """What `workers: 2..8` comes to for a stage."""
    asked = getattr(planned.stage, "workers", None) or plan.spec.cluster.workers
    if not isinstance(planned.stage, TrainStage) or not isinstance(asked, str):
        return None
    if planned.resources.at_least is not None:
        return f"with as many of {asked} workers as there is room for, in the steps of {planned.resources.workers}"
    return f"of {asked} workers {planned.resources.workers}: an iteration's prompts are cut for all workers"


def _too_much(memory: Memory, room: int, gpu: bool, workers: int) -> str:
    each = " for each worker" if workers > 1 else ""
    there = f"a GPU has {room / GIB:.1f}" if gpu else f"there are {room / GIB:.1f}"
    return f"needs {memory.total / GIB:.1f} GiB of memory{each}, {there}"


# ------------------------------------------------------------------------------------------------ how much


def amount_of(plan: Plan, planned: PlannedStage) -> Amount:
    """Rows, tokens and steps: of what is published; else of the data, if it is prepared; else by its files."""
    stage = planned.stage
    if published := plan.folder.find(planned.name, planned.fingerprint):
        made = read_manifest(published) or {}
        longest = None
        if isinstance(stage, TrainStage) and (path := (made.get("details") or {}).get("prepared")):
            data = read_json(Path(path) / "manifest.json")
            longest = longest_sequence(Prepared(Path(path), data)) if data else None
        epochs = _epochs(stage, made["rows"], made["steps"], planned.resources.workers)
        return Amount(made["rows"], made["tokens"], made["steps"], epochs, longest)
    ready = with_made_data(plan, stage)
    if ready is None or not ready.sources() or isinstance(stage, Init | Generate):
        return Amount()
    stage = ready
    workers = planned.resources.workers
    if isinstance(stage, TrainStage) and (found := prepared_amount(plan, planned, stage)) is not None:
        rows, tokens, longest, size = found
        steps = stage.planned_steps(rows, workers)
        return Amount(rows, tokens, steps, _epochs(stage, rows, steps, workers), longest, size)
    expected = expected_rows(stage.sources(), pairs_are_two=getattr(stage, "task", None) == "labelled")
    if not isinstance(stage, TrainStage) or expected is None:
        return Amount(expected)
    planned_for = planned_steps(stage, expected, workers)
    return Amount(expected, None, planned_for, _epochs(stage, expected, planned_for, workers))


def prompts_of(plan: Plan, stage: Generate) -> int | None:
    """Prompts that will be answered; None where it takes a download, or another stage, to know."""
    ready = with_made_data(plan, stage)
    expected = expected_rows(ready.sources()) if ready is not None else None
    return expected if expected is None or stage.max_prompts is None else min(expected, stage.max_prompts)


def prepared_amount(plan: Plan, planned: PlannedStage, stage: TrainStage) -> tuple[int, int, int | None, int] | None:
    """(rows, tokens, tokens of the longest row, bytes) of the data if it is prepared already; None if it is not.

    Packs that are not made yet are about as many as their tokens fill: best fit leaves next to nothing empty.
    """
    model = _tokenizer_of(plan, planned)
    if model is None:
        return None
    try:
        tokenizer = load_tokenizer(model, plan.spec.template)
    except DataError:  # a config is enough for a plan; a run says what is missing
        return None
    recipe = stage.recipe(tokenizer, plan.spec.seed)
    length = recipe.max_length or stage.max_length
    if (found := find_prepared(stage.data, recipe, plan.folder.prepared)) is not None:
        longest = length if recipe.packing else longest_sequence(found)
        return found.rows, found.tokens, longest, _folder_bytes(found.path)
    if not recipe.packing:
        return None
    loose = find_prepared(stage.data, replace(recipe, packing=False), plan.folder.prepared)
    if loose is None:
        return None
    rows = math.ceil(loose.tokens / length)
    return rows, loose.tokens, length, _folder_bytes(loose.path)


def longest_sequence(data: Prepared) -> int | None:
    """Tokens of the longest row; of answers, of the prompt with the longest of them; of prompts alone, of the longest."""
    longest = 0
    for shard in data.manifest["shards"]:
        names = pq.read_schema(pull(data.path / shard["file"])).names
        if "input_ids" in names:
            return int(data.manifest["longest"])
        sides = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in names]
        if "prompt_ids" not in names:
            return None
        table = pq.read_table(pull(data.path / shard["file"]), columns=["prompt_ids", *sides])
        prompt, *answers = (pc.list_value_length(table[name]) for name in ("prompt_ids", *sides))
        rows = pc.add(prompt, pc.max_element_wise(*answers)) if answers else prompt
        longest = max(longest, pc.max(rows).as_py() or 0)
    return longest or None


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _tokenizer_of(plan: Plan, planned: PlannedStage) -> str | None:
    """A folder with the tokenizer that the stage will have; None where it is not made or not downloaded yet.

    A trained model has the tokenizer of its base: prepared data is found again by what the tokenizer is, so another one
    finds nothing.
    """
    ref = planned.inputs["model"][0]
    while ref.startswith("stages."):
        made = plan[ref.removeprefix("stages.")]
        if published := plan.folder.find(made.name, made.fingerprint):
            return str(published / "model")
        if "model" not in made.inputs:
            return None
        ref = made.inputs["model"][0]
    return ref if Path(ref).is_dir() else None


def expected_rows(sources: list[DataSource], pairs_are_two: bool = False) -> int | None:
    """Rows to train on, by what the files have, weights and splits; None where that takes a download.

    `pairs_are_two`: a pair is split into two answers with a label.

    What filters, duplicates and the ledger take away is known only once the data is prepared.
    """
    total = 0.0
    for source in sources:
        count = count_rows(source)
        if count is None:
            return None
        each = 2 if pairs_are_two and resolve_formats([source]) == ["preference"] else 1
        total += each * count * (1 - (source.eval or 0)) * source.weight
    return round(total)


def planned_steps(stage: TrainStage, rows: int, workers: int) -> int | None:
    """Optimiser steps over rows that are not prepared yet; None where they are to be packed first."""
    packed = stage.train.given().get("packing") and not stage.most_steps(workers)
    return None if packed else stage.planned_steps(rows, workers)


def _epochs(stage: Any, rows: int | None, steps: int | None, workers: int) -> float | None:
    """How often each row is seen."""
    if not isinstance(stage, TrainStage) or not rows or steps is None:
        return None
    shares, updates = stage.cut(workers)
    return round(steps / (shares.steps(rows) * updates), 2)


# ------------------------------------------------------------------------------------------------ memory


def training_of(plan: Plan, planned: PlannedStage, amount: Amount) -> Training:
    """What decides the stage's memory.

    Raises:
        DataError: the config of its model is not to be had.
    """
    stage, resources = planned.stage, planned.resources
    assert isinstance(stage, TrainStage)
    gpu = resources.gpus_per_worker > 0
    config = config_of(plan, planned.inputs["model"][0])
    train = with_defaults(stage, gpu)
    checkpointing = stage.train.given().get("gradient_checkpointing", gpu and train["gradient_checkpointing"])
    deepspeed = deepspeed_config(stage.deepspeed, gpu=gpu)
    quantisation = stage.tuning.quantization() if stage.lora() is not None else None
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    length = min(n for n in (amount.longest or stage.max_length, stage.max_length, positions) if n)
    reinforced: dict[str, Any] = {}
    if isinstance(stage, RLStage):
        length = min(n for n in ((amount.longest or stage.max_length) + stage.max_new_tokens, positions) if n)
        reinforced = _reinforced(plan, planned, stage, length)
    return Training(
        config=json.dumps(config, sort_keys=True),
        kind=stage.kind,
        batch=train["per_device_train_batch_size"],
        length=length,
        accumulation=train["gradient_accumulation_steps"],
        workers=resources.workers,
        gpu=gpu,
        checkpointing=bool(checkpointing),
        attention="eager" if stage.attention == "eager" else "sdpa" if stage.attention == "auto" else stage.attention,
        lora=_adapter(stage, config),
        four_bits=quantisation is not None,
        double_quant=(quantisation or {}).get("bnb_4bit_use_double_quant", True),
        optim=str(train["optim"]),
        deepspeed=json.dumps(deepspeed) if deepspeed else None,
        **precision(stage.train.given(), gpu) | reinforced,
    )


def _reinforced(plan: Plan, planned: PlannedStage, stage: RLStage, length: int) -> dict[str, Any]:
    """The fields of `Training` that say what a worker has besides its policy."""
    beside = stage.beside(planned.resources.workers, planned.inputs)

    def config(ref: str) -> str:
        return json.dumps(config_of(plan, ref), sort_keys=True)

    return {
        "answer": min(stage.max_new_tokens, length - 1),
        "sampled": beside.sampled,
        "whole_logits": beside.whole_logits,
        "value": None if beside.value is None else config(beside.value),
        "rewards": tuple(map(config, beside.rewards)),
        "reference": beside.reference,
        "generation": stage.train.given().get("steps_per_generation"),
    }


def _adapter(stage: TrainStage, config: dict[str, Any]) -> str | None:
    """peft's options with the targets this model has, as JSON; None for full training."""
    options = stage.lora()
    if options is None:
        return None
    from stages.training.architecture import read_architecture

    try:
        architecture = read_architecture(config, reward=stage.kind == "reward")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"transformers cannot make a model of the config: {error}") from error
    return json.dumps(adapter_options(stage.tuning, options, architecture), sort_keys=True)


def config_of(plan: Plan, model: str) -> dict[str, Any]:
    """config.json of a model: of a folder, the hub's, or that of the stage that makes it.

    Raises:
        DataError: it is neither here, nor in the cache, nor given by the hub.
    """
    while model.startswith("stages."):
        made = plan[model.removeprefix("stages.")]
        if isinstance(made.stage, Init):
            return {"model_type": "llama", "vocab_size": made.stage.tokenizer.vocab_size} | made.stage.config
        model = made.inputs["model"][0]
    return read_config(model) or fetch_config(model)


def room_of(plan: Plan, planned: PlannedStage, available: Capacity) -> int | None:
    """Bytes a worker may use: a GPU's, or its part of the machine's; None where that is not known."""
    if planned.resources.gpus_per_worker:
        told = plan.spec.cluster.gpu_memory_gib
        return int(told * GIB) if told is not None else gpu_memory()
    memory = available.most("memory")
    return int(memory / planned.resources.workers) if 0 < memory < math.inf else None


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this machine, by its driver; None where there is none."""
    sizes = gpus("memory.total")  # MiB
    return int(min(sizes)) << 20 if sizes else None


# ------------------------------------------------------------------------------------------------ disk


def disk_bytes(stage: TrainStage, training: Training, amount: Amount) -> int | None:
    """What a stage writes at most: checkpoints (one more than are kept, while one is written), the model, prepared data.

    Prepared data that is not made yet is taken to be as large as the files it is made of. None where these are far away.
    """
    prepared = amount.bytes if amount.bytes is not None else _source_bytes(stage.sources())
    if prepared is None:
        return None
    policy = anatomy = dry_run(training.shape()).anatomy
    if (value := training.value_shape()) is not None:
        anatomy = both(dry_run(training.shape()), dry_run(value)).anatomy
    given = stage.arguments()
    each = 2 if training.shape().half else 4
    whole = each * anatomy.parameters
    state = optimizer_bytes(training.optim, anatomy)
    trained = 4 * anatomy.trainable
    checkpoint = state + (trained if training.lora is not None else whole)
    if training.deepspeed is not None:  # DeepSpeed keeps its own copy of the weights, and the float32 ones
        checkpoint += trained + (0 if training.lora is not None else whole)
    keep = given.get("save_total_limit") or 2
    every = given.get("save_steps") or 500
    made = 0 if given.get("save_strategy") == "no" else keep + 1
    if made and amount.steps is not None and every >= 1:
        made = min(made, max(1, math.ceil(amount.steps / every)))
    adapter = 4 * policy.trainable if training.lora is not None else 0
    return made * checkpoint + each * policy.parameters + adapter + prepared


def _source_bytes(sources: list[DataSource]) -> int | None:
    from stages.data import files
    from stages.data.source import find_files

    if any(source.made_by for source in sources):
        return None
    found = [file for source in sources for file in find_files(source)]
    if any(file.kind == "hf" or files.is_remote(file) for file in found):
        return None
    return sum(Path(file.path).stat().st_size for file in found)
