"""GRPO and RLOO as they are run: TRL's trainers on our prompts, rewards, workers and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import KINDS, StageContext
from stages.base import Artifact, Resources, StageResult
from stages.errors import StageError
from stages.training import stage as training_stage
from stages.training import trainer as trainer_module

from ..conftest import chat, write_jsonl
from .test_training import weights

pytestmark = pytest.mark.usefixtures("ray_address")

REWARDS = """\
def letters(completions, **columns):
    return [share(c[0]["content"], "a") for c in completions]

def share(text, wanted):
    return sum(c == wanted for c in text) / max(len(text), 1)

def short(completion_ids, **columns):
    return [-len(ids) / 16 for ids in completion_ids]

def asks(prompts, completions, expected, topic, **columns):
    assert [p[-1]["role"] for p in prompts] == ["user"] * len(completions)
    assert set(topic) == {"letters"} and not any(c[0]["content"].count("<|") for c in completions)
    return [float(e is not None) for e in expected]

def nan_for_one(prompts, expected, **columns):
    return [float("nan") if e == "f e d" else 0.0 for e in expected]

def raises(completions, **columns):
    raise KeyError("topic")

def too_few(completions, **columns):
    return [0.0]
"""
ROWS = 21


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prompts.jsonl: 21 conversations of different lengths that end with a question, and beside it a module of rewards."""
    import random

    folder, rng = tmp_path_factory.mktemp("prompts"), random.Random(1)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        *messages, answer = chat(rng, 1 + i % 2)
        rows.append({"prompt": messages, "expected": answer["content"], "topic": "letters"})
    rows[5]["expected"] = "f e d"
    write_jsonl(folder / "prompts.jsonl", rows)
    (folder / "group_rewards.py").write_text(REWARDS)
    return folder


def stage(
    kind: str, folder: Path, model: str, prompts: Path, workers: int = 1, worker: Callable[..., Any] | None = None, /,
    **config: Any,
) -> StageResult:  # fmt: skip
    """Run the stage in its folder, again where it was begun; `worker`: instead of `train_on_worker`."""
    settings: dict[str, Any] = {
        "data": [{"path": str(prompts / "prompts.jsonl")}], "rewards": ["group_rewards:letters"], "max_new_tokens": 8,
    }  # fmt: skip
    settings |= config
    settings["train"] = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 16 // workers, "num_generations": 4, "steps_per_generation": 2,
        "logging_steps": 1, "lr_scheduler_type": "constant",
    } | config.get("train", {})  # fmt: skip
    made = KINDS[kind].model_validate({"kind": kind} | settings)
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        "stage", folder, folder.parent / "prepared", {"model": [Artifact("base", "model", model)], "rewards": []},
        resources=Resources(workers=workers), local=workers == 1 and "deepspeed" not in config, code=str(prompts),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if worker is not None:
            patch.setattr(training_stage, "train_on_worker", worker)
        return made.run(context)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_an_easy_reward_is_learned(tmp_path: Path, model: str, prompts: Path, kind: str) -> None:
    """8 prompts an iteration, 3 iterations an epoch of 2 steps each; the last has 5 prompts."""
    rewards = ["group_rewards:letters", {"reward": "group_rewards:asks", "weight": 0.5}]
    config = {"rewards": rewards, "train": {"num_train_epochs": 5}, "samples": {"every": 4, "prompts": 3}}
    result = stage(kind, tmp_path / kind, model, prompts, **config)
    assert result.steps == 30 and result.rows == ROWS
    assert result.details["consumption"] == {"steps": 30, "epochs": 5, "rows_after": 0, "problems": []}
    lines = [line for line in log(tmp_path / kind) if "loss" in line]
    first, last = lines[0], lines[-1]
    assert last["rewards/group_rewards:letters"] > first["rewards/group_rewards:letters"] + 0.1
    for line in lines:
        assert line["rewards/group_rewards:asks"] == 1.0
        assert line["reward"] == pytest.approx(line["rewards/group_rewards:letters"] + 0.5, abs=1e-5)
        assert 0 <= line["stopped"] <= 1 and 1 <= line["answer_tokens"] <= 8 and line["entropy"] > 0
        assert {"clip_fraction", "tokens_per_second", "grad_norm"} <= set(line)
    kept = [json.loads(line) for line in (tmp_path / kind / "samples.jsonl").open()]
    assert [k["iteration"] for k in kept] == [i for i in (0, 4, 8, 12, 14) for _ in range(3)]
    for k in kept:
        assert k["step"] == 2 * k["iteration"] and k["prompt"].count("Reverse") and isinstance(k["stopped"], bool)
        assert k["reward"] == pytest.approx(
            k["scores"]["group_rewards:letters"] + 0.5 * k["scores"]["group_rewards:asks"]
        )
        assert k["scores"]["group_rewards:letters"] == pytest.approx(k["answer"].count("a") / max(len(k["answer"]), 1))
