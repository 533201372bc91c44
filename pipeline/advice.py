"""What a training stage would need on one worker, and the smallest changes with which it fits: computed by trying them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from stages.training.deepspeed import deepspeed_config, offload, zero_stage
from stages.training.dry_answers import Sampling
from stages.training.dry_run import Shape, dry_run
from stages.training.kernels import model_dtype, precision_for
from stages.training.memory import Beside, Memory, frozen_bytes, predict, weight_bytes

GIB = 1 << 30
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 180)  # GiB of GPUs that can be rented
MOST_WORKERS = 512
LORA = {"r": 16, "target_modules": "all-linear"}  # what is advised, with peft's own names
PAIRS = ("reward", "dpo")  # a row is two sequences; what sharing a prompt saves of them on a CPU is not counted


@dataclass(frozen=True)
class Training:
    """All of a stage that decides its memory."""

    config: str  # config.json of its model
    kind: str
    batch: int  # rows of a micro-batch, as per_device_train_batch_size counts them
    length: int  # tokens of the longest
    accumulation: int = 1
    workers: int = 1
    gpu: bool = False
    bf16: bool = False
    fp16: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    lora: str | None = None  # JSON of peft's options
    four_bits: bool = False
    double_quant: bool = True
    optim: str = "adamw_torch_fused"
    deepspeed: str | None = None  # JSON of its configuration
    # of reinforcement learning
    answer: int = 0  # tokens of an answer at most, part of `length`
    sampled: int = 0  # answers that a worker samples together; 0: none
    whole_logits: bool = True  # of the answers' tokens; else they are computed in small parts
    value: str | None = None  # config.json of the value model that is trained in the same steps
    rewards: tuple[str, ...] = ()  # config.json of each reward model in the worker
    reference: str = ""  # a frozen copy where there is no adapter: whole, or shared out as the policy is
    generation: int | None = None  # steps_per_generation, where it is given

    @property
    def zero(self) -> dict[str, Any] | None:
        return json.loads(self.deepspeed) if self.deepspeed else None

    def shape(self) -> Shape:
        """Of its dry run. DeepSpeed turns weights to bfloat16 and keeps a float32 copy; else they are cast as they are used."""
        half = self.bf16 or self.fp16
        dtype = model_dtype({"bf16": self.bf16, "fp16": self.fp16}, frozen=self.lora is not None)
        return Shape(
            config=self.config,
            head="score" if self.kind == "reward" else "trained",
            rows=self.batch * (2 if self.kind in PAIRS else 1),
            length=self.length,
            scored=None if not self.sampled else self.answer if self.whole_logits else 1,
            half=dtype != "float32" or (half and self.deepspeed is not None),
            autocast=half and self.deepspeed is None,
            checkpointing=self.checkpointing,
            attention=self.attention,
            lora=self.lora,
            gpu=self.gpu,
        )

    def value_shape(self) -> Shape | None:
        """Of the value model's dry run: with the policy's micro-batch, precision and adapter."""
        if self.value is None:
            return None
        lora = json.loads(self.lora) if self.lora is not None else None
        if lora is not None:
            lora["modules_to_save"] = [*(lora.get("modules_to_save") or []), "score"]
        return replace(
            self.shape(), config=self.value, head="score", scored=None, lora=json.dumps(lora) if lora else None
        )

    def beside(self) -> Beside:
        shape = self.shape()
        frozen, shared = sum(frozen_bytes(config, reward=True) for config in self.rewards), 0
        if self.reference == "whole" and self.lora is None:
            frozen += frozen_bytes(self.config, dtype=model_dtype({"bf16": self.bf16, "fp16": self.fp16}, frozen=True))
        elif self.reference == "shared" and self.lora is None:
            shared = weight_bytes(dry_run(shape).anatomy, half=shape.half, four_bits=False)
        sampling = Sampling(self.sampled, self.length - self.answer, self.answer) if self.sampled else None
        return Beside(self.value_shape(), frozen, shared, sampling)

    def memory(self) -> Memory:
        """
        Raises:
            Unpredictable: the model cannot be built from its config.
        """
        return predict(
            self.shape(),
            beside=self.beside(),
            workers=self.workers,
            accumulation=self.accumulation,
            optim=self.optim,
            deepspeed=self.zero,
            four_bits=self.four_bits,
            double_quant=self.double_quant,
        )


@dataclass(frozen=True)
class Advice:
    change: dict[str, Any]  # keys of the stage, and their values
    memory: int  # bytes of a worker then
    text: str


def advise(now: Training, room: int, most: int = 4) -> list[Advice]:
    """Changes with which a worker needs at most `room` bytes, the least first; none where it fits or nothing helps.

    Of each way (as it is, ZeRO over the workers there are, offload, an adapter, 4 bits, more workers) the cheapest form:
    as it stands, with gradient checkpointing, or with that and smaller micro-batches whose steps hold the same rows.
    """
    if now.memory().total <= room:
        return []
    found = []
    for way, label in _ways(now):
        if (fitting := _cheapest(way, room)) is not None:
            used = fitting.memory().total
            change = changes(now, fitting)
            found.append(
                Advice(change, used, f"{_say(change, label)}: {used / GIB:.1f} GiB{_where(now, fitting, used)}")
            )
        if len(found) == most:
            break
    return found


def _ways(now: Training) -> Iterator[tuple[Training, str]]:
    """From what changes nothing of the result to what changes the method or costs more machines."""
    yield now, ""
    stage = zero_stage(now.zero)
    if now.workers > 1 and not now.four_bits:
        for target in range(max(stage + 1, 1), 4):
            yield _with_zero(now, f"zero{target}"), f"zero{target}"
    if now.gpu and not now.four_bits and "optimizer" not in offload(now.zero):
        preset = "zero3+offload" if now.workers > 1 else "zero2+offload"
        yield _with_zero(now, preset), preset
    adapter = json.dumps(LORA | ({"modules_to_save": ["score"]} if now.kind == "reward" else {}))
    if now.lora is None:
        yield replace(now, lora=adapter), "lora"
    if now.gpu and not now.four_bits and stage < 3:
        yield replace(now, lora=now.lora or adapter, four_bits=True), "qlora"
    if not now.four_bits:
        workers = max(2 * now.workers, 2)
        while workers <= MOST_WORKERS:
            yield _with_zero(replace(now, workers=workers), "zero3"), "more"
            workers *= 2


def _with_zero(now: Training, preset: str) -> Training:
    return replace(now, deepspeed=json.dumps({"preset": preset, **(deepspeed_config(preset, gpu=now.gpu) or {})}))


def _cheapest(way: Training, room: int) -> Training | None:
    """The way with the fewest changes that fit; None where none do."""
    forms = [way] if way.checkpointing else [way, replace(way, checkpointing=True)]
    for form in forms:
        if form.memory().total <= room:
            return form
    whole, form = forms[-1].memory().total, forms[-1]
    if form.batch == 1:
        return None
    least = _smaller(form, 1)
    smallest = least.memory().total
    if smallest > room:
        return None
    # The peak is a maximum of lines in the size of the batch: between two sizes it is at most what lies on their line.
    for batch in (b for b in _halves(form.batch) if b > 1):
        if smallest + (whole - smallest) * (batch - 1) / (form.batch - 1) <= room:
            candidate = _smaller(form, batch)
            if candidate.memory().total <= room:
                return candidate
    return least


def _halves(batch: int) -> Iterator[int]:
    """Divisors of a batch, the greatest first: then the steps hold the same rows."""
    return (b for b in range(batch - 1, 0, -1) if batch % b == 0)


def _smaller(now: Training, batch: int) -> Training:
    times = now.batch // batch
    generation = None if now.generation is None else now.generation * times
    return replace(now, batch=batch, accumulation=now.accumulation * times, generation=generation)


def changes(before: Training, after: Training) -> dict[str, Any]:
    """What to write in the stage so that `before` becomes `after`."""
    out: dict[str, Any] = {}
    train: dict[str, Any] = {}
    if before.checkpointing != after.checkpointing:
        train["gradient_checkpointing"] = after.checkpointing
    if before.batch != after.batch:
        train["per_device_train_batch_size"] = after.batch
    if before.accumulation != after.accumulation:
        train["gradient_accumulation_steps"] = after.accumulation
    if before.generation != after.generation:
        train["steps_per_generation"] = after.generation
    if train:
        out["train"] = train
    if before.deepspeed != after.deepspeed:
        out["deepspeed"] = cast(Mapping[str, Any], after.zero)["preset"]
    if before.workers != after.workers:
        out["workers"] = after.workers
    if (before.lora, before.four_bits) != (after.lora, after.four_bits):
        out["tuning"] = {"method": "qlora" if after.four_bits else "lora"} | (LORA if before.lora is None else {})
    return out


def _say(change: dict[str, Any], label: str) -> str:
    """`zero3 with 8 workers, gradient_checkpointing: true`."""
    said = []
    if "deepspeed" in change:
        said.append(change["deepspeed"] + (f" with {change['workers']} workers" if "workers" in change else ""))
    elif label in ("lora", "qlora"):
        said.append(label)
    said += [f"{key}: {json.dumps(value)}" for key, value in change.get("train", {}).items()]
    return ", ".join(said)


def _where(before: Training, after: Training, used: int) -> str:
    card = next((size for size in CARDS if used <= size * GIB), None)
    each = " each" if after.workers > 1 else ""
    return each + (f" (a {card} GiB card holds it)" if after.gpu and before.lora != after.lora and card else "")


def precision(train: Mapping[str, Any], gpu: bool) -> dict[str, bool]:
    """bf16 and fp16 of the worker, which cannot be asked here: a GPU is taken to have bf16."""
    return precision_for({k: train.get(k) for k in ("bf16", "fp16")}, gpu=gpu, bf16_there=True)
