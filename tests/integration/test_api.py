"""The chain from Python, in a process that has a Ray of its own: it is used, and left running."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from pipeline import Pipeline
from stages import DPO, SFT
from stages.errors import StageError


def test_a_pipeline_from_python(tmp_path: Path, data: Path, model: str, ray_address: str) -> None:
    stages = {
        "sft": SFT(data=[{"path": str(data / "chats.jsonl")}], train={"max_steps": 2, "logging_steps": 1}),
        "dpo": DPO(
            model="stages.sft", data=[{"path": str(data / "pairs.jsonl")}], train={"max_steps": 2, "logging_steps": 1}
        ),
    }
    run = Pipeline(model=model, stages=stages, storage=str(tmp_path), name="api").run(quiet=True)
    assert list(run) == ["sft", "dpo"]
    assert run["dpo"].model is not None and (run["dpo"].model / "model.safetensors").is_file()
    assert run["dpo"].manifest["inputs"]["model"][0]["model"] == str(run["sft"].model)
    assert run["sft"].metrics["loss"] > 0
    assert ray.is_initialized() and ray.get(ray.remote(lambda: 1).remote()) == 1

    broken = SFT(data=[{"path": str(data / "chats.jsonl")}], train={"max_length": 5})
    with pytest.raises(
        StageError, match=r"stage sft failed: none of the 101 rows can be used:\n  too_long 101, for example .*row 1"
    ):
        Pipeline(model=model, stages={"sft": broken}, storage=str(tmp_path), name="broken").run(quiet=True)
