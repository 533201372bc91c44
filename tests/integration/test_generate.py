"""Data made on the way: SFT -> reward -> pairs -> DPO, rejection sampling back into SFT, labelled answers into KTO."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages import Generate, generate
from stages.base import Artifact, Resources, StageContext
from stages.data.records import normalise
from stages.errors import StageError

from ..conftest import CODE, LLAMA, write_jsonl
from .test_chain import raylign

SPEC = """\
name: chain
model:
  init: {{config: {config}, tokenizer: {{vocab_size: 320}}}}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    train: {{learning_rate: 5e-3, max_steps: 60, max_length: 128, per_device_train_batch_size: 16}}
  reward: {{kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], train: {{learning_rate: 1e-3}}}}
  pairs:
    kind: generate
    model: stages.sft
    data: [{{path: {data}/heldout.jsonl}}, {{path: {data}/pairs.jsonl}}]
    samples: 6
    max_new_tokens: 16
    rewards: [stages.reward, {{reward: "own_rewards:exact", weight: 0.5}}]
  labels:
    kind: generate
    model: stages.sft
    data: [{{path: stages.pairs}}]        # the prompts of what another stage made
    samples: 4
    max_new_tokens: 16
    rewards: ["own_rewards:short"]
    make: kto
  best:
    kind: generate
    model: stages.sft
    data: [{{path: {data}/heldout.jsonl}}]
    max_new_tokens: 16
    rewards: ["own_rewards:exact"]
    make: best
    threshold: 0.4
  dpo: {{kind: dpo, model: stages.sft, data: [{{path: stages.pairs, eval: 10%}}], train: {{max_steps: 3, logging_steps: 1}}}}
  kto: {{kind: kto, model: stages.sft, data: [{{path: stages.labels}}], train: {{max_steps: 3}}}}
  again: {{kind: sft, model: stages.sft, data: [{{path: stages.best}}, {{path: {data}/chats.jsonl}}], train: {{max_steps: 3}}}}
"""
REWARDS = """\
def exact(prompts, completions, expected, **columns):
    return [share(c[0]["content"], e) if e else 0.5 for c, e in zip(completions, expected)]

def share(answer, expected):
    return sum(a == b for a, b in zip(answer, expected)) / max(len(answer), len(expected))

def short(completions, **columns):
    return [-len(c[0]["content"]) for c in completions]

def wrong(completions, **columns):
    return [float("nan")] * len(completions)

def slow(completions, **columns):
    return [float(sum(map(ord, c[0]["content"])) % 7) for c in completions]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "own_rewards.py").write_text(REWARDS)
    (folder / "spec.yaml").write_text(SPEC.format(data=data, config=json.dumps(LLAMA)))
    done = raylign(folder, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "chain" / stage / "manifest.json").read_text())


def made(folder: Path, stage: str) -> list[dict[str, Any]]:
    parts = sorted((folder / "runs" / "chain" / stage / "data").iterdir())
    return [json.loads(line) for part in parts for line in part.open()]


@pytest.mark.slow  # nine stages; those that follow look at the same run
def test_pairs_are_made_and_trained_on(finished: Path) -> None:
    pairs, rows = manifest(finished, "pairs"), made(finished, "pairs")
    metrics, ledger = pairs["metrics"], pairs["details"]["ledger"]
    assert (metrics["prompts"], metrics["samples"], metrics["rows"]) == (57, 57 * 6, len(rows)) and len(rows) > 5
    assert ledger["read"] == 57 == ledger["kept"] + sum(ledger["reasons"].values()) and ledger["kept"] == len(rows)
    lines = (finished / "runs" / "chain" / "pairs" / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == sum(ledger["reasons"].values())
    records: list[Any] = [normalise(row, "preference") for row in rows]
    assert all(record.margin > 0 for record in records)
    assert metrics["margin"] == pytest.approx(sum(record.margin for record in records) / len(records))
    reward, exact = pairs["details"]["rewards"]
    assert (reward["name"], exact["name"]) == ("reward", "own_rewards:exact")
    assert reward["mean"] + 0.5 * exact["mean"] == pytest.approx(metrics["reward_mean"])
    stored = manifest(finished, "reward")["metrics"]
    assert abs(reward["mean"]) < 4 and stored["reward_std"] > 0  # in standard deviations of the reward stage's own data
    assert {i["stage"] for refs in pairs["inputs"].values() for i in refs} == {"sft", "reward"}
    dpo = manifest(finished, "dpo")
    assert dpo["details"]["ledger"]["read"] == len(rows) and "held_out" in dpo["details"]["ledger"]["reasons"]
    assert dpo["inputs"]["data"][0]["fingerprint"] == pairs["fingerprint"]
    first = json.loads((finished / "runs" / "chain" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # its reference is the model that answered


@pytest.mark.slow
def test_labels_and_the_best_are_made_and_trained_on(finished: Path) -> None:
    labels = made(finished, "labels")
    assert {row["label"] for row in labels} == {True, False}
    by_prompt: dict[str, dict[bool, list[int]]] = {}
    for row in labels:
        of_prompt = by_prompt.setdefault(json.dumps(row["prompt"]), {True: [], False: []})
        of_prompt[row["label"]].append(len(row["completion"][0]["content"]))
    assert all(max(each[True], default=0) < min(each[False], default=999) for each in by_prompt.values())
    assert manifest(finished, "labels")["details"]["ledger"]["read"] == len(made(finished, "pairs"))
    assert manifest(finished, "kto")["details"]["ledger"]["read"] == len(labels)
    best = made(finished, "best")
    assert all("train" not in row["messages"][-1] and row["messages"][2]["train"] is False for row in best)
    again = manifest(finished, "again")
    assert again["rows"] == len(best) + 101
    source = next(s for s in again["details"]["mixture"] if s["path"].endswith("best/data"))
    assert source["kept"] == len(best)


@pytest.mark.slow
def test_the_run_is_cached_shown_and_planned(finished: Path) -> None:
    done = raylign(finished, "run", "spec.yaml")
    assert done.returncode == 0 and done.stdout.count("unchanged") == 9
    shown = json.loads(raylign(finished, "inspect", "spec.yaml", "--stage", "dpo", "--json", "-n", "1").stdout)
    assert [row["answer"] for row in shown["rows"]] == ["chosen", "rejected"]
    plan = {s["name"]: s for s in json.loads(raylign(finished, "plan", "spec.yaml", "--json").stdout)["stages"]}
    assert plan["pairs"]["rows"] == len(made(finished, "pairs")) and plan["dpo"]["inputs"] == [
        "stages.sft",
        "stages.pairs",
    ]
    page = (finished / "runs" / "chain" / "report.html").read_text()
    assert '<span class="good">chosen</span>' in page
    changed = raylign(finished, "plan", "spec.yaml", "--json", "--set", "stages.reward.train.learning_rate=2e-3")
    states = {s["name"]: s["state"] for s in json.loads(changed.stdout)["stages"]}
    assert [name for name, state in states.items() if state == "run"] == ["reward", "pairs", "labels", "dpo", "kto"]


# ------------------------------------------------------------------------------------------------ the stage by itself


def stage(data: Path, **options: Any) -> Generate:
    given = {
        "data": [{"path": str(data / "chats.jsonl")}],
        "samples": 2,
        "max_new_tokens": 8,
        "rewards": ["own_rewards:slow"],
    }
    return Generate.model_validate(given | options)


@pytest.fixture
def ctx(tmp_path: Path, model: str, ray_address: str) -> StageContext:
    (CODE / "own_rewards.py").write_text(REWARDS)
    (tmp_path / "work").mkdir()
    policy = Artifact("policy", "model", model)
    return StageContext("made", tmp_path / "work", tmp_path / "prepared", {"model": [policy], "rewards": []})


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks, and processes even for little."""
    monkeypatch.setattr(generate, "CHUNK", 8)
    monkeypatch.setattr(generate, "LITTLE", 0)


def often_stopping(model: str, folder: Path) -> Artifact:
    """The fresh model, ending its answers with many tokens: one that has learned nothing hardly ever stops."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, *range(40, 110)]}))
    return Artifact("policy", "model", str(folder))


def test_the_same_rows_with_one_process_and_with_two(
    ctx: StageContext, data: Path, model: str, tmp_path: Path, in_chunks: None
) -> None:
    ctx.inputs["model"] = [often_stopping(model, tmp_path / "policy")]
    results = []
    for workers in (1, 2):
        ctx.work = tmp_path / f"work-{workers}"
        ctx.work.mkdir()
        ctx.resources = Resources(workers=workers)
        result = stage(data).run(ctx)
        rows = (ctx.data_dir / "part-00000.jsonl").read_text()
        facts = {k: v for k, v in result.metrics.items() if k not in ("sampling_seconds", "tokens_per_second")}
        results.append((rows, facts, result.details))
    assert results[0] == results[1] and results[0][1]["rows"] > 3
    reasons = results[0][2]["ledger"]["reasons"]
    assert reasons["not_stopped"] > 3 and results[0][2]["answers_left_out"]["not_stopped"] > reasons["not_stopped"]


def test_what_was_sampled_is_not_sampled_again(ctx: StageContext, data: Path, model: str, tmp_path: Path) -> None:
    ctx.inputs["model"] = [often_stopping(model, tmp_path / "policy")]
    with pytest.raises(StageError, match=r"own_rewards:wrong gave nan for chats.jsonl, row \d+ \(the answer"):
        stage(data, rewards=["own_rewards:wrong"], max_prompts=20).run(ctx)
    (samples,) = ctx.prepared.glob("samples-*/000000.json")
    answers = json.loads(samples.read_text())
    answers[0] = [{"ids": [50, 2], "text": text, "stopped": True} for text in ("told", "apart")]
    samples.write_text(json.dumps(answers))
    result = stage(data, max_prompts=20).run(ctx)
    first = json.loads((ctx.data_dir / "part-00000.jsonl").read_text().splitlines()[0])
    assert {first["chosen"][0]["content"], first["rejected"][0]["content"]} == {"told", "apart"}
    assert result.metrics["prompts"] == 20 and result.metrics["tokens_per_second"] is None
    assert result.details["ledger"]["reasons"]["max_prompts"] == 81 and result.details["ledger"]["read"] == 101
    assert samples.exists() and not (ctx.work / "rewards").exists()
    other = stage(data, max_prompts=20, make="best").run(ctx)  # the same answers, used otherwise
    assert other.metrics["tokens_per_second"] is None
    assert stage(data, max_prompts=20, temperature=0.9).run(ctx).metrics["tokens_per_second"] is not None


def test_no_row_at_all_is_an_error_with_the_reasons(ctx: StageContext, data: Path) -> None:
    with pytest.raises(
        StageError, match=r"none of 101 prompts gave a row: not_stopped \d+.*; .*ledger.jsonl has them all"
    ):
        stage(data, max_new_tokens=1).run(ctx)


def test_a_reward_model_that_reads_other_tokens_is_refused_before_anything_is_sampled(
    ctx: StageContext, data: Path, model: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scores = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, change in (
        ("same", ""),
        ("template", "chat template"),
        ("tokenizer", "tokenizer"),
        ("head", "gives 3 scores"),
    ):
        folder = tmp_path / name
        if name == "head":
            scores = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
        scores.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if name == "template":
            (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")
        if name == "tokenizer":
            other = AutoTokenizer.from_pretrained(model)
            other.add_tokens(["another"])
            other.save_pretrained(folder)
        ctx.inputs["rewards"] = [Artifact(str(folder), "model", str(folder))]
        told = stage(data, rewards=[str(folder)], max_prompts=4)
        if name == "same":
            with pytest.raises(StageError, match="none of 4 prompts"):
                told.run(ctx)
        else:
            with pytest.raises(StageError, match=change):
                told.run(ctx)
    ctx.inputs["rewards"] = [Artifact("other", "model", model)]
    with pytest.raises(StageError, match="other is no reward model: its config names LlamaForCausalLM"):
        stage(data, rewards=[model]).run(ctx)


def test_what_the_command_refuses(tmp_path: Path, data: Path, model: str) -> None:
    spec = {"model": model, "stages": {"made": {"kind": "generate", "data": [{"path": str(data / "chats.jsonl")}],
            "max_new_tokens": 8, "rewards": ["own_rewards:slow"]}}}  # fmt: skip
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    done = raylign(tmp_path, "run", "spec.yaml", "--set", "stages.made.engine=vllm")
    assert done.returncode == 2 and "stages.made.engine: vllm is not installed" in done.stderr
    done = raylign(tmp_path, "run", "spec.yaml", "--set", "stages.made.rewards=['own_rewards:gone']")
    assert done.returncode == 2 and "own_rewards.py has no 'gone'" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_chunks_that_are_left(tmp_path: Path, data: Path, model: str) -> None:
    policy = often_stopping(model, tmp_path / "policy").model
    prompts = [{"prompt": f"Reverse: a b {n}"} for n in range(1500)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    spec: dict[str, Any] = {"name": "whole", "model": policy, "stages": {"made": {
        "kind": "generate", "data": [{"path": "prompts.jsonl"}], "max_new_tokens": 48, "rewards": ["own_rewards:slow"]}}}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert raylign(tmp_path, "run", "spec.yaml").returncode == 0
    (tmp_path / "spec.yaml").write_text(json.dumps(spec | {"storage": "killed"}))
    command = [sys.executable, "-m", "pipeline", "run", "spec.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while time.time() < deadline and len(list(tmp_path.glob("killed/.prepared/samples-*/0*.json"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the stage's process ends with its runner
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/.prepared/samples-*/0*.json")}
    assert 3 <= len(before) < 24
    plan = json.loads(raylign(tmp_path, "plan", "spec.yaml", "--json").stdout)["stages"]
    assert plan[0]["state"] == "resume"
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 0 and "goes on where it was" in done.stdout, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    whole, killed = (
        (tmp_path / storage / "whole/made/data/part-00000.jsonl").read_text() for storage in ("runs", "killed")
    )
    assert whole == killed
