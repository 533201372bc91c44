"""`raylign submit`: a spec as a Ray job. The job runs `python -m pipeline run SPEC`, as it would by hand."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.spec_reader import load_spec
from stages.errors import Problem, RaylignError, SpecError

EXCLUDES = ["runs/", ".git/", ".venv/", "**/__pycache__/"]


def submit_spec(spec: Path, address: str, overrides: Sequence[str], env: Sequence[str]) -> int:
    """Submit a spec from the folder it is run from, follow the log, and return the job's exit code.

    The submission id comes from the spec and its overrides, with a number that grows where that job has already ended, so a
    second submission while the first still runs is refused, and one after it goes on where it stopped.

    Raises:
        SpecError: the spec is wrong, or an environment variable is not set.
        RaylignError: the cluster cannot be reached or refuses the job.
    """
    read = load_spec(spec, overrides)
    if Path(read.storage).is_relative_to(Path.cwd()):
        what = "it is relative, and would go with the job's working directory; name a folder that every node sees"
        raise SpecError([Problem("storage", what)], str(spec))
    if Path(spec).is_absolute():
        raise SpecError(
            [Problem("", f"{spec}: give the spec relative to the folder that is shipped (the current one)")]
        )
    missing = [name for name in env if name not in os.environ]
    if missing:
        raise SpecError([Problem("--env", f"not set: {', '.join(missing)}")])
    logging.getLogger("ray").setLevel(logging.WARNING)  # it names every file it packs
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    entrypoint = shlex.join(
        ["python", "-m", "pipeline", "run", str(spec), *[a for o in overrides for a in ("--set", o)]]
    )
    try:
        client = JobSubmissionClient(address)
        job = _submission_id(client, entrypoint, Path(spec).stem)
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job,
            runtime_env={
                "working_dir": ".",
                "excludes": EXCLUDES,
                "env_vars": {name: os.environ[name] for name in env},
            },
        )
    except AuthenticationError as error:
        what = (
            "the cluster wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (on its head, `ray get-auth-token`)"
        )
        raise RaylignError(f"{address}: {what}") from error
    except (ConnectionError, RuntimeError) as error:
        raise RaylignError(f"{address}: {str(error).splitlines()[0]}") from error
    print(f"job {job} on {address}", flush=True)
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    print(f"job {job}: {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _submission_id(client: Any, entrypoint: str, name: str) -> str:
    stem = f"raylign-{name}-{hashlib.sha256(entrypoint.encode()).hexdigest()[:8]}"
    known = {job.submission_id: job.status for job in client.list_jobs()}
    number = 1
    while f"{stem}-{number}" in known:
        if not known[f"{stem}-{number}"].is_terminal():
            raise RaylignError(f"the job {stem}-{number} is still running; stop it with `ray job stop`, or wait for it")
        number += 1
    return f"{stem}-{number}"


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
