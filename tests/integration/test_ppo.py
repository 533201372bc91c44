"""PPO on real Ray and DeepSpeed: the same run however it is shared, and an interrupted one ends as if it were not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages import StageContext, StageResult
from stages.base import Artifact, Resources
from stages.errors import DataError, StageError
from stages.ppo import PPO
from stages.reward import Reward

from ..conftest import CODE, prepared_beside
from .test_training import weights

pytestmark = pytest.mark.usefixtures("ray_address")

REWARDS = """
import os
import signal
from pathlib import Path

def letters(completions, **_):
    return [c[0]["content"].count("a") / 8 for c in completions]

def failing(completions, **_):
    file = Path(__file__).with_name("fails")
    left = int(file.read_text()) - len(completions)
    file.write_text(str(left))
    if left < 0:
        raise RuntimeError("the reward is out of order")
    return letters(completions)

def killing(completions, **_):
    try:
        return failing(completions)
    except RuntimeError:
        Path(__file__).with_name("fails").write_text("1000000")
        os.kill(os.getpid(), signal.SIGKILL)

def raises(completions, **_):
    raise ValueError("no")

def nan(completions, **_):
    return [0.0] * (len(completions) - 1) + [float("nan")]

def short(completions, **_):
    return [1.0]
"""
BASE = {"per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="session", autouse=True)
def _rewards() -> None:
    (CODE / "ppo_rewards.py").write_text(REWARDS)


def run(
    folder: Path, model: str, rows: Path, workers: int = 1, train: dict[str, Any] | None = None, **more: Any
) -> StageResult:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "data": [{"path": str(rows / "chats.jsonl")}], "rewards": ["ppo_rewards:letters"], "max_new_tokens": 8, "samples": {"every": 4},
        "train": BASE | (train or {}),
    } | more  # fmt: skip
    with prepared_beside(folder) as prepared:
        context = StageContext(
            "stage", folder, prepared, {"model": [Artifact("base", "model", model)]},
            resources=Resources(workers=workers), local=workers == 1 and "deepspeed" not in config,
        )  # fmt: skip
        return PPO.model_validate(config).run(context)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> tuple[Path, StageResult]:
    """An epoch of 101 prompts by one worker: 16 answers an iteration, in 4 steps; the last one has 5."""
    folder = tmp_path_factory.mktemp("ppo") / "alone"
    return folder, run(folder, model, data, train={"num_train_epochs": 1})


def test_what_is_told_of_a_training(alone: tuple[Path, StageResult]) -> None:
    folder, result = alone
    lines = [line for line in logged(folder) if "reward" in line]
    iterations = math.ceil(101 / 16)
    assert [line["step"] for line in lines] == [4 * (i + 1) for i in range(iterations)]
    assert result.steps == 4 * iterations and result.rows == 101
    assert result.details["consumption"] == {"steps": 4 * iterations, "epochs": 1, "rows_after": 0, "problems": []}
    first, last = lines[0], lines[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-5)  # the policy still is its reference
    assert first["episodes"] == 16 and last["episodes"] == 5
    assert first["rewards/ppo_rewards:letters"] == first["reward"] and 0 <= first["stopped"] <= 1
    assert last["kl"] > 0 and last["seconds/generate"] > 0 and last["explained_variance"] > first["explained_variance"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert [s["iteration"] for s in samples] == [0] * 8 + [4] * 8 + [6] * 5
    assert samples[0].keys() == {"iteration", "step", "prompt", "answer", "reward", "scores", "stopped"}


def test_the_reward_goes_up(tmp_path: Path, model: str, data: Path) -> None:
    train = {"total_episodes": 800, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "kl_coef": 0.01}
    run(tmp_path / "ppo", model, data, train=train, limits={"kl_per_token": None})
    rewards = [line["reward"] for line in logged(tmp_path / "ppo") if "reward" in line]
    assert len(rewards) == 800 // 32 + (800 % 32 > 0) and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1


@pytest.mark.parametrize(
    ("workers", "config"),
    [
        (1, {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}}),
        pytest.param(2, {"train": {"per_device_train_batch_size": 4}}, marks=pytest.mark.slow),
        pytest.param(2, {"train": {"per_device_train_batch_size": 4}, "deepspeed": "zero2"}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "deepspeed": "zero3"},
            marks=pytest.mark.slow,
        ),
        (1, {"placement": "separate"}),
    ],
    ids=["micro-batches", "two workers", "zero2", "zero3", "separate"],
)
def test_the_run_is_the_same_however_it_is_shared(
    tmp_path: Path,
    model: str,
    data: Path,
    alone: tuple[Path, StageResult],
    workers: int,
    config: dict[str, Any],
) -> None:
    config = config | {"train": config.get("train", {}) | {"num_train_epochs": 1}}
    run(tmp_path / "shared", model, data, workers, **config)
    wanted, got = ([line for line in logged(folder) if "reward" in line] for folder in (alone[0], tmp_path / "shared"))
    assert len(got) == len(wanted)
    for name in ("reward", "kl", "entropy", "policy_loss", "value_loss", "answer_tokens", "explained_variance", "loss"):
        assert [line[name] for line in got] == pytest.approx([line[name] for line in wanted], rel=1e-3, abs=2e-4), name
    expected, found = weights(alone[0]), weights(tmp_path / "shared")
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-3


@pytest.mark.parametrize(
    "more", [{}, pytest.param({"tuning": {"method": "lora", "r": 4}}, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_an_interrupted_run_ends_as_if_it_were_not(
    tmp_path: Path, model: str, data: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    train = {"total_episodes": 160, "save_steps": 6, "kl_target": 0.5, "kl_horizon": 100}
    run(tmp_path / "whole", model, data, train=train, **more)
    (CODE / "fails").write_text("112")  # answers until it raises, while iteration 8 is judged
    with pytest.raises(Exception, match="the reward is out of order"):
        run(tmp_path / "resumed", model, data, train=train, rewards=["ppo_rewards:failing"], **more)
    assert [p.name for p in sorted((tmp_path / "resumed" / "checkpoints").glob("checkpoint-*"))] == [
        "checkpoint-20",
        "checkpoint-24",
    ]  # saved at the end of the iterations that steps 18 and 24 belong to
    result = run(tmp_path / "resumed", model, data, train=train, **more)
    assert result.details["consumption"]["problems"] == []
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steady = ("reward", "kl", "kl_coef", "loss", "entropy", "explained_variance")
    one, other = (
        [{name: line[name] for name in steady} for line in logged(folder) if "reward" in line]
        for folder in (tmp_path / "whole", tmp_path / "resumed")
    )
    assert one == other


@pytest.mark.slow
def test_a_worker_that_is_killed_in_an_iteration_costs_that_iteration_alone(
    tmp_path: Path, model: str, data: Path
) -> None:
    train = {"total_episodes": 64, "per_device_train_batch_size": 4, "save_steps": 4}
    run(tmp_path / "whole", model, data, 2, train=train)
    (CODE / "fails").write_text("40")  # of 64 answers: while the third of four iterations is judged
    killed = run(tmp_path / "killed", model, data, 2, train=train, rewards=["ppo_rewards:killing"])
    assert killed.details["workers"]["lost"] == 1
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_reference_of_an_adapter_is_the_policy_without_it(tmp_path: Path, model: str, data: Path) -> None:
    """The same first steps as with a copy for reference: values of kl, and no second model."""
    train = {"total_episodes": 40, "learning_rate": 3e-2}
    run(tmp_path / "lora", model, data, train=train, tuning={"method": "lora", "r": 8})
    lines = [line for line in logged(tmp_path / "lora") if "reward" in line]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl"] > 0.01
    base, made = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "lora" / "model"))
    samples = [json.loads(line) for line in (tmp_path / "lora" / "samples.jsonl").open()]
    assert len(samples) > 0 and (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), made.parameters(), strict=True))


def test_steps_are_left_out_where_the_policy_has_moved_enough(tmp_path: Path, model: str, data: Path) -> None:
    """A bound that every step is beyond leaves one step of each iteration; weights do not move in the others."""
    train = {"total_episodes": 24, "target_kl": 1e-12, "lr_scheduler_type": "constant", "num_mini_batches": 1}
    few = run(tmp_path / "few", model, data, train=train | {"num_ppo_epochs": 4})
    one = run(tmp_path / "one", model, data, train=train | {"num_ppo_epochs": 2})
    skipped = [line["skipped_steps"] for line in logged(tmp_path / "few") if "reward" in line]
    # The first step of an iteration is made by the policy that answered, so its distance is 0; the second is beyond.
    assert skipped == [0.5] * len(skipped) and few.steps == 2 * one.steps
    told = [[line["reward"] for line in logged(tmp_path / name) if "reward" in line] for name in ("few", "one")]
    assert told[0] == pytest.approx(told[1])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "ppo_rewards:raises",
            r"ppo_rewards:raises raised ValueError: no \(line \d+ of ppo_rewards.py\), .*chats.jsonl, row \d+",
        ),
        ("ppo_rewards:nan", r"ppo_rewards:nan gave nan for chats.jsonl, row \d+"),
        ("ppo_rewards:short", r"returned 1 rewards for \d+ answers"),
        ("ppo_rewards:gone", r"the module ppo_rewards has no 'gone'"),
    ],
)
def test_rewards_that_are_wrong(tmp_path: Path, model: str, data: Path, reward: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        run(tmp_path / "ppo", model, data, rewards=[reward], train={"total_episodes": 8})


def test_prompts_that_leave_no_room(tmp_path: Path, model: str, data: Path) -> None:
    with pytest.raises(DataError, match="leaves no room for a prompt in the model's 256 positions"):
        run(tmp_path / "none", model, data, max_new_tokens=256)
    with pytest.raises(DataError, match="too_long 69"):
        run(tmp_path / "some", model, data, max_new_tokens=230)
    assert json.loads((tmp_path / "some" / "ledger.json").read_text())["reasons"]["too_long"] == 69


def test_held_out_prompts_are_answered(tmp_path: Path, model: str, data: Path) -> None:
    split = [{"path": str(data / "chats.jsonl"), "eval": "20%"}]
    train = {"total_episodes": 32, "eval_strategy": "steps", "eval_steps": 8, "load_best_model_at_end": True}
    result = run(tmp_path / "ppo", model, data, data=split, train=train)
    told = [line["eval_reward"] for line in logged(tmp_path / "ppo") if "eval_reward" in line]
    assert len(told) >= 2 and result.metrics["eval_reward"] == pytest.approx(max(told))
    assert result.metrics["eval_rows"] + result.rows == 101


def test_a_value_model_from_the_reward_model(tmp_path: Path, model: str, data: Path) -> None:
    reward = train_reward(tmp_path / "reward", model, data)
    folder = tmp_path / "ppo"
    folder.mkdir()
    stage = PPO.model_validate(
        {
            "data": [{"path": str(data / "chats.jsonl")}],
            "rewards": ["stages.reward", {"reward": "ppo_rewards:letters", "weight": 0.5}],
            "max_new_tokens": 8,
            "train": BASE | {"total_episodes": 16},
        }
    )
    inputs = {"model": [Artifact("base", "model", model)], "rewards": [reward]}
    ctx = StageContext("ppo", folder, tmp_path / "prepared", inputs)
    stage.run(ctx)
    lines = [line for line in logged(folder) if "reward" in line]
    total = lines[0]["rewards/reward"] + 0.5 * lines[0]["rewards/ppo_rewards:letters"]
    assert lines[0]["reward"] == pytest.approx(total, abs=1e-5)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert samples[0]["scores"].keys() == {"reward", "ppo_rewards:letters"}


def train_reward(folder: Path, model: str, data: Path) -> Artifact:
    folder.mkdir(parents=True)
    stage = Reward.model_validate({"data": [{"path": str(data / "pairs.jsonl")}], "train": {"num_train_epochs": 1}})
    inputs = {"model": [Artifact("base", "model", model)]}
    result = stage.run(StageContext("reward", folder, folder.parent / "prepared", inputs))
    return Artifact("reward", "reward model", str(folder / "model"), {"metrics": result.metrics})
