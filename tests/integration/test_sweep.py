"""A sweep through the command line: its variants beside each other, one table, and only what changed is made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .test_chain import raylign

SPEC = """\
name: sweep
model: {model}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    train: {{learning_rate: 3e-3, max_steps: 10, logging_steps: 5, max_length: 128}}
  dpo:
    kind: dpo
    model: stages.sft
    data: [{{path: {data}/pairs.jsonl}}]
    sweep: {{train.beta: [0.05, 0.1, 0.3]}}
    train: {{learning_rate: 1e-3, num_train_epochs: 1, logging_steps: 1, max_length: 128}}
  eval:
    kind: evaluate
    models: [stages.sft, stages.dpo]
    data: [{{path: {data}/heldout.jsonl}}, {{path: {data}/pairs.jsonl}}]
    max_new_tokens: 12
"""
pytestmark = pytest.mark.slow  # three trainings beside each other; tests/test_sweep.py has what needs none

VARIANTS = [f"dpo-beta-{beta}" for beta in (0.05, 0.1, 0.3)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, model: str) -> tuple[Path, str]:
    """A folder with spec.yaml and its finished run, and what the run printed."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "spec.yaml").write_text(SPEC.format(data=data, model=model))
    done = raylign(folder, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "sweep" / "run.json").read_text())


def states(folder: Path) -> dict[str, str]:
    return {name: record["state"] for name, record in state(folder)["stages"].items()}


def test_the_variants_run_side_by_side_as_the_machine_allows(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert states(folder) == dict.fromkeys(["sft", *VARIANTS, "eval"], "done")
    spans = [(s["started"], s["started"] + s["seconds"]) for s in (state(folder)["stages"][v] for v in VARIANTS)]
    beside = max(sum(start <= at < end for start, end in spans) for at, _ in spans)
    assert beside == min(os.cpu_count() or 1, len(VARIANTS))  # each wants one CPU


def test_each_variant_was_trained_with_its_value_from_the_same_model(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    made = [json.loads((folder / "runs" / "sweep" / v / "manifest.json").read_text()) for v in VARIANTS]
    assert [m["config"]["train"]["beta"] for m in made] == [0.05, 0.1, 0.3]
    assert len({m["inputs"]["model"][0]["fingerprint"] for m in made}) == 1
    assert len({m["metrics"]["loss"] for m in made}) == 3


def test_one_table_compares_them(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    status = raylign(folder, "status", "runs/sweep").stdout
    for text in (printed, status):
        headings, *rows = text.split("dpo: 3 variants, * the best of a column")[1].split("dpo-beta-")
        assert {"variant", "beta", "loss", "KL", "exact", "answer"} <= set(headings.split())
        assert [row.split()[:2] for row in rows] == [[v.removeprefix("dpo-beta-")] * 2 for v in VARIANTS]
        assert sum("*" in row for row in rows) > 0
    assert "dpo: 3 variants" in (folder / "runs" / "sweep" / "report.html").read_text()


def test_the_same_again_is_all_cached_from_either_spec(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    done = raylign(folder, "run", "spec.yaml")
    assert done.returncode == 0 and set(states(folder).values()) == {"cached"}, done.stdout
    plan = json.loads(raylign(folder, "plan", "runs/sweep/spec.yaml", "--json").stdout)["stages"]
    assert [(row["name"], row["state"]) for row in plan] == [(n, "cached") for n in ("sft", *VARIANTS, "eval")]


def test_changing_a_value_runs_that_variant_alone(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    text = (folder / "spec.yaml").read_text()
    (folder / "changed.yaml").write_text(text.replace("0.3]", "0.5]"))
    done = raylign(folder, "run", "changed.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(folder) == {
        "sft": "cached", "dpo-beta-0.05": "cached", "dpo-beta-0.1": "cached", "dpo-beta-0.5": "done", "eval": "done",
    }  # fmt: skip
    assert "dpo-beta-0.3" not in done.stdout


def test_a_variant_can_be_talked_to_and_looked_at_by_its_name(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    shown = json.loads(raylign(folder, "inspect", "spec.yaml", "--stage", "dpo-beta-0.1", "--json", "-n", "1").stdout)
    assert shown["stage"] == "dpo-beta-0.1" and len(shown["rows"]) == 2
