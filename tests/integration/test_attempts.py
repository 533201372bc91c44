"""What a stage cost is the time of all its attempts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline import attempts

from .test_chain import raylign

OWN = """
import time
from stages import Stage, StageResult
from stages.errors import StageError

class Slow(Stage):
    produces = "metrics"
    uses_ray = False

    def run(self, ctx):
        time.sleep(1.5)
        if (ctx.work / "again").exists():
            return StageResult(metrics={})
        (ctx.work / "again").touch()
        raise StageError("not yet")
"""


def test_seconds_of_a_stage_are_those_of_all_attempts(tmp_path: Path, model: str) -> None:
    (tmp_path / "slow.py").write_text(OWN)
    (tmp_path / "spec.yaml").write_text(
        f'name: r\nmodel: {model}\nstorage: .\nreport_to: none\nstages: {{slow: {{kind: "slow:Slow"}}}}\n'
    )
    record = lambda: json.loads((tmp_path / "r" / "run.json").read_text())["stages"]["slow"]  # noqa: E731
    assert raylign(tmp_path, "run", "spec.yaml").returncode == 1
    first = record()
    assert first["state"] == "failed" and first["seconds"] > 1.5 and first["earlier"] == 0
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert record()["earlier"] == first["seconds"] and record()["seconds"] > first["seconds"] + 1.5
    made = json.loads((tmp_path / "r" / "slow" / "manifest.json").read_text())
    assert made["seconds"] == record()["seconds"] and not (tmp_path / "r" / "slow" / attempts.FILE).exists()


def test_an_attempt_whose_runner_was_killed_lasted_until_it_last_said_something(tmp_path: Path) -> None:
    assert attempts.begin(tmp_path) == 0
    begun = json.loads((tmp_path / attempts.FILE).read_text())["started"]
    assert attempts.begin(tmp_path) == 0  # it said nothing
    (tmp_path / "events.jsonl").touch()
    os.utime(tmp_path / "events.jsonl", (begun + 3000, begun + 3000))
    (tmp_path / attempts.FILE).write_text(json.dumps({"seconds": 10, "started": begun}))
    assert round(attempts.begin(tmp_path)) == 3010
    attempts.end(tmp_path, 3020.0)
    assert attempts.begin(tmp_path) == 3020
