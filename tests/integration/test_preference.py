"""Reward, DPO and KTO as they are run: references computed once, steps that may be shared in any way, and what is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.data.prepare import Prepared
from stages.errors import DataError
from stages.scoring import answer_logprobs
from stages.training import recovery, reference
from stages.training import trainer as trainer_module
from stages.training.drift import FILE

from ..conftest import write_jsonl
from .test_training import WEIGHT_TOLERANCE, run, train, weights

pytestmark = pytest.mark.usefixtures("ray_address")


def close(told: dict[str, Any], wanted: dict[str, Any], names: str) -> None:
    assert {k: told[k] for k in names.split()} == pytest.approx(
        {k: wanted[k] for k in names.split()}, rel=1e-3, abs=2e-5
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: str, data: Path) -> dict[str, tuple[Path, Any, list[float]]]:
    """Each kind by one worker, 37 pairs, some of them held out, in steps of 8 rows."""
    folder = tmp_path_factory.mktemp("alone")
    made = {}
    for kind in ("dpo", "kto", "reward"):
        config = {"data": [{"path": str(data / "pairs.jsonl"), "eval": "25%"}], "train": train(8)}
        made[kind] = (folder / kind, *run(folder / kind, model, kind, data / "pairs.jsonl", 1, config))
    return made


SHARED = [
    ("dpo", 1, {"train": train(2, gradient_accumulation_steps=4)}),
    ("dpo", 2, {"train": train(2, gradient_accumulation_steps=2), "deepspeed": "zero3"}),
    pytest.param("kto", 2, {"train": train(2, gradient_accumulation_steps=2)}, marks=pytest.mark.slow),
    pytest.param(
        "kto", 1, {"train": train(4, gradient_accumulation_steps=2), "deepspeed": "zero2"}, marks=pytest.mark.slow
    ),
    pytest.param("reward", 2, {"train": train(4), "deepspeed": "zero2"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "workers", "config"), SHARED, ids=lambda x: str(x)[:60])
def test_a_step_and_its_metrics_are_the_same_however_it_is_shared(
    tmp_path: Path, model: str, data: Path, alone: dict[str, Any], kind: str, workers: int, config: dict[str, Any]
) -> None:
    folder, one, wanted = alone[kind]
    split = [{"path": str(data / "pairs.jsonl"), "eval": "25%"}]
    result, losses = run(tmp_path / kind, model, kind, data / "pairs.jsonl", workers, config | {"data": split})
    assert len(losses) > 3 and losses == pytest.approx(wanted, rel=1e-5)
    expected, got = weights(folder), weights(tmp_path / kind)
    assert set(expected) == set(got)
    if kind != "reward":  # a reward model's head begins with numbers drawn on the way
        assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < WEIGHT_TOLERANCE
    names = {
        "dpo": "rewards/chosen rewards/rejected rewards/accuracies logps/chosen eval_loss eval_rewards/margins eval_rows",
        "kto": "kl eval_loss eval_kl eval_rewards/chosen eval_rewards/rejected eval_rewards/margins eval_logps/chosen",
        "reward": "accuracy margin mean_reward eval_loss eval_accuracy calibration_error reward_mean reward_std "
        "length_correlation other_prompt_accuracy judged_pairs judged_held_out",
    }
    close(result.metrics, one.metrics, names[kind])
    if kind != "reward" and config.get("deepspeed") != "zero3":
        close(result.metrics, one.metrics, "samples/tokens samples/length_ratio samples/stopped samples/kl")


def test_what_is_told_of_a_preference_training(alone: dict[str, Any]) -> None:
    _, dpo, losses = alone["dpo"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy still is its reference
    assert dpo.metrics["eval_loss"] < math.log(2) and dpo.metrics["rewards/accuracies"] > 0.5
    assert dpo.metrics["samples/kl"] > 0 and 0 <= dpo.metrics["samples/stopped"] <= 1
    _, kto, losses = alone["kto"]
    assert losses[0] == pytest.approx(0.5, abs=1e-6) and kto.metrics["kl"] >= 0
    _, reward, _ = alone["reward"]
    assert reward.metrics["judged_held_out"] == 1 and reward.metrics["reward_std"] > 0


@pytest.fixture
def folder_of(alone: dict[str, Any]) -> Any:
    def folder(kind: str) -> Path:
        (found,) = [p for p in alone[kind][0].parent.glob("prepared/[!.]*-reference-*") if _columns(p) & COLUMNS[kind]]
        return found

    return folder


COLUMNS = {"dpo": {"ref_chosen_logps"}, "kto": {"ref_kl_logps"}}


def _columns(folder: Path) -> set[str]:
    return set(pq.read_schema(next(folder.glob("shards-*.parquet"))).names)


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    prepared = Prepared(folder, json.loads((folder / "manifest.json").read_text()))
    return [
        r
        for file, group, _ in prepared.row_groups(part)
        for r in pq.ParquetFile(file).read_row_group(group).to_pylist()
    ]


@pytest.mark.parametrize("part", ["shards", "eval"])
def test_the_reference_is_the_model_that_was_handed_over(model: str, folder_of: Any, part: str) -> None:
    """Its values are those of the artifact itself, padded and by another function; of another model they are not."""
    pairs, labelled = rows_of(folder_of("dpo"), part), rows_of(folder_of("kto"), part)
    artifact = AutoModelForCausalLM.from_pretrained(model).eval()
    for rows, side, column in (
        (pairs, "chosen_ids", "ref_chosen_logps"), (pairs, "rejected_ids", "ref_rejected_logps"),
        (labelled, "completion_ids", "ref_logps"), (labelled, "kl_completion_ids", "ref_kl_logps"),
    ):  # fmt: skip
        wanted = torch.tensor(answer_logprobs(artifact, rows, side, 0, 8), dtype=torch.float32)
        assert torch.allclose(torch.tensor([row[column] for row in rows]), wanted, atol=1e-5)
    with torch.no_grad():
        artifact.model.embed_tokens.weight += 0.05 * torch.randn_like(artifact.model.embed_tokens.weight)
    others = torch.tensor(answer_logprobs(artifact, labelled, "completion_ids", 0, 8), dtype=torch.float32)
    assert not torch.allclose(torch.tensor([row["ref_logps"] for row in labelled]), others, atol=0.1)
    prompts = {tuple(row["completion_ids"]): tuple(row["prompt_ids"]) for row in labelled}
    assert all(prompts.get(tuple(row["kl_completion_ids"])) != tuple(row["prompt_ids"]) for row in labelled)


def test_actors_and_this_process_say_the_same_and_a_second_run_asks_nobody(
    tmp_path: Path, model: str, data: Path, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LITTLE", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config = {"data": [{"path": str(data / "pairs.jsonl"), "eval": "25%"}], "train": train(8, max_steps=1)}
    first, _ = run(tmp_path / "a", model, "dpo", data / "pairs.jsonl", 1, config)
    (made,) = tmp_path.glob("prepared/[!.]*-reference-*")
    for part in ("shards", "eval"):
        for ours, theirs in zip(rows_of(made, part), rows_of(folder_of("dpo"), part), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5) if isinstance(ours, float) else True
            assert ours["ref_chosen_logps"] == pytest.approx(theirs["ref_chosen_logps"], abs=1e-5)
            assert ours["row"] == theirs["row"] and ours["chosen_ids"] == theirs["chosen_ids"]
    second, _ = run(
        tmp_path / "b", model, "dpo", data / "pairs.jsonl", 1, config | {"train": train(4, max_steps=1, beta=0.5)}
    )
    assert not first.details["reference"]["reused"] and second.details["reference"]["reused"]
    assert len(list(tmp_path.glob("prepared/[!.]*-reference-*"))) == 1
    free, _ = run(
        tmp_path / "c", model, "dpo", data / "pairs.jsonl", 1, {"train": train(8, max_steps=1, loss_type="simpo")}
    )
    assert "reference" not in free.details and len(list(tmp_path.glob("prepared/[!.]*-reference-*"))) == 1


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_an_adapter_has_its_base_for_a_reference(tmp_path: Path, model: str, data: Path, method: str) -> None:
    """As it is trained beside: in 4 bits where that is so."""
    for kind, start in (("dpo", math.log(2)), ("kto", 0.5)):
        tuning = {"tuning": {"method": method, "r": 4}}
        result, losses = run(tmp_path / kind, model, kind, data / "pairs.jsonl", train=train(8), **tuning)
        assert losses[0] == pytest.approx(start, abs=1e-6) and losses[-1] < start
        assert abs(result.metrics["samples/kl"]) > 1e-3  # an estimate of a few samples may be below 0


@pytest.mark.parametrize("loss_type", ["ipo", ["sigmoid", "sft"], "orpo"])  # each of them: tests/test_preference.py
def test_other_losses_train(tmp_path: Path, model: str, data: Path, loss_type: Any) -> None:
    config = {"watch": {"prompts": 0}, "train": train(8, num_train_epochs=2, loss_type=loss_type)}
    result, losses = run(tmp_path / "dpo", model, "dpo", data / "pairs.jsonl", 1, config)
    assert losses[-1] < losses[0] and result.metrics["rewards/accuracies"] > 0.5
    assert "samples/tokens" not in result.metrics


def test_a_second_look_at_the_samples_is_at_the_same_prompts(alone: dict[str, Any]) -> None:
    rows = json.loads((alone["dpo"][0] / FILE).read_text())
    prompts = [row["prompt_ids"] for row in rows]
    held_out = {
        tuple(row["prompt_ids"])
        for f in alone["dpo"][0].parent.glob("prepared/*/eval-*.parquet")
        for row in pq.read_table(f).to_pylist()
    }
    assert prompts and {tuple(p) for p in prompts} <= held_out
    assert all(row["completion_ids"] and row["logps"] < 0 for row in rows)


def answers(count: int, label: Any, prompt: str = "Is {} even?") -> list[dict[str, Any]]:
    return [{"prompt": prompt.format(i), "completion": f"a b {i}", "label": label(i)} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (answers(20, lambda i: True), "all 20 answers are desirable"),
        (answers(20, lambda i: False), "all 20 answers are undesirable"),
        (answers(20, lambda i: i % 2 == 0, "Say something."), "all rows have the same prompt"),
    ],
)
def test_kto_refuses_data_it_cannot_learn_from(tmp_path: Path, model: str, rows: list[Any], says: str) -> None:
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    with pytest.raises(DataError, match=says):
        run(tmp_path / "kto", model, "kto", path, train=train(4))


def test_kto_says_when_one_kind_outweighs_the_other(tmp_path: Path, model: str) -> None:
    path = write_jsonl(tmp_path / "kto.jsonl", answers(24, lambda i: i % 8 == 0))
    result, _ = run(tmp_path / "kto", model, "kto", path, train=train(8))
    (warning,) = [w for w in result.details["training_warnings"] if "desirable" in w]
    assert "desirable_weight: 7" in warning and "3 desirable and 21 undesirable" in warning


def test_margins_of_the_data_and_centring_reach_the_reward(tmp_path: Path, model: str, data: Path) -> None:
    rows = [json.loads(line) | {"margin": 3.0} for line in (data / "pairs.jsonl").open()]
    path = write_jsonl(tmp_path / "margins.jsonl", rows)
    first = train(37, max_steps=1)
    _, (plain,) = run(tmp_path / "a", model, "reward", data / "pairs.jsonl", train=first)
    _, (margin,) = run(tmp_path / "b", model, "reward", path, train=first)
    _, (centred,) = run(
        tmp_path / "c", model, "reward", data / "pairs.jsonl", train=first | {"center_rewards_coefficient": 10.0}
    )
    assert margin > plain + 2 and centred > plain


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, model: str, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 3 of 5 with a checkpoint of step 2; neither the reference nor its samples are made again."""
    from transformers import TrainerCallback

    config = {"train": train(8, save_steps=2)}
    run(tmp_path / "whole", model, kind, data / "pairs.jsonl", **config)

    class Accident(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("an accident")

    def cut_short(job: dict[str, Any]) -> Any:
        def build(parts: Any) -> Any:
            made = job["build"](parts)
            made.add_callback(Accident())
            return made

        return trainer_module.train_on_worker(job | {"build": build})

    with monkeypatch.context() as patch, pytest.raises(Exception, match="an accident"):
        patch.setattr(recovery, "train_on_worker", cut_short)
        run(tmp_path / "cut", model, kind, data / "pairs.jsonl", **config)
    before = (tmp_path / "cut" / FILE).stat().st_mtime_ns
    result, _ = run(tmp_path / "cut", model, kind, data / "pairs.jsonl", **config)
    assert result.details["reference"]["reused"] and (tmp_path / "cut" / FILE).stat().st_mtime_ns == before
    wanted, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
