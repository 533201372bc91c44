"""Trackers through the command line: a run that is killed and goes on is one run of theirs, and one that is down stops nothing.

The stage is a user's own, which writes metrics as trainers do: neither Ray nor a model is needed. MLflow is its own client, with
its storage of files and, where there is one, with a server: `RAYLIGN_TEST_MLFLOW` names an `mlflow` command of an environment of
its own, since the server wants older libraries than ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..test_tracking import points

STAGE = """\
import time
from typing import ClassVar

from stages import Stage, StageResult


class Curve(Stage):
    kind: str
    lines: int
    wait: float = 0.0
    produces: ClassVar = "metrics"
    uses_ray: ClassVar[bool] = False

    def run(self, ctx):
        file = ctx.work / "metrics.jsonl"
        done = len(file.read_text().splitlines()) if file.is_file() else 0
        start = done - done % 5  # a checkpoint every five steps
        ctx.report.rewind(start)
        for step in range(start + 1, self.lines + 1):
            ctx.report.metrics(step, {"loss": 1 / step, "rewards/chosen": float(step), "said": "text"})
            time.sleep(self.wait)
        return StageResult({"loss": 1 / self.lines, "first_loss": 1.0}, rows=7, steps=self.lines)
"""
SPEC = """\
name: curves
model: org/none
report_to: {report_to}
project: trying
stages:
  one: {{kind: "curves:Curve", lines: 4}}
  two: {{kind: "curves:Curve", lines: {lines}, wait: 0.1}}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "WANDB_", "RAYLIGN_CODE", "RAY_"))}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "RAYLIGN_TRACKER_SECONDS": "300", **more}


def raylign(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=500
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def folder_of(tmp_path: Path, report_to: str = "tensorboard", lines: int = 20) -> Path:
    (tmp_path / "curves.py").write_text(STAGE)
    (tmp_path / "spec.yaml").write_text(SPEC.format(report_to=report_to, lines=lines))
    return tmp_path


def killed_at(folder: Path, step: int, **env: str) -> None:
    """Run the spec, and end the process that carries it out, without a word, when `two` has come to a step."""
    process = subprocess.Popen(
        command("run", "spec.yaml"),
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while time.time() < deadline:
        (file,) = [*(folder / "runs" / "curves" / ".work").glob("two-*/metrics.jsonl")] or [None]
        if file is not None and len(file.read_text().splitlines()) >= step:
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while not (lines := file.read_text().splitlines()) or time.time() - json.loads(lines[-1])["time"] < 1:
        time.sleep(0.1)  # the stage leaves with it


# ------------------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_by_default(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    boards = folder / "runs" / "curves" / "tensorboard"
    killed_at(folder, 7)
    done = raylign(folder, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = [(step, pytest.approx({"loss": 1 / step, "rewards/chosen": step})) for step in range(1, 21)]
    assert points(boards / "two") == wanted  # each once
    assert points(boards / "one") == wanted[:4]
    # What is cached stays as it is; what a changed spec replaces goes.
    before = {path: path.stat().st_mtime_ns for path in boards.rglob("*") if path.is_file()}
    assert raylign(folder, "run", "spec.yaml").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in boards.rglob("*") if path.is_file()} == before
    assert raylign(folder, "run", "spec.yaml", "--set", "stages.two.lines=6").returncode == 0
    assert points(boards / "two") == wanted[:6] and points(boards / "one") == wanted[:4]
    assert raylign(folder, "run", "spec.yaml").returncode == 0  # and back: the earlier one is found again
    assert points(boards / "two") == wanted


def test_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "none")
    assert raylign(folder, "run", "spec.yaml").returncode == 0
    assert not (folder / "runs" / "curves" / "tensorboard").exists()


# ------------------------------------------------------------------------------------------------ MLflow


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(params=["files", "server"])
def mlflow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that says where MLflow is."""
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("MLflow's client is not installed: pip install mlflow-skinny")
    if request.param == "files":
        yield {"MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
        return
    server = os.environ.get("RAYLIGN_TEST_MLFLOW")
    if server is None:
        pytest.skip(
            "no MLflow server: pip install mlflow in an environment of its own, RAYLIGN_TEST_MLFLOW=THAT/bin/mlflow"
        )
    port, store = free_port(), tmp_path / "server"
    store.mkdir()
    with (store / "log").open("wb") as log:
        process = subprocess.Popen(
            [server, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri",
             f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "artifacts")],
            cwd=store, env=environment(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.time() + 180
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None and time.time() < deadline, (store / "log").read_text()[-2000:]
            time.sleep(0.5)
    yield {"MLFLOW_TRACKING_URI": address}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


LOOK = """\
import json, sys
from mlflow.tracking import MlflowClient
client, out = MlflowClient(), []
experiment = client.get_experiment_by_name("trying")
for run in client.search_runs([experiment.experiment_id]) if experiment else []:
    history = {name: [[m.step, m.value, m.timestamp] for m in client.get_metric_history(run.info.run_id, name)]
               for name in run.data.metrics}
    out.append({"id": run.info.run_id, "name": run.info.run_name, "status": run.info.status, "tags": run.data.tags,
                "params": run.data.params, "history": history,
                "files": sorted(file.path for file in client.list_artifacts(run.info.run_id))})
print(json.dumps(out))
"""


def look(env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What MLflow has, by the names of the runs."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment(**env), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert len({run["name"] for run in runs}) == len(runs)
    return {run["name"]: run for run in runs}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_a_killed_run_goes_on_in_the_same_runs(tmp_path: Path, mlflow: dict[str, str]) -> None:
    folder = folder_of(tmp_path, "[tensorboard, mlflow]", lines=150)
    record = folder / "runs" / "curves" / "tracking.json"
    killed_at(folder, 120, **mlflow)
    before = json.loads(record.read_text())["mlflow"]
    done = raylign(folder, "run", "spec.yaml", **mlflow)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = look(mlflow)
    assert set(runs) == {"curves", "one", "two"}
    assert runs["curves"]["id"] == before["run"]
    parent, one, two = runs["curves"], runs["one"], runs["two"]
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    assert one["tags"]["mlflow.parentRunId"] == two["tags"]["mlflow.parentRunId"] == parent["id"]
    assert "mlflow.parentRunId" not in parent["tags"]
    lines = [json.loads(line) for line in (folder / "runs" / "curves" / "two" / "metrics.jsonl").open()]
    assert [step for step, _, _ in two["history"]["loss"]] == list(range(1, 151))  # each once
    assert [value for _, value, _ in two["history"]["loss"]] == pytest.approx([line["loss"] for line in lines])
    assert [point[1] for point in two["history"]["first_loss"]] == [1.0]
    assert two["params"] == {"kind": "curves:Curve", "lines": "150", "wait": "0.1", "seed": "0"}
    manifest = json.loads((folder / "runs" / "curves" / "two" / "manifest.json").read_text())
    assert two["tags"]["raylign.fingerprint"] == manifest["fingerprint"]
    assert two["tags"]["raylign.version.torch"] == manifest["versions"]["torch"]
    assert parent["files"] == ["report.html", "spec.yaml"]
    # Nothing is told twice, and a changed stage is a run of its own under the same parent.
    assert raylign(folder, "run", "spec.yaml", **mlflow).returncode == 0
    assert look(mlflow) == runs
    assert (
        raylign(
            folder, "run", "spec.yaml", "--set", "stages.one.lines=3", "--set", "stages.two.lines=2", **mlflow
        ).returncode
        == 0
    )
    record_now = json.loads(record.read_text())["mlflow"]
    assert record_now["run"] == parent["id"] and len(record_now["stages"]) == 4


@pytest.mark.slow
def test_a_tracker_that_is_down_stops_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("MLflow's client is not installed: pip install mlflow-skinny")
    folder = folder_of(tmp_path, "[tensorboard, mlflow]")
    down = {"MLFLOW_TRACKING_URI": "http://ann:s3cr3tword@127.0.0.1:9"}
    done = raylign(folder, "run", "spec.yaml", **down)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("the run goes on without it") == 1
        and "metrics.jsonl of each stage has everything" in done.stdout
    )
    assert len(points(folder / "runs" / "curves" / "tensorboard" / "two")) == 20
    for file in (folder / "runs").rglob("*"):
        assert not file.is_file() or b"s3cr3tword" not in file.read_bytes()
    assert "s3cr3tword" not in done.stdout + done.stderr
    # When it is there again, the same command sends all of it.
    there = {"MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    assert raylign(folder, "run", "spec.yaml", **there).returncode == 0
    runs = look(there)
    assert [len(runs[name]["history"]["loss"]) for name in ("one", "two")] == [4, 20]
    shutil.rmtree(tmp_path / "store")  # a server that has lost everything is told everything
    assert raylign(folder, "run", "spec.yaml", **there).returncode == 0
    (folder / "runs" / "curves" / "tracking.json").unlink()
    assert raylign(folder, "run", "spec.yaml", **there).returncode == 0
    assert set(look(there)) == {"curves", "one", "two"}


# ------------------------------------------------------------------------------------------------ Weights & Biases


def test_wandb_offline(tmp_path: Path) -> None:
    """Offline it writes what it would send; `wandb sync` sends it."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed: pip install wandb")
    folder = folder_of(tmp_path, "wandb")
    done = raylign(folder, "run", "spec.yaml", WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "runs" / "curves" / "tracking.json").read_text())["wandb"]
    ids = [record["run"], *(entry["run"] for entry in record["stages"].values())]
    for run in ids:
        (place,) = (folder / "runs" / "curves" / "wandb").glob(f"offline-run-*-{run}")
        assert (place / f"run-{run}.wandb").stat().st_size > 0
    assert [entry["state"] for entry in record["stages"].values()] == ["done", "done"]
    without = raylign(folder, "run", "spec.yaml", "--set", "stages.two.lines=3", HOME=str(tmp_path / "nobody"))
    assert without.returncode == 0 and "no credentials: set WANDB_API_KEY" in without.stdout
