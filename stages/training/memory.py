"""The memory a worker needs at the peak of training, in named parts, from a model's config alone.

What a micro-batch holds is read off a dry run of the model (stages/training/dry_run.py). What the libraries hold besides is
arithmetic, after ZeRO (Rajbhandari et al. 2020, section 3.1: 16 bytes a parameter in mixed precision, of which stage 1
shares out the optimizer's, 2 the gradients too, 3 the weights too), and was measured: tests/bench/memory.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stages.training.deepspeed import offload, zero_stage
from stages.training.dry_answers import Sampling, dry_answers
from stages.training.dry_run import LOGITS, Anatomy, DryRun, Shape, dry_run

GIB = 1 << 30
# Of a process that has imported the trainers: its resident memory on a CPU; on a GPU the CUDA context and cuBLAS'
# workspaces, and what NCCL takes where there are several workers.
CPU_PROCESS, CUDA_CONTEXT, NCCL = int(0.56 * GIB), int(0.6 * GIB), int(0.4 * GIB)
# bitsandbytes: 4 bits, and for each block of 64 a float32 scale, or with double quantisation 8 bits and for each 256 of
# these a float32 (Dettmers et al. 2023, section 3).
FOUR_BITS = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Optimizers by a part of their names -> bytes a trained parameter; the first that fits. A moment is 4, or 1 in 8 bits.
OPTIMIZERS = (
    ("4bit", 1.0), ("ademamix_8bit", 3.0), ("ademamix", 12.0), ("lion_8bit", 1.0), ("lion", 4.0), ("rmsprop_bnb_8bit", 1.0),
    ("8bit", 2.0), ("rmsprop", 4.0), ("adagrad", 4.0), ("schedule_free_sgd", 4.0), ("sgd", 0.0), ("lomo", 0.0),
)  # fmt: skip
ADAM = 8.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the moment when it needs most. Of a GPU worker, those of its GPU; `host` is not in the sum."""

    weights: int
    gradients: int
    optimizer: int  # its state, and the float32 copy of the weights that it changes
    activations: int
    logits: int
    buffers: int  # of communication: DDP's and ZeRO's buckets, weights that ZeRO-3 has gathered
    fixed: int
    moment: str  # backward, optimizer step, sampling, merge or export
    host: int = 0  # what is offloaded to the machine's main memory
    estimated: str = ""  # why activations come from a formula, where they do
    frozen: int = 0  # whole models beside the ones that are trained: the reference, reward models

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in PARTS)

    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in PARTS}


PARTS = tuple(field.name for field in fields(Memory) if field.name not in ("moment", "host", "estimated"))


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says of memory; sizes in elements."""

    stage: int
    bucket: int = 500_000_000
    buckets: int = 1
    live: int = 1_000_000_000  # ZeRO-3: gathered weights that may stay
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, hidden: int) -> Zero | None:
        """None without DeepSpeed. `auto` sizes are what transformers makes of them (transformers/integrations/deepspeed.py)."""
        if config is None:
            return None
        zero, off = config.get("zero_optimization", {}), offload(config)

        def size(key: str, default: int, auto: int) -> int:
            value = zero.get(key, default)
            return auto if value == "auto" else int(value)

        stage = zero_stage(config)
        reuse = size("stage3_max_reuse_distance", 1_000_000_000, 1_000_000_000)
        return cls(
            stage=stage,
            bucket=size("reduce_bucket_size", 500_000_000, hidden * hidden),
            buckets=2 if zero.get("overlap_comm", stage == 3) else 1,
            live=min(size("stage3_max_live_parameters", 1_000_000_000, 1_000_000_000), reuse),
            optimizer_offloaded="optimizer" in off,
            weights_offloaded="param" in off,
        )


def optimizer_bytes(name: str, anatomy: Anatomy) -> int:
    """What the optimizer remembers of the trained parameters. Of one that is not known here: two moments, as Adam's."""
    if name == "adafactor":  # Shazeer and Stern 2018: a sum for each row and each column
        return 4 * anatomy.factored
    each = next((size for part, size in OPTIMIZERS if part in name), ADAM)
    return int(each * anatomy.trainable)


@dataclass(frozen=True)
class Beside:
    """What reinforcement learning has in a worker besides the policy.

    Args:
        value: a value model, trained in the same steps; its micro-batch is the policy's.
        frozen: bytes of whole models, as they are loaded; `shared`: of those that are partitioned as the policy is.
    """

    value: Shape | None = None
    frozen: int = 0
    shared: int = 0
    sampling: Sampling | None = None


def predict(
    shape: Shape,
    *,
    beside: Beside = Beside(),
    workers: int = 1,
    accumulation: int = 1,
    optim: str = "adamw_torch_fused",
    deepspeed: Mapping[str, Any] | None = None,
    four_bits: bool = False,
    double_quant: bool = True,
) -> Memory:
    """The peak of one worker.

    Args:
        shape: the model, its micro-batch, precision and adapter. With DeepSpeed in bfloat16 the weights are `half`.
        deepspeed: as `deepspeed_config` gives it.
        four_bits: QLoRA; `double_quant` of its scales.

    Raises:
        Unpredictable: the model cannot be built from its config.
    """
    policy = run = dry_run(shape)
    if beside.value is not None:
        run = both(policy, dry_run(beside.value))
    anatomy = run.anatomy
    zero = Zero.of(deepspeed, anatomy.hidden)
    partitioned = zero is not None and zero.stage == 3
    frozen = beside.frozen + (beside.shared // workers if partitioned else beside.shared)
    held = weight_bytes(anatomy, half=shape.half, four_bits=four_bits, double_quant=double_quant)
    state = optimizer_bytes(optim, anatomy)
    each = int(run.series[-1, 2])  # bytes of all gradients
    fixed = CUDA_CONTEXT + (NCCL if workers > 1 else 0) if shape.gpu else CPU_PROCESS
    base = Memory(held, 0, state, 0, 0, 0, fixed, "backward", 0, run.estimated, frozen)
    stay = accumulation > 1
    activations, logits, gradients = run.peak(stay or (zero is not None and zero.stage >= 2))
    if stay:
        gradients, activations = each, activations + anatomy.largest_trainable * (2 if shape.half else 4)
    if four_bits:  # a layer's weights are made whole for its matrix product, and again in the backward pass
        activations += anatomy.largest_linear * (2 if shape.half or shape.autocast else 4)
    backward = replace(base, activations=activations, logits=logits, gradients=gradients)
    step = replace(base, gradients=each, activations=step_bytes(optim, anatomy, shape.gpu), moment="optimizer step")
    if zero is None:
        if workers > 1:  # DDP's buckets are a second copy of the gradients (gradient_as_bucket_view is off by default)
            backward, step = (replace(m, buffers=each) for m in (backward, step))
    else:
        backward, step = (_shared(m, zero, anatomy, each, shape, workers) for m in (backward, step))
    moments = [backward, step]
    if beside.sampling is not None:
        cache, drawn = dry_answers(shape, beside.sampling)
        whole = weight_bytes(policy.anatomy, half=shape.half, four_bits=four_bits) if partitioned else 0
        sampling = replace(step, gradients=0, activations=cache, logits=drawn, buffers=max(step.buffers, whole))
        moments.append(replace(sampling, moment="sampling"))
    if partitioned and not shape.gpu:  # the first worker gathers all weights, and casts them
        assert zero is not None
        shared = step.gradients - (0 if zero.optimizer_offloaded else 4 * anatomy.trainable // workers)
        moments.append(replace(step, gradients=max(shared, 0), activations=0, buffers=2 * held, moment="export"))
    if shape.lora is not None:
        again = merge_bytes(shape.config, policy.anatomy)
        if shape.gpu:
            moments = [replace(m, host=max(m.host, again)) for m in moments]
        else:
            moments.append(replace(base, buffers=again, moment="merge"))
    return max(moments, key=lambda m: m.total)


def both(policy: DryRun, value: DryRun) -> DryRun:
    """A policy and a value model in one step: the policy's forward pass, the value model's passes, and the policy's backward
    pass, since what was computed last goes back first."""
    first, second = policy.series, value.series
    at = int(first[:, LOGITS].argmax())  # the policy's forward pass is over
    series = np.concatenate([first[: at + 1], second + first[at], first[at + 1 :] + second[-1]])
    a, b = policy.anatomy, value.anatomy
    largest = {name: max(getattr(a, name), getattr(b, name)) for name in ("largest_linear", "largest_trainable")}
    summed = {
        name: getattr(a, name) + getattr(b, name)
        for name in ("parameters", "trainable", "weight_bytes", "buffer_bytes", "quantised", "adapted", "factored")
    }
    return DryRun(replace(a, **summed, **largest), series, policy.estimated or value.estimated)


def frozen_bytes(config: str, *, reward: bool = False, dtype: str | None = None) -> int:
    """A whole model that is not trained.

    Args:
        dtype: it is loaded as; by default what its config says, which is what its weights are stored in.

    Raises:
        Unpredictable: the model cannot be built from its config.
    """
    run = dry_run(
        Shape(config, "score" if reward else "trained", rows=1, length=8, half="16" in (dtype or stored_in(config)))
    )
    return weight_bytes(run.anatomy, half=False, four_bits=False)


def stored_in(config: str) -> str:
    """The dtype of a model's weights by its config."""
    said = json.loads(config)
    return str(said.get("dtype", said.get("torch_dtype")))


def merge_bytes(config: str, anatomy: Anatomy) -> int:
    """What the first worker takes of the main memory to merge an adapter (stages/training/export.py): the base once more in
    float32, the weights that change, and all in the base's own type where that is a shorter one."""
    half = "16" in stored_in(config)
    return 4 * (anatomy.parameters + anatomy.adapted) + (2 * anatomy.parameters if half else 0)


def weight_bytes(anatomy: Anatomy, *, half: bool, four_bits: bool, double_quant: bool = True) -> int:
    """As they are held, with the model's buffers. In 4 bits are linear layers alone: not embeddings, norms or the head."""
    whole = anatomy.weight_bytes + anatomy.buffer_bytes
    if not four_bits:
        return whole
    return whole - int(anatomy.quantised * ((2 if half else 4) - FOUR_BITS[double_quant]))


def step_bytes(optim: str, anatomy: Anatomy, gpu: bool) -> int:
    """What an optimizer step takes besides: torch's AdamW by groups (foreach, on GPUs) a root of the second moments."""
    if "fused" in optim:
        return 0
    return 4 * (anatomy.trainable if gpu else 2 * anatomy.largest_trainable)


def _shared(m: Memory, zero: Zero, anatomy: Anatomy, each: int, shape: Shape, workers: int) -> Memory:
    """A moment under DeepSpeed: what is shared out, what is copied, what is offloaded."""
    trained, stage, stepping = anatomy.trainable, zero.stage, m.moment != "backward"
    size = each // max(trained, 1)  # bytes of a gradient
    if stage == 0:
        copies = 4 * trained if shape.half else 0  # of weights and gradients in float32
        reduced = min(zero.bucket * size, each) if workers > 1 else 0
        return replace(m, optimizer=m.optimizer + copies, gradients=m.gradients + copies, buffers=reduced * stepping)
    part = 1 / workers
    master = int(4 * trained * part)  # a float32 copy is made even of float32 weights
    state = int(m.optimizer * part) + master
    flat = master if stepping else 0  # gradients of the part in float32, for the optimizer
    gradients = m.gradients if stage == 1 and not stepping else int(each * part)
    # The last bucket is still held when the optimizer steps. Seen with DeepSpeed 0.19.8, as all of this function.
    buffers = (1 if stepping else zero.buckets) * min(zero.bucket * size, each)
    weights, host = m.weights, 0
    if stage == 3:
        gathered = min(m.weights, zero.live * (2 if shape.half else 4))
        buffers += gathered  # released only when the optimizer has stepped
        weights = int(weights * part)
        if zero.weights_offloaded:
            weights, host = 0, weights
    if zero.optimizer_offloaded:  # with gradients in float32 and the changed weights, and a second bucket on their way
        host += state + master + int(m.weights * part)
        state, flat, gradients, buffers = 0, 0, 0 if stage >= 2 else gradients, 2 * buffers
    m = replace(m, weights=weights, optimizer=state, gradients=gradients + flat, buffers=buffers, host=host)
    return m if shape.gpu else replace(m, optimizer=m.optimizer + m.host, host=0)  # on a CPU it is the same memory
