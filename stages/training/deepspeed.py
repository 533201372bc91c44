"""DeepSpeed by name: `zero0` .. `zero3`, or the path of the user's own JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRESETS = ("zero0", "zero1", "zero2", "zero3")


def deepspeed_config(setting: str | None) -> dict[str, Any] | None:
    """The configuration for transformers' Trainer, whose `auto` values it fills in from the training arguments.

    Raises:
        ValueError: not a preset, and not a readable JSON file.
    """
    if setting is None:
        return None
    if setting not in PRESETS:
        return _from_file(setting)
    stage = int(setting[-1])
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # else save_model writes no weights
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }


def _from_file(setting: str) -> dict[str, Any]:
    path = Path(setting)
    if not path.is_file():
        raise ValueError(f"{setting!r} is neither a preset ({', '.join(PRESETS)}) nor a file")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{setting} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{setting} does not hold a JSON object")
    return config


def init_deepspeed(backend: str) -> None:
    """Join the process group under DeepSpeed, before a model is made (ZeRO-3 partitions weights as they are loaded)."""
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce for CPUs is compiled at first use, which takes half a minute on a fresh machine; gloo
    # gives the same weights at a similar speed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
