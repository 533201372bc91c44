"""GRPO and RLOO without training: what may be asked for, and what TRL is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.spec_reader import load_spec
from stages import KINDS
from stages.errors import SpecError
from stages.rl.groups import Prompts, Sizes, as_answers, filled
from stages.rl.iterations import Iterations
from stages.training.feed import Feed, Shares
from stages.training.guard import rows_of
from stages.training.meter import Meter


def spec(kind: str, train: dict[str, Any] | None = None, **more: Any) -> Any:
    config = {"data": [{"path": "p.jsonl"}], "rewards": ["my.rewards:exact"], "train": train or {}}
    return KINDS[kind].model_validate({"kind": kind} | config | more)


Mistake = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def mistake(tmp_path: Path, data: Path, model: str) -> Mistake:
    """What the user reads of a spec with one mistake."""

    def told(kind: str, train: dict[str, Any]) -> str:
        stage = {
            "kind": kind,
            "data": [{"path": str(data / "chats.jsonl")}],
            "rewards": ["my.rewards:exact"],
            "train": train,
        }
        (tmp_path / "spec.yaml").write_text(json.dumps({"name": "test", "model": model, "stages": {"rl": stage}}))
        with pytest.raises(SpecError) as caught:
            load_spec(tmp_path / "spec.yaml", [])
        (problem,) = caught.value.problems
        return problem.message

    return told


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_spec_of_a_ppo_stage_is_taken_with_its_kind_changed(kind: str) -> None:
    common = {
        "rewards": ["my.rewards:exact", {"reward": "stages.reward", "weight": 0.5}], "max_new_tokens": 32,
        "temperature": 0.7, "engine": "auto", "samples": {"every": 5}, "limits": {"kl_per_token": None},
        "tuning": {"method": "lora", "r": 4}, "deepspeed": "zero2", "early_stopping": None,
    }  # fmt: skip
    train = {"learning_rate": 1e-5, "per_device_train_batch_size": 8, "save_steps": 10}
    assert spec("ppo", train, **common).max_new_tokens == spec(kind, train, **common).max_new_tokens == 32


@pytest.mark.parametrize(
    ("kind", "train", "says"),
    [
        ("grpo", {"kl_coef": 0.1}, "unknown key; write beta"),
        ("rloo", {"num_ppo_epochs": 2}, "unknown key; write num_iterations"),
        ("grpo", {"response_length": 2}, "unknown key; write `max_new_tokens: 53` beside `train`"),
        ("grpo", {"max_completion_length": 64}, "write it beside `train`: `max_new_tokens: 256`"),
        ("rloo", {"temperature": 0.5}, "write it beside `train`: `temperature: 1.0`"),
        ("grpo", {"use_vllm": True}, "write it beside `train`: `engine: vllm`"),
        ("grpo", {"reward_weights": [1.0]}, "write them in `rewards`: `- {reward: NAME, weight: 0.5}`"),
        ("grpo", {"num_generation": 4}, "unknown key; did you mean num_generations?"),
        ("grpo", {"num_generations": 1}, "num_generations must be at least 2: the answers to a prompt are compared with each other"),
        (
            "grpo",
            {"per_device_train_batch_size": 6, "num_generations": 4},
            "per_device_train_batch_size 6 x steps_per_generation 1 answers on each worker are not whole groups of num_generations 4",
        ),
        (
            "rloo",
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "steps_per_generation 2 x num_iterations 1 micro-batches of an iteration are not whole steps of "
            "gradient_accumulation_steps 4",
        ),
        ("rloo", {"num_iterations": 0}, "num_iterations must be at least 1, not 0"),
        ("grpo", {"generation_kwargs": {"temperature": 2}}, "generation_kwargs: temperature is decided by `temperature` beside `train`"),
    ],
)  # fmt: skip
def test_mistakes(mistake: Mistake, kind: str, train: dict[str, Any], says: str) -> None:
    assert mistake(kind, train) == says


def test_a_loss_that_trl_does_not_have_is_told_before_anything_starts(mistake: Mistake) -> None:
    assert "'dapo', 'dr_grpo'" in mistake("grpo", {"loss_type": "dappo"})
    assert spec("grpo", {"scale_rewards": False, "loss_type": "dr_grpo"}).train.given()["scale_rewards"] is False


def test_sizes() -> None:
    assert Sizes.of(spec("grpo").train) == Sizes(prompts=1, updates=1)  # 8 answers to a prompt
    assert Sizes.of(spec("rloo").train) == Sizes(prompts=4, updates=1)  # 2
    of = spec("grpo", {"per_device_train_batch_size": 6, "steps_per_generation": 4, "num_iterations": 3, "num_generations": 8,
                       "gradient_accumulation_steps": 2}).train  # fmt: skip
    assert Sizes.of(of) == Sizes(prompts=3, updates=6)
    assert Sizes.of(spec("grpo", {"gradient_accumulation_steps": 4}).train) == Sizes(prompts=4, updates=1)


def test_the_best_model_is_the_one_of_most_reward() -> None:
    evaluated = {"eval_strategy": "steps", "load_best_model_at_end": True}
    made = spec("grpo", evaluated, data=[{"path": "p.jsonl", "eval": "5%"}])
    assert made.arguments()["metric_for_best_model"] == "reward" and made.arguments()["greater_is_better"]


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_prompt_is_asked_and_the_first_ones_of_the_last_iteration_again(tmp_path: Any, workers: int) -> None:
    """14 prompts, 6 an iteration: the third has 2, each asked three times. Each worker has whole groups."""
    pq.write_table(pa.table({"row": range(14)}), tmp_path / "rows.parquet")
    groups, seed = [(str(tmp_path / "rows.parquet"), 0, 14)], 5
    steps: list[list[list[int]]] = []  # [optimiser step][worker]: rows of its first micro-batch
    for rank in range(workers):
        feed = Feed(groups, rank=0, shares=Shares(1, 6), steps=3, seed=seed)
        iterations = Iterations(feed, updates=2, accumulation=2, workers=workers)
        loader = Prompts(iterations, rank=rank, count=6, repeat=2)
        batches = [[row["row"] for row in batch["asked"]] for batch in loader]
        assert len(batches) == len(loader) == 3 * 2 * 2 and iterations.step == 6
        assert all(batches[i] == batches[i - i % 4] for i in range(len(batches))), "those of an iteration are the same"
        for step in range(6):
            if rank == 0:
                steps.append([])
            steps[step].append(batches[2 * step])
    for of_worker in steps:
        for rows in of_worker:
            assert len(rows) == 12 // workers and rows[::2] == rows[1::2]
    asked = [sorted(row for rows in of_worker for row in rows[::2]) for of_worker in steps[::2]]
    assert sorted(asked[0] + asked[1]) == sorted(set(range(14)) - set(asked[2]))
    assert [asked[2].count(row) for row in sorted(set(asked[2]))] == [3, 3]


def test_filled() -> None:
    assert filled("abc", 7) == list("abcabca") and filled("abc", 3) == list("abc")


def test_what_the_meter_counts_and_the_guard_writes_down() -> None:
    """Three answers: of one token, of three, and one that is left out since it did not end."""
    inputs = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7], [8, 9]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
        "completion_ids": torch.tensor([[11, 0, 0], [12, 13, 14], [15, 16, 17]]),
        "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]),
    }
    batch = as_answers(inputs)
    assert rows_of(batch) == [
        {"input_ids": [5, 11], "labels": [-100, 11]},
        {"input_ids": [6, 7, 12, 13, 14], "labels": [-100, -100, 12, 13, 14]},
        {"input_ids": [8, 9], "labels": [-100, -100]},
    ]
    meter = Meter(None, None)
    meter.batch(batch)
    assert meter.counts == pytest.approx({"tokens": 9, "trained": 4, "slots": 15, "flops": 0, "waited": 0})
