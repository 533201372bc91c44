"""ZeRO checkpoints for another number of workers, through DeepSpeed's universal checkpoints (Lian et al. 2024).

ZeRO writes each worker's part of flat buffers and reads it back only with as many workers. A universal checkpoint holds each
parameter and its optimizer moments by name, and any number of workers reads from it what is theirs.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.errors import StageError
from stages.storage import pull, push
from stages.training.checkpoint import Saved, newest_sound, sweep
from stages.training.unpickling import load, tensors_only


def go_on_from(folder: Path, workers: int, say: Callable[[str], None]) -> Saved | None:
    """The newest sound checkpoint, as `workers` workers can read it; half-made ones are removed. None: from the start."""
    sweep(folder)
    checkpoint = newest_sound(folder, say)
    if checkpoint is None or checkpoint.record.workers == workers:
        return checkpoint
    say(f"it was made by {checkpoint.record.workers} workers and is read by {workers}")
    return checkpoint if not checkpoint.record.zero else converted(checkpoint)


def converted(checkpoint: Saved) -> Saved:
    """The checkpoint with its ZeRO shards as a universal checkpoint, in a hidden folder beside it.

    Raises:
        StageError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    source, record = pull(checkpoint.path), checkpoint.record
    tag = f"global_step{record.step}"
    target = source.with_name(f".universal-{record.step}")
    target.mkdir()
    arguments = Namespace(
        input_folder=str(source / tag),
        output_folder=str(target / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), tensors_only(source, deepspeed=True):
            ds_to_universal.main(arguments)
    except (OSError, StageError):
        raise
    except Exception as error:
        raise StageError(
            f"{source}: DeepSpeed cannot read it with another number of workers ({type(error).__name__}: {error}); "
            f"run with {record.workers} workers, or remove {source.parent} to train from the start"
        ) from error
    (target / "latest_universal").write_text(tag)
    for path in source.iterdir():
        if path.is_file() and path.name != "latest":
            shutil.copy2(path, target / path.name)
    push(target)
    return replace(checkpoint, path=target, universal=True)


def finish_loading(engine: Any, folder: Path) -> None:
    """What DeepSpeed 0.19.8 gets wrong when ZeRO-3 reads a universal checkpoint (stage3.py,
    `load_hp_checkpoint_state_from_checkpoint_dir_stage3`); may go when it no longer does, which the test of 2, 1 and 2 workers
    with weight decay shows. All groups share one step counter, which each of them then counts up; and all get the settings of
    the first, so that norms and biases would decay. What is saved from here on is not universal.
    """
    import torch

    engine._config.load_universal_checkpoint = False
    if engine.zero_optimization_stage() < 3:
        return
    (saved,) = folder.glob("global_step*/zero/optimizer_state.pt")
    groups = load(saved)["optimizer_state_dict"]["param_groups"]
    optimizer = engine.optimizer.optimizer
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def for_universal(config: dict[str, Any] | None, resume: Saved | None) -> dict[str, Any] | None:
    """DeepSpeed's config to read what `go_on_from` gave."""
    if config is None or resume is None or not resume.universal:
        return config
    return config | {"checkpoint": config.get("checkpoint", {}) | {"load_universal": True}}
