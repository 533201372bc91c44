"""A spec that `raylign init` wrote is run as it stands, but for its steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .test_chain import raylign


@pytest.mark.slow
def test_what_init_writes_runs(tmp_path: Path) -> None:
    with (tmp_path / "faq.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer", "source"])
        table.writerows([f"What is {i} and {i}?", f"It is {2 * i}, für immer.", "a book"] for i in range(60))
    written = raylign(tmp_path, "init", "--data", "faq.csv")
    assert written.returncode == 0, written.stdout + written.stderr
    assert "questions and answers" in written.stdout and "not used: source" in written.stdout
    done = raylign(tmp_path, "run", "spec.yaml", "--set", "stages.sft.train.max_steps=3")
    assert done.returncode == 0, done.stdout + done.stderr

    run = tmp_path / "runs" / "faq"
    made = {name: json.loads((run / name / "manifest.json").read_text()) for name in ("sft", "eval")}
    held_out = len((tmp_path / "spec-eval.jsonl").read_text().splitlines())
    ledger = json.loads((run / "sft" / "ledger.json").read_text())
    assert ledger["reasons"] == {"held_out": held_out} and ledger["read"] == 60  # the very rows that init set aside
    assert made["sft"]["steps"] == 3 and "eval_loss" in made["sft"]["metrics"]
    compared = made["eval"]["metrics"]["sft"]
    assert compared["loss"] > 0 and compared["answers"] == held_out

    model = AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "sft" / "model")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 and 1?"}], return_tensors="pt")
    assert torch.isfinite(model(**asked).logits).all()
