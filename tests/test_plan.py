"""Order, fingerprints, states and estimates: pure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import Pipeline
from pipeline.plan import describe, expected_rows, make_plan, planned_steps, resources_for
from pipeline.spec import Cluster, Spec
from stages import SFT, Evaluate
from stages.data.source import DataSource


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
        ({"stages": {"dpo": {"workers": 2}}}, {"dpo", "eval"}),
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
        ("name", "kind", "inputs", "fingerprint", "state", "rows", "tokens", "steps", "workers", "memory_per_worker_bytes", "fits", "why")
    }  # fmt: skip
    by_name = {row["name"]: row for row in rows}
    assert (by_name["sft"]["rows"], by_name["sft"]["steps"]) == (101, 4)
    assert (by_name["dpo"]["rows"], by_name["dpo"]["steps"]) == (37, 5)  # one epoch of 37 rows by 8
    assert by_name["dpo"]["inputs"] == ["stages.sft"] and by_name["eval"]["inputs"] == ["stages.dpo", "stages.sft"]
    assert all(row["fits"] for row in rows)
    # weights, gradients and two moments in float32; DPO's reference comes on top
    assert by_name["sft"]["memory_per_worker_bytes"] % 16 == 0
    assert by_name["dpo"]["memory_per_worker_bytes"] == by_name["sft"]["memory_per_worker_bytes"] * 20 // 16


def test_a_deepspeed_file_counts_by_its_contents(data: Path, model: str, tmp_path: Path) -> None:
    seen = set()
    for folder, stage in (("a", 1), ("b", 1), ("b", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        seen.add(prints(pipeline(data, model, tmp_path, stages={"sft": {"deepspeed": str(file)}}))["sft"])
    assert len(seen) == 2


def test_plan_says_when_memory_is_lacking(data: Path, model: str, tmp_path: Path) -> None:
    rows = describe(pipeline(data, model, tmp_path).plan(), {"CPU": 2.0, "GPU": 0.0, "memory": 1000.0})
    assert not rows[0]["fits"] and "GiB of memory" in rows[0]["why"]


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


def test_held_out_rows_of_an_evaluation_are_scored_once() -> None:
    with pytest.raises(ValueError, match=r"a.jsonl: held-out rows are scored once each; leave `weight` and `eval` out"):
        Evaluate(models=["m"], data=[{"path": "a.jsonl", "weight": 2.0}])
