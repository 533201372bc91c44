"""Data tasks for which a cluster has no node: that is told, and ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from stages import cluster
from stages.base import Reporter
from stages.capacity import Need
from stages.cluster import GROWTH, WAIT, while_there_are_nodes
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe
from stages.data.prepare import prepare
from stages.data.source import DataSource
from stages.errors import StageError


@pytest.fixture(autouse=True)
def on_a_cluster(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GROWTH, "null")
    monkeypatch.setenv(WAIT, "2")
    monkeypatch.setattr(cluster, "SAY_SECONDS", 0.3)


def test_tasks_that_no_node_can_hold_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    import ray.data

    results = ray.data.from_items([{"i": 1}]).map(lambda row: row, num_gpus=1).iter_rows()
    began = time.monotonic()
    with pytest.raises(StageError, match="waited 2 s for 1 GPU: have 0 free of 0, cannot grow"):
        list(while_there_are_nodes(results, Need(1, {"CPU": 1, "GPU": 1}), Reporter(tmp_path)))
    assert time.monotonic() - began < 30
    said = [json.loads(line)["waiting"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert said and set(said) == {"1 GPU: have 0 free of 0, cannot grow"}


def test_long_tasks_are_no_waiting(tmp_path: Path) -> None:
    import ray.data

    def slow(row: dict[str, int]) -> dict[str, int]:
        time.sleep(4)
        return row

    results = ray.data.from_items([{"i": 1}]).map(slow).iter_rows()
    assert [r["i"] for r in while_there_are_nodes(results, Need(1, {"CPU": 1}), Reporter(tmp_path))] == [1]
    assert not (tmp_path / "events.jsonl").exists()


def test_what_a_task_raises_is_raised(tmp_path: Path) -> None:
    def broken() -> object:
        yield 1
        raise ValueError("of a task")

    results = while_there_are_nodes(broken(), Need(1, {"CPU": 1}), None)
    assert next(results) == 1
    with pytest.raises(ValueError, match="of a task"):
        next(results)


def test_data_is_prepared_on_a_cluster(data: Path, tokenizer: object, tmp_path: Path) -> None:
    recipe = Recipe("conversation", tokenizer_spec(tokenizer))
    made = prepare([DataSource(path=str(data / "chats.jsonl"))], recipe, tmp_path, report=Reporter(tmp_path))
    assert made.rows == 101 and not list(tmp_path.glob("**/.shared-*"))
