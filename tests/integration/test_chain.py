"""The whole chain through the command line, as a user runs it: the run folder, its contracts, caching, failure, resume."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..conftest import LLAMA

SPEC = """\
name: chain
storage: runs
model:
  init: {{config: {config}, tokenizer: {{vocab_size: 320}}}}
stages:
  sft:
    kind: sft
    data: [{{path: {data}/chats.jsonl}}]
    deepspeed: zero2
    train: {{learning_rate: 3e-3, max_steps: 20, save_steps: 5, logging_steps: 1, max_length: 128}}
  reward: {{kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], train: {{learning_rate: 1e-3, logging_steps: 1}}}}
  dpo: {{kind: dpo, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], train: {{learning_rate: 1e-4, logging_steps: 1}}}}
  eval:
    kind: evaluate
    models: [stages.sft, stages.reward, stages.dpo]
    data: [{{path: {data}/heldout.jsonl}}, {{path: {data}/pairs.jsonl}}]
    max_new_tokens: 12
"""


def raylign(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with spec.yaml and its finished run."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "spec.yaml").write_text(SPEC.format(data=data, config=json.dumps(LLAMA)))
    done = raylign(folder, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(folder / "runs" / "chain") in done.stdout
    assert "models side by side" in done.stdout and "Traceback" not in done.stdout + done.stderr
    return folder


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "chain" / stage / "manifest.json").read_text())


def test_the_run_folder(finished: Path) -> None:
    run = finished / "runs" / "chain"
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "spec.yaml", "run.json", "report.html", "logs", "tensorboard", "base", "sft", "reward", "dpo", "eval",
    }  # fmt: skip
    for stage in ("sft", "reward", "dpo"):
        for file in ("manifest.json", "metrics.jsonl", "ledger.json", "model/config.json", "model/model.safetensors"):
            assert (run / stage / file).is_file(), f"{stage}/{file}"
    assert json.loads((run / "run.json").read_text())["state"] == "done"
    losses = [json.loads(line)["loss"] for line in (run / "sft" / "metrics.jsonl").open()]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_lineage_and_metrics(finished: Path) -> None:
    sft, dpo, evaluation = (manifest(finished, name) for name in ("sft", "dpo", "eval"))
    assert dpo["inputs"]["model"][0]["fingerprint"] == sft["fingerprint"]
    assert (sft["rows"], sft["steps"], dpo["rows"]) == (101, 20, 37)
    assert sft["details"]["ledger"]["read"] == 101
    assert sft["versions"]["trl"] and sft["handoff"]["parameters"] > 50_000
    metrics = evaluation["metrics"]
    assert {"loss", "exact_match", "stopped", "preference_accuracy"} <= set(metrics["sft"])
    assert [metrics[m]["preference_by"] for m in ("sft", "reward", "dpo")] == [
        "likelihood",
        "reward",
        "implicit reward",
    ]
    assert "loss" not in metrics["reward"] and metrics["reward"]["pairs"] == 37


def test_the_first_dpo_loss_is_ln_2_so_the_reference_is_the_handed_over_model(finished: Path) -> None:
    first = json.loads((finished / "runs" / "chain" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_export_loads_in_a_fresh_process_with_only_transformers(finished: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1])\n"
        "i = t.apply_chat_template([{'role': 'user', 'content': 'a b'}], add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "m.generate(input_ids=i['input_ids'], attention_mask=i['attention_mask'], max_new_tokens=3)\n"
        "assert 'stages' not in sys.modules; print(t.chat_template[:20], t.pad_token_id, m.generation_config.eos_token_id)"
    )
    model = finished / "runs" / "chain" / "dpo" / "model"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{% for message in me") and done.stdout.strip().endswith("0 [2]")


def test_a_second_run_is_all_cached(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "runs" / "chain").glob("*/manifest.json")}
    started = time.time()
    done = raylign(finished, "run", "spec.yaml")
    assert done.returncode == 0 and done.stdout.count("unchanged") == 5
    assert time.time() - started < 60  # nothing was trained; the benchmark in LOG.md says how long it takes
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_plan_status_report_inspect(finished: Path) -> None:
    plan = json.loads(raylign(finished, "plan", "spec.yaml", "--json").stdout)["stages"]
    assert [s["state"] for s in plan] == ["cached"] * 5
    assert next(s for s in plan if s["name"] == "sft")["tokens"] == manifest(finished, "sft")["tokens"]
    assert raylign(finished, "status", "runs/chain").stdout.startswith("chain: done")
    assert raylign(finished, "report", "runs/chain").stdout.strip() == "runs/chain/report.html"
    page = (finished / "runs" / "chain" / "report.html").read_text()
    assert 'class="plot"' in page and "<title>chain: done</title>" in page
    assert 'id="library"' in page and " src=" not in page and 'href="http' not in page

    shown = json.loads(raylign(finished, "inspect", "spec.yaml", "--json", "-n", "2").stdout)
    assert set(shown) >= {"stage", "rows", "ledger"} and shown["stage"] == "sft" and len(shown["rows"]) == 2
    row = shown["rows"][0]
    assert set(row) == {"source", "row", "text", "segments", "tokens", "trained_tokens"}
    assert "".join(s["text"] for s in row["segments"]) == row["text"]
    trained = [s for s in row["segments"] if s["trained"]]
    assert trained and all(s["role"] == "assistant" and s["text"].endswith("<|im_end|>") for s in trained)
    pairs = json.loads(raylign(finished, "inspect", "spec.yaml", "--stage", "dpo", "--json", "-n", "1").stdout)["rows"]
    assert [p["answer"] for p in pairs] == ["chosen", "rejected"]
    assert raylign(finished, "inspect", "spec.yaml", "--stage", "nope").returncode == 2


@pytest.mark.slow
def test_chat(finished: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "chat", "runs/chain", "--stage", "sft", "--stage", "dpo", "--max-new-tokens", "5"],
        cwd=finished, env=env, input="Reverse: a b c\n\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace("\n", "")
    assert "sft/model" in said and "sft: " in said.split("ends")[1] and "dpo: " in said.split("ends")[1]


def test_a_changed_stage_runs_alone_and_changing_it_back_finds_the_old_one(finished: Path) -> None:
    old = manifest(finished, "dpo")["fingerprint"]
    done = raylign(
        finished, "run", "spec.yaml", "--set", "stages.dpo.train.beta=0.5", "--set", "stages.eval.models=[stages.dpo]"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unchanged") == 3 and manifest(finished, "dpo")["fingerprint"] != old
    done = raylign(finished, "run", "spec.yaml")
    assert done.stdout.count("unchanged") == 5 and manifest(finished, "dpo")["fingerprint"] == old


@pytest.mark.slow
def test_a_gate_that_fails_ends_with_1_and_says_so(finished: Path) -> None:
    gate = "stages.eval.gates=[{metric: exact_match, of: stages.dpo, over: stages.sft, at_least: 0.99}]"
    done = raylign(finished, "run", "spec.yaml", "--set", gate)
    assert done.returncode == 1
    assert "gate not met: exact_match of dpo over sft is" in done.stderr and "wanted at least 0.99" in done.stderr
    assert "models side by side" in done.stdout and done.stdout.count("unchanged") == 5  # the evaluation itself is kept
    assert raylign(finished, "status", "runs/chain").stdout.startswith("chain: failed")


@pytest.mark.slow
def test_a_failing_stage_names_itself_and_leaves_the_others(tmp_path: Path, data: Path) -> None:
    """An optimizer of the user's that raises: reward fails in the trainer, dpo beside it goes on."""
    (tmp_path / "own.py").write_text("def optimizer(*_, **__):\n    raise ValueError('not today')\n")
    spec = SPEC.format(data=data, config=json.dumps(LLAMA))
    spec = spec.replace(
        "train: {learning_rate: 1e-3, logging_steps: 1}", "train: {learning_rate: 1e-3, optim: own.optimizer}"
    )
    (tmp_path / "spec.yaml").write_text(spec)
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 1
    assert "stage reward failed: ValueError: not today" in done.stderr and "reward.log" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "not today" in (tmp_path / "runs" / "chain" / "logs" / "reward.log").read_text()
    state = {
        n: s["state"] for n, s in json.loads((tmp_path / "runs" / "chain" / "run.json").read_text())["stages"].items()
    }
    assert state == {"base": "done", "sft": "done", "reward": "failed", "dpo": "done", "eval": "not run"}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path, data: Path) -> None:
    spec = (
        SPEC.format(data=data, config=json.dumps(LLAMA))
        .split("  reward:")[0]
        .replace("max_steps: 20", "max_steps: 3000")
    )
    (tmp_path / "spec.yaml").write_text(spec)
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "pipeline", "run", "spec.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "runs" / "chain" / ".work"
    deadline = time.time() + 200
    while time.time() < deadline and not list(work.glob("sft-*/checkpoints/checkpoint-*/trainer_state.json")):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the stage's process ends with its runner
    (folder,) = work.glob("sft-*")
    size = (folder / "metrics.jsonl").stat().st_size
    time.sleep(1)
    assert (folder / "metrics.jsonl").stat().st_size == size, "the stage went on without its runner"

    plan = json.loads(raylign(tmp_path, "plan", "spec.yaml", "--json").stdout)["stages"]
    assert next(s for s in plan if s["name"] == "sft")["state"] == "resume"
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    steps = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    while time.time() < deadline + 100 and (folder / "metrics.jsonl").stat().st_size <= size:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "goes on where it was" in out and "interrupted" in err
    after = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert after == list(range(1, len(after) + 1)) and after[-1] >= steps


@pytest.mark.slow
def test_submit_runs_the_spec_as_a_job_on_a_real_head(tmp_path: Path, data: Path, model: str) -> None:
    """A Ray head of its own, with the dashboard that takes jobs; the job's stage trains on a Ray Train worker there."""
    clone = Path(__file__).parents[2]
    spec = clone / f"submit-{os.getpid()}.yaml"
    spec.write_text(
        f"name: job\nmodel: {model}\nstorage: {tmp_path}/runs\nstages:\n  sft: {{kind: sft, data: [{{path: {data}/chats.jsonl}}], "
        "train: {max_steps: 3, logging_steps: 1, max_length: 128}}\n"
    )
    unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    bare = {k: v for k, v in os.environ.items() if k not in unset} | {
        "HOME": str(tmp_path)
    }  # no token of the user's own
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the entry point is `python`
    env = bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": python}
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=6399"]
    head += ["--dashboard-port=8299", "--num-cpus=2", "--disable-usage-stats"]
    command = [sys.executable, "-m", "pipeline", "submit", spec.name, "--address", "http://127.0.0.1:8299"]
    log = (tmp_path / "head.log").open("w")
    started = subprocess.Popen(head, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 60
        while time.time() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 8299), timeout=1):
                break
            time.sleep(0.5)
        refused = subprocess.run(command, cwd=clone, env=bare, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and "the cluster wants a token" in refused.stderr, refused.stderr
        done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout and "run folder:" in done.stdout
        assert (tmp_path / "runs" / "job" / "sft" / "model" / "model.safetensors").is_file()
    finally:
        spec.unlink()
        started.terminate()  # with --block the head ends what it started; `ray stop` would end every Ray of this machine
        started.wait(60)
