"""The card of a pushed model: what it states of a chain, and what never gets into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.artifacts import RunFolder
from pipeline.markdown import cell, code, public
from pipeline.model_card import lineage, measured, model_card

SECRET = "/home/ann/secret-project"


def fingerprint(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def write(run: Path, name: str, kind: str, **facts: Any) -> dict[str, Any]:
    manifest = {
        "name": name, "kind": kind, "produces": "model", "fingerprint": fingerprint(name), "config": {"kind": kind}, "seed": 7,
        "inputs": {}, "handoff": {"warnings": []}, "workers": 2, "seconds": 9.0, "versions": {"trl": "1.16.0"}, "metrics": {},
        "rows": 90, "tokens": 1000, "steps": 30, "details": {"mixture": [], "ledger": {"reasons": {}}, "warnings": {}},
    } | facts  # fmt: skip
    (run / name).mkdir(parents=True)
    (run / name / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def source(path: str, **facts: Any) -> dict[str, Any]:
    return {
        "path": path, "weight": 1.0, "format": "messages", "read": 100, "kept": 90, "held_out": 4, "tokens": 1000,
    } | facts  # fmt: skip


def ref(name: str, what: str = "model") -> dict[str, str]:
    return {"stage": name, "fingerprint": fingerprint(name), what: f"{SECRET}/runs/cards/{name}/{what}"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Qwen -> sft -> pairs -> dpo, judged by an evaluation with two gates."""
    folder = tmp_path / "cards"
    write(
        folder, "sft", "sft", inputs={"model": [{"model": "Qwen/Qwen2.5-0.5B"}]},
        config={
            "kind": "sft", "mask": {"train_on": "last_assistant"}, "tuning": {"method": "lora", "r": 16},
            "data": [{"path": f"{SECRET}/chats.jsonl"}], "deepspeed": f"{SECRET}/my_zero.json",
            "train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "learning_rate": 1e-4},
        },
        details={
            "mixture": [source(f"{SECRET}/chats.jsonl", weight=2.0), source("hf://org/open", format="text"), source("s3://bucket/k/x.jsonl")],
            "ledger": {"reasons": {"too_long": 5, "duplicate": 1}, "examples": [{"detail": "a row of the data"}]},
            "trained_tokens": 250, "epochs": 1, "warnings": {"control_token_as_text": 3}, "prepared": f"{SECRET}/.prepared/x",
            "training_warnings": [f"read {SECRET}/odd/notes.txt <b>twice</b>"],
        },
    )  # fmt: skip
    write(
        folder,
        "pairs",
        "generate",
        produces="dataset",
        inputs={"model": [ref("sft")]},
        config={"kind": "generate", "samples": 4},
    )
    write(
        folder, "dpo", "dpo", inputs={"model": [ref("sft")], "data": [ref("pairs", "data")]},
        config={"kind": "dpo", "train": {"beta": 0.3, "report_to": ["mlflow"]}, "data": [{"path": "stages.pairs"}]},
        details={"mixture": [source(f"{SECRET}/runs/cards/pairs/data", format="preference")], "ledger": {"reasons": {}}},
        metrics={"loss": 0.4, "rewards/margins": 0.7, "tokens_per_second": 900.0, "train_seconds": 5.0, "first_loss": 0.69},
        handoff={"parameters": 123456, "dtype": "bfloat16", "warnings": ["answers reach no stop token"]},
    )  # fmt: skip
    judged = {
        "dpo": {"exact_match": 0.75, "answers": 300, "kl": 1.5, "kl_stderr": 0.25, "stopped": 1.0},
        "sft": {"exact_match": 0.5, "answers": 300},
    }
    write(
        folder, "eval", "evaluate", produces="metrics", inputs={"models": [ref("dpo"), ref("sft")]}, metrics=judged,
        config={"kind": "evaluate", "data": [{"path": f"{SECRET}/heldout.jsonl"}], "max_new_tokens": 64},
        details={"samples": [{"prompt": "a row of the data"}]},
    )  # fmt: skip
    gates = [
        {"metric": "exact_match", "holds": True, "says": "exact_match of dpo over sft is 0.25, wanted at least 0.05"},
        {"metric": "kl", "holds": False, "says": "kl of dpo is 1.5, wanted at most 1"},
        {"metric": "exact_match", "holds": True, "says": "exact_match of sft is 0.5, wanted at least 0.1"},
    ]
    stages = {
        n: {"kind": k, "state": "done", "fingerprint": fingerprint(n)}
        for n, k in (("sft", "sft"), ("pairs", "generate"), ("dpo", "dpo"))
    }
    stages["eval"] = {"kind": "evaluate", "state": "failed", "fingerprint": fingerprint("eval"), "gates": gates}  # type: ignore[dict-item]
    (folder / "run.json").write_text(json.dumps({"name": "cards", "state": "failed", "started": 0.0, "stages": stages}))
    return RunFolder(folder)


def test_what_it_states(run: RunFolder) -> None:
    card = model_card(run, "dpo", "org/tuned")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "base_model": "Qwen/Qwen2.5-0.5B", "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "datasets": ["org/open"], "tags": ["raylign", "sft", "dpo"],
    }  # fmt: skip
    for said in (
        "# tuned",
        "123,456 parameters, bfloat16.",
        'AutoModelForCausalLM.from_pretrained("org/tuned")',
        f"| `dpo` | preference tuning on pairs (DPO), [arXiv:2305.18290](https://arxiv.org/abs/2305.18290) | `sft`, `pairs` (data) | `{fingerprint('dpo')[:12]}` |",
        "| `sft` | `chats.jsonl` | messages, weight 2 | 100 | 90 | 4 | 1,000 |",
        "| `sft` | `hf://org/open` | text |",
        "| `sft` | `x.jsonl` | messages |",
        "| `dpo` | `stages.pairs` | preference |",
        "- `sft` left out 6 rows: `too_long` 5, `duplicate` 1",
        "the last assistant turn and its stop token; of rows of plain text every token (250 of 1,000 tokens an epoch, 25.0%)",
        "| rows a step | 24 |",  # 4 x 3 x 2 workers
        "supervised fine-tuning, LoRA",
        "`tuning.r: 16`",
        "`deepspeed: my_zero.json`",
        "`train.beta: 0.3`",
        f"| reference | the model it was given, `sft`, `{fingerprint('sft')[:12]}` |",
        "| `rewards/margins` | 0.700 |",
        "On `heldout.jsonl`: 300 prompts answered greedily in at most 64 tokens. By their names, no stage above has read these.",
        "| exact match | 75.0% ± 2.5 | 50.0% ± 2.9 |",
        "| stopped | 100.0% |  |",
        "| KL to reference | 1.500 ± 0.250 |  |",
        "- gate held: exact\\_match of dpo over sft is 0.25",
        "- gate **not met**: kl of dpo is 1.5, wanted at most 1",
        "- `sft`: 3 rows: ",
        "- `dpo`: answers reach no stop token",
        "- `sft`: read notes.txt &lt;b&gt;twice&lt;/b&gt;",
        "trl 1.16.0",
    ):
        assert said in card, said
    assert "exact\\_match of sft is 0.5" not in card  # the gate of another model
    assert "first_loss" not in card and "tokens_per_second" not in card


def test_what_is_not_on_it(run: RunFolder) -> None:
    """Neither where things lie on this machine, nor rows of the data."""
    for stage in ("sft", "dpo"):
        card = model_card(run, stage, "org/tuned")
        assert "secret-project" not in card and "/home" not in card and str(run.path) not in card
        assert "bucket" not in card and "a row of the data" not in card and "report_to" not in card


def test_an_evaluation_of_another_version_does_not_count(run: RunFolder) -> None:
    manifest = json.loads((run.path / "dpo" / "manifest.json").read_text())
    (run.path / "dpo" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "f" * 64}))
    assert "this model has not been held against any held-out rows" in model_card(run, "dpo")


def test_what_is_gone_is_said(run: RunFolder) -> None:
    (run.path / "sft" / "manifest.json").unlink()
    card = model_card(run, "dpo")
    assert "| `sft` | not in the run folder any more | nothing |" in card
    assert "base_model" not in card  # nobody knows
    assert [manifest["name"] for manifest in lineage(run, json.loads((run.path / "dpo" / "manifest.json").read_text()))] == [
        "sft", "pairs", "dpo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/a/b/c.jsonl", "c.jsonl"),
        ("s3://bucket/a/c.jsonl?region=x", "c.jsonl"),
        ("hf://org/data", "hf://org/data"),
        ("hf:///a/folder", "folder"),
        ("stages.sft", "stages.sft"),
        ("org/model", "org/model"),
        ("module:function", "module:function"),
        ({"x": ["/a/b", 1]}, {"x": ["b", 1]}),
        (None, None),
    ],
)
def test_paths_are_told_by_their_names(value: Any, shown: Any) -> None:
    assert public(value) == shown


def test_text_is_text() -> None:
    assert cell("a|b <script> *x* `y`\nnext") == "a\\|b &lt;script&gt; \\*x\\* \\`y\\` next"
    assert cell("https://host/a/b stays, /a/b/c goes") == "https://host/a/b stays, c goes"
    assert code("a`b|c\n") == "`a'b\\|c`"


def test_errors_are_binomial() -> None:
    assert measured({"exact_match": 0.5, "answers": 100}, "exact_match") == "50.0% ± 5.0"
    assert measured({"preference_accuracy": 0.9, "pairs": 100, "answers": 7}, "preference_accuracy") == "90.0% ± 3.0"
    assert measured({"exact_match": 1.0, "answers": 100}, "exact_match") == "100.0%"  # which says nothing of the error
    assert measured({}, "kl") == ""
