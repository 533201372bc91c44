"""Checkpoints are read by torch's unpickler for tensors, which calls nothing a file names but what is listed here.

That a checkpoint's hashes are right says that it is whole, not who wrote it: whoever can write a file can write its hash. What
processes of ours send each other (a stage's job, rows of a pool) is plain pickle; nobody else can write there.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from stages.errors import StageError

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of torch: it wins over a library's `weights_only=False`


def known() -> list[Any]:
    """What may be made besides tensors and plain values: numpy's arrays and scalars."""
    import numpy as np

    made_by = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]  # what unpickling a scalar, an array calls
    return [np.ndarray, np.dtype, *made_by, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]


def known_of_deepspeed() -> list[Any]:
    """What DeepSpeed keeps of its optimizers, beside their states."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Python before 3.11.4 pickles the members of an Enum as getattr(class, name).
    by_name = [(member, f"{module}.getattr") for module in ("__builtin__", "builtins")]
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, *by_name]


def member(enum: Any, name: str) -> Any:
    """What stands for `getattr` in a checkpoint: it gives members of enums, and nothing else.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """
    if not (isinstance(enum, type) and issubclass(enum, Enum)) or name not in enum.__members__:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {enum!r}")
    return enum[name]


@contextmanager
def tensors_only(what: Path, deepspeed: bool = False) -> Iterator[None]:
    """Within, every `torch.load` of this process reads tensors, plain values and what is known, and nothing else: DeepSpeed's
    too, though it asks for more. `what` is being read.

    Raises:
        StageError: a file holds something else.
    """
    import torch

    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        wanted = {*known(), *(known_of_deepspeed() if deepspeed else [])}
        # Those already allowed stay so afterwards: one of these may be within another.
        with torch.serialization.safe_globals(list(wanted - set(torch.serialization.get_safe_globals()))):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise StageError(
            f"{what} holds more than tensors, plain values and numpy's{f': {named[1]}' if named else ''}. If that is of an "
            "optimizer or schedule of yours, let its `state_dict` give plain values; else somebody has changed the file: "
            "remove it"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def load(path: Path) -> Any:
    """A state of tensors, plain values and numpy's, which a user's own optimizer or schedule may have.

    Raises:
        StageError: it has something else.
    """
    import torch

    with tensors_only(path):
        return torch.load(path, map_location="cpu", weights_only=True)
