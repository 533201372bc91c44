"""What is told of a training before it starts: lengths, the hub, libraries, the disk, and all of it with its line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan import make_plan
from pipeline.spec_checks import build_spec
from pipeline.spec_reader import load_spec
from pipeline.training_checks import disk_problem, hub_problem, length_problem, model_config, run_problems
from stages.errors import SpecError
from stages.training.kernels import installed


def spec(data: Path, model: Any, stage: dict[str, Any], **head: Any) -> Any:
    stages = {"sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]} | stage}
    return build_spec({"model": model, "storage": "runs", "stages": stages} | head, folder=data)


def refused(*arguments: Any, **head: Any) -> dict[str, str]:
    with pytest.raises(SpecError) as error:
        spec(*arguments, **head)
    return {problem.path: problem.message for problem in error.value.problems}


# ------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize(
    ("config", "length", "limit"),
    [
        ({"max_position_embeddings": 2048}, 4096, 2048),
        ({"n_positions": 1024}, 1025, 1024),
        ({"max_seq_len": 1024, "model_type": "dbrx"}, 1025, 1024),
        ({"model_max_length": 1024, "model_type": "kimi_linear"}, 1025, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 513, 512),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096, 2048),
        ({"max_position_embeddings": 2048}, 2048, None),
        ({"max_position_embeddings": 2048}, None, None),  # the default of max_length
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32768, None),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 2.0}}, 16384, None),
        ({"model_type": "mamba"}, 100_000, None),
    ],
)
def test_a_length_over_the_models(config: dict[str, Any], length: int | None, limit: int | None) -> None:
    problem = length_problem(length, config)
    assert (problem is None) == (limit is None)
    if problem is not None:
        assert f"{length} is more than the {limit} positions" in problem


def test_positions_are_read_without_torch(tmp_path: Path) -> None:
    for name, content in (("flat", {"n_positions": 77}), ("nested", {"text_config": {"max_position_embeddings": 88}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    code = (
        "import sys; from stages.training.architecture import positions\n"
        "print([positions(model) for model in sys.argv[1:]], {'torch', 'transformers'} & set(sys.modules))"
    )
    models = [str(tmp_path / name) for name in ("flat", "nested", "damaged", "empty")] + ["org/not-downloaded"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    asked = subprocess.run([sys.executable, "-c", code, *models], capture_output=True, text=True, env=offline)
    assert asked.stdout == "[77, 88, None, None, None] set()\n", asked.stderr


def test_the_model_whose_length_counts_is_the_one_the_stage_starts_from(data: Path, model: str) -> None:
    long = {"train": {"max_length": 300}}
    assert "more than the 256 positions" in refused(data, model, long)["stages.sft.train.max_length"]
    init = {"init": {"config": {"max_position_embeddings": 128}}}
    assert "more than the 128 positions" in refused(data, init, long)["stages.sft.train.max_length"]
    assert spec(data, "org/not-downloaded", long)  # nothing is known of it yet
    pairs = {"kind": "dpo", "model": "stages.sft", "data": [{"path": str(data / "pairs.jsonl")}]} | long
    stages = {"sft": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]}, "dpo": pairs}
    with pytest.raises(SpecError, match=r"stages\.dpo\.train\.max_length: 300 is more than the 256"):
        build_spec({"model": model, "stages": stages}, folder=data)


# ------------------------------------------------------------------------------------------------ settings


def test_every_clash_is_told_at_once_with_its_line(tmp_path: Path, data: Path, model: str) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"gradient_clipping": 0.5, "train_batch_size": 7, "zero_optimization": {"stage": 2}})
    )
    (tmp_path / "spec.yaml").write_text(
        f"model: {model}\ncluster: {{workers: 2, gpus_per_worker: 0}}\nstages:\n  sft:\n    kind: sft\n"
        f"    data: [{{path: {data}/chats.jsonl}}]\n    deepspeed: ds.json\n    attention: flash_attention_2\n"
        "    train:\n      max_length: 4000\n      fp16: true\n      optim: adamw_toch\n      bogus: 1\n"
    )
    with pytest.raises(SpecError) as error:
        load_spec(tmp_path / "spec.yaml")
    assert [p.path for p in error.value.problems] == [
        "stages.sft.train.bogus"
    ]  # of a stage that cannot be read, no more
    text = (tmp_path / "spec.yaml").read_text().replace("      bogus: 1\n", "")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        load_spec(tmp_path / "spec.yaml")
    found = {p.path.removeprefix("stages.sft."): (p.line, p.message) for p in error.value.problems}
    assert {path: line for path, (line, _) in found.items()} == {
        "deepspeed.gradient_clipping": 7, "deepspeed.train_batch_size": 7, "attention": 8,
        "train.max_length": 10, "train.fp16": 11, "train.optim": 12,
    }  # fmt: skip
    assert "0.5, but train.max_grad_norm is 1.0 (by default)" in found["deepspeed.gradient_clipping"][1]
    assert found["deepspeed.gradient_clipping"][1].endswith("(ds.json)")
    assert "7 does not divide by 2 workers" in found["deepspeed.train_batch_size"][1]
    assert "did you mean adamw_torch?" in found["train.optim"][1]


def test_what_depends_on_workers_waits_until_they_are_known(tmp_path: Path, data: Path, model: str) -> None:
    """The spec may be submitted to a cluster from a laptop without GPUs."""
    half = {"train": {"fp16": True}}
    assert (
        "wants workers with GPUs" in refused(data, model, half, cluster={"gpus_per_worker": 0})["stages.sft.train.fp16"]
    )
    found = spec(data, model, half, storage=str(tmp_path))
    plan = make_plan(found)
    assert plan["sft"].resources.gpus_per_worker == 0
    assert [p.path for p in run_problems(plan, local=True)] == ["stages.sft.train.fp16"]


@pytest.mark.skipif(installed("liger_kernel") or installed("galore_torch"), reason="they are installed")
def test_libraries_are_looked_for_where_the_run_is(tmp_path: Path, data: Path, model: str) -> None:
    found = spec(data, model, {"train": {"optim": "galore_adamw"}}, storage=str(tmp_path))
    plan = make_plan(found)
    (problem,) = run_problems(plan, local=True)
    assert problem.path == "stages.sft.train.optim" and "pip install galore-torch" in problem.message
    assert run_problems(plan, local=False) == []


# ------------------------------------------------------------------------------------------------ the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a look at a model takes."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0]
        if "silent" in name:
            time.sleep(20)
        code, headers = 200, {}
        if "gone" in name:
            code, headers = 404, {"X-Error-Code": "RepoNotFound"}
        elif name.endswith("auth-check"):
            code, headers = 403, {"X-Error-Code": "GatedRepo"}
        weights = "pytorch_model.bin" if "pickled" in name else "model.safetensors"
        body = {
            "id": "org/model",
            "gated": "manual" if "gated" in name else False,
            "siblings": [{"rfilename": weights}],
        }
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = "import json, sys; from pipeline.training_checks import hub_problem as h; print(json.dumps([h(m, 1.0) for m in sys.argv[1:]]))"


def ask(endpoint: str, home: Path, *models: str) -> list[str | None]:
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", ASK, *models], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_the_hub_says_of_a_model(hub: str, tmp_path: Path) -> None:
    started = time.time()
    fine, gone, pickled, gated, silent = ask(
        hub, tmp_path, "org/model", "org/gone", "org/pickled", "org/gated", "org/silent"
    )
    assert time.time() - started < 15  # it does not hang
    assert fine is None
    assert gone is not None and "neither a folder here nor a model on the hub" in gone
    assert pickled is not None and "never pickled weights" in pickled
    assert gated is not None and "accept its terms" in gated
    assert silent is not None and "the hub cannot be reached" in silent


def test_no_network(tmp_path: Path) -> None:
    (problem,) = ask("http://127.0.0.1:9", tmp_path, "org/model")
    assert problem is not None and "org/model has not been downloaded, and the hub cannot be reached" in problem


def test_what_has_been_downloaded_needs_no_hub(tmp_path: Path) -> None:
    """The layout of the hub's cache; a shard that is missing has to be fetched."""
    folder = tmp_path / "hub" / "models--org--model"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(shards))
    (snapshot / "model-1.safetensors").write_text("")
    assert ask("http://127.0.0.1:9", tmp_path, "org/model")[0] is not None
    (snapshot / "model-2.safetensors").write_text("")
    assert ask("http://127.0.0.1:9", tmp_path, "org/model") == [None]


def test_offline_is_said(data: Path) -> None:
    problem = hub_problem("org/never-downloaded")
    assert problem is not None and "HF_HUB_OFFLINE is set" in problem
    assert model_config(spec(data, "org/never-downloaded", {}), "sft") is None


# ------------------------------------------------------------------------------------------------ the disk


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    assert disk_problem(1, tmp_path / "not" / "there" / "yet") is None
    problem = disk_problem(1 << 60, tmp_path / "not" / "there")
    assert problem is not None and problem.startswith(f"checkpoints and model need {1 << 30}.0 GiB, {tmp_path} has ")


def test_what_a_run_writes_is_held_against_the_disk(
    tmp_path: Path, data: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(spec(data, model, {}, storage=str(tmp_path)))
    assert run_problems(plan, local=True) == []
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 20)  # of a model of 0.4 MB, three checkpoints are more
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    (problem,) = run_problems(plan, local=True)
    assert problem.path == "storage" and "need 0.0 GiB" in problem.message


def test_a_lora_target_that_matches_nothing(tmp_path: Path, data: Path, model: str) -> None:
    lora = {"tuning": {"method": "lora", "target_modules": ["q_prj"]}}
    (problem,) = run_problems(make_plan(spec(data, model, lora, storage=str(tmp_path))), local=True)
    assert problem.path == "stages.sft.tuning.target_modules" and "did you mean q_proj?" in problem.message
    qlora = {"tuning": {"method": "qlora"}, "deepspeed": "zero3"}
    assert "does not go with ZeRO-3" in refused(data, model, qlora)["stages.sft.tuning.method"]
