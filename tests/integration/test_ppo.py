"""PPO on real Ray and DeepSpeed: the same run however it is shared, and an interrupted one ends as if it were not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import StageContext, StageResult
from stages.base import Artifact, Resources
from stages.ppo import PPO

from ..conftest import write_jsonl
from .test_training import weights

pytestmark = pytest.mark.usefixtures("ray_address")

REWARDS = """
def letters(completions, **_):
    return [c[0]["content"].count("a") / 8 for c in completions]
"""
BASE = {"per_device_train_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "ppo_rewards.py").write_text(REWARDS)
    return folder


def run(
    folder: Path, model: str, data: Path, code: Path, workers: int = 1, train: dict[str, Any] | None = None, **more: Any
) -> StageResult:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "data": [{"path": str(data / "chats.jsonl")}], "rewards": ["ppo_rewards:letters"], "max_new_tokens": 8,
        "train": BASE | (train or {}),
    } | more  # fmt: skip
    context = StageContext(
        "stage", folder, folder.parent / "prepared", {"model": [Artifact("base", "model", model)]},
        resources=Resources(workers=workers), local=workers == 1 and "deepspeed" not in config, code=str(code),
    )  # fmt: skip
    return PPO.model_validate(config).run(context)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_the_reward_goes_up(tmp_path: Path, model: str, data: Path, code: Path) -> None:
    train = {"total_episodes": 800, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "kl_coef": 0.01}
    result = run(tmp_path / "ppo", model, data, code, train=train)
    lines = [line for line in logged(tmp_path / "ppo") if "reward" in line]
    print(json.dumps(lines[0]), json.dumps(lines[-1]))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.1
