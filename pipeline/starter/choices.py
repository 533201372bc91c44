"""What a spec says, chosen from data, model and machine; each choice with the words that explain it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.advice import LORA, Training
from pipeline.starter.base import Base, said
from pipeline.starter.machine import ASSUMED_GPU, Machine
from pipeline.starter.seen import Measured
from stages.training.deepspeed import deepspeed_config
from stages.training.dry_run import Unpredictable

GIB = 1 << 30
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WHOLE = 4096  # up to so many tokens every row is to fit; beyond, all but one in a hundred
FULL_AT_MOST = 1_500_000_000  # parameters of a model that is trained whole where it fits
FULL_ON_CPU = 100_000_000
TINY_STEPS = (300, 1500)
TINY_TOKENS, TINY_RATE = 2_000_000, 7_000  # of one training; a second, on two cores (LOG.md, 2026-11-22)
# learning rates, by kind and by what is trained. SFT with an adapter: ten times that of all weights (Schulman et al. 2025,
# "LoRA without regret"); preference losses: TRL's defaults, and ten times those.
RATES = {
    "sft": {"full": 2.0e-5, "adapter": 2.0e-4, "fresh": 2.0e-3},
    "dpo": {"full": 1.0e-6, "adapter": 1.0e-5, "fresh": 5.0e-5},
    "kto": {"full": 1.0e-6, "adapter": 1.0e-5, "fresh": 5.0e-5},
}
EPOCHS = {"sft": ((1000, 4), (10_000, 3), (100_000, 2)), "dpo": ((1000, 3),), "kto": ((1000, 3),)}
# bytes a parameter takes where no config is there to predict from: float32 weights, gradients and Adam's moments; bfloat16;
# four bits
ROUGHLY = {"full": 16.0, "lora": 2.1, "qlora": 0.7}


class Choice(NamedTuple):
    value: Any
    why: str


@dataclass(frozen=True)
class Way:
    """How the weights are trained, and on what."""

    method: str  # full, lora or qlora
    deepspeed: str | None
    batch: int  # rows a worker holds at a time
    workers: int
    gpu: bool
    checkpointing: bool = False
    elsewhere: bool = False  # it does not fit here: written for a GPU
    why: str = ""
    memory: int | None = None
    note: tuple[str, ...] = field(default=())

    @property
    def adapter(self) -> bool:
        return self.method != "full"


def length_for(measured: Sequence[Measured], rows: int | None, limit: int | None) -> Choice:
    """`max_length`: the first of LENGTHS that holds the longest row, where that is not a rare one."""
    lengths = sorted(n for m in measured for n in m.lengths)
    exact = all(m.exact for m in measured)
    longest = lengths[-1]
    target = longest if longest <= WHOLE else lengths[math.ceil(0.99 * len(lengths)) - 1]
    if not exact or rows is None or rows > len(lengths):
        target = math.ceil(1.1 * target)  # there are others, and estimates
    value = next((n for n in LENGTHS if n >= target), LENGTHS[-1])
    about = "" if exact else "about "
    whole = rows is not None and rows <= len(lengths)
    those = f"{len(lengths):,} rows" if whole else f"{len(lengths):,} rows that were looked at"
    why = f"the longest of {those} has {about}{longest:,} tokens"
    if limit is not None and value > limit:
        value, why = limit, f"the model's positions; {why}"
    over = sum(n > value for n in lengths)
    if over:
        why += f"; {over:,} longer ones are left out"
    return Choice(value, why)


def dropped_for(measured: Sequence[Measured], length: int) -> Choice | None:
    """`max_dropped`, where more rows than the default allows cannot be used."""
    read = sum(m.read for m in measured)
    lost = sum(sum(m.lost.values()) + m.longer(length) for m in measured)
    if not read or lost / read <= 0.008:
        return None
    share = lost / read
    value = next((n for n in (2, 3, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100) if n / 100 >= 1.25 * share), 100)
    reasons: dict[str, int] = {}
    for m in measured:
        for reason, count in [*m.lost.items(), ("too_long", m.longer(length))]:
            reasons[reason] = reasons.get(reason, 0) + count
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
    return Choice(f"{value}%", f"of {read:,} rows that were looked at {lost:,} are left out: {listed}")


def held_out_for(rows: int | None) -> Choice | None:
    """The share of `eval`; None where there are too few rows to give any away."""
    if rows is None:
        return Choice("1%", "held out, by their content: never trained on")
    if rows < 20:
        return None
    share = next((s for s in (1, 2, 5) if rows * s >= 5000), 10)  # 50 rows, where they are not a tenth of all
    return Choice(f"{share}%", f"about {rows * share // 100:,} rows are held out, by their content: never trained on")


def epochs_for(kind: str, rows: int | None) -> Choice:
    for below, epochs in EPOCHS[kind]:
        if rows is not None and rows < below:
            return Choice(epochs, f"{rows:,} rows, each seen {_times(epochs)}")
    return Choice(1, "enough rows to see each once" if rows is None else f"{rows:,} rows: each seen once is enough")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def step_rows_for(rows: int | None) -> int:
    """Rows of an optimiser step: few rows are still to give some steps."""
    for below, size in ((500, 8), (5000, 16), (50_000, 32)):
        if rows is not None and rows < below:
            return size
    return 64


def tiny_steps_for(rows: int | None, batch: int, tokens: float) -> Choice:
    """Of a fresh model: enough to learn few short rows, and no more than some minutes of long ones, of `tokens` on average."""
    least, most = TINY_STEPS
    steps = min(most, max(least, 20 * (rows or most * batch) // batch))
    steps = max(100, min(round(steps, -2), int(TINY_TOKENS / (batch * tokens)) // 100 * 100))
    times = f", {steps * batch / rows:.0f} times over {rows:,} rows" if rows else ""
    minutes = max(1, round(steps * batch * tokens / TINY_RATE / 60))
    return Choice(steps, f"steps of {batch} rows{times}: some {minutes} min on two cores")


def rate_for(kind: str, base: Base, way: Way) -> Choice:
    if base.fresh:
        return Choice(
            RATES[kind]["fresh"], "high: the model is small, and starts from nothing" if kind == "sft" else ""
        )
    if way.adapter:
        return Choice(RATES[kind]["adapter"], "usual for an adapter; ten times that for all weights")
    rate = RATES[kind]["full"]
    if kind == "sft" and (base.parameters or 0) > 1_000_000_000:
        rate /= 2
    return Choice(rate, "usual where all weights are trained")


# ------------------------------------------------------------------------------------------------ what fits


def way_for(base: Base, machine: Machine, length: int, step_rows: int) -> Way:
    """The first way of training that fits: all weights of small models, an adapter, an adapter beside four bits; where none
    does, one that fits a GPU of 24 GiB."""
    if base.fresh:
        return Way("full", None, min(16, step_rows), 1, machine.gpus > 0, why="the model is small")
    if base.parameters is None:
        note = "the model's size is not known: `raylign plan` says what fits, once its config can be had"
        return Way("lora", None, 1, machine.workers, machine.gpus > 0, why="trains few weights", note=(note,))
    if (here := _fits(base, machine, length, step_rows)) is not None:
        return here
    gpu = Machine("a GPU", machine.cpus, machine.memory, 1, ASSUMED_GPU)
    there = _fits(base, gpu, length, step_rows) or Way("qlora", None, 1, 1, True, why="the least memory")
    what = (
        f"{said(base.parameters)} parameters do not fit on {machine.name} ({machine.room / GIB:.0f} GiB for a worker)"
    )
    note = (
        f"{what}: written for a GPU of {ASSUMED_GPU / GIB:.0f} GiB; `raylign submit` takes it to a cluster that has one"
    )
    return Way(
        there.method, there.deepspeed, there.batch, 1, True, there.checkpointing, True, there.why, there.memory, (note,)
    )


def _fits(base: Base, machine: Machine, length: int, step_rows: int) -> Way | None:
    gpu, workers = machine.gpus > 0, machine.workers
    most = max(1, min(8, step_rows // workers))
    for method, zero in _methods(base, gpu, workers):
        for checkpointing in (True,) if gpu else (False, True):
            known: dict[int, int | None] = {}
            for batch in (b for b in (8, 4, 2, 1) if b <= most):
                used = known[batch] = _memory(base, method, zero, batch, length, machine, checkpointing)
                if used is not None and used <= machine.room:
                    why = f"{used / GIB:.1f} GiB of {machine.room / GIB:.0f} that a worker may use"
                    note = ("memory is a rough guess: the model's config is not here",) if base.config is None else ()
                    return Way(method, zero, batch, workers, gpu, checkpointing and not gpu, False, why, used, note)
                if batch == most and used is not None and used > 8 * machine.room:
                    break  # a smaller batch will not do it
    return None


def _methods(base: Base, gpu: bool, workers: int) -> Iterator[tuple[str, str | None]]:
    small = (base.parameters or 0) <= (FULL_AT_MOST if gpu else FULL_ON_CPU)
    shared = "zero2" if workers > 1 else None
    if small:
        yield "full", shared
        if workers > 1:
            yield "full", "zero3"
    yield "lora", shared
    if gpu:
        yield "qlora", shared
    if workers > 1:
        yield "lora", "zero3"


def _memory(
    base: Base, method: str, zero: str | None, batch: int, length: int, machine: Machine, checkpointing: bool
) -> int | None:
    """Bytes of a worker; None where it cannot be predicted."""
    gpu = machine.gpus > 0
    if base.config is None:
        activations = batch * length * 2_000_000 * (1 if gpu else 2)
        return int(ROUGHLY[method] * (base.parameters or 0) * (1 if gpu or method == "full" else 2)) + activations
    lora = None if method == "full" else json.dumps(LORA)
    deepspeed = None
    if zero is not None:
        deepspeed = json.dumps({"preset": zero, **(deepspeed_config(zero, gpu=gpu) or {})})
    training = Training(
        json.dumps(base.config, sort_keys=True),
        "sft",
        batch,
        length,
        accumulation=2,
        workers=machine.workers,
        gpu=gpu,
        bf16=gpu,
        checkpointing=checkpointing,
        lora=lora,
        four_bits=method == "qlora",
        deepspeed=deepspeed,
    )
    try:
        return training.memory().total
    except Unpredictable:
        return None
