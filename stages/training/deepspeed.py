"""DeepSpeed by name (`zero0` .. `zero3`, `zero2+offload`) or by the user's own JSON, and what in it clashes with `train:`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ZERO = ("zero0", "zero1", "zero2", "zero3")
# What is kept in the workers' main memory besides: the optimizer's state, or that and the weights.
OFFLOAD = ("zero1+offload", "zero2+offload", "zero3+offload", "zero3+offload_params")
PRESETS = (*ZERO, *OFFLOAD)

# Optimizers that need weights as matrices; ZeRO gives them a flat slice of all weights.
OF_MATRICES = ("galore_", "apollo_", "lomo", "adalomo")
# DeepSpeed's key -> the field of `train:` that says the same. transformers compares the two while it starts to train.
SAME: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}


def deepspeed_config(setting: str | None, *, gpu: bool = False) -> dict[str, Any] | None:
    """The configuration for transformers' Trainer, whose `auto` values it fills in from the training arguments.

    Of a user's file, what it leaves out of batch sizes, clipping and precision is `auto` too: DeepSpeed's own defaults
    would silently do something else than `train:` says (no clipping, float32, no accumulation).

    Raises:
        ValueError: not a preset, and not a readable JSON file.
    """
    if setting is None:
        return None
    config = _preset(setting, gpu) if setting in PRESETS else _from_file(setting)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(key, "auto")
    for key in ("bf16", "fp16"):
        config[key] = {"enabled": "auto"} | config.get(key, {})
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # else the export would have no weights
    if offload(config):
        # By default accelerate replaces whatever optimizer there is by DeepSpeed's Adam for CPUs, which takes a minute to
        # compile. torch's fused AdamW is what `train.optim` says, and as fast: 15 ms a step for 20 M weights, as the other.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _preset(setting: str, gpu: bool) -> dict[str, Any]:
    """One of PRESETS. With GPUs communication overlaps with the backward pass; gloo has nothing to overlap it with."""
    stage = int(setting[4])
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"overlap_comm": gpu, "contiguous_gradients": True}
    if stage in (1, 2):
        # Elements; DeepSpeed's own 5e8 costs up to 9 GB with overlap_comm (its documentation of ZeRO), this 0.9 GB.
        zero |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    if stage == 3:  # from the model's hidden size
        buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero |= dict.fromkeys(buckets, "auto")
    if setting in OFFLOAD:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if setting.endswith("_params"):
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "wall_clock_breakdown": False}


def _from_file(setting: str) -> dict[str, Any]:
    path = Path(setting)
    if not path.is_file():
        raise ValueError(f"{setting!r} is neither a preset ({', '.join(PRESETS)}) nor a file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{setting} does not hold a JSON object")
    sections = ("bf16", "fp16", "zero_optimization", "optimizer", "scheduler")
    wrong = [key for key in sections if not isinstance(config.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{setting}: {', '.join(wrong)} must be a JSON object")
    return config


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """0 (every worker holds all) .. 3 (optimizer, gradients and weights are shared out); 0 without DeepSpeed."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def offload(config: Mapping[str, Any] | None) -> dict[str, str]:
    """What is kept off the GPU: {"optimizer": "cpu"}, {"optimizer": "cpu", "param": "nvme"}, or nothing."""
    zero = (config or {}).get("zero_optimization", {})
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device", "none") for name in ("optimizer", "param")}
    return {name: device for name, device in devices.items() if device != "none"}


def clashes(
    config: Mapping[str, Any], train: Mapping[str, Any], given: Mapping[str, Any], workers: int | None, gpu: bool | None
) -> Iterator[tuple[str, str]]:
    """What in a DeepSpeed configuration contradicts the training arguments, or cannot work: (key, message).

    Args:
        config: as `deepspeed_config` returns it.
        train: the training arguments with their defaults; `given` those of them that the spec names.
        workers: None where it is not known yet.
        gpu: whether the workers have GPUs; None where it is not known yet.
    """
    for key, field in SAME.items():
        theirs, ours = _at(config, key), train.get(field)
        if theirs in (None, "auto") or ours is None or theirs == ours:
            continue
        yield key, _both(theirs, field, ours, field in given)
    betas = [train.get("adam_beta1"), train.get("adam_beta2")]
    theirs = _at(config, "optimizer.params.betas")
    if theirs not in (None, "auto") and None not in betas and theirs != betas:
        yield "optimizer.params.betas", _both(theirs, "adam_beta1, adam_beta2", betas, "adam_beta1" in given)
    yield from _batch(config, train, workers)
    for section, field in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config and field in given:
            kind = config[section].get("type")
            yield (
                section,
                f"the file's own {section} ({kind}) would be used and train.{field}: {given[field]} not; leave one out",
            )
    zero, stage = config["zero_optimization"], zero_stage(config)
    if stage not in (0, 1, 2, 3):
        yield "zero_optimization.stage", f"{stage} is not a stage of ZeRO: 0, 1, 2 or 3"
    gather = "stage3_gather_16bit_weights_on_model_save"
    if stage == 3 and zero.get(gather) is False:
        yield f"zero_optimization.{gather}", "without it the trained model cannot be saved; leave it out, or write true"
    if _at(config, "bf16.enabled") is True and _at(config, "fp16.enabled") is True:
        yield "fp16.enabled", "bf16 is enabled too; only one of them can be"
    yield from _optimizer(config, train, stage)
    if gpu is False and "nvme" in offload(config).values():
        yield "zero_optimization", "offload to nvme needs workers with GPUs; leave it out for CPU workers"


def _batch(config: Mapping[str, Any], train: Mapping[str, Any], workers: int | None) -> Iterator[tuple[str, str]]:
    """DeepSpeed's own identity: train_batch_size = micro-batch x accumulation x workers."""
    total = config.get("train_batch_size")
    if total in (None, "auto") or workers is None:
        return
    rows, accumulation = (train[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    if total == rows * accumulation * workers:
        return
    here = f"{rows} rows x {accumulation} accumulation steps x {workers} workers are {rows * accumulation * workers}"
    if total % (workers * rows) == 0:
        mend = f"set train.gradient_accumulation_steps: {total // (workers * rows)}"
    elif total % workers == 0:
        mend = f"set train.per_device_train_batch_size to a divisor of {total // workers}"
    else:
        mend = f"{total} does not divide by {workers} workers"
    yield "train_batch_size", f'{total}, but {here}; write "auto" in the file, or {mend}'


def _optimizer(config: Mapping[str, Any], train: Mapping[str, Any], stage: int) -> Iterator[tuple[str, str]]:
    name = str(train.get("optim") or "")
    if "optimizer" in config or not name:
        return
    if stage >= 1 and name.startswith(OF_MATRICES):
        yield (
            "zero_optimization.stage",
            f"ZeRO {stage} flattens the weights, and {name} needs them as matrices; use zero0",
        )
    if "optimizer" in offload(config) and ("8bit" in name or name.startswith("paged_")):
        yield "zero_optimization.offload_optimizer", f"{name} runs on a GPU only; use adamw_torch, or no offload"


def _both(theirs: Any, field: str, ours: Any, given: bool) -> str:
    where = "" if given else " (by default)"
    remedy = 'write "auto" in the file, or the same in both'
    return f"{json.dumps(theirs)}, but train.{field} is {json.dumps(ours)}{where}; {remedy}"


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


def init_deepspeed(backend: str) -> None:
    """Join the process group under DeepSpeed, before a model is made (ZeRO-3 partitions weights as they are loaded)."""
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce for CPUs is compiled at first use, which takes half a minute on a fresh machine; gloo
    # gives the same weights at a similar speed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
