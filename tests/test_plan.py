"""Order, fingerprints, states and estimates: pure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import Pipeline
from pipeline.estimate import amount_of, describe, expected_rows, planned_steps, training_of
from pipeline.plan import make_plan, resources_for
from pipeline.spec import Cluster, Spec
from stages import KINDS, SFT, Evaluate
from stages.base import Resources
from stages.capacity import Capacity
from stages.data.prepare import prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer
from stages.rl.iterations import Iterations
from stages.rl.stage import RLStage
from stages.training.feed import Feed, Position, Shares, total_steps

from .conftest import write_jsonl


def pipeline(data: Path, model: str, storage: Path, **changes: Any) -> Pipeline:
    stages: dict[str, Any] = {
        "eval": {
            "kind": "evaluate",
            "models": ["stages.dpo", "stages.sft"],
            "data": [{"path": str(data / "heldout.jsonl")}],
        },
        "dpo": {"kind": "dpo", "model": "stages.sft", "data": [{"path": str(data / "pairs.jsonl")}]},
        "sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}], "train": {"max_steps": 4}},
    }
    for name, change in changes.pop("stages", {}).items():
        stages[name] = stages[name] | change
    return Pipeline(name="p", model=model, storage=str(storage), stages=stages, **changes)


def prints(p: Pipeline) -> dict[str, str]:
    return {s.name: s.fingerprint for s in p.plan().stages}


def test_order_is_that_of_the_needs(data: Path, model: str, tmp_path: Path) -> None:
    plan = pipeline(data, model, tmp_path).plan()
    assert [s.name for s in plan.stages] == ["sft", "dpo", "eval"]
    assert [s.state for s in plan.stages] == ["run"] * 3


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({}, set()),
        ({"storage": "elsewhere"}, set()),
        ({"stages": {"sft": {"train": {"max_steps": 4, "logging_steps": 1}}}}, set()),
        ({"stages": {"sft": {"train": {"max_steps": 5}}}}, {"sft", "dpo", "eval"}),
        ({"stages": {"sft": {"mask": {"train_on": "last_assistant"}}}}, {"sft", "dpo", "eval"}),
        ({"stages": {"dpo": {"train": {"beta": 0.3}}}}, {"dpo", "eval"}),
        ({"stages": {"eval": {"max_new_tokens": 3}}}, {"eval"}),
        ({"stages": {"dpo": {"workers": 2}}}, set()),
        ({"seed": 1}, {"sft", "dpo", "eval"}),
    ],
)
def test_a_fingerprint_changes_with_what_decides_the_artifact(
    data: Path, model: str, tmp_path: Path, change: dict[str, Any], differ: set[str]
) -> None:
    change = dict(change)
    storage = tmp_path / change.pop("storage", "runs")
    base, other = prints(pipeline(data, model, tmp_path / "runs")), prints(pipeline(data, model, storage, **change))
    assert {name for name in base if base[name] != other[name]} == differ


def test_the_contents_of_the_data_count_and_not_their_place(data: Path, model: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    base = prints(pipeline(data, model, tmp_path))
    assert prints(pipeline(moved, model, tmp_path)) == base
    with (moved / "chats.jsonl").open("a") as out:
        out.write('{"messages": []}\n')
    assert prints(pipeline(moved, model, tmp_path))["sft"] != base["sft"]


def test_plan_json_has_the_contracts_fields(data: Path, model: str, tmp_path: Path) -> None:
    rows = describe(pipeline(data, model, tmp_path).plan(), Capacity.of({"CPU": 2.0, "GPU": 0.0}))
    assert {tuple(row) for row in rows} == {
        ("name", "kind", "inputs", "fingerprint", "state", "rows", "tokens", "steps", "epochs", "workers",
         "memory_per_worker_bytes", "memory", "disk_bytes", "fits", "why", "advice")
    }  # fmt: skip
    by_name = {row["name"]: row for row in rows}
    assert (by_name["sft"]["rows"], by_name["sft"]["steps"]) == (101, 4)
    assert (by_name["dpo"]["rows"], by_name["dpo"]["steps"]) == (37, 15)  # three epochs of 37 rows by 8
    assert by_name["dpo"]["inputs"] == ["stages.sft"] and by_name["eval"]["inputs"] == ["stages.dpo", "stages.sft"]
    assert all(row["fits"] for row in rows)
    assert (by_name["sft"]["epochs"], by_name["dpo"]["epochs"]) == (0.31, 3.0)
    sft, dpo = by_name["sft"], by_name["dpo"]
    for row in (sft, dpo):
        parts = {k: v for k, v in row["memory"].items() if k not in ("moment", "host")}
        assert sum(parts.values()) == row["memory_per_worker_bytes"]
    weights = sft["memory"]["optimizer"] / 2
    assert (
        dpo["memory"]["weights"] == sft["memory"]["weights"] == pytest.approx(weights, rel=1e-3)
    )  # and no second model
    # a checkpoint (weights and two moments), the model, and the data as large as its file
    assert sft["disk_bytes"] == pytest.approx(4 * weights + (data / "chats.jsonl").stat().st_size, rel=0.01)


def test_the_disk_that_the_best_model_takes(data: Path, model: str, tmp_path: Path) -> None:
    """Where the best model is kept, checkpoints are made as often as it is evaluated."""
    best = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    disk = []
    for train in ({"max_steps": 4}, best):
        held = {"train": train, "data": [{"path": str(data / "chats.jsonl"), "eval": 0.1}]}
        disk.append(describe(pipeline(data, model, tmp_path, stages={"sft": held}).plan())[0]["disk_bytes"])
    (weights,) = (file.stat().st_size for file in Path(model).glob("*.safetensors"))
    assert disk[1] - disk[0] == pytest.approx(3 * weights, rel=0.05)  # a second checkpoint: weights and two moments


def test_a_deepspeed_file_counts_by_its_contents(data: Path, model: str, tmp_path: Path) -> None:
    seen = set()
    for folder, stage in (("a", 1), ("b", 1), ("b", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        seen.add(prints(pipeline(data, model, tmp_path, stages={"sft": {"deepspeed": str(file)}}))["sft"])
    assert len(seen) == 2


def test_plan_says_when_memory_is_lacking_and_what_helps(data: Path, model: str, tmp_path: Path) -> None:
    long = {"train": {"max_steps": 4, "max_length": 256, "per_device_train_batch_size": 64}}
    plan = pipeline(data, model, tmp_path, stages={"sft": long}).plan()
    enough = describe(plan, Capacity.of({"CPU": 2.0, "GPU": 0.0, "memory": 64.0 * 2**30}))[0]
    assert enough["fits"] and enough["advice"] == []
    room = float(enough["memory_per_worker_bytes"] * 0.9)
    short = describe(plan, Capacity.of({"CPU": 2.0, "GPU": 0.0, "memory": room}))[0]
    assert not short["fits"] and "GiB of memory" in short["why"]
    assert short["advice"][0]["change"]["train"]["gradient_checkpointing"] is True
    assert all(a["memory_per_worker_bytes"] <= room and "GiB" in a["text"] for a in short["advice"])
    helped = pipeline(
        data, model, tmp_path, stages={"sft": {"train": long["train"] | short["advice"][0]["change"]["train"]}}
    )
    assert describe(helped.plan(), Capacity.of({"CPU": 2.0, "GPU": 0.0, "memory": room}))[0]["fits"]


def test_a_gpu_is_as_large_as_the_cluster_section_says(data: Path, model: str, tmp_path: Path) -> None:
    rows = []
    for size in (80.0, 0.5):
        cluster = {"workers": 2, "gpus_per_worker": 1, "gpu_memory_gib": size}
        plan = pipeline(data, model, tmp_path, cluster=cluster).plan()
        rows.append(describe(plan, Capacity.of({"CPU": 8.0, "GPU": 8.0}))[0])
    assert [row["fits"] for row in rows] == [True, False]
    assert rows[1]["why"].startswith("needs ") and "a GPU has 0.5" in rows[1]["why"]


def test_a_range_of_workers_fits_where_its_fewest_do(data: Path, model: str, tmp_path: Path) -> None:
    two = Capacity.of({"CPU": 2.0, "GPU": 0.0})
    sft = describe(pipeline(data, model, tmp_path, cluster={"workers": "2..8"}).plan(), two)[0]
    assert sft["fits"] and "as many of 2..8 workers as there is room for, in the steps of 8" in sft["why"]
    assert not describe(pipeline(data, model, tmp_path, cluster={"workers": "3..8"}).plan(), two)[0]["fits"]
    ppo = describe(reinforced(data, model, tmp_path, cluster={"workers": "2..8"}).plan(), two)[-1]
    assert ppo["workers"] == 2 and "of 2..8 workers 2: an iteration's prompts are cut for all workers" in ppo["why"]


def test_a_model_that_is_not_at_hand_is_planned_without_its_memory(data: Path, tmp_path: Path) -> None:
    plan = pipeline(data, "nobody/nothing-of-that-name", tmp_path).plan()
    sft = describe(plan, Capacity.of({"CPU": 2.0, "GPU": 0.0}))[0]
    assert sft["memory_per_worker_bytes"] is None and sft["memory"] is None and sft["fits"] and sft["steps"] == 4
    assert "memory is not known: config.json of nobody/nothing-of-that-name" in sft["why"]


@pytest.mark.usefixtures("ray_address")
def test_prepared_data_is_known_before_the_run(data: Path, model: str, tmp_path: Path) -> None:
    base = {"train": {"num_train_epochs": 2, "max_length": 200}}
    loose, packs = (
        pipeline(
            data, model, tmp_path, stages={"sft": {"train": base["train"] | {"max_steps": -1, "packing": p}}}
        ).plan()
        for p in (False, True)
    )
    before = describe(loose)[0]
    assert before["tokens"] is None and describe(packs)[0]["steps"] is None
    stage = loose["sft"].stage
    made = prepare(stage.data, stage.recipe(load_tokenizer(model), 0), loose.folder.prepared)
    after, packed = describe(loose)[0], describe(packs)[0]
    assert (after["rows"], after["tokens"], after["steps"], after["epochs"]) == (101, made.tokens, 2 * 13, 2.0)
    assert after["memory_per_worker_bytes"] < before["memory_per_worker_bytes"]  # rows are shorter than they may be
    assert packed["rows"] == -(-made.tokens // 200) and packed["steps"] == 2 * -(-packed["rows"] // 8)


def test_plan_says_what_is_lacking(data: Path, model: str, tmp_path: Path) -> None:
    rows = describe(
        pipeline(data, model, tmp_path, cluster={"workers": 8}).plan(), Capacity.of({"CPU": 2.0, "GPU": 0.0})
    )
    sft = next(row for row in rows if row["name"] == "sft")
    assert not sft["fits"] and "needs 8 CPU; have 2, cannot grow: will never start" in sft["why"]


@pytest.mark.parametrize(
    ("train", "workers", "steps"),
    [
        ({}, 1, 3 * 13),
        ({"num_train_epochs": 1.5}, 1, 20),
        ({"max_steps": 7}, 4, 7),
        ({"gradient_accumulation_steps": 2}, 2, 3 * 4),
    ],
)
def test_planned_steps(train: dict[str, Any], workers: int, steps: int) -> None:
    stage = SFT.model_validate({"data": [{"path": "x"}], "train": train})
    assert planned_steps(stage, 101, workers) == steps


def test_workers_follow_the_machine_the_cluster_and_the_stage() -> None:
    stage = SFT.model_validate({"data": [{"path": "x"}]})
    assert resources_for(stage, Cluster(), lambda: 0) == Resources(workers=1)
    assert resources_for(stage, Cluster(), lambda: 4) == Resources(workers=4, gpus_per_worker=1)
    some = resources_for(stage, Cluster(workers="2..8", stall_minutes=1.0), lambda: 0)
    assert some == Resources(workers=8, at_least=2, stall_minutes=1.0) and some.fewest == 2
    assert resources_for(stage, Cluster(workers="3..3"), lambda: 0).at_least is None
    with pytest.raises(ValueError, match="goes from a smaller number to a larger one"):
        Cluster(workers="8..2")
    with pytest.raises(ValueError, match="write a number, or a range"):
        Cluster(workers="many")
    assert resources_for(stage, Cluster(workers=8, gpus_per_worker=1), lambda: 0).workers == 8
    assert (
        resources_for(
            SFT.model_validate({"data": [{"path": "x"}], "workers": 3}), Cluster(workers=8), lambda: 0
        ).workers
        == 3
    )
    evaluate = Evaluate.model_validate({"models": ["m"], "data": [{"path": "x"}]})
    assert resources_for(evaluate, Cluster(workers=8, gpus_per_worker=1), lambda: 0).workers == 1


def test_planning_changes_nothing(data: Path, model: str, tmp_path: Path) -> None:
    spec: Spec = pipeline(data, model, tmp_path / "runs").spec
    describe(make_plan(spec))
    assert not (tmp_path / "runs").exists()


def test_expected_rows_know_weights_and_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 100)
    sources = [DataSource(path=str(path), weight=2.5, eval="20%"), DataSource(path=str(path), weight=0.1)]
    assert expected_rows(sources) == 210


def test_steps_of_packs_are_not_known_before_they_are_made() -> None:
    stage = SFT(data=[{"path": "a.jsonl"}], train={"packing": True})
    assert planned_steps(stage, 1000, 1) is None
    assert planned_steps(SFT(data=[{"path": "a.jsonl"}], train={"packing": True, "max_steps": 7}), 1000, 1) == 7


def test_pairs_of_a_kto_stage_are_two_rows_each(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 10)
    single = write_jsonl(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b", "label": True}] * 10)
    sources = [DataSource(path=str(pairs), eval=0.2), DataSource(path=str(single))]
    assert expected_rows(sources) == 18 and expected_rows(sources, pairs_are_two=True) == 26


def test_held_out_rows_of_an_evaluation_are_scored_once() -> None:
    with pytest.raises(ValueError, match=r"a.jsonl: held-out rows are scored once each; leave `weight` and `eval` out"):
        Evaluate(models=["m"], data=[{"path": "a.jsonl", "weight": 2.0}])


def test_an_artifact_of_another_number_of_workers_is_found_and_says_so(data: Path, model: str, tmp_path: Path) -> None:
    planned = pipeline(data, model, tmp_path).plan()
    folder = planned.folder.stage("sft")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": planned["sft"].fingerprint, "workers": 4}))
    again = pipeline(data, model, tmp_path).plan()["sft"]
    assert (again.state, again.why) == ("cached", "unchanged; made with 4 workers")
    same = pipeline(data, model, tmp_path, cluster={"workers": 4}).plan()["sft"]
    assert (same.fingerprint, same.why) == (again.fingerprint, "unchanged")


# ------------------------------------------------------------------------------------------------ reinforcement learning


def reinforced(data: Path, model: str, storage: Path, cluster: dict[str, Any] | None = None, **ppo: Any) -> Pipeline:
    """SFT, reward and `ppo`, on the 37 prompts of the pairs."""
    pairs = [{"path": str(data / "pairs.jsonl")}]
    stages: dict[str, Any] = {
        "sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]},
        "reward": {"kind": "reward", "model": "stages.sft", "data": pairs},
        "rl": {"kind": "ppo", "model": "stages.sft", "rewards": ["stages.reward"], "data": pairs, "max_new_tokens": 32}
        | ppo,
    }
    return Pipeline(name="rl", model=model, storage=str(storage), stages=stages, cluster=cluster or {})


def steps_of_a_run(updates: int, prompts: int, rows: int, max_steps: int = -1, epochs: float = 3.0) -> int:
    """As train_on_worker and the trainer's loader count them."""
    shares = Shares(1, prompts)
    total = -(-max_steps // updates) if max_steps > 0 else total_steps(shares, rows, epochs, Position())
    feed = Feed([("", 0, rows)], rank=0, shares=shares, steps=total, seed=0)
    iterations = Iterations(feed, updates, 1, 1)
    assert iterations.steps == sum(iterations.steps_in(epoch) for epoch in range(iterations.epochs))
    return iterations.steps


@pytest.mark.parametrize(
    ("kind", "train", "workers", "run"),
    [
        ("ppo", {}, 1, {"updates": 4, "prompts": 8}),
        ("ppo", {"num_mini_batches": 3, "num_ppo_epochs": 2}, 2, {"updates": 6, "prompts": 48}),
        ("ppo", {"gradient_accumulation_steps": 2, "num_train_epochs": 1.5}, 1, {"updates": 4, "prompts": 16, "epochs": 1.5}),
        ("ppo", {"max_steps": 9}, 1, {"updates": 4, "prompts": 8, "max_steps": 9}),
        ("ppo", {"total_episodes": 100}, 3, {"updates": 4, "prompts": 24, "max_steps": 5 * 4}),
        ("grpo", {"num_generations": 4}, 2, {"updates": 1, "prompts": 4}),
        ("grpo", {"num_generations": 2, "steps_per_generation": 4, "num_iterations": 3}, 1, {"updates": 12, "prompts": 16}),
        ("rloo", {"num_generations": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}, 1,
         {"updates": 1, "prompts": 8, "epochs": 1}),
    ],
)  # fmt: skip
def test_steps_of_iterations_are_those_of_the_run(
    kind: str, train: dict[str, Any], workers: int, run: dict[str, Any]
) -> None:
    stage = KINDS[kind].model_validate({"rewards": ["m:f"], "data": [{"path": "x"}], "train": train})
    assert isinstance(stage, RLStage)
    assert stage.cut(workers) == (Shares(1, run["prompts"]), run["updates"])
    assert stage.planned_steps(37, workers) == steps_of_a_run(rows=37, **run)


def test_a_plan_says_how_many_answers_an_iteration_has(data: Path, model: str, tmp_path: Path) -> None:
    rows = describe(reinforced(data, model, tmp_path, train={"total_episodes": 100, "num_mini_batches": 2}).plan())
    rl = next(row for row in rows if row["name"] == "rl")
    assert (rl["rows"], rl["steps"], rl["epochs"], rl["fits"]) == (37, 7 * 8, round(7 / 3, 2), True)
    assert rl["why"].endswith("37 prompts, 7 iterations of 16 answers")
    group = {"kind": "grpo", "train": {"num_generations": 4}}
    rl = describe(reinforced(data, model, tmp_path, **group).plan())[-1]
    assert rl["why"].endswith("37 prompts, 57 iterations of 8 answers, 4 to a prompt")
    assert rl["steps"] == 57


def test_what_a_ppo_worker_holds(data: Path, model: str, tmp_path: Path) -> None:
    def memory(**ppo: Any) -> dict[str, Any]:
        return describe(reinforced(data, model, tmp_path, **ppo).plan())[-1]["memory"]

    sft = describe(reinforced(data, model, tmp_path).plan())[0]["memory"]
    whole = memory()
    # The policy and a value model with a head of 64 weights in place of the tied one; a reward model and the reference.
    head = 64 * 4
    assert whole["weights"] == pytest.approx(2 * sft["weights"] + head, rel=1e-3)
    assert whole["optimizer"] == pytest.approx(2 * sft["optimizer"] + 2 * head, rel=1e-3)
    assert whole["frozen"] == pytest.approx(2 * sft["weights"] + head, rel=1e-3)
    assert memory(train={"kl_coef": 0.0})["frozen"] == pytest.approx(sft["weights"] + head, rel=1e-3)
    lora = memory(tuning={"method": "lora", "r": 4})
    assert lora["frozen"] == pytest.approx(
        sft["weights"] + head, rel=1e-3
    )  # the policy without its adapter is the reference
    assert memory(placement="separate")["frozen"] == 0
    group = memory(kind="grpo", train={"num_generations": 4})
    assert group["frozen"] == pytest.approx(sft["weights"] + head, rel=1e-3)  # beta is 0 by default
    assert group["weights"] == sft["weights"]
    both = memory(kind="grpo", train={"num_generations": 4, "beta": 0.04})
    assert both["frozen"] == pytest.approx(2 * sft["weights"] + head, rel=1e-3)


def test_processes_that_judge_take_gpus_of_their_own(data: Path, model: str, tmp_path: Path) -> None:
    cluster = {"workers": 2, "gpus_per_worker": 1, "gpu_memory_gib": 80.0}
    plan = reinforced(data, model, tmp_path, placement="separate", judge_processes=2, cluster=cluster).plan()
    rl = describe(plan, Capacity.of({"CPU": 8.0, "GPU": 2.0}))[-1]
    assert not rl["fits"] and rl["why"].startswith("needs 4 GPU; have 2, cannot grow: will never start")
    assert rl["why"].endswith("judged by 2 more processes")
    assert describe(plan, Capacity.of({"CPU": 8.0, "GPU": 4.0}))[-1]["fits"]


@pytest.mark.usefixtures("ray_address")
def test_a_row_of_reinforcement_learning_is_the_longest_prompt_and_its_answer(
    data: Path, model: str, tmp_path: Path
) -> None:
    plan = reinforced(data, model, tmp_path, train={"kl_coef": 0.0}).plan()
    planned = plan["rl"]
    stage: Any = planned.stage
    before = training_of(plan, planned, amount_of(plan, planned))
    assert (before.length, before.answer) == (256, 32)  # a prompt may be as long as the model's positions allow
    made = prepare(stage.data, stage.recipe(load_tokenizer(model), 0), plan.folder.prepared)
    longest = max(len(row["prompt_ids"]) for row in made.read())
    amount = amount_of(plan, planned)
    assert (amount.rows, amount.longest) == (37, longest)
    after = training_of(plan, planned, amount)
    assert (after.length, after.answer, after.sampled) == (longest + 32, 32, 8)
