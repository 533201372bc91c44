"""Order, fingerprints, states and estimates: pure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import Pipeline
from pipeline.estimate import describe, expected_rows, planned_steps
from pipeline.plan import make_plan, resources_for
from pipeline.spec import Cluster, Spec
from stages import SFT, Evaluate
from stages.data.prepare import prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer

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
    rows = describe(pipeline(data, model, tmp_path).plan(), {"CPU": 2.0, "GPU": 0.0})
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
    enough = describe(plan, {"CPU": 2.0, "GPU": 0.0, "memory": 64.0 * 2**30})[0]
    assert enough["fits"] and enough["advice"] == []
    room = float(enough["memory_per_worker_bytes"] * 0.9)
    short = describe(plan, {"CPU": 2.0, "GPU": 0.0, "memory": room})[0]
    assert not short["fits"] and "GiB of memory" in short["why"]
    assert short["advice"][0]["change"]["train"]["gradient_checkpointing"] is True
    assert all(a["memory_per_worker_bytes"] <= room and "GiB" in a["text"] for a in short["advice"])
    helped = pipeline(
        data, model, tmp_path, stages={"sft": {"train": long["train"] | short["advice"][0]["change"]["train"]}}
    )
    assert describe(helped.plan(), {"CPU": 2.0, "GPU": 0.0, "memory": room})[0]["fits"]


def test_a_gpu_is_as_large_as_the_cluster_section_says(data: Path, model: str, tmp_path: Path) -> None:
    rows = []
    for size in (80.0, 0.5):
        cluster = {"workers": 2, "gpus_per_worker": 1, "gpu_memory_gib": size}
        plan = pipeline(data, model, tmp_path, cluster=cluster).plan()
        rows.append(describe(plan, {"CPU": 8.0, "GPU": 8.0})[0])
    assert [row["fits"] for row in rows] == [True, False]
    assert rows[1]["why"].startswith("needs ") and "a GPU has 0.5" in rows[1]["why"]


def test_a_model_that_is_not_at_hand_is_planned_without_its_memory(data: Path, tmp_path: Path) -> None:
    plan = pipeline(data, "nobody/nothing-of-that-name", tmp_path).plan()
    sft = describe(plan, {"CPU": 2.0, "GPU": 0.0})[0]
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
    rows = describe(pipeline(data, model, tmp_path, cluster={"workers": 8}).plan(), {"CPU": 2.0, "GPU": 0.0})
    sft = next(row for row in rows if row["name"] == "sft")
    assert not sft["fits"] and "needs 8 CPU, there are 2" in sft["why"]


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
    assert resources_for(stage, Cluster(), lambda: 0).model_dump() == {
        "workers": 1,
        "gpus_per_worker": 0,
        "cpus_per_worker": 1,
    }
    assert resources_for(stage, Cluster(), lambda: 4).model_dump() == {
        "workers": 4,
        "gpus_per_worker": 1,
        "cpus_per_worker": 1,
    }
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
