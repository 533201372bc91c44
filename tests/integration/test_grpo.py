"""GRPO and RLOO as they are run: TRL's trainers on our prompts, rewards, workers and checkpoints."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from stages import KINDS, StageContext
from stages.base import Artifact, Resources, StageResult
from stages.data.prepare import Prepared
from stages.errors import StageError
from stages.training import recovery
from stages.training import trainer as trainer_module

from ..conftest import CODE, chat, prepared_beside, write_jsonl
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
    """prompts.jsonl: 21 conversations of different lengths that end with a question, and a module of rewards."""
    folder, rng = tmp_path_factory.mktemp("prompts"), random.Random(1)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        *messages, answer = chat(rng, 1 + i % 2)
        rows.append({"prompt": messages, "expected": answer["content"], "topic": "letters"})
    rows[15]["expected"] = "f e d"
    write_jsonl(folder / "prompts.jsonl", rows)
    (CODE / "group_rewards.py").write_text(REWARDS)
    return folder


def stage(
    kind: str, folder: Path, model: str, prompts: Path, workers: int = 1, worker: Callable[..., Any] | None = None,
    judge: Artifact | None = None, /, **config: Any,
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
    with pytest.MonkeyPatch.context() as patch, prepared_beside(folder) as prepared:
        inputs = {"model": [Artifact("base", "model", model)], "rewards": [judge] if judge else []}
        context = StageContext(
            "stage", folder, prepared, inputs, resources=Resources(workers=workers),
            local=workers == 1 and "deepspeed" not in config,
        )  # fmt: skip
        if worker is not None:
            patch.setattr(recovery, "train_on_worker", worker)
        return made.run(context)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(("kind", "train"), [("grpo", {}), ("rloo", {"normalize_advantages": True})])
def test_an_easy_reward_is_learned(tmp_path: Path, model: str, prompts: Path, kind: str, train: dict[str, Any]) -> None:
    """8 prompts an iteration of 2 steps, 3 iterations an epoch; the last has 5 prompts."""
    rewards = ["group_rewards:letters", {"reward": "group_rewards:asks", "weight": 0.5}]
    config = {"rewards": rewards, "train": train | {"num_train_epochs": 4}, "samples": {"every": 4, "prompts": 3}}
    result = stage(kind, tmp_path / kind, model, prompts, **config)
    assert result.steps == 24 and result.rows == ROWS
    assert result.details["consumption"] == {"steps": 24, "epochs": 4, "rows_after": 0, "problems": []}
    lines = [line for line in log(tmp_path / kind) if "loss" in line]
    letters = [line["rewards/group_rewards:letters"] for line in lines if "reward" in line]
    assert len(lines) == 12 == len(letters), "what falls into an iteration is told at its end"
    assert letters[-1] > 2 * letters[0] > 0
    for line in lines:
        assert line["rewards/group_rewards:asks"] == 1.0
        assert line["reward"] == pytest.approx(line["rewards/group_rewards:letters"] + 0.5, abs=1e-5)
        assert 0 <= line["stopped"] <= 1 and 1 <= line["answer_tokens"] <= 8 and line["entropy"] > 0
        assert {"clip_fraction", "tokens_per_second", "grad_norm", "seconds/generate", "seconds/judge"} <= set(line)
    kept = [json.loads(line) for line in (tmp_path / kind / "samples.jsonl").open()]
    assert [k["iteration"] for k in kept] == [i for i in (0, 4, 8, 11) for _ in range(3)]
    for k in kept:
        assert k["step"] == 2 * k["iteration"] and k["prompt"].count("Reverse") and isinstance(k["stopped"], bool)
        scores = {name.removeprefix("group_rewards:"): score for name, score in k["scores"].items()}
        assert k["reward"] == pytest.approx(scores["letters"] + 0.5 * scores["asks"])
        assert scores["letters"] == pytest.approx(k["answer"].count("a") / max(len(k["answer"]), 1))


# ------------------------------------------------------------------------------------------------ what TRL is given


def with_trainer(change: Callable[[Any], None]) -> Callable[[dict[str, Any]], Any]:
    """The worker's own function, with a trainer that `change` was done to."""

    def build(job: dict[str, Any], parts: Any) -> Any:
        made = job["build"](parts)
        change(made)
        return made

    return lambda job: trainer_module.train_on_worker(job | {"build": lambda parts: build(job, parts)})


def raise_after(step: int) -> Callable[[Any], None]:
    from transformers import TrainerCallback

    class Accident(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise RuntimeError("an accident")

    return lambda trainer: trainer.add_callback(Accident())


TWICE = {
    "num_train_epochs": 2, "num_iterations": 2, "gradient_accumulation_steps": 2, "save_steps": 3, "beta": 0.05,
    "use_adaptive_entropy": True, "learning_rate": 3e-3,
}  # fmt: skip
LINE = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "reward",
    "entropy",
    "kl_per_token",
    "stopped",
    "answer_tokens",
    "num_tokens",
)


def told(folder: Path) -> list[dict[str, Any]]:
    return [{k: line.get(k) for k in LINE} for line in log(folder) if "loss" in line]


def test_an_interrupted_run_ends_with_the_very_same_weights(tmp_path: Path, model: str, prompts: Path) -> None:
    """Two steps an iteration on the same answers; cut off in the middle of the fourth, after the checkpoint of the third.
    On the way: what the policy is asked, and that the reference is the model that was handed over."""
    asked: list[list[int]] = []
    sizes: list[int] = []

    def watch(trainer: Any) -> None:
        generate = trainer.model.generate

        def watched(input_ids: Any, attention_mask: Any, **more: Any) -> Any:
            asked.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
            sizes.append(len(input_ids))
            return generate(input_ids=input_ids, attention_mask=attention_mask, **more)

        trainer.model.generate = watched

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = stage("grpo", whole, model, prompts, 1, with_trainer(watch), train=TWICE)
    assert result.steps == 12

    data = Prepared(
        Path(result.details["prepared"]), json.loads((Path(result.details["prepared"]) / "manifest.json").read_text())
    )
    prepared = [
        ids for file, group, _ in data.row_groups()
        for ids in pq.ParquetFile(file).read_row_group(group)["prompt_ids"].to_pylist()
    ]  # fmt: skip
    assert len(prepared) == ROWS == len({tuple(ids) for ids in prepared}) and sizes == [32] * 6
    counts = Counter(map(tuple, asked))
    # Twice, 4 answers each time; 3 of the last 5 prompts of each epoch are asked once more.
    assert set(counts) == {tuple(ids) for ids in prepared} and set(counts.values()) <= {8, 12, 16}
    assert sum(counts.values()) == 2 * 4 * (ROWS + 3)
    groups = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    assert all(group == group[:1] * 4 for group in groups), "the answers to a prompt stand together"

    assert told(whole)[-1]["kl_per_token"] > 1e-4, "the policy has moved away from what it was given"
    with pytest.raises(RuntimeError, match="an accident"):
        stage("grpo", cut, model, prompts, 1, with_trainer(raise_after(7)), train=TWICE)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert stage("grpo", cut, model, prompts, train=TWICE).steps == 12
    wanted, got = weights(whole), weights(cut)
    assert set(wanted) == set(got) and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert told(whole) == told(cut)
    for file in ("consumed.jsonl", "samples.jsonl"):
        assert (whole / file).read_text() == (cut / file).read_text()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, model: str) -> Artifact:
    """A reward model that has learnt nothing."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(tmp_path_factory.mktemp("judge"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Artifact("stages.judge", "reward model", folder, {"metrics": {"reward_mean": 0.0, "reward_std": 0.5}})


LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
SHARED = [
    ("grpo", 1, {"tuning": LORA}),
    pytest.param("grpo", 2, {}, marks=pytest.mark.slow),
    pytest.param("grpo", 2, {"deepspeed": "zero3"}, marks=pytest.mark.slow),
    pytest.param("rloo", 2, {"deepspeed": "zero3", "tuning": LORA}, marks=pytest.mark.slow),
    pytest.param("rloo", 2, {"deepspeed": "zero2"}, marks=pytest.mark.slow),
    pytest.param("grpo", 1, {"deepspeed": "zero0", "tuning": LORA}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "workers", "config"), SHARED, ids=lambda x: str(x)[:60])
def test_workers_share_it(
    tmp_path: Path, model: str, prompts: Path, judge: Artifact, kind: str, workers: int, config: dict[str, Any]
) -> None:
    """The reference is the model that was handed over, or with an adapter its base: the policy begins at a KL of 0."""
    rewards = ["stages.judge", {"reward": "group_rewards:letters", "weight": 2.0}]
    source = [{"path": str(prompts / "prompts.jsonl"), "eval": "20%"}]
    train = {
        "beta": 0.05, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,  # the first step changes nothing
    }  # fmt: skip
    result = stage(
        kind, tmp_path / kind, model, prompts, workers, None, judge, data=source, rewards=rewards, train=train, **config
    )
    lines = [line for line in log(tmp_path / kind) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4] and result.steps == 4
    assert abs(lines[0]["kl_per_token"]) < 1e-6 < 1e-5 < abs(lines[1]["kl_per_token"])
    for line in lines:
        assert line["reward"] == pytest.approx(
            line["rewards/stages.judge"] + 2 * line["rewards/group_rewards:letters"], abs=1e-5
        )
        assert line["frac_reward_zero_std"] < 0.5
    held_out = [line for line in log(tmp_path / kind) if "eval_reward" in line]
    assert [line["step"] for line in held_out][:2] == [2, 4] and held_out[0]["eval_rows"] >= 2
    assert result.metrics["eval_reward"] == pytest.approx(
        result.metrics["eval_rewards/stages.judge"] + 2 * result.metrics["eval_rewards/group_rewards:letters"]
    )
    before = load_file(Path(model) / "model.safetensors")
    after = weights(tmp_path / kind)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and (all("q_proj" in n or "v_proj" in n for n in changed) if "tuning" in config else True)


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (
            "raises",
            r"group_rewards:raises raised KeyError: 'topic' \(line \d+ of group_rewards.py\), for 32 answers, prompts.jsonl, row",
        ),
        ("too_few", "group_rewards:too_few returned 1 rewards for 32 answers"),
    ],
)
def test_a_reward_that_fails(tmp_path: Path, model: str, prompts: Path, reward: str, says: str) -> None:
    with pytest.raises(StageError, match=says):
        stage("grpo", tmp_path / "a", model, prompts, rewards=[f"group_rewards:{reward}"])


@pytest.mark.slow
def test_a_reward_that_is_no_number_stops_all_workers_and_the_checkpoint_is_kept(
    tmp_path: Path, model: str, prompts: Path
) -> None:
    """Row 16 is asked by one of two workers, in the second iteration."""
    settings = {"shuffle": False, "train": {"save_steps": 1}}
    says = r"group_rewards:nan_for_one gave nan for prompts.jsonl, row 16"
    with pytest.raises(StageError, match=says):
        stage("rloo", tmp_path / "a", model, prompts, 2, rewards=["group_rewards:nan_for_one"], **settings)
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_limits_end_a_training_that_has_nothing_more_to_learn(tmp_path: Path, model: str, prompts: Path) -> None:
    """Entropy is known after the first iteration; the second is the last."""
    result = stage("grpo", tmp_path / "a", model, prompts, rewards=["group_rewards:asks"], limits={"entropy": 100.0})
    (warning,) = result.details["training_warnings"]
    assert result.steps == 4 and "training ended after 4 steps: the policy always says the same" in warning
    assert result.details["consumption"] == {"steps": 4, "epochs": 0, "rows_after": 16, "problems": []}
    with pytest.raises(StageError, match=r"stopped after 2 steps: .* a higher beta holds it"):
        train = {"beta": 0.1, "learning_rate": 0.1}
        stage("grpo", tmp_path / "b", model, prompts, limits={"kl_per_token": 1e-6}, train=train)
