"""What somebody else wrote (models, checkpoints, data, templates, specs, run folders) does nothing but what it is for."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import StageError
from stages.training.checkpoint import Record, publish, saved
from stages.training.unpickling import load, tensors_only
from stages.training.writer import write_state


class Evil:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def evil(mark: Path) -> Evil:
    """Shown to work, so that a mark that is not there says something."""
    pickle.loads(pickle.dumps(Evil(mark)))
    mark.unlink()
    return Evil(mark)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_runs_nothing(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """Its hashes are right: whoever can change a file can change them too."""
    making = tmp_path / ".saving-1"
    making.mkdir()
    files = {"state.pt": write_state(making / "state.pt", {"optimizer": {"state": torch.ones(2), "more": evil}})}
    path = publish(making, Record(1, 0, 8, 1, None, "m", files))
    assert saved(path) is not None
    with pytest.raises(StageError, match="holds more than tensors"):
        load(path / "state.pt")
    assert not mark.exists()


def test_deepspeed_reads_a_checkpoint_of_its_own_but_runs_nothing(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """It asks torch for everything (`weights_only=False`); all it needs of that are a few classes of its own."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    file, engine = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", TorchCheckpointEngine()
    scalers = [LossScaler(scale=2.0), DynamicLossScaler(256.0, 2.0, 100, 1.0, 1, False, True, dtype=torch.float16)]
    state = {"stage": ZeroStageEnum.weights, "scalers": scalers, "where": fragment_address(numel=3, start=1)}
    torch.save(state, file)
    with tensors_only(tmp_path, deepspeed=True):
        read = engine.load(str(file))
    assert read["stage"] == ZeroStageEnum.weights and read["where"] == fragment_address(3, 1)
    assert [vars(scaler) for scaler in read["scalers"]] == [vars(scaler) for scaler in scalers]
    torch.save(state | {"more": evil}, file)
    with pytest.raises(StageError, match=r"holds more than tensors.*system"), tensors_only(tmp_path, deepspeed=True):
        engine.load(str(file))
    assert not mark.exists()
    engine.load(str(file))  # what it does otherwise
    assert mark.exists()


def test_what_is_known_stays_known_around_a_file_that_is_read_within(tmp_path: Path) -> None:
    import numpy as np

    torch.save({"a": np.float64(1.5), "b": np.arange(3)}, tmp_path / "own.pt")
    with tensors_only(tmp_path):
        load(tmp_path / "own.pt")
        assert torch.load(tmp_path / "own.pt", weights_only=False)["a"] == 1.5
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and not torch.serialization.get_safe_globals()


def test_numpy_s_own_ways_to_unpickle_are_no_way_round(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """An array of objects, and a scalar that says it is one."""
    import numpy as np

    class Scalar:
        def __reduce__(self) -> Any:
            return np.float64(0).__reduce__()[0], (np.dtype("O"), pickle.dumps(evil))

    for i, value in enumerate((np.array([evil], dtype=object), Scalar())):
        torch.save(value, tmp_path / f"{i}.pt")
        with suppress(StageError):  # it may also be read, as what it says it is
            load(tmp_path / f"{i}.pt")
        assert not mark.exists()


def test_a_checkpoint_for_other_workers_is_converted_without_running_it(tmp_path: Path, evil: Evil, mark: Path) -> None:
    from stages.training.universal import converted

    making = tmp_path / ".saving-1"
    names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1))]
    for name in names:
        (making / "global_step1").mkdir(parents=True, exist_ok=True)
        torch.save({"ds_version": "0.19", "module": evil, "optimizer_state_dict": evil}, making / "global_step1" / name)
    checkpoint = saved(publish(making, Record(1, 0, 8, 2, 2, "m", {})))
    assert checkpoint is not None
    with pytest.raises(StageError, match="holds more than tensors"):
        converted(replace(checkpoint))
    assert not mark.exists()
