"""One stage in a process of its own: its memory, its log and its crash are its own, and stages can run side by side.

The runner starts `python -m pipeline.stage_process`, sends the job on standard input and keeps that pipe open; when it
closes, the runner is gone and so is the stage.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import IO, Any

from pipeline.artifacts import write_json, write_text
from stages.base import StageContext
from stages.errors import RaylignError
from stages.storage import pull_model


@dataclass(frozen=True)
class StageJob:
    kind: str
    config: dict[str, Any]
    context: StageContext
    ray_address: str | None


def send(job: StageJob, pipe: IO[bytes]) -> None:
    data = pickle.dumps(job)
    pipe.write(struct.pack(">Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> StageJob:
    (size,) = struct.unpack(">Q", pipe.read(8))
    return pickle.loads(pipe.read(size))  # from our own parent


def _leave_with_parent(pipe: IO[bytes]) -> None:
    pipe.read()  # returns when the runner's end closes
    os._exit(130)


def main() -> None:
    pipe = sys.stdin.buffer
    job = _receive(pipe)
    threading.Thread(target=_leave_with_parent, args=(pipe,), daemon=True).start()
    work = job.context.work
    try:
        result = run(job)
    except Exception as error:
        traceback.print_exc()
        told = str(error) if isinstance(error, RaylignError) else f"{type(error).__name__}: {error}"
        write_json(work / "error.json", {"message": told, "ours": isinstance(error, RaylignError)})
        sys.stdout.flush()
        os._exit(1)
    write_text(work / "result.json", json.dumps(result, default=float))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do; waiting for libraries to tidy up costs a second, or hangs


def run(job: StageJob) -> dict[str, Any]:
    """Carry the stage out."""
    from stages import stage_class

    if job.ray_address is not None:
        from stages.training.launch import connect

        connect(job.ray_address, job.context.local)
    cls = stage_class(job.kind)
    assert cls is not None, job.kind
    stage = cls.model_validate(job.config)
    for artifact in (a for artifacts in job.context.inputs.values() for a in artifacts):
        pull_model(artifact.model)
    return stage.run(job.context).as_dict()


if __name__ == "__main__":
    main()
