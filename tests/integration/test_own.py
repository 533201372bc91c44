"""A user's own format, stage and gate, named in a spec as `module:name`: those of examples/own.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import write_jsonl
from .test_chain import raylign

EXAMPLE = Path(__file__).parents[2] / "examples" / "own.py"
SPEC = """
name: mine
model: {model}
storage: runs
stages:
  fast: &sft
    kind: sft
    data: [{{path: tickets.jsonl, format: "own:tickets"}}]
    train: &train {{max_steps: 4, learning_rate: 1.0e-3, per_device_train_batch_size: 8}}
  slow: {{<<: *sft, train: {{<<: *train, learning_rate: 1.0e-4}}}}
  average: {{kind: "own:Average", models: [stages.fast, stages.slow]}}
  eval:
    kind: evaluate
    models: [stages.fast, stages.slow, stages.average]
    data: [{{path: tickets.jsonl, format: "own:tickets"}}]
    max_samples: 0
    max_new_tokens: 4
    gates: [{{check: "own:no_worse"}}]
"""


@pytest.mark.slow
def test_format_stage_and_gate_of_a_user(tmp_path: Path, model: str) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    rows = [
        {"status": "solved" if i % 3 else "open", "subject": "letters", "body": f"Reverse: {c}", "reply": c[::-1]}
        for i, c in enumerate(a + b for a in "abcdef" for b in "abcdef")
    ]
    write_jsonl(tmp_path / "tickets.jsonl", rows)
    (tmp_path / "spec.yaml").write_text(SPEC.format(model=model))
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gate: own:no_worse: holds" in done.stdout
    run = tmp_path / "runs" / "mine"
    ledger = json.loads((run / "fast" / "ledger.json").read_text())
    assert ledger["reasons"] == {"filtered": 12} and ledger["read"] == 36
    fast, slow, average = (load_file(run / n / "model" / "model.safetensors") for n in ("fast", "slow", "average"))
    assert all(torch.allclose(average[k], (fast[k] + slow[k]) / 2, atol=1e-7) for k in average)

    again = raylign(tmp_path, "plan", "spec.yaml", "--json")
    assert {s["state"] for s in json.loads(again.stdout)["stages"]} == {"cached"}
    code = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(code.replace("return None if average", "return 'never good enough' if average"))
    changed = json.loads(raylign(tmp_path, "plan", "spec.yaml", "--json").stdout)["stages"]
    assert {s["name"]: s["state"] for s in changed}["average"] == "run"  # its code is part of its fingerprint
