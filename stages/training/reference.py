"""What the reference says of the data: log-probabilities computed once, in parallel, before training, and kept.

The reference is by definition the model the stage was given: its weights name the result, with the data and what is computed
in, so another run, or the variants of a sweep, find it again. The prepared data is written once more with the columns that
training needs beside its rows, so the values cannot come to stand beside another row, and no rank holds a second model.
(TRL's own pass attaches them to other rows where a worker holds its share alone, and keeps the reference in memory.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from stages.base import StageContext
from stages.data.encode import digest
from stages.data.groups import Group, read_group
from stages.data.prepare import Prepared
from stages.data.shards import IDS
from stages.errors import DataError
from stages.pool import run_pool
from stages.storage import mirrored, names, pull, pull_model, push
from stages.training.answers import PAIR, answer_collator, score_answers
from stages.training.feed import length
from stages.training.job import TrainerParts, TrainJob

LABELLED = ("completion_ids",)
# columns of answers -> those of the reference's log-probabilities
REFERENCE: dict[tuple[str, ...], tuple[str, ...]] = {
    PAIR: ("ref_chosen_logps", "ref_rejected_logps"),
    LABELLED: ("ref_logps",),
}
KL = ("kl_completion_ids", "ref_kl_logps")  # an answer to another prompt, and what the reference says of it
VERSION = 2  # raised when the same data and model would give another result
LITTLE = 1e12  # parameters x tokens: some ten seconds of a core, about what it takes to start another process
BLOCK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class References:
    """What a stage wants of its reference: log-probabilities of the answers in `sides`.

    `ld_alpha` weighs tokens beyond the shorter answer (stages/training/answers.py). `kl`: each row gets an answer to another
    prompt besides, for an estimate of the KL to the reference: one of the next prompt's, cut so that it fits.
    """

    sides: tuple[str, ...]
    ld_alpha: float | None = None
    kl: bool = False


class Task(NamedTuple):
    """A row group to be done; `beyond` is the one whose answers its last rows may take for their KL."""

    file: str
    group: Group
    beyond: Group


def with_reference(
    data: Prepared,
    wanted: References,
    job: TrainJob,
    ctx: StageContext,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Prepared, dict[str, Any]]:
    """The data with the columns of `REFERENCE`, and of `KL` where wanted, and facts for the manifest.

    Row groups are those of the data, so its order is too.

    Raises:
        DataError: `kl`, and all rows have the same prompt.
    """
    gpu = ctx.resources.gpus_per_worker > 0
    computed = {name: job.arguments.get(name) for name in ("bf16", "fp16")} | {"gpu": gpu}
    if any(computed.values()):  # in half precision it matters what the weights are held in
        computed |= {"frozen": job.lora is not None, "deepspeed": job.deepspeed is not None}
    key = {
        "version": VERSION, "model": weights_hash(folder_of(job.model)), "quantization": job.quantization,
        "sides": wanted.sides, "ld_alpha": wanted.ld_alpha, "kl": wanted.kl, **computed,
    }  # fmt: skip
    target = data.path.with_name(f"{data.path.name}-reference-{digest(json.dumps(key, sort_keys=True))[:12]}")
    reused = pull(target / "manifest.json").is_file()
    if not reused:
        with FileLock(target.with_name(f".lock-{target.name}")):  # another variant of a sweep may want the same
            if not pull(target / "manifest.json").is_file():
                _make(data, wanted, job, ctx, target, key, progress)
    made = Prepared(target, json.loads((target / "manifest.json").read_text()))
    return made, made.manifest["reference"] | {"model": job.given_model or job.model, "reused": reused}


def _make(
    data: Prepared,
    wanted: References,
    job: TrainJob,
    ctx: StageContext,
    target: Path,
    key: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    started = time.time()
    work = target if mirrored(target) else target.with_name(f".making-{target.name}")  # as of prepare.py
    work.mkdir(parents=True, exist_ok=True)
    parts = {part: data.row_groups(part) for part in ("shards", "eval")}
    everything = parts["shards"] + parts["eval"]
    if wanted.kl:
        check_prompts_differ(everything)
    files = {
        part: [(f"{part}-{number:06}.parquet", group) for number, group in enumerate(groups)]
        for part, groups in parts.items()
    }
    tasks = [
        Task(str(work / file), group, following)
        for (file, group), following in zip(
            files["shards"] + files["eval"], everything[1:] + everything[:1], strict=True
        )
    ]
    there = names(work)
    left = [task for task in tasks if Path(task.file).name not in there]  # of an attempt that was interrupted
    options = {
        "job": job,
        "wanted": wanted,
        "max_length": data.manifest["key"]["recipe"]["max_length"],
        "gpu": ctx.resources.gpus_per_worker > 0,
    }
    weights = sum(file.stat().st_size for file in folder_of(job.model).glob("*.safetensors")) / 4
    little = 0 < weights * data.tokens < LITTLE  # 0: its weights are in files of another kind
    run_pool(ReferenceWorker, options, left, ctx=ctx, little=little, progress=progress)
    tokens = data.tokens
    seconds = round(time.time() - started, 3)
    reference = {"seconds": seconds, "tokens": tokens, "key": key}
    shards = {
        part: [{"file": file, "rows": rows, "groups": [rows]} for file, (_, _, rows) in files[part]] for part in files
    }
    manifest = data.manifest | shards | {"reference": reference}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if work != target:
        shutil.rmtree(target, ignore_errors=True)  # without a manifest: not ours
        os.rename(work, target)
    push(target, last="manifest.json")


def folder_of(model: str) -> Path:
    """Where a model's weights lie; those of the hub are fetched, as training would."""
    if Path(pull_model(model)).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["config.json", "model*.safetensors*"]))


def weights_hash(folder: Path) -> str:
    """What identifies a model: the content of its weights and config; where the weights are in files of other kinds, which the
    hub was not asked for, the commit that its snapshot is named by."""
    known = hashlib.blake2b(digest_size=16)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    if not files:
        known.update(str(folder).encode())
    for file in [folder / "config.json", *files]:
        if file.is_file():
            known.update(file.name.encode())
            with file.open("rb") as content:
                while block := content.read(BLOCK):
                    known.update(block)
    return known.hexdigest()


def check_prompts_differ(groups: Sequence[Group]) -> None:
    """Raises:
    DataError: all rows have the same prompt, so none has an answer to another one.
    """
    first = None
    for file, group, _ in groups:
        for prompt in read_group(file, group, ["prompt_ids"])["prompt_ids"].to_pylist():
            first = prompt if first is None else first
            if prompt != first:
                return
    raise DataError(
        "kto compares answers with answers to other prompts, and all rows have the same prompt; "
        "use `train: {loss_type: apo_zero_unpaired}`, which needs none, or data with more prompts"
    )


class ReferenceWorker:
    """The reference, loaded as the trainer loads its policy, and what it says of a row group. A worker of stages/pool.py."""

    def __init__(self, job: TrainJob, wanted: References, max_length: int | None, gpu: bool) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        from stages.data.tokenizer import load_tokenizer
        from stages.training.head import TrainedHead
        from stages.training.tuning import settle_quantized

        transformers.logging.set_verbosity_error()
        tokenizer = load_tokenizer(job.model, job.chat_template)
        parts = TrainerParts(job, tokenizer, None, None, not gpu)
        options = parts.kernels.load_options() | parts.quantization()
        on = parts.kernels.precision
        half = torch.bfloat16 if on["bf16"] else torch.float16 if on["fp16"] else None
        if half is not None and job.deepspeed is not None:  # has no autocast: all parameters are cast
            options, half = options | {"dtype": half}, None
        self.autocast = half
        model = AutoModelForCausalLM.from_pretrained(job.model, trust_remote_code=False, **options)
        if job.quantization is not None:
            settle_quantized(model)
        self.model = model.eval() if job.quantization is not None else model.eval().to("cuda" if gpu else "cpu")
        self.head, self.wanted, self.max_length = TrainedHead(model), wanted, max_length
        self.rows = job.arguments.get("per_device_train_batch_size", 8)
        layout = parts.layout(model)
        pad = tokenizer.pad_token_id
        self.collate = answer_collator(pad, wanted.sides, layout=layout, ld_alpha=wanted.ld_alpha)
        self.collate_kl = answer_collator(pad, KL[:1], layout=layout)

    def __call__(self, task: Task) -> int:
        """Write the row group with its new columns; the number of its rows."""
        table = _read(task.group)
        rows = table.to_pylist()
        if self.wanted.kl:
            others = answers_to_others(rows, lambda: _read(task.beyond).to_pylist(), self.max_length)
            table = table.append_column(KL[0], pa.array(others, IDS))
            rows = [row | {KL[0]: other} for row, other in zip(rows, others, strict=True)]
            table = table.append_column(KL[1], pa.array(self._logps(rows, self.collate_kl, 1)[0], pa.float32()))
        for name, values in zip(
            REFERENCE[self.wanted.sides], self._logps(rows, self.collate, len(self.wanted.sides)), strict=True
        ):
            table = table.append_column(name, pa.array(values, pa.float32()))
        Path(task.file).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{task.file}.{os.getpid()}.tmp"
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, task.file)
        push(Path(task.file))
        return len(rows)

    def _logps(self, rows: list[dict[str, Any]], collate: Any, sides: int) -> list[list[float]]:
        """(sides, rows), rows of like length together."""
        import torch

        order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
        out = torch.empty(sides, len(rows))
        device = self.model.device
        autocast = torch.autocast(device.type, self.autocast) if self.autocast is not None else nullcontext()
        with torch.no_grad(), autocast:
            for at in range(0, len(rows), self.rows):
                chosen = order[at : at + self.rows]
                batch = collate([rows[i] for i in chosen])
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                out[:, chosen] = score_answers(self.head, self.model, batch, sides=sides).logps.float().cpu()
        return out.tolist()


def _read(group: Group) -> pa.Table:
    file, number, _ = group
    return read_group(file, number)


def answers_to_others(
    rows: list[dict[str, Any]], beyond: Callable[[], list[dict[str, Any]]], max_length: int | None
) -> list[list[int]]:
    """For each row one of the answers to other prompts that follow, cut so that prompt and answer are not too long.

    Of a prompt's own answers the first takes the first of them, the second the second: in pairs the chosen one stands before
    the rejected one, and the KL is to be seen on both kinds.

    Args:
        beyond: the rows that follow these; asked for only where none of these is left.

    Raises:
        DataError: neither these nor those have another prompt.
    """
    out: list[list[int]] = []
    far: list[dict[str, Any]] | None = None
    begun = found = 0  # where the row's prompt and the next one begin
    for i, row in enumerate(rows):
        prompt = row["prompt_ids"]
        if prompt != rows[begun]["prompt_ids"]:
            begun = i
        found = max(found, i + 1)
        while found < len(rows) and rows[found]["prompt_ids"] == prompt:
            found += 1
        following: Iterable[dict[str, Any]] = itertools.islice(rows, found, None)
        if found == len(rows):
            far = beyond() if far is None else far
            following = itertools.chain(far, rows)  # the last of all: from the start again
        others = (r for r in following if r["prompt_ids"] != prompt)
        nearest = list(itertools.islice(others, i - begun + 1))
        if not nearest:
            raise DataError("kto: a thousand rows and more in a row have the same prompt; shuffle the data's files")
        answer = nearest[-1]["completion_ids"]
        out.append(answer if max_length is None else answer[: max(1, max_length - len(prompt))])
    return out


@contextmanager
def references_elsewhere(trl: ModuleType) -> Iterator[None]:
    """For the constructor of one of TRL's trainers, which is told that the references are computed already.

    It would hash all weights to name a cache, and run the model over its one-row placeholder. Holds for TRL 1.16;
    tests/test_contracts.py fails when it no longer does.
    """
    module: Any = trl
    trainer = next(getattr(module, name) for name in ("DPOTrainer", "KTOTrainer") if hasattr(module, name))
    hashed, precompute = module.hash_module, trainer._precompute_ref_logps
    module.hash_module = lambda model: ""
    trainer._precompute_ref_logps = lambda self, dataset, name, batch_size: dataset
    try:
        yield
    finally:
        module.hash_module, trainer._precompute_ref_logps = hashed, precompute
